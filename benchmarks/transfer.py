"""What restarts cost clients that keep their connections: with transfer, and without it.

Many idle keep-alive clients and some that ask at random moments, on uvicorn under ``ecdysis run``, over many restarts
by ``ecdysis restart``: how many connections the server closes, how many move per second, how long the loop of either
side stands still, beside the same service that just serves its clients, and what a connection weighs in a process that
has accepted it, and in one that has taken it over.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import gc
import heapq
import json
import operator
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ecdysis_async
from benchmarks.bench import LIMIT_SECONDS, PROJECT, Options, Table, describe_machine, memory, parse, publish

SUBJECTS = tuple((loop, transfer) for loop in ("asyncio", "uvloop") for transfer in (True, False))

PROBATION_SECONDS = 0.3
# Without transfer, idle connections are closed at its end; with it, the drain is over when all have moved.
DRAIN_SECONDS = 1.5
TRANSFER_SECONDS = 30.0
# How long a process is watched that has begun to serve, and one that goes on serving.
WATCH_SECONDS = 3.0
TICK_SECONDS = 0.001
# Connections move until none has come or gone for so long.
CALM_SECONDS = 0.1
# How many of the longest durations are remembered: one in a thousand of all there are.
KEPT = 100
# What the machine itself does to a loop: one that computes for so long in each turn, for so long after each subject, in
# so many processes.
CONTROL_TURN_SECONDS = 0.002
CONTROL_SECONDS = 5.0
CONTROL_PROCESSES = (1, 3)
# What counts for the speed: the others were busy, and moved when they were answered.
MOST = 0.9

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
MARK = b"GET /mark HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
END = b"hello"


# The service


@dataclass(slots=True)
class Longest:
    """The longest of some durations, in seconds.

    Attributes:
        count: how many there were.
        kept: the longest ones, in descending order.
    """

    count: int = 0
    kept: list[float] = field(default_factory=list)

    def note(self, seconds: float) -> None:
        """Take note of one more."""
        self.count += 1
        if len(self.kept) < KEPT or seconds > self.kept[-1]:
            bisect.insort(self.kept, seconds, key=operator.neg)
            del self.kept[KEPT:]

    def merge(self, other: Longest) -> None:
        """Take note of all of another one."""
        self.count += other.count
        self.kept = heapq.nlargest(KEPT, [*self.kept, *other.kept])

    def describe(self) -> list[str]:
        """Return the longest one, and what one in a thousand reaches, in milliseconds."""
        if not self.kept:
            return ["-", "-"]
        return [f"{self.kept[index] * 1000:.1f}" for index in (0, min(self.count // 1000, len(self.kept) - 1))]


@dataclass(slots=True)
class Stall:
    """How long a loop stood still.

    Attributes:
        late: how late the loop came back to somebody.
        computed: what this process computed meanwhile, in a turn, or up to two of them: what others took the processor
            for is not its fault.
        collection: what the garbage collector took at most, in seconds.
    """

    late: Longest = field(default_factory=Longest)
    computed: Longest = field(default_factory=Longest)
    collection: float = 0.0

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Stall:
        """Return what another process has seen."""
        return cls(Longest(**found["late"]), Longest(**found["computed"]), found["collection"])

    def merge(self, other: Stall) -> None:
        """Take note of what another one has seen."""
        self.late.merge(other.late)
        self.computed.merge(other.computed)
        self.collection = max(self.collection, other.collection)

    def describe(self) -> list[str]:
        """Return the cells of a table, in milliseconds."""
        return [*self.late.describe(), *self.computed.describe(), f"{self.collection * 1000:.1f}"]


class Watch:
    """What one generation sees of itself: while it begins, while it just serves from the mark on, while it leaves."""

    def __init__(self) -> None:
        self.stalls = {"young": Stall(), "steady": Stall(), "old": Stall()}
        self.is_marked = False
        self.speed = 0.0
        self._collection = self._collection_begun = 0.0
        gc.callbacks.append(self._note_collection)

    async def run(self) -> None:
        """Watch from the first to the last turn."""
        ecdysis = ecdysis_async.current()
        while ecdysis.state is not ecdysis_async.State.SERVING:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(TICK_SECONDS)
        sock = ecdysis._registry.entries[0].sock  # noqa: SLF001 - there is one
        tell("serving", pid=os.getpid(), port=sock.getsockname()[1])
        begun = time.perf_counter()
        left = 0.0
        moved: list[tuple[float, int]] = []
        pause, size, changed = TICK_SECONDS, 0, 0.0
        try:
            while True:
                before, cpu, self._collection = time.perf_counter(), time.process_time(), 0.0
                await asyncio.sleep(pause)
                now = time.perf_counter()
                late = now - before - pause
                # How late a pause ends is how long others wait, too. It may span several turns: of what was computed in
                # it no more than that counts. Then from one turn to the very next: once, and after each long one.
                computed = min(time.process_time() - cpu, late) if pause else time.process_time() - cpu
                pause = 0.0 if pause or late > TICK_SECONDS else TICK_SECONDS
                if len(ecdysis._tracker) != size:  # noqa: SLF001 - it is not told
                    size, changed = len(ecdysis._tracker), now  # noqa: SLF001
                if ecdysis.draining.is_set():
                    kind, left = "old", left or before
                    moved.append((now - left, ecdysis._tracker.count.transferred))  # noqa: SLF001
                else:
                    kind = "young" if now - begun < WATCH_SECONDS else "steady"
                if not (self.is_marked if kind == "steady" else now - max(changed, left) < CALM_SECONDS):
                    continue
                stall = self.stalls[kind]
                stall.late.note(late)
                stall.computed.note(computed)
                stall.collection = max(stall.collection, self._collection)
        finally:
            if moved and moved[-1][1]:
                seconds, count = next(each for each in moved if each[1] >= MOST * moved[-1][1])
                self.speed = count / seconds

    def _note_collection(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._collection_begun = time.thread_time()
        else:
            self._collection = max(self._collection, time.thread_time() - self._collection_begun)


watch = Watch()


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Say hello."""
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    watch.is_marked |= scope["path"] == "/mark"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": END})


