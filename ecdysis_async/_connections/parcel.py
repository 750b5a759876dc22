"""What travels when connections move: the record of each, the two messages, and who packs and resumes.

This module is data and its codec, below everything that moves connections. It opens, reads and closes nothing. The
sender and the receiver carry the messages; the data planes know how their own connections are packed and resumed.
"""

from __future__ import annotations

import abc
import base64
import json
import math
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "BATCH",
    "MESSAGE_BYTES",
    "Answer",
    "Batch",
    "ConnectionResumer",
    "MalformedMessage",
    "Refused",
    "Release",
    "TransferRecord",
    "Transferable",
    "write_batch",
]

# How many connections travel in one message. The kernel takes 253 descriptors; fewer keep both loops from stalling, and
# cost nothing that could be measured. The predecessor packs so many in one turn of asyncio's loop, aborts so many, and
# tells so many protocols of their end: 1.5 ms.
BATCH = 16

# The longest message, in bytes.
MESSAGE_BYTES = 256 * 1024


class MalformedMessage(ValueError):
    """A message that this release does not understand; the text says what is wrong with it."""


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
        release: what its own side has given away.
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
    def from_json(cls, fields: Any) -> TransferRecord:
        """Read it. What a later release adds stands at the end, and is left out.

        Raises:
            MalformedMessage: it is no record.
        """
        match fields:
            case [str(listener), int() | float() as since, str(kind), state, str(unread), *_] if _is_time(since):
                try:
                    return cls(listener, float(since), Release(state, base64.b64decode(unread), kind))
                except ValueError as error:
                    raise MalformedMessage(f"its unread bytes are no base64: {error}") from error
        raise MalformedMessage("it has other fields than this release knows")


@dataclass(frozen=True, slots=True)
class Batch:
    """Connections that were sent together.

    Attributes:
        number: what the answer refers to.
        connections: the fields of each connection, in the order of their descriptors; none of them has been looked at.
    """

    number: int
    connections: Sequence[Any]

    @classmethod
    def read(cls, message: bytes) -> Batch:
        """Read it.

        Raises:
            MalformedMessage: it is no batch.
        """
        match _load(message):
            case {"batch": int(number), "connections": list(connections)}:
                return cls(number, connections)
        raise MalformedMessage("it has no number and no list of connections")


def write_batch(number: int, records: Sequence[str]) -> bytes:
    """Return the message of a batch: its number, and its records in JSON."""
    return f'{{"batch":{number},"connections":[{",".join(records)}]}}'.encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of a batch. All connections that it does not name are refused for good.

    Attributes:
        number: of the batch.
        taken: the indices of the connections that the receiver serves from now on.
        later: the indices of the connections that it had no room for; they may be offered again.
        reasons: why some were not taken, in words.
    """

    number: int
    taken: Collection[int] = ()
    later: Collection[int] = ()
    reasons: Collection[str] = ()

    def write(self) -> bytes:
        """Return the message."""
        taken, later, reasons = list(self.taken), list(self.later), sorted(self.reasons)
        return json.dumps({"batch": self.number, "taken": taken, "later": later, "reasons": reasons}).encode()

    @classmethod
    def read(cls, message: bytes) -> Answer:
        """Read it.

        Raises:
            MalformedMessage: it is no answer.
        """
        match _load(message):
            case {"batch": int(number), "taken": list(taken), "later": list(later), "reasons": list(reasons)}:
                if all(isinstance(index, int) for index in [*taken, *later]):
                    return cls(number, frozenset(taken), frozenset(later), list(map(str, reasons)))
        raise MalformedMessage("it does not say which connections are taken")


class Transferable:
    """What a protocol derives from, beside ``asyncio.Protocol``, so that its connections can move to a successor.

    Its server needs ``resume=`` as well. When its connection has moved, ``connection_lost(None)`` is called, as at any
    end, and the peer notices nothing.
    """

    def release_connection(self) -> Release | None:
        """Give the connection away, or return None where that is impossible now: something is half read, or to come.

        The predecessor asks it once its generation leaves, again and again, when everything that was written has left
        and nothing is being read. Once it has given the connection away, the protocol must not write.
        ``Release(state, unread)`` has JSON-able state for ``resume``, and bytes that the protocol has received and not
        dealt with: the successor's protocol is given them before all others.
        """
        raise NotImplementedError

    def keep_connection(self) -> None:
        """Go on: the successor has not taken the connection, and this protocol has it again."""


class Refused(Exception):
    """This process cannot go on with a connection; the message says why, and the predecessor keeps it."""


class ConnectionResumer(abc.ABC):
    """What resumes connections that another process has accepted from one socket."""

    @abc.abstractmethod
    def prepare(self, parcel: TransferRecord) -> Callable[[socket.socket], Awaitable[None]]:
        """Make what will serve a connection, reading nothing of it yet; return the function that begins to.

        That function owns the socket it is called with, and has begun when it returns.

        Raises:
            Refused: it cannot be served here.
            Exception: the application's side failed; it is refused as well.
        """


def _load(message: bytes) -> Any:
    try:
        return json.loads(message)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"it is no JSON: {error}") from error


def _is_time(seconds: float) -> bool:
    try:
        return math.isfinite(seconds)
    except OverflowError:  # a whole number beyond what a float can hold
        return False
