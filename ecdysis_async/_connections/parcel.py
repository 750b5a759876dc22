"""What travels of a live connection beside its descriptor, and who packs and unpacks it.

Data only, below everything that moves connections: the data planes know how their own are packed and resumed, and
``transfer.py`` carries the parcels over.
"""

from __future__ import annotations

import abc
import base64
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["ConnectionResumer", "Refused", "Release", "TransferRecord", "Transferable"]


@dataclass(frozen=True, slots=True)
class Release:
    """What a connection's own side gives away of it, at a point where nothing is half read or half written.

    Attributes:
        state: anything that JSON can hold; the successor gets it back.
        unread: bytes that were received and not dealt with; the successor's side is given them before all others.
        kind: what the successor has to make of it, where one server has connections of several kinds.
    """

    state: Any = None
    unread: bytes = b""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """A :class:`Release` on its way, with what the data plane adds.

    Attributes:
        listener: the registered name of the socket that it was accepted from.
        since: when it was accepted, by CLOCK_MONOTONIC, which all processes of a machine share.
        release: see there.
    """

    listener: str
    since: float
    release: Release

    def to_json(self) -> list[Any]:
        """Return what goes over the wire."""
        release = self.release
        unread = base64.b64encode(release.unread).decode()
        return [self.listener, self.since, release.kind, release.state, unread]

    @classmethod
    def from_json(cls, fields: list[Any]) -> TransferRecord:
        """Read it. What a later release adds stands at the end, and is left out.

        Raises:
            TypeError, ValueError: it is none.
        """
        listener, since, kind, state, unread, *_ = fields
        return cls(str(listener), float(since), Release(state, base64.b64decode(unread), str(kind)))


class Transferable:
    """What a protocol derives from, beside ``asyncio.Protocol``, so that its connections can move to a successor.

    Its server needs ``resume=`` as well. When its connection has moved, ``connection_lost(None)`` is called, as at any
    end, and the peer notices nothing.
    """

    def release_connection(self) -> Release | None:
        """Give the connection away, or return None where that is impossible now: something is half read, or to come.

        Asked in the predecessor once its generation leaves, again and again, when everything that was written has left
        and nothing is being read. From then on the protocol must not write. ``Release(state, unread)`` has JSON-able
        state for ``resume``, and bytes that it has received and not dealt with: the successor's protocol is given them
        before all others.
        """
        raise NotImplementedError

    def keep_connection(self) -> None:
        """Go on: the successor has not taken the connection, and this protocol has it again."""


class Refused(Exception):
    """This process cannot go on with a connection; the message says why, and the predecessor keeps it."""


class ConnectionResumer(abc.ABC):
    """What resumes connections that were accepted from one socket by another process."""

    @abc.abstractmethod
    def prepare(self, parcel: TransferRecord) -> Callable[[socket.socket], Awaitable[None]]:
        """Make whatever will serve a connection, reading nothing of it yet; return what begins to.

        That one owns the socket it is called with, and has begun when it returns.

        Raises:
            Refused: it cannot be served here.
            Exception: the application's side failed; it is refused as well.
        """
