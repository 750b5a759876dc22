"""WebSockets under proof: echoes, pings where nothing is echoed, and servers that send their clients away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from websockets.asyncio.server import ServerConnection, serve

from ecdysis_async._proving.load import Load
from ecdysis_async._proving.plan import Kind, Shape, Url
from ecdysis_async._proving.records import Ending, Fault, History
from ecdysis_async._proving.rules import check

pytestmark = pytest.mark.backends("asyncio", "uvloop")

ENOUGH = 30


async def load(handle: Callable[[ServerConnection], Awaitable[None]]) -> History:
    history = History()
    async with serve(handle, "127.0.0.1", 0) as server:
        [sock] = server.sockets
        url = Url("http", "127.0.0.1", sock.getsockname()[1])
        clients = Load(url, [Shape(Kind.WEBSOCKET, rate=200, connections=2)], history, patience=10)
        await clients.try_out()
        running = asyncio.create_task(clients.run())
        while len(history.exchanges) < ENOUGH and not running.done():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
        clients.end()
        await running
    return history


async def echo(websocket: ServerConnection) -> None:
    async for message in websocket:
        await websocket.send(f'{{"you said": "{message!s}"}}')


async def test_an_echo_is_the_answer() -> None:
    history = await load(echo)
    assert check(history) == []
    assert len(history.connections) == 2
    assert all(each.answer is not None and each.answer.request == each.id for each in history.exchanges)


async def test_where_nothing_is_echoed_a_ping_is_answered() -> None:
    heard = []

    async def listen(websocket: ServerConnection) -> None:
        heard.extend([message async for message in websocket])

    history = await load(listen)
    assert check(history) == []
    # The first one, by which that was found out.
    assert len(heard) == 1


@pytest.mark.parametrize("code", [1001, 1012])
async def test_clients_that_are_told_to_come_back_lose_nothing(code: int) -> None:
    async def dismiss(websocket: ServerConnection) -> None:
        for _ in range(3):
            await websocket.send(await websocket.recv())
        await websocket.close(code)

    history = await load(dismiss)
    assert [finding.text for finding in check(history)] == []
    assert len(history.connections) > ENOUGH / 4
    assert {each.ending for each in history.connections} <= {Ending.ANNOUNCED, Ending.OURS}


async def test_a_websocket_that_just_ends() -> None:
    async def vanish(websocket: ServerConnection) -> None:
        for _ in range(3):
            await websocket.send(await websocket.recv())
        websocket.transport.abort()

    found = {finding.fault for finding in check(await load(vanish))}
    # Whether a client was waiting for an answer just then is a matter of chance.
    assert found
    assert found <= {Fault.IDLE_CLOSED, Fault.UNANSWERED}


async def test_answers_to_other_messages() -> None:
    async def confuse(websocket: ServerConnection) -> None:
        former = ""
        async for message in websocket:
            await websocket.send(former or message)
            former = str(message)

    found = {finding.fault for finding in check(await load(confuse))}
    assert found == {Fault.OTHER, Fault.REPEATED}
