"""Safe points of asyncio's tasks, which do without a cancel scope."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import anyio
import pytest

from ecdysis_async._accepting.asyncio_connections import ServerConnection
from ecdysis_async._accepting.asyncio_servers import start_server
from ecdysis_async._accepting.gated_socket import SocketAcceptor
from ecdysis_async._accepting.safe_points import TaskSafePoints
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.errors import DrainInterrupt
from tests.accepting.serving import LOCALHOST
from tests.planes import a_plane, connect, turn

pytestmark = pytest.mark.backends("asyncio", "uvloop")


class Handler:
    """A task of a connection that waits for something at a safe point."""

    def __init__(self, tracker: Tracker, connection: TaskSafePoints, awaitable: Awaitable[Any]) -> None:
        async def wait() -> Any:
            current_connection.set(connection)
            try:
                return await tracker.until_draining(awaitable)
            except DrainInterrupt:
                # It can still say goodbye.
                await asyncio.sleep(0)
                return "bye"
            finally:
                task = asyncio.current_task()
                assert task is not None
                self.requests = task.cancelling()

        self.requests = -1  # how many requests to cancel it were left when it ended
        self.task = asyncio.create_task(wait())

    async def result(self) -> Any:
        with anyio.fail_after(60):
            return await self.task


@contextlib.asynccontextmanager
async def a_connection(kind: str = "stream of asyncio") -> AsyncIterator[tuple[Tracker, TaskSafePoints]]:
    async with a_plane() as plane:
        if kind == "stream of anyio":
            entry = plane.registry.obtain(Internet("127.0.0.1", 0))
            await plane.gate.open()
            acceptor = SocketAcceptor(entry, plane=plane)
            await plane.gate.add(acceptor)
            with connect(entry):
                sock, connection = await acceptor.accept()
            with sock:
                assert isinstance(connection, TaskSafePoints)
                yield plane.tracker, connection
        else:
            server = await start_server(plane, lambda reader, writer: None, LOCALHOST, 0)
            inner = server._acceptors[0]
            yield plane.tracker, ServerConnection(inner.hooks, inner.entry, None)


@pytest.mark.parametrize("kind", ["stream of asyncio", "stream of anyio"])
async def test_who_waits_is_woken_and_can_go_on(kind: str) -> None:
    async with a_connection(kind) as (tracker, connection):
        waiting = asyncio.get_running_loop().create_future()
        handler = Handler(tracker, connection, waiting)
        await turn()
        connection.interrupt()
        connection.interrupt()
        assert await handler.result() == "bye"
        assert handler.requests == 0
        assert connection.silent
        assert waiting.cancelled()
        late = Handler(tracker, connection, anyio.sleep_forever())
        assert await late.result() == "bye"


@pytest.mark.parametrize("turns", range(4))
async def test_a_result_that_is_there_is_returned(turns: int) -> None:
    async with a_connection() as (tracker, connection):
        waiting = asyncio.get_running_loop().create_future()
        handler = Handler(tracker, connection, waiting)
        await turn()
        waiting.set_result("result")
        # Before the task has had its turn to take it, and after.
        await turn(turns)
        connection.interrupt()
        assert await handler.result() == "result"
        assert handler.requests == 0
        assert not connection.silent


async def test_who_goes_on_to_wait_for_something_else_is_woken_there() -> None:
    async with a_connection() as (tracker, connection):
        first, second = (asyncio.get_running_loop().create_future() for _ in range(2))

        async def wait_for_both() -> None:
            await first
            await second

        handler = Handler(tracker, connection, wait_for_both())
        await turn()
        first.set_result(None)
        connection.interrupt()
        assert await handler.result() == "bye"
        assert handler.requests == 0
        assert second.cancelled()


@pytest.mark.parametrize("interrupt", ["never", "before", "after"])
async def test_a_cancellation_by_others_in_the_same_turn_is_not_lost(interrupt: str) -> None:
    async with a_connection() as (tracker, connection):
        handler = Handler(tracker, connection, anyio.sleep_forever())
        await turn()
        if interrupt == "before":
            connection.interrupt()
        handler.task.cancel()
        if interrupt == "after":
            connection.interrupt()
        with pytest.raises(asyncio.CancelledError):
            await handler.result()
        assert handler.requests == 1


async def test_what_ends_by_itself_when_it_is_cancelled_has_its_result_returned() -> None:
    async def end_itself() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        return "result"

    async with a_connection() as (tracker, connection):
        handler = Handler(tracker, connection, end_itself())
        await turn()
        connection.interrupt()
        assert await handler.result() == "result"
        assert handler.requests == 0


async def test_errors_pass_through_and_leave_nothing_behind() -> None:
    async with a_connection() as (tracker, connection):
        waiting = asyncio.get_running_loop().create_future()
        handler = Handler(tracker, connection, waiting)
        await turn()
        waiting.set_exception(LookupError("this one"))
        with pytest.raises(LookupError, match="this one"):
            await handler.result()
        again = Handler(tracker, connection, anyio.sleep_forever())
        await turn()
        connection.interrupt()
        assert await again.result() == "bye"


async def test_who_waits_for_nothing_but_its_turn_is_woken_once() -> None:
    async def spin() -> None:
        while True:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0)

    async with a_connection() as (tracker, connection):
        handler = Handler(tracker, connection, spin())
        await turn()
        connection.interrupt()
        connection.interrupt()
        assert await handler.result() == "bye"
        assert handler.requests == 0


async def test_every_task_of_a_connection_is_woken() -> None:
    async with a_connection() as (tracker, connection):

        async def wait_twice() -> None:
            await tracker.until_draining(anyio.sleep_forever())

        handlers = [Handler(tracker, connection, anyio.sleep_forever()) for _ in range(3)]
        handlers.append(Handler(tracker, connection, wait_twice()))
        await turn()
        connection.interrupt()
        for handler in handlers:
            assert await handler.result() == "bye"
            assert handler.requests == 0


async def test_a_task_that_outlives_its_connection_is_woken_by_the_drain() -> None:
    async with a_connection("stream of anyio") as (tracker, connection):
        handlers = [Handler(tracker, connection, anyio.sleep_forever()) for _ in range(2)]
        await turn()
        tracker.close(connection)
        handlers.append(Handler(tracker, connection, anyio.sleep_forever()))
        await turn()
        await tracker.drain(60)
        for handler in handlers:
            assert await handler.result() == "bye"
            assert handler.requests == 0


@pytest.mark.parametrize("first", ["scope", "connection"])
async def test_a_scope_that_is_cancelled_in_the_same_turn_ends_what_it_encloses(first: str) -> None:
    async with a_connection("stream of anyio") as (tracker, connection):
        scope = anyio.CancelScope()

        async def wait() -> str:
            current_connection.set(connection)
            with scope:
                try:
                    await tracker.until_draining(anyio.sleep_forever())
                except DrainInterrupt:
                    await anyio.sleep_forever()
            return "cancelled"

        task = asyncio.create_task(wait())
        await turn()
        for end in (scope.cancel, connection.interrupt) if first == "scope" else (connection.interrupt, scope.cancel):
            end()
        with anyio.fail_after(60):
            assert await task == "cancelled"
        assert scope.cancelled_caught
        assert task.cancelling() == 0
