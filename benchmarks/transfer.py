"""What restarts cost clients that keep their connections: with transfer, and without it.

Many idle keep-alive clients and some that ask at random moments, on uvicorn, over many restarts: how many connections
the server closes, how many connections move per second, how long the loop of either side stands still at most, and what
a connection weighs in a process that has accepted it, and in one that has taken it over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import ecdysis_async
from benchmarks.bench import Options, Table, describe_machine, memory, parse, publish
from ecdysis_async import Ecdysis

SUBJECTS = tuple((loop, transfer) for loop in ("asyncio", "uvloop") for transfer in (True, False))

PROBATION_SECONDS = 0.3
# Without transfer, idle connections are closed at its end; with it, the drain is over when all have moved.
DRAIN_SECONDS = 1.5
TRANSFER_SECONDS = 30.0
# How long a successor is watched for stalls: until it has taken over what there is.
WATCH_SECONDS = 3.0
TICK_SECONDS = 0.001

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
END = b"hello"


# The service


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Say hello."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": END})


async def serve(transfer: bool) -> None:  # noqa: FBT001
    """Serve, and tell what one generation has seen."""
    import uvicorn

    import ecdysis_async.servers.uvicorn as adapter

    stalls = {"young": 0.0, "old": 0.0}
    timeout = TRANSFER_SECONDS if transfer else DRAIN_SECONDS
    async with Ecdysis(probation=PROBATION_SECONDS, drain_timeout=timeout, max_draining=99) as ecdysis:
        config = uvicorn.Config(
            application, port=0, http="httptools", timeout_keep_alive=600, access_log=False, log_level="warning"
        )
        watching = asyncio.create_task(watch(ecdysis, stalls))
        await adapter.serve(ecdysis, config, transfer=transfer)
        watching.cancel()
    report = ecdysis.last_report
    tell("ended", stalls=stalls, report=report.to_json() if report is not None else None)


async def watch(ecdysis: Ecdysis, stalls: dict[str, float]) -> None:
    """Take note of the longest time in which the loop did not turn."""
    while ecdysis.state is not ecdysis_async.State.SERVING:  # noqa: ASYNC110 - a state has no event
        await asyncio.sleep(TICK_SECONDS)
    sock = ecdysis._registry.entries[0].sock  # noqa: SLF001 - there is one
    tell("serving", pid=os.getpid(), port=sock.getsockname()[1])
    begun = time.perf_counter()
    while True:
        before = time.perf_counter()
        await asyncio.sleep(TICK_SECONDS)
        now = time.perf_counter()
        if ecdysis.draining.is_set():
            stalls["old"] = max(stalls["old"], now - before - TICK_SECONDS)
        elif now - begun < WATCH_SECONDS:
            stalls["young"] = max(stalls["young"], now - before - TICK_SECONDS)


def tell(event: str, **fact: Any) -> None:
    """Write a line for the one that measures."""
    os.write(1, json.dumps({"event": event, **fact}).encode() + b"\n")


# The clients


class Client(asyncio.Protocol):
    """One connection, made anew where the server ends it."""

    def __init__(self, crowd: Crowd, *, is_active: bool) -> None:
        self.crowd, self.is_active = crowd, is_active
        self.received = b""
        self.is_waiting = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.crowd.clients.add(self)
        self.ask()

    def ask(self) -> None:
        if not self.transport.is_closing():
            self.is_waiting = True
            self.transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.received.endswith(END):
            self.crowd.answers += 1
            self.received, self.is_waiting = b"", False
            if self.is_active:
                asyncio.get_running_loop().call_later(random.expovariate(4), self.ask)

    def connection_lost(self, error: Exception | None) -> None:
        self.crowd.clients.discard(self)
        if not self.crowd.is_over:
            self.crowd.closed += 1
            self.crowd.failures += self.is_waiting
            self.crowd.connect(is_active=self.is_active)


class Crowd:
    """All clients, and what became of them."""

    def __init__(self, port: int) -> None:
        self.answers = self.closed = self.failures = 0
        self.is_over = False
        self.clients: set[Client] = set()
        self._port = port
        self._tasks: set[asyncio.Task[Any]] = set()

    def leave(self) -> None:
        """Close all connections: the last generation has nobody to wait for."""
        self.is_over = True
        for client in self.clients:
            client.transport.abort()

    def connect(self, *, is_active: bool) -> None:
        connecting = asyncio.get_running_loop().create_connection(
            lambda: Client(self, is_active=is_active), "127.0.0.1", self._port
        )
        task = asyncio.ensure_future(connecting)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


# The measurement


@contextlib.asynccontextmanager
async def running(loop: str, *, transfer: bool) -> AsyncIterator[asyncio.StreamReader]:
    """Run a service, and yield what its generations tell."""
    mode = "on" if transfer else "off"
    first = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.transfer", "--serve", loop, mode, stdout=asyncio.subprocess.PIPE
    )
    assert first.stdout is not None
    try:
        yield first.stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            first.kill()
        # The end of the last generation is the end of the pipe.
        while await first.stdout.readline():
            pass
        await first.wait()


async def measure(loop: str, *, transfer: bool, idle: int, active: int, restarts: int) -> dict[str, Any]:
    """Restart one service among its clients."""
    stalls: dict[str, list[float]] = {"young": [], "old": []}
    moved: list[float] = []
    async with running(loop, transfer=transfer) as facts:

        async def expect(event: str) -> dict[str, Any]:
            while True:
                fact: dict[str, Any] = json.loads(await asyncio.wait_for(facts.readline(), 60))
                if fact["event"] == event:
                    return fact

        serving = await expect("serving")
        pid, crowd = serving["pid"], Crowd(serving["port"])
        empty = memory(pid)[1]
        for number in range(idle + active):
            crowd.connect(is_active=number >= idle)
            if number % 50 == 0:
                await asyncio.sleep(0.01)
        while crowd.answers < idle + active:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        accepted, adopted = (memory(pid)[1] - empty) / (idle + active), 0.0
        for number in range(restarts):
            os.kill(pid, signal.SIGHUP)
            pid = (await expect("serving"))["pid"]
            empty = memory(pid)[1]
            ended = await expect("ended")
            if number == 0:
                adopted = (memory(pid)[1] - empty) / (idle + active)
            for side, longest in ended["stalls"].items():
                # The first generation was nobody's successor.
                if number or side == "old":
                    stalls[side].append(longest)
            report = ended["report"]
            moved.append(report["drain"]["transferred"] / report["phases"]["drain"])
        crowd.leave()
        os.kill(pid, signal.SIGTERM)
        await expect("ended")
    return {
        "answers": crowd.answers,
        "failures": crowd.failures,
        "closed": crowd.closed,
        "moved": sorted(moved)[len(moved) // 2],
        "old": max(stalls["old"], default=0.0),
        "young": max(stalls["young"], default=0.0),
        "accepted": accepted,
        "adopted": adopted,
    }


def run(options: Options) -> None:
    """Measure each subject, and say what came out."""
    before = describe_machine()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle, active, restarts = (50, 5, 1) if options.quick else (5000, 500, 20)
    table = Table(
        "What restarts cost clients that keep their connections",
        [
            "service",
            "answers",
            "failures",
            "connections closed",
            "moved per second",
            "longest stall, old, ms",
            "longest stall, new, ms",
            "kB each, accepted",
            "kB each, taken over",
        ],
        f"uvicorn with httptools, {idle} idle clients and {active} active ones, {restarts} restarts.",
    )
    for loop, transfer in SUBJECTS:
        name = f"{loop}, {'with transfer' if transfer else 'without'}"
        if options.only in name:
            found = asyncio.run(measure(loop, transfer=transfer, idle=idle, active=active, restarts=restarts))
            table.add(
                name,
                f"{found['answers']}",
                f"{found['failures']}",
                f"{found['closed']}",
                f"{found['moved']:.0f}",
                f"{found['old'] * 1000:.1f}",
                f"{found['young'] * 1000:.1f}",
                f"{found['accepted'] * 1024:.1f}",
                f"{found['adopted'] * 1024:.1f}",
            )
    publish("transfer", [table], None, options, before)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        ecdysis_async.run(lambda: serve(sys.argv[3] == "on"), loop=sys.argv[2])  # type: ignore[arg-type]
    else:
        run(parse(__doc__))
