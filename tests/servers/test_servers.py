"""Restarts of a service on each server and loop, under every kind of load: nothing fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async import Outcome, RestartReport
from tests.servers.clients import CLOSE, HOST, Load, fetch, read_frame, read_head, say_goodbye, upgrade

PROJECT = Path(__file__).resolve().parents[2]
SERVICE = Path(__file__).with_name("service.py")

SERVERS = ["uvicorn", "hypercorn", "aiohttp"]

PATIENCE_SECONDS = 30.0
RESTARTS = 10
WEBSOCKETS = 10

# A tenth of the time over which WebSockets are closed.
SPREAD_SECONDS = 0.15

# Longer than any request, and than any client's pause; and none is hurried because too many drain.
SETTINGS = {"probation": 0.05, "drain_timeout": 2, "max_draining": RESTARTS + 1}

# What a healthy service never writes.
BLEMISHES = ("Exception ignored", "Warning", "never awaited", "never retrieved", "ERROR", "does not end")


class Service:
    """A service and what its generations tell.

    Attributes:
        port: where it serves.
        pids: of the generations that have served.
        reports: of those that have ended, of the restart that each was shed by.
        shutdowns: the state that each was in when its application was shut down.
    """

    def __init__(self, facts: asyncio.StreamReader) -> None:
        self.port = 0
        self.pids: list[int] = []
        self.reports: dict[int, RestartReport | None] = {}
        self.shutdowns: dict[int, str] = {}
        self._facts = facts
        self._news = asyncio.Condition()

    async def listen(self) -> None:
        """Take note of everything, to the end of the last generation."""
        while line := await self._facts.readline():
            fact = json.loads(line)
            match fact["event"]:
                case "serving":
                    self.port = fact["address"][1]
                    self.pids.append(fact["pid"])
                case "shutdown":
                    self.shutdowns[fact["pid"]] = fact["state"]
                case "ended":
                    report = fact["report"]
                    self.reports[fact["pid"]] = None if report is None else RestartReport.from_json(report)
            async with self._news:
                self._news.notify_all()

    async def wait_for_generations(self, number: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS), self._news:
            await self._news.wait_for(lambda: len(self.pids) >= number)

    async def wait_for_ends(self, number: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: len(self.reports) >= number)

    async def restart(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await asyncio.wait_for(fetch(self.port, "/restart"), PATIENCE_SECONDS))
        return answer


@contextlib.asynccontextmanager
async def running(server: str, loop: str, directory: Path) -> AsyncIterator[Service]:
    """Run a service; stop it, and wait until the last of its processes has let go of stdout."""
    command = [sys.executable, "-W", "error", str(SERVICE), server, loop, str(directory), json.dumps(SETTINGS)]
    with (directory / "stderr").open("wb") as stderr:
        first = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE, stderr=stderr
        )
    facts = asyncio.StreamReader()
    assert first.stdout is not None
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(facts), first.stdout
    )
    service = Service(facts)
    listening = asyncio.create_task(service.listen())
    try:
        await service.wait_for_generations(1)
        yield service
        os.kill(service.pids[-1], signal.SIGTERM)
        await asyncio.wait_for(asyncio.shield(listening), PATIENCE_SECONDS)
    finally:
        if not listening.done():
            for pid in service.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        await listening
        first.kill()
        first.wait()
        transport.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("server", SERVERS)
def test_restarts_under_load_lose_nothing(server: str, loop: str, tmp_path: Path) -> None:
    asyncio.run(restart_under_load(server, loop, tmp_path))


async def restart_under_load(server: str, loop: str, directory: Path) -> None:
    async with running(server, loop, directory) as service:
        assert await fetch(service.port, "/nodelay") == "True"
        clients = Load(service.port)
        async with asyncio.TaskGroup() as task_group:
            task_group.create_task(clients.run())
            for number in range(RESTARTS):
                if number == RESTARTS // 2:
                    (directory / "broken").touch()
                    assert "this release is broken" in (await service.restart())["error"]
                    (directory / "broken").unlink()
                report = await service.restart()
                assert report.get("outcome") == "settled", report
                await service.wait_for_generations(number + 2)
            while not clients.generations[RESTARTS + 1]:  # noqa: ASYNC110 - an answer has no event
                await asyncio.sleep(0.01)
            clients.end()

    assert not clients.failures, clients.failures
    assert set(clients.generations) == set(range(1, RESTARTS + 2)), clients.generations
    # Each kind was told to leave; connections of `new` are too short for that.
    assert {"keep-alive", "slow", "websocket", "stream", "silent"} <= set(clients.goodbyes), clients.goodbyes
    reports = [service.reports[pid] for pid in service.pids[:-1]]
    assert [report and report.outcome for report in reports] == [Outcome.SETTLED] * RESTARTS
    assert [report and report.drain.cut for report in reports] == [0] * RESTARTS
    assert sum(report.drain.silent for report in reports if report) >= clients.goodbyes["silent"]
    # No shutdown begins before the restart has settled; and none is missing.
    assert service.shutdowns == dict.fromkeys(service.pids, "draining")
    blemishes = [line for line in (directory / "stderr").read_text().splitlines() if any(b in line for b in BLEMISHES)]
    assert [line for line in blemishes if "this release is broken" not in line and "startup failed" not in line] == []


@pytest.mark.parametrize("server", SERVERS)
def test_each_connection_gets_its_own_goodbye(server: str, tmp_path: Path) -> None:
    asyncio.run(say_goodbye_to_each(server, tmp_path))


async def say_goodbye_to_each(server: str, directory: Path) -> None:
    async with running(server, "asyncio", directory) as service, contextlib.AsyncExitStack() as stack:

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            streams = await asyncio.open_connection(HOST, service.port)
            stack.callback(streams[1].close)
            return streams

        async def talk() -> float:
            streams = await connect()
            await upgrade(streams)
            opened.release()
            opcode, payload = await read_frame(streams[0])
            assert opcode == CLOSE
            closed = asyncio.get_running_loop().time()
            await say_goodbye(streams, payload)
            return closed

        fresh, idle, busy = [await connect() for _ in range(3)]
        idle[1].write(b"GET /echo/one HTTP/1.1\r\nHost: localhost\r\n\r\n")
        headers = await read_head(idle[0])
        await idle[0].readexactly(int(headers["content-length"]))
        busy[1].write(b"GET /slow/60/one HTTP/1.1\r\nHost: localhost\r\n\r\n")
        opened = asyncio.Semaphore(0)
        async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as task_group:
            talks = [task_group.create_task(talk()) for _ in range(WEBSOCKETS)]
            for _ in range(WEBSOCKETS):
                await opened.acquire()
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


@pytest.mark.parametrize("server", SERVERS)
def test_a_shutdown_without_end_is_ended(server: str, tmp_path: Path) -> None:
    (tmp_path / "endless").touch()
    asyncio.run(start_and_stop(server, tmp_path))
    assert "does not end" in (tmp_path / "stderr").read_text()


async def start_and_stop(server: str, directory: Path) -> None:
    async with running(server, "asyncio", directory) as service:
        pass
    assert service.shutdowns == dict.fromkeys(service.pids, "draining")
    assert set(service.reports) == set(service.pids)
