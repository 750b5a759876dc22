"""Listeners for services on anyio, which pause and resume with a restart."""

from __future__ import annotations

from ._accepting.anyio_streams import AnyioListener, DatagramListener

__all__ = ["AnyioListener", "DatagramListener"]
