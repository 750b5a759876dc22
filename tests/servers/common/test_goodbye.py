"""How a server says goodbye to its clients, on a clock that jumps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Awaitable
from typing import Any, cast

import anyio
import pytest
import trio
import trio.testing

from ecdysis_async._accepting.data_plane import activate, deactivate
from ecdysis_async.errors import DrainInterrupt
from ecdysis_async.servers._common.goodbye import STEP_SECONDS, Goodbye
from ecdysis_async.settings import WebSocketClose
from tests.planes import a_plane

WEBSOCKETS = 10


class Leaving:
    """Stands for an Ecdysis that leaves at once, as far as a goodbye asks it."""

    def __init__(self, drain_timeout: float, websocket_close: WebSocketClose = WebSocketClose.SPREAD) -> None:
        self.drain_timeout = drain_timeout
        self.websocket_close = websocket_close

    async def finished(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def until_draining(self, awaitable: Awaitable[object]) -> None:
        with anyio.move_on_after(self.drain_timeout * 0.95):
            await awaitable
        raise DrainInterrupt


@pytest.mark.parametrize(("timeout", "last"), [(3, 2.25), (30, 25)])
def test_websockets_are_closed_evenly_and_their_clients_have_time_to_answer(timeout: float, last: float) -> None:
    closed = close_websockets(Leaving(timeout), WEBSOCKETS)
    assert len(closed) == WEBSOCKETS
    assert last / 2 < closed[-1] <= last + 2 * STEP_SECONDS
    # One after the other.
    gaps = [after - before for before, after in itertools.pairwise(closed)]
    assert max(gaps) < last / 2
    assert min(gaps) >= STEP_SECONDS


def test_websockets_are_closed_together_where_their_clients_shall_meet() -> None:
    closed = close_websockets(Leaving(30, WebSocketClose.TOGETHER), WEBSOCKETS)
    assert len(closed) == WEBSOCKETS
    assert closed[-1] <= 2 * STEP_SECONDS


def close_websockets(leaving: Leaving, number: int) -> list[float]:
    """Return when each of so many WebSockets was closed, after the beginning of a drain, in seconds."""
    closed: list[float] = []

    async def main() -> None:
        async with a_plane() as plane:
            activate(plane)
            try:
                goodbye = Goodbye(cast("Any", leaving))
                begun = anyio.current_time()

                async def close() -> None:
                    closed.append(anyio.current_time() - begun)

                for _ in range(number):
                    goodbye.add_websocket(functools.partial(close))
                with anyio.move_on_after(leaving.drain_timeout):
                    await goodbye.wait_for_last_connection()
            finally:
                deactivate()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return closed
