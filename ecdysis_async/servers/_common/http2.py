"""The goodbye of HTTP/2 (RFC 9113, 6.8): whatever a client has asked is answered, or the client may ask it again.

Each connection is told to open no more streams, at a moment without a request if there is one: some clients take a
GOAWAY for the end of everything. Streams that come all the same are answered. A second GOAWAY says soon after which
stream was the last, and what was asked up to then has the rest of the drain. Nothing here knows a server.
"""

from __future__ import annotations

import abc
import functools
import math
import struct
from collections.abc import Callable, Collection
from typing import Final

import anyio

from .goodbye import STEP_SECONDS, Goodbye, say_to_one

__all__ = ["ANY_STREAM", "Http2Connection", "Http2Goodbyes", "refuse_and_close", "write_goaway"]

ANY_STREAM: Final = 2**31 - 1
"""The last stream of a GOAWAY that refuses nothing yet."""

# Connections that are busy all the time are told after this share of the drain. What they have asked by then has the
# rest of it to be answered.
BUSY_SHARE = 0.5

# How long the client has to hear of that before streams are refused, seconds, and as a share of the drain at most.
HEAR_SECONDS = 1.0
HEAR_SHARE = 0.1

# A connection that was told everything is closed after so many seconds, and half of what is left of the drain at most.
# Meanwhile it is read from: a socket that is closed with something unread resets, and the client might never see why.
LINGER_SECONDS = 0.3


def write_goaway(last_stream: int) -> bytes:
    """Return the frame that says goodbye to a whole connection, without an error."""
    return struct.pack("!IBBIII", 8, 7, 0, 0, last_stream, 0)[1:]


class Http2Connection(abc.ABC):
    """A connection of HTTP/2, as its goodbye sees it. Its methods raise nothing where the client has gone."""

    @property
    @abc.abstractmethod
    def is_idle(self) -> bool:
        """Whether all streams are answered, down to the last byte that is to be sent."""

    @property
    @abc.abstractmethod
    def is_over(self) -> bool:
        """Whether it has ended."""

    @abc.abstractmethod
    async def announce(self) -> None:
        """Ask the client for no more streams; those that come are answered. It has no effect behind ``refuse``."""

    @abc.abstractmethod
    async def refuse(self) -> None:
        """Say which stream was the last, and refuse those above from now on. It takes effect once."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Close it: it was refused, and is idle."""


class Http2Goodbyes:
    """Says goodbye to the connections of HTTP/2 of one server, once its generation leaves.

    Args:
        goodbye: of that server.
        find: returns the connections there are, each as the same object each time.
    """

    def __init__(self, goodbye: Goodbye, find: Callable[[], Collection[Http2Connection]]) -> None:
        self._goodbye = goodbye
        self._timeout = goodbye.ecdysis.drain_timeout
        self._find = find
        goodbye.accompany(self._run)

    async def _run(self) -> None:
        told: set[Http2Connection] = set()
        patience = anyio.current_time() + self._timeout * BUSY_SHARE
        async with anyio.create_task_group() as task_group:
            while True:
                connections = self._find()
                told.intersection_update(connections)
                is_patient = anyio.current_time() < patience and not self._goodbye.late.is_set()
                for connection in connections:
                    if connection not in told and (connection.is_idle or not is_patient):
                        told.add(connection)
                        task_group.start_soon(say_to_one, functools.partial(self._see_off, connection))
                await anyio.sleep(STEP_SECONDS)

    async def _see_off(self, connection: Http2Connection) -> None:
        """Say goodbye to one connection, and close it once it is idle."""
        if not self._goodbye.late.is_set():
            await connection.announce()
            with anyio.move_on_after(min(HEAR_SECONDS, self._timeout * HEAR_SHARE)):
                await self._goodbye.late.wait()
        await refuse_and_close(connection, lambda: (self._goodbye.deadline - anyio.current_time()) / 2)


async def refuse_and_close(connection: Http2Connection, seconds_left: Callable[[], float] = lambda: math.inf) -> None:
    """Refuse new streams, and close a connection once all others are answered.

    Args:
        connection: it may have been refused before.
        seconds_left: says how long it may be read from at the most, once it is idle.
    """
    await connection.refuse()
    while not connection.is_over:
        if not connection.is_idle:
            await anyio.sleep(STEP_SECONDS)
            continue
        await anyio.sleep(min(LINGER_SECONDS, seconds_left()))
        # A stream that was asked for before may have begun meanwhile.
        if connection.is_idle:
            await connection.close()
            return
