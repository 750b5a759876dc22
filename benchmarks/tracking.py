"""What tracking costs in steady state: our servers beside those of asyncio, uvloop, anyio and trio themselves.

A tracked server and a bare one run at the same time, each a process of its own on one processor, and are loaded in
turn from this process on another one. So a pair of measurements is milliseconds apart, whatever else the machine does.
A bare server beside another bare one shows how much of a difference is noise: run `python -m benchmarks.tracking`.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .bench import Options, Subject, Table, cpu_seconds, describe_machine, parse, publish, running, spread
from .subject import HOST, Style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE = b"GET / HTTP/1.1 Host: localhost User-Agent: benchmark Accept: */*\n"

# How many clients there are: each turn sends one request for each of them, and then reads the answers.
CLIENTS = 16

# No answer takes longer, seconds.
PATIENCE_SECONDS = 30.0

AIM_PERCENT = 1.0


@dataclass(frozen=True, slots=True)
class Extent:
    """How long to measure: pairs of processes, pairs of slices with each, and seconds of a slice."""

    processes: int
    slices: int
    seconds: float


FULL = Extent(processes=4, slices=6, seconds=0.12)
QUICK = Extent(processes=1, slices=2, seconds=0.02)


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared: a loop, and what the service is written with on it."""

    loop: str
    style: Style
    is_control: bool = False  # bare beside bare

    @property
    def name(self) -> str:
        """What it is called in the table."""
        kind = {Style.SAFE_STREAMS: "streams in until_draining"}.get(self.style, self.style.value)
        return f"{kind} on {self.loop}" + (", bare beside bare" if self.is_control else "")


CASES = [
    Case("asyncio", Style.STREAMS),
    Case("asyncio", Style.PROTOCOL),
    Case("uvloop", Style.STREAMS),
    Case("uvloop", Style.PROTOCOL),
    Case("asyncio", Style.ANYIO),
    Case("trio", Style.ANYIO),
    Case("trio", Style.TRIO),
    Case("asyncio", Style.SAFE_STREAMS),
    Case("uvloop", Style.SAFE_STREAMS),
    Case("asyncio", Style.PROTOCOL, is_control=True),
    Case("uvloop", Style.PROTOCOL, is_control=True),
]

# One of each loop, to show that it works.
QUICK_CASES = [CASES[0], CASES[3], CASES[6]]


class KeepAlive:
    """Requests on connections that stay open."""

    name = "keep-alive"

    def __init__(self, port: int) -> None:
        self._sockets = [connect(port) for _ in range(CLIENTS)]

    def turn(self) -> None:
        """Make a request on each connection."""
        for sock in self._sockets:
            sock.sendall(LINE)
        for sock in self._sockets:
            read_answer(sock)

    def close(self) -> None:
        """Close the connections."""
        for sock in self._sockets:
            sock.close()


class Connecting:
    """A connection for each request."""

    name = "connect, request, close"

    def __init__(self, port: int) -> None:
        self._port = port

    def turn(self) -> None:
        """Make a request on as many new connections."""
        sockets = [connect(self._port) for _ in range(CLIENTS)]
        for sock in sockets:
            sock.sendall(LINE)
        for sock in sockets:
            read_answer(sock)
            sock.close()

    def close(self) -> None:
        """Leave nothing: nothing is open between two turns."""


WORKLOADS: tuple[type[KeepAlive | Connecting], ...] = (KeepAlive, Connecting)


@dataclass(slots=True)
class Rate:
    """What one slice came to."""

    per_second: float
    cpu_each: float  # seconds of the server's processor time for each request


@dataclass(slots=True)
class Comparison:
    """Pairs of slices: of the bare server, and of the tracked one right beside it."""

    case: Case
    workload: str
    pairs: list[tuple[Rate, Rate]] = field(default_factory=list)

    @property
    def throughput(self) -> tuple[float, float, float]:
        """By how many percent the tracked one serves less: the median of the pairs, and its quartiles."""
        return spread([(1 - tracked.per_second / bare.per_second) * 100 for bare, tracked in self.pairs])

    @property
    def cpu(self) -> tuple[float, float, float]:
        """By how many percent the tracked one takes more of the processor for each request, likewise."""
        return spread([(tracked.cpu_each / bare.cpu_each - 1) * 100 for bare, tracked in self.pairs])


