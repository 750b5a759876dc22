"""How a server says goodbye to its clients, on a clock that jumps."""

from __future__ import annotations

import asyncio
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
from ecdysis_async.servers._common.goodbye import STEP_SECONDS, Goodbye, say_to_one
from ecdysis_async.settings import WebSocketClose
from tests.planes import a_plane, turn

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


def test_a_websocket_that_cannot_be_told_costs_no_other_one_its_goodbye(caplog: pytest.LogCaptureFixture) -> None:
    assert len(close_websockets(Leaving(3), WEBSOCKETS, broken=2)) == WEBSOCKETS
    assert caplog.text.count("could not be told") == 2


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_goodbye_that_awaits_what_was_cancelled_ends_alone() -> None:
    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(say_to_one, functools.partial(wait_for, cancelled))
        await turn()
        assert not task_group.cancel_scope.cancel_called


async def wait_for(future: asyncio.Future[None]) -> None:
    await future


def close_websockets(leaving: Leaving, number: int, *, broken: int = 0) -> list[float]:
    """Return when each of so many WebSockets was closed, after the beginning of a drain, in seconds.

    Before them come those that are ``broken``: to close one of these fails.
    """
    closed: list[float] = []

    async def main() -> None:
        async with a_plane() as plane:
            activate(plane)
            try:
                goodbye = Goodbye(cast("Any", leaving))
                begun = anyio.current_time()

                async def close() -> None:
                    closed.append(anyio.current_time() - begun)

                async def fail() -> None:
                    raise AssertionError("this server cannot send two messages at a time")

                for _ in range(broken):
                    goodbye.add_websocket(functools.partial(fail))
                for _ in range(number):
                    goodbye.add_websocket(functools.partial(close))
                with anyio.move_on_after(leaving.drain_timeout):
                    await goodbye.wait_for_last_connection()
            finally:
                deactivate()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return closed
