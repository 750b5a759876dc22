"""Restarts of a service on each server and loop, under every kind of load: nothing fails."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from pathlib import Path

import pytest

from ecdysis_async import Outcome
from tests.scenarios.servers.clients import (
    CLIENTS,
    CLOSE,
    HOST,
    Load,
    by_tcp,
    fetch,
    read_frame,
    read_head,
    say_goodbye,
    upgrade,
)
from tests.scenarios.servers.harness import PATIENCE_SECONDS, find_blemishes, running

pytestmark = pytest.mark.main_python_only

SERVERS = ["uvicorn", "uvicorn-h11", "hypercorn", "aiohttp"]
ON_TRIO = ("hypercorn", "trio")
# Idle connections move to the successor, and are not told.
MOVING = ("uvicorn-moving", "uvloop")
EACH_SERVER = [*((server, "asyncio") for server in SERVERS), ON_TRIO]
# uvicorn's other parser sees nothing of the loop.
ON_UVLOOP = [(server, "uvloop") for server in SERVERS if server != "uvicorn-h11"]

RESTARTS = 10
WEBSOCKETS = 10

# A tenth of the time over which WebSockets are closed.
SPREAD_SECONDS = 0.4

# Longer than any request, and than any client's pause.
SETTINGS = {"probation": 0.05, "drain_timeout": 5}

# Some ten seconds on an idle machine. Where many others want its processors, each of the starts waits for its turn.
HEAVY_SECONDS = 600

# How many generations drain at most: the next one would hurry the oldest.
DRAINING = 5

# The last quarter of a drain is for the answers of clients that were told to leave, also on a busy machine.
LOADED = {"probation": 0.05, "drain_timeout": 8, "max_draining": DRAINING + 1}


@pytest.mark.timeout(HEAVY_SECONDS)
@pytest.mark.parametrize(("server", "loop"), [*EACH_SERVER, *ON_UVLOOP, MOVING])
def test_restarts_under_load_lose_nothing(server: str, loop: str, tmp_path: Path) -> None:
    asyncio.run(restart_under_load(server, loop, tmp_path))


@pytest.mark.timeout(HEAVY_SECONDS)
def test_restarts_of_a_main_under_load_lose_nothing(tmp_path: Path) -> None:
    # Those of the other servers are behind proxies, under the same load.
    asyncio.run(restart_under_load("aiohttp", "asyncio", tmp_path, is_main=True))


async def restart_under_load(server: str, loop: str, directory: Path, *, is_main: bool = False) -> None:
    async with running(server, loop, directory, is_main=is_main, settings=LOADED) as service:
        assert await fetch(service.port, "/nodelay") == "True"
        clients = Load(by_tcp(service.port))
        async with asyncio.TaskGroup() as task_group:
            task_group.create_task(clients.run())
            for number in range(RESTARTS):
                if number == RESTARTS // 2:
                    (directory / "broken").touch()
                    assert "this release is broken" in (await service.restart())["error"]
                    (directory / "broken").unlink()
                await service.wait_for_ends(number + 1 - DRAINING)
                report = await service.restart()
                assert report.get("outcome") == "settled", report
                await service.wait_for_generations(number + 2)
                while not clients.generations[service.generations[-1]]:  # noqa: ASYNC110 - an answer has no event
                    await asyncio.sleep(0.01)
            clients.end()

    assert not clients.failures, clients.failures
    assert sorted(clients.generations) == service.generations
    # Each kind was told to leave; connections of `new` are too short for that.
    told = {"websocket", "stream"} if (server, loop) == MOVING else set(CLIENTS) - {"new"}
    assert told <= set(clients.goodbyes), clients.goodbyes
    reports = [service.reports[pid] for pid in service.pids[:-1]]
    assert [report and report.outcome for report in reports] == [Outcome.SETTLED] * RESTARTS
    assert [report and report.drain.cut for report in reports] == [0] * RESTARTS
    assert sum(report.drain.silent for report in reports if report) >= clients.goodbyes["silent"]
    # No shutdown begins before the restart has settled; and none is missing.
    assert service.shutdowns == dict.fromkeys(service.pids, "draining")
    assert find_blemishes(directory) == []


@pytest.mark.parametrize(("server", "loop"), EACH_SERVER)
def test_each_connection_gets_its_own_goodbye(server: str, loop: str, tmp_path: Path) -> None:
    asyncio.run(say_goodbye_to_each(server, loop, tmp_path))


async def say_goodbye_to_each(server: str, loop: str, directory: Path) -> None:
    async with (
        running(server, loop, directory, settings=SETTINGS) as service,
        contextlib.AsyncExitStack() as stack,
    ):

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            streams = await asyncio.open_connection(HOST, service.port)
            stack.callback(streams[1].close)
            return streams

        async def talk() -> float:
            streams = await connect()
            await upgrade(streams)
            opened.release()
            opcode, payload = await read_frame(streams)
            assert opcode == CLOSE
            closed = asyncio.get_running_loop().time()
            await say_goodbye(streams, payload)
            return closed

        fresh, idle, gone, reset, busy = [await connect() for _ in range(5)]
        for reader, writer in (idle, gone):
            writer.write(b"GET /echo/one HTTP/1.1\r\nHost: localhost\r\n\r\n")
            headers = await read_head(reader)
            await reader.readexactly(int(headers["content-length"]))
        busy[1].write(b"GET /slow/60/one HTTP/1.1\r\nHost: localhost\r\n\r\n")
        opened = asyncio.Semaphore(0)
        async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as task_group:
            talks = [task_group.create_task(talk()) for _ in range(WEBSOCKETS)]
            for _ in range(WEBSOCKETS):
                await opened.acquire()
            # Whoever has hung up is not there any more to be told.
            gone[1].close()
            linger = struct.pack("ii", 1, 0)
            reset[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            reset[1].transport.abort()
            await service.restart()
        times = sorted(task.result() for task in talks)
        assert times[-1] - times[0] > SPREAD_SECONDS
        async with asyncio.timeout(PATIENCE_SECONDS):
            for reader, _ in (fresh, idle):
                assert await reader.read() == b""
            # Nothing, or an error that says so.
            assert b" 200 " not in await busy[0].read()
            await service.wait_for_ends(1)

    report = service.reports[service.pids[0]]
    assert report is not None
    assert (report.drain.silent, report.drain.cut) == (2, 1)


@pytest.mark.parametrize(("server", "loop"), EACH_SERVER)
def test_whoever_asks_while_it_leaves_is_answered(server: str, loop: str, tmp_path: Path) -> None:
    asyncio.run(ask_while_it_leaves(server, loop, tmp_path))


async def ask_while_it_leaves(server: str, loop: str, directory: Path) -> None:
    """Trap 2: the first byte of one connection, and the next request of another one, come after the restart."""
    request = b"GET /echo/one HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, str | None]:
        writer.write(request)
        headers = await read_head(reader)
        return (await reader.readexactly(int(headers["content-length"]))).decode(), headers.get("connection")

    async with (
        running(server, loop, directory, settings={**SETTINGS, "drain_timeout": 60}) as service,
        contextlib.AsyncExitStack() as stack,
    ):
        fresh, idle, half = [await asyncio.open_connection(HOST, service.port) for _ in range(3)]
        for _, writer in (fresh, idle, half):
            stack.callback(writer.close)
        assert await ask(*idle) == (f"{service.generations[0]} one", None)
        # Its answer also says that the others, which came before, are accepted.
        half[1].write(request[:20])
        assert (await service.restart()).get("outcome") == "settled"
        half[1].write(request[20:])
        async with asyncio.timeout(PATIENCE_SECONDS):
            for reader, writer in (fresh, idle):
                assert await ask(reader, writer) == (f"{service.generations[0]} one", "close")
                assert await reader.read() == b""
            assert (await half[0].read()).endswith(f"{service.generations[0]} one".encode())
    assert find_blemishes(directory) == []


@pytest.mark.parametrize(("server", "loop"), [each for each in EACH_SERVER if each[0] != "uvicorn-h11"])
def test_a_shutdown_without_end_is_ended(server: str, loop: str, tmp_path: Path) -> None:
    (tmp_path / "endless").touch()
    asyncio.run(start_and_stop(server, loop, tmp_path))
    assert "does not end" in (tmp_path / "stderr").read_text()


async def start_and_stop(server: str, loop: str, directory: Path) -> None:
    async with running(server, loop, directory, settings=SETTINGS) as service:
        pass
    assert service.shutdowns == dict.fromkeys(service.pids, "draining")
    assert set(service.reports) == set(service.pids)