def connect(port: int) -> socket.socket:
    """Open a connection."""
    sock = socket.create_connection((HOST, port), timeout=PATIENCE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_answer(sock: socket.socket) -> None:
    """Read an answer to its end.

    Raises:
        RuntimeError: it is none.
    """
    answer = sock.recv(len(LINE))
    while len(answer) < len(LINE) and (piece := sock.recv(len(LINE) - len(answer))):
        answer += piece
    if answer != LINE:
        raise RuntimeError(f"the server answered {answer!r}")


def measure(load: KeepAlive | Connecting, subject: Subject, seconds: float) -> Rate:
    """Load a server for a slice of time."""
    turns = 0
    used = cpu_seconds(subject.pid)
    begun = time.perf_counter()
    elapsed = 0.0
    # Once at least, however long this process has waited for its turn before it comes so far.
    while elapsed < seconds:
        load.turn()
        turns += 1
        elapsed = time.perf_counter() - begun
    # The client has its answers, and the server still has connections to close: they count for it all the same.
    return Rate(turns * CLIENTS / elapsed, (cpu_seconds(subject.pid) - used) / (turns * CLIENTS))


def compare(case: Case, extent: Extent) -> list[Comparison]:
    """Measure a case under each workload, on several pairs of processes: one process differs from the next by luck."""
    comparisons = [Comparison(case, workload.name) for workload in WORKLOADS]
    arguments = ["--loop", case.loop, "--style", case.style]
    for _ in range(extent.processes):
        with ExitStack() as stack:
            bare = stack.enter_context(running(*arguments, "--bare"))
            tracked = stack.enter_context(running(*arguments, *(["--bare"] if case.is_control else [])))
            keep_apart([bare.pid, tracked.pid])
            for comparison, workload in zip(comparisons, WORKLOADS, strict=True):
                subjects = (bare, tracked)
                loads = [workload(subject.port) for subject in subjects]
                for subject, load in zip(subjects, loads, strict=True):
                    measure(load, subject, extent.seconds)
                for number in range(extent.slices):
                    # Each is the first one half of the time.
                    order = (0, 1) if number % 2 == 0 else (1, 0)
                    rates = {which: measure(loads[which], subjects[which], extent.seconds) for which in order}
                    comparison.pairs.append((rates[0], rates[1]))
                for load in loads:
                    load.close()
    return comparisons


def keep_apart(servers: list[int]) -> None:
    """Give the servers a processor, and the load another one, where there are two."""
    first, *others = sorted(os.sched_getaffinity(0))
    for server in servers:
        os.sched_setaffinity(server, {first})
    if others:
        os.sched_setaffinity(0, others)


def tabulate(comparisons: list[Comparison]) -> Table:
    """Make the table: medians of all pairs, and in brackets the quartiles of what they differ by."""
    table = Table(
        "What tracking costs in steady state",
        ["server", "workload", "requests/s bare", "tracked", "less throughput", "CPU us each, bare", "more CPU each"],
        f"{len(comparisons[0].pairs)} pairs of slices each; median [quartiles]; aim: less than {AIM_PERCENT:g} % of "
        "throughput on keep-alive. The CPU time of the server is the steadier measure.",
    )
    for comparison in comparisons:
        bare = [rates[0] for rates in comparison.pairs]
        tracked = [rates[1] for rates in comparison.pairs]
        table.add(
            comparison.case.name,
            comparison.workload,
            f"{spread([rate.per_second for rate in bare])[0]:,.0f}",
            f"{spread([rate.per_second for rate in tracked])[0]:,.0f}",
            describe(comparison.throughput),
            f"{spread([rate.cpu_each * 1e6 for rate in bare])[0]:.1f}",
            describe(comparison.cpu),
        )
    return table


def describe(percents: tuple[float, float, float]) -> str:
    """Write a median with its quartiles."""
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*percents)


def plot(comparisons: list[Comparison]) -> Figure:
    """Draw what each server takes more of the processor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.35 * len(comparisons) + 1.5), layout="constrained")
    axes = figure.subplots()
    for row, comparison in enumerate(comparisons):
        middle, low, high = comparison.cpu
        axes.plot([low, high], [row, row], color="tab:gray")
        axes.plot([middle], [row], "o", color="tab:blue" if comparison.workload == KeepAlive.name else "tab:orange")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(AIM_PERCENT, color="tab:red", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(comparisons)), [f"{each.case.name}: {each.workload}" for each in comparisons])
    axes.invert_yaxis()
    axes.set_xlabel("more CPU time for each request than without tracking, % (median, quartiles)")
    return figure


def run(options: Options) -> None:
    """Measure all cases, and say what came out."""
    before = describe_machine()
    extent = QUICK if options.quick else FULL
    affinity = os.sched_getaffinity(0)
    comparisons: list[Comparison] = []
    for case in QUICK_CASES if options.quick else CASES:
        if options.only in case.name:
            comparisons += compare(case, extent)
            os.sched_setaffinity(0, affinity)
    publish(
        "tracking", [tabulate(comparisons)], plot(comparisons) if options.output is not None else None, options, before
    )


if __name__ == "__main__":
    run(parse(__doc__))
