"""Listeners for services on trio, which pause and resume with a restart."""

from __future__ import annotations

from ._accepting.trio_streams import TrioListener

__all__ = ["TrioListener"]
