"""Connections that move to the next generation alive: what a protocol of one's own derives from."""

from __future__ import annotations

from ecdysis_async._connections.parcel import Release, Transferable

__all__ = ["Release", "Transferable"]