async def live(receive: Any, send: Any) -> None:
    """Watch, and tell what one generation has seen."""
    await receive()
    watching = asyncio.create_task(watch.run())
    await send({"type": "lifespan.startup.complete"})
    await receive()
    watching.cancel()
    await asyncio.wait([watching])
    stalls = {kind: asdict(stall) for kind, stall in watch.stalls.items()}
    tell("ended", stalls=stalls, speed=watch.speed)
    await send({"type": "lifespan.shutdown.complete"})


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
                asyncio.get_running_loop().call_later(random.expovariate(1), self.ask)

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

COMMAND = [sys.executable, "-m", "ecdysis_async.cli"]


class Running:
    """A service of ``ecdysis run``, and what its generations tell."""

    def __init__(self, facts: asyncio.StreamReader, control: str) -> None:
        self._facts = facts
        self._control = control

    async def expect(self, event: str) -> dict[str, Any]:
        """Wait for the next thing of this kind that a generation tells."""
        while True:
            line = await asyncio.wait_for(self._facts.readline(), LIMIT_SECONDS)
            if not line:
                raise RuntimeError("the service has ended: see what it has written to stderr")
            fact: dict[str, Any] = json.loads(line)
            if fact["event"] == event:
                return fact

    async def command(self, name: str, *options: str) -> Any:
        """Run one of the commands that steer it, and return what it prints."""
        done = await asyncio.create_subprocess_exec(
            *COMMAND, name, *options, "--json", "--control", self._control, cwd=PROJECT, stdout=subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(done.communicate(), LIMIT_SECONDS)
        if done.returncode:
            raise RuntimeError(f"ecdysis {name} failed: {output.decode()}")
        return json.loads(output)


@contextlib.asynccontextmanager
async def running(loop: str, *, transfer: bool) -> AsyncIterator[Running]:
    """Run a service, and stop it in the end."""
    with tempfile.TemporaryDirectory() as directory:
        control = str(Path(directory) / "control")
        options = [f"--loop={loop}", "--bind=127.0.0.1:0", f"--control={control}", "--no-access-log"]
        options += [f"--probation={PROBATION_SECONDS}", "--log-level=warning"]
        options += [f"--drain-timeout={TRANSFER_SECONDS}"] if transfer else [f"--drain-timeout={DRAIN_SECONDS}"]
        options += [] if transfer else ["--no-transfer"]
        for option in ("http=httptools", "timeout_keep_alive=600"):
            options += ["--server-option", option]
        first = await asyncio.create_subprocess_exec(
            *COMMAND, "run", "benchmarks.transfer:application", *options, cwd=PROJECT, stdout=subprocess.PIPE
        )
        assert first.stdout is not None
        service = Running(first.stdout, control)
        try:
            yield service
        finally:
            # The anchor stops its workers, whose end is that of the pipe.
            with contextlib.suppress(ProcessLookupError):
                first.terminate()
            while await first.stdout.readline():
                pass
            await first.wait()


async def mark(port: int) -> None:
    """Let the generation that serves begin to watch itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(MARK)
    await reader.read()
    writer.close()


async def measure(
    loop: str, *, transfer: bool, idle: int, active: int, restarts: int, watched: float = WATCH_SECONDS
) -> dict[str, Any]:
    """Restart one service among its clients."""
    stalls = {"young": Stall(), "steady": Stall(), "old": Stall()}
    speeds: list[float] = []
    async with running(loop, transfer=transfer) as service:
        serving = await service.expect("serving")
        pid, crowd = serving["pid"], Crowd(serving["port"])
        empty = memory(pid)[1]
        for number in range(idle + active):
            crowd.connect(is_active=number >= idle)
            if number % 50 == 0:
                await asyncio.sleep(0.01)
        while crowd.answers < idle + active:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        accepted, adopted = (memory(pid)[1] - empty) / (idle + active), 0.0
        await mark(serving["port"])
        await asyncio.sleep(watched)
        for number in range(restarts):
            restarting = asyncio.create_task(service.command("restart", "--until=drained"))
            pid = (await service.expect("serving"))["pid"]
            empty = memory(pid)[1]
            ended = await service.expect("ended")
            if number == 0:
                adopted = (memory(pid)[1] - empty) / (idle + active)
            for kind, stall in ended["stalls"].items():
                # The first generation was nobody's successor.
                if number or kind != "young":
                    stalls[kind].merge(Stall.from_json(stall))
            speeds.append(ended["speed"])
            await restarting
        crowd.leave()
    return {
        "answers": crowd.answers,
        "failures": crowd.failures,
        "closed": crowd.closed,
        "speed": sorted(speeds)[len(speeds) // 2],
        "stalls": stalls,
        "accepted": accepted,
        "adopted": adopted,
    }


# What the machine does by itself

CONTROL = "from benchmarks.transfer import control; control({turn}, {seconds})"


def compute(rounds: int) -> None:
    """Compute, and nothing else: no memory is taken, and no system call made."""
    number = 1
    for _ in range(rounds):
        number = number * 5 % 1048573


def control(turn: float, seconds: float) -> None:
    """Compute ``turn`` seconds at a time for so many seconds, and tell how long that took."""
    rounds, durations = 10000, []
    for _ in range(50):
        cpu = time.process_time()
        compute(rounds)
        durations.append(time.process_time() - cpu)
    rounds = int(rounds * turn / sorted(durations)[len(durations) // 2])
    stall = Stall()
    end = time.perf_counter() + seconds
    while (before := time.perf_counter()) < end:
        cpu = time.process_time()
        compute(rounds)
        stall.computed.note(time.process_time() - cpu)
        stall.late.note(time.perf_counter() - before)
    sys.stdout.write(json.dumps(asdict(stall)))


def measure_machine(processes: int, seconds: float) -> Stall:
    """Let so many processes compute at a time, each of them the same in each turn."""
    code = CONTROL.format(turn=CONTROL_TURN_SECONDS, seconds=seconds)
    command = [sys.executable, "-c", code]
    stall = Stall()
    started = [subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) for _ in range(processes)]
    for process in started:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
        stall.merge(Stall.from_json(json.loads(output)))
    return stall


def run(options: Options) -> None:
    """Measure each subject, and say what came out."""
    before = describe_machine()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle, active, restarts, watched = (50, 5, 1, 0.1) if options.quick else (5000, 500, 20, WATCH_SECONDS)
    note = f"uvicorn with httptools by ecdysis run, {idle} idle clients and {active} active ones, {restarts} restarts."
    clients = Table(
        "What restarts cost clients that keep their connections",
        [
            "service",
            "answers",
            "failures",
            "connections closed",
            "moved per second",
            "kB each, accepted",
            "kB each, taken over",
        ],
        note,
    )
    loops = Table(
        "How long the loop stands still, ms",
        ["loop", "longest", "1 in 1000", "computed meanwhile, longest", "1 in 1000", "garbage collection"],
        "The same service while it just serves these clients, and each side while connections move: how late the loop "
        "comes back to somebody, and what its process computes meanwhile. At the end what this machine makes of "
        f"processes that do nothing else than to compute {CONTROL_TURN_SECONDS * 1000:.0f} ms at a time.",
    )
    controls = {processes: Stall() for processes in CONTROL_PROCESSES}
    for loop, transfer in SUBJECTS:
        name = f"{loop}, {'with transfer' if transfer else 'without'}"
        if options.only in name:
            found = asyncio.run(
                measure(loop, transfer=transfer, idle=idle, active=active, restarts=restarts, watched=watched)
            )
            clients.add(
                name,
                f"{found['answers']}",
                f"{found['failures']}",
                f"{found['closed']}",
                f"{found['speed']:.0f}",
                f"{found['accepted'] * 1024:.1f}",
                f"{found['adopted'] * 1024:.1f}",
            )
            for kind, side in (("steady", "serving"), ("old", "old"), ("young", "new")):
                loops.add(f"{name}: {side}", *found["stalls"][kind].describe())
            for processes, stall in controls.items():
                stall.merge(measure_machine(processes, 0.1 if options.quick else CONTROL_SECONDS))
    for processes, stall in controls.items():
        loops.add(f"arithmetic, {processes} at a time", *stall.describe())
    publish("transfer", [clients, loops], None, options, before)


if __name__ == "__main__":
    run(parse(__doc__))
