"""The load of the benchmarks counts what a server does: a faulty one is found out, fault by fault."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from benchmarks.load import HOST, Counts, Failure, Kind, Lines, Load, Mix

pytestmark = pytest.mark.main_python_only

ANSWERS = 20

# Far longer than a busy machine keeps anybody waiting, and shorter than the patience of the load.
STALL_SECONDS = 0.5


class Faulty:
    """A line server that answers some requests, then does one thing wrong to the next, and so on.

    Attributes:
        port: where it serves.
        faults: what it did.
        requests: how many requests have come.
        is_done: set once there were enough of them for every fault.
    """

    def __init__(self, fault: str) -> None:
        self.port = 0
        self.faults = Counter[str]()
        self.requests = 0
        self.is_done = asyncio.Event()
        self._fault = fault

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while line := await reader.readline():
                text = line.decode().split()[-1]
                self.requests += 1
                if self.requests == 3 * ANSWERS + 10:
                    self.is_done.set()
                if self.requests % 3 == 0 and self.faults.total() < ANSWERS:
                    self.faults[self._fault] += 1
                    match self._fault:
                        case "reset":
                            sock = writer.get_extra_info("socket")
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                            return
                        case "close":
                            return
                        case "other text":
                            text = "something-else"
                        case "stall":
                            time.sleep(STALL_SECONDS)
                            self._fault = "none"
                writer.write(f"1 {text}\n".encode())


@contextlib.asynccontextmanager
async def faulty(fault: str) -> AsyncIterator[Faulty]:
    """Run one."""
    server = Faulty(fault)
    async with await asyncio.start_server(server.serve, HOST, 0) as listener:
        server.port = listener.sockets[0].getsockname()[1]
        yield server


async def load(fault: str, *, new: float = 0, keep_alive: int = 0) -> tuple[Counts, Faulty]:
    """Load a faulty server until it was loaded enough."""
    async with faulty(fault) as server:
        load = Load(server.port, Mix(new_per_second=new, keep_alive=keep_alive, pause=0.01, slow=0, silent=0), Lines())
        async with asyncio.TaskGroup() as task_group:
            task_group.create_task(load.run())
            await server.is_done.wait()
            load.end()
    return load.counts, server


@pytest.mark.parametrize(
    ("fault", "failure"),
    [("reset", Failure.RESET), ("close", Failure.UNANSWERED), ("other text", Failure.WRONG)],
)
@pytest.mark.parametrize(("new", "keep_alive"), [(300, 0), (0, 8)], ids=["new connections", "kept ones"])
def test_each_fault_is_one_failure_of_its_kind(fault: str, failure: Failure, new: float, keep_alive: int) -> None:
    counts, server = asyncio.run(load(fault, new=new, keep_alive=keep_alive))
    assert counts.failures == {failure: server.faults[fault]} == {failure: ANSWERS}
    assert counts.requests.total() == counts.answers.total() + ANSWERS == len(counts.outcomes)
    assert sum(each.failure is failure for each in counts.outcomes) == ANSWERS


def test_a_stall_is_in_the_latency_of_those_that_were_due_meanwhile() -> None:
    counts, _ = asyncio.run(load("stall", new=300))
    assert not counts.failures
    # A load that waits for answers before it asks again would show one request that was slow.
    assert sum(seconds > STALL_SECONDS / 10 for seconds in counts.latencies) > 10
    assert len(counts.lateness) == counts.requests[Kind.NEW]


def test_a_server_that_is_not_there_refuses() -> None:
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        load = Load(closed.getsockname()[1], Mix(new_per_second=100, keep_alive=0, slow=0, silent=0, limit=20))
        counts = asyncio.run(load.run())
    assert set(counts.failures) == {Failure.REFUSED}
    assert counts.failures.total() == counts.requests.total() >= 20
