"""WebSockets that outlive the processes that serve them, each with its counter."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.scenarios.transfer.subreaper import subreaper
from tests.test_examples import EXAMPLES, Service

pytestmark = pytest.mark.main_python_only

# A start of each takes a second; so many are asked of one loop for each implementation, and a few of the other: of
# uvicorn on uvloop in test_run.py.
RESTARTS = {
    ("websocket_echo", "asyncio"): 20,
    ("websockets_server", "asyncio"): 5,
    ("websockets_server", "uvloop"): 20,
}
# Of the clients, seconds: one of them asks without a pause, and the processors are for those who start.
PAUSES = (0.0, *(0.05,) * 3, *(0.1,) * 4, *(0.3,) * 4)
PATIENCE_SECONDS = 60

# Compressible, of all the lengths that a frame's head can have, and with references far back.
TEXTS = ("", "hello", "once upon a time " * 20, "".join(map(str, range(20000))))


@pytest.fixture(autouse=True)
def orphans() -> Iterator[None]:
    with subreaper():
        yield


class Counting:
    """A client that checks the count of each answer."""

    def __init__(self, number: int, port: int) -> None:
        self.count = 0
        self.generations: set[int] = set()
        self._number = number
        self._port = port

    async def run(self, ending: asyncio.Event) -> None:
        async with connect(
            f"ws://127.0.0.1:{self._port}", compression=None if self._number % 4 == 0 else "deflate", ping_interval=None
        ) as websocket:
            while not ending.is_set():
                await self._ask(websocket, TEXTS[self.count % len(TEXTS)])
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ending.wait(), PAUSES[self._number % len(PAUSES)])
            await self._ask(websocket, "last")

    async def _ask(self, websocket: ClientConnection, text: str) -> None:
        self.count += 1
        # Some in fragments, and now and then a ping in between.
        await websocket.send([text[:3], text[3:]] if self.count % 3 == 0 else text)
        if self.count % 7 == 0:
            await (await websocket.ping())
        answer = str(await asyncio.wait_for(websocket.recv(), PATIENCE_SECONDS))
        count, _, rest = answer.partition(" from generation ")
        generation, _, echo = rest.partition(": ")
        assert (int(count), echo) == (self.count, text)
        self.generations.add(int(generation))


# Twenty restarts, each of which imports uvicorn.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "loop"), RESTARTS)
def test_restarts_lose_no_websocket_and_no_count(name: str, loop: str, tmp_path: Path) -> None:
    restarts = RESTARTS[name, loop]
    with Service(EXAMPLES / f"{name}.py", loop=loop, directory=tmp_path) as service:
        service.wait_for_generation(1)
        clients = [Counting(number, service.port()) for number in range(12)]
        newest = asyncio.run(restart_among(service, clients, restarts))
        os.kill(newest, signal.SIGTERM)
        service.require_clean_end()
    for client in clients:
        assert client.count > restarts // 4
        assert len(client.generations) > restarts // 4


async def restart_among(service: Service, clients: list[Counting], restarts: int) -> int:
    ending = asyncio.Event()
    async with asyncio.TaskGroup() as task_group:
        for client in clients:
            task_group.create_task(client.run(ending))
        pid = service.process.pid
        for generation in range(2, restarts + 2):
            os.kill(pid, signal.SIGHUP)
            pid = await asyncio.to_thread(service.wait_for_generation, generation)
        ending.set()
    return pid


# A path, the subprotocols that its client offers, and whether its WebSocket moves.
FATES = {
    "/same": (["chat"], True),
    "/plain": ([], True),
    "/silent": ([], False),  # offers no state
    "/no-json": ([], False),  # offers what cannot travel
    "/turned-away": ([], False),  # by the application, when it is resumed
    "/broken": ([], False),  # likewise; the library websockets says so itself, with 1011
    "/changed": (["chat", "talk"], False),  # is accepted otherwise there
}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("name", ["websocket_service", "websockets_service"])
def test_what_cannot_go_on_is_closed_as_without_a_transfer(name: str, loop: str, tmp_path: Path) -> None:
    fates = FATES if name == "websocket_service" else {path: fate for path, fate in FATES.items() if path != "/broken"}
    with Service(Path(__file__).with_name(f"{name}.py"), loop=loop, directory=tmp_path) as service:
        pid = service.wait_for_generation(1)
        newest = asyncio.run(meet_fates(service, pid, fates))
        os.kill(newest, signal.SIGTERM)
        while service.read_log():
            pass
    assert "is accepted otherwise here" in service.log
    assert "is not JSON serializable" in service.log


async def meet_fates(service: Service, pid: int, fates: dict[str, tuple[list[str], bool]]) -> int:
    async with contextlib.AsyncExitStack() as stack:
        websockets = {}
        for path, (subprotocols, _) in fates.items():
            uri = f"ws://127.0.0.1:{service.port()}{path}"
            websocket = await stack.enter_async_context(connect(uri, subprotocols=subprotocols or None))  # type: ignore[arg-type]
            await websocket.send("hello")
            assert await websocket.recv() == "1 1"
            websockets[path] = websocket
        os.kill(pid, signal.SIGHUP)
        newest = await asyncio.to_thread(service.wait_for_generation, 2)
        await asyncio.to_thread(service.wait_for, "served here now")
        for path, (_, moves) in fates.items():
            websocket = websockets[path]
            if moves:
                await websocket.send("hello")
                assert await asyncio.wait_for(websocket.recv(), PATIENCE_SECONDS) == "2 2", path
            else:
                await asyncio.wait_for(websocket.wait_closed(), PATIENCE_SECONDS)
                assert websocket.close_code == 1012, path
    return newest
