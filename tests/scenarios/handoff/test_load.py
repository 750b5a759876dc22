"""Restarts under load: no request fails, and a service is as small after many restarts as it was after the first."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.load import Counts, Failure, Kind, Load, Mix
from benchmarks.running import RunningService, running
from benchmarks.service import LOOPS
from ecdysis_async import Outcome

# Under load, the versions differ by asyncio only.
pytestmark = pytest.mark.main_python_only(but=("asyncio",))

RESTARTS = 20  # in all: one before the first look, the others before the last

# Slow requests end well before the deadline of a drain, however long a busy machine lets a process wait for its turn.
# Silent connections meet it in each of them.
MIX = Mix(
    new_per_second=50, hasty=1, keep_alive=6, pause=0.06, slow=4, slow_seconds=(0.1, 0.6), silent=3, limit=100_000
)
DRAIN_SECONDS = 4.0
PROBATION_SECONDS = 0.05

# What a process holds privately differs between two starts of one program by up to 33 KB (measured, on all loops), and
# by more where a burst of clients met one of them. A buffer of 64 KiB that is left with each restart is seen in this;
# a leak that is smaller shows in the descriptors, if anywhere.
TOLERANCE_BYTES = 512 * 1024

# How many threads may wait for work: as many as there was work for at once, which differs with the machine's load. Were
# one left by each restart, there would be more.
IDLE_THREADS = 10

QUIET_SECONDS = 60.0


@dataclass(frozen=True)
class Stock:
    """What a process holds while nobody asks it for anything."""

    descriptors: Counter[str]
    threads: int
    children: int
    private_bytes: int


# A few seconds on an idle machine. Where many others want its processors, each of the starts waits for its turn.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loop", LOOPS)
def test_restarts_under_load_lose_nothing_and_leave_nothing(loop: str, tmp_path: Path) -> None:
    stderr = tmp_path / "stderr"
    asyncio.run(restart_under_load(loop, stderr))
    assert stderr.read_text() == ""


async def restart_under_load(loop: str, stderr: Path) -> None:
    options = ["--loop", loop, "--probation", str(PROBATION_SECONDS), "--drain-timeout", str(DRAIN_SECONDS)]
    # So that none is hurried, which would leave it a second.
    options += ["--max-draining", str(RESTARTS)]
    with stderr.open("wb") as file:
        async with running(*options, flags=["-W", "error"], stderr=file) as service:
            await load(service, restarts=1)
            first = await take_stock(service)
            counts = await load(service, restarts=RESTARTS - 1, silent_closed=1)
            last = await take_stock(service)
            await service.stop()

    assert counts.failures == Counter()
    assert counts.answers == counts.requests
    assert set(counts.requests) == set(Kind)
    assert set(counts.generations) == set(range(2, RESTARTS + 2))
    assert counts.reconnects >= RESTARTS - 1
    reports = list(service.reports.values())
    assert len(reports) == RESTARTS
    assert {report.outcome for report in reports} == {Outcome.SETTLED}
    assert [report.drain.cut for report in reports] == [0] * len(reports)
    # Closed, as seen from both ends; each connection has one client, and each silent client has seen it.
    assert counts.silent_closed <= sum(report.drain.silent for report in reports)

    assert last.descriptors == first.descriptors
    assert last.threads < first.threads + IDLE_THREADS
    assert (first.children, last.children) == (0, 0)
    assert last.private_bytes < first.private_bytes + TOLERANCE_BYTES


async def load(service: RunningService, restarts: int, silent_closed: int = 0) -> Counts:
    """Load a service while it restarts, each time as soon as the last restart has settled.

    The load goes on until so many silent clients have met a deadline: a fast machine is through the restarts before.
    """
    clients = Load(service.port, MIX)
    async with asyncio.TaskGroup() as task_group:
        task_group.create_task(clients.run())
        for _ in range(restarts):
            await service.restart()
        # A last generation that nobody asks would show nothing.
        while not clients.counts.generations[max(service.generations)] or clients.counts.silent_closed < silent_closed:
            await clients.wait_for_end(0.01)
        clients.end()
    assert not clients.is_limited, "the load ended before the restarts did"
    await service.wait_for_drained()
    return clients.counts


async def take_stock(service: RunningService) -> Stock:
    """Count what the serving generation holds once it has let go of all clients and of all who went before."""
    process = psutil.Process(service.newest.pid)
    async with asyncio.timeout(QUIET_SECONDS):
        while not is_quiet(process):  # noqa: ASYNC110 - what another process holds has no event
            await asyncio.sleep(0.01)
    return Stock(
        descriptors=list_descriptors(process.pid),
        threads=process.num_threads(),
        children=len(process.children(recursive=True)),
        private_bytes=process.memory_full_info().uss,
    )


def is_quiet(process: psutil.Process) -> bool:
    """Say whether a process has no connection, and watches no other process."""
    connections = [each for each in process.net_connections("tcp") if each.status != psutil.CONN_LISTEN]
    return not connections and not list_descriptors(process.pid)["anon_inode:[pidfd]"]


def list_descriptors(pid: int) -> Counter[str]:
    """Count a process' descriptors by what they are: files by path, sockets and pipes without their numbers."""
    descriptors: Counter[str] = Counter()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since
            descriptors[re.sub(r"\[\d+\]", "", os.readlink(f"/proc/{pid}/fd/{number}"))] += 1
    return descriptors


Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def close_unanswered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()


async def say_only_goodbye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.write(b"bye\n")


async def answer_half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"1 " + (await reader.readline()).split()[-1][:-1])


async def answer_another(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.write(b"1 nonsense\n")


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    # close(2) with a linger of 0 seconds resets: socket(7), SO_LINGER.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [
        (close_unanswered, Failure.UNANSWERED),
        (say_only_goodbye, Failure.UNANSWERED),
        (answer_half, Failure.WRONG),
        (answer_another, Failure.WRONG),
        (reset, Failure.RESET),
        (None, Failure.REFUSED),
    ],
)
def test_the_load_sees_a_failure_and_names_it(behaviour: Behaviour | None, failure: Failure, kind: Kind) -> None:
    counts = asyncio.run(load_a_bad_server(behaviour, kind))
    assert counts.requests[kind] == counts.requests.total() == counts.failures[failure] == counts.failures.total() > 0
    assert counts.answers.total() == 0


async def load_a_bad_server(behaviour: Behaviour | None, kind: Kind) -> Counts:
    async with serving(behaviour) as port:
        mix = Mix(
            new_per_second=200 if kind is Kind.NEW else 0,
            keep_alive=int(kind is Kind.KEEP_ALIVE),
            slow=int(kind is Kind.SLOW),
            slow_seconds=(0.0, 0.01),
            silent=int(kind is Kind.SILENT),
            limit=5,
        )
        clients = Load(port, mix)
        if kind is Kind.SILENT:
            # After its one request it waits, connected or not.
            asyncio.get_running_loop().call_later(0.05, clients.end)
        return await clients.run()


@contextlib.asynccontextmanager
async def serving(behaviour: Behaviour | None) -> AsyncIterator[int]:
    """Serve a behaviour on a port of the kernel's choice; with none, a bound port on which nobody listens."""
    if behaviour is None:
        with socket.socket() as unheard:
            unheard.bind(("127.0.0.1", 0))
            yield unheard.getsockname()[1]
        return

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await behaviour(reader, writer)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
