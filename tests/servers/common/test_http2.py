"""When connections of HTTP/2 are told what, on a clock that jumps."""

from __future__ import annotations

import struct
from typing import Any, cast

import anyio
import pytest
import trio
import trio.testing

from ecdysis_async._accepting.data_plane import activate, deactivate
from ecdysis_async._connections.connection import Connection
from ecdysis_async.servers._common.goodbye import Goodbye
from ecdysis_async.servers._common.http2 import ANY_STREAM, Http2Connection, Http2Goodbyes, write_goaway
from tests.planes import a_plane
from tests.servers.common.test_goodbye import Leaving

TIMEOUT = 30.0


class Told(Http2Connection):
    """Takes note of when it is told what; busy between two moments."""

    def __init__(self, busy_from: float = 0, busy_to: float = 0) -> None:
        self.told: list[tuple[str, float]] = []
        self.begun = anyio.current_time()
        self._busy = busy_from, busy_to

    @property
    def is_idle(self) -> bool:
        begin, end = self._busy
        return not begin <= anyio.current_time() - self.begun < end

    @property
    def is_over(self) -> bool:
        return bool(self.told) and self.told[-1][0] == "close"

    async def announce(self) -> None:
        self._note("announce")

    async def refuse(self) -> None:
        self._note("refuse")

    async def close(self) -> None:
        self._note("close")

    def _note(self, what: str) -> None:
        self.told.append((what, anyio.current_time() - self.begun))


class Broken(Told):
    """Cannot be told anything."""

    async def announce(self) -> None:
        raise AssertionError("its server has lost it")


async def say_goodbye(*connections: Told) -> None:
    async with a_plane() as plane:
        activate(plane)
        try:
            goodbye = Goodbye(cast("Any", Leaving(TIMEOUT)))
            Http2Goodbyes(goodbye, lambda: connections)
            held = Connection()
            plane.tracker.open(held)
            with anyio.move_on_after(TIMEOUT):
                await goodbye.wait_for_last_connection()
        finally:
            deactivate()


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ((0.0, 0.0), [0, 1, 1.3]),
        # There is an idle moment in the first half.
        ((0.0, 8.0), [8, 9, 9.3]),
        # There is none: it is told all the same, and answers what it was asked.
        ((0.0, 20.0), [15, 16, 20.3]),
        # It was asked before it refused.
        ((0.5, 5.0), [0, 1, 5.3]),
        # It is never idle: the drain will cut it.
        ((0.0, 99.0), [15, 16]),
    ],
)
def test_each_is_told_at_its_time(busy: tuple[float, float], expected: list[float]) -> None:
    async def main() -> None:
        connection = Told(*busy)
        await say_goodbye(connection)
        assert [what for what, _ in connection.told] == ["announce", "refuse", "close"][: len(expected)]
        assert [when for _, when in connection.told] == pytest.approx(expected, abs=0.11)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_who_cannot_be_told_costs_no_other_one_its_goodbye() -> None:
    async def main() -> None:
        connection = Told()
        await say_goodbye(Broken(), connection)
        assert [what for what, _ in connection.told] == ["announce", "refuse", "close"]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_goaway_is_a_frame_of_the_connection_without_an_error() -> None:
    frame = write_goaway(ANY_STREAM)
    assert frame[:9] == bytes([0, 0, 8, 7, 0, 0, 0, 0, 0])
    assert struct.unpack("!II", frame[9:]) == (2**31 - 1, 0)
