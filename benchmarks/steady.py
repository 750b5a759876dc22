"""What `ecdysis run` costs while no restart is going on: beside the bare server, in processor time for each request.

Both run at the same time and are loaded in turn from this process, so that a pair of slices is milliseconds apart,
whatever else the machine does. What is compared is the processor time of the whole tree of processes. "As installed"
both have the options that they come with; "like for like" neither looks at proxy headers nor writes an access log. A
second bare server beside the first shows how much of a difference is noise: run `python -m benchmarks.steady`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .bench import LIMIT_SECONDS, PROJECT, Options, Table, cpu_seconds, describe_machine, parse, publish, spread
from .hello import BODY
from .pairs import (
    HOST,
    QUICK,
    WORKLOADS,
    Exchange,
    Extent,
    KeepAlive,
    Workload,
    alternate,
    connect,
    measure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXCHANGE = Exchange(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", BODY, clients=32)

# Requests before anything is measured: the interpreter specialises what runs often.
WARM_UP_TURNS = 30

ASGI = "benchmarks.hello:app"
ECDYSIS = ("ecdysis", "run")
QUIET = "--no-access-log"
TRUSTS_NOBODY = "--no-proxy-headers"


@dataclass(frozen=True, slots=True)
class Case:
    """A bare server, and what `ecdysis run` makes of the same one.

    Attributes:
        name: in the table.
        bare: the command, without the port.
        ours: the options of `ecdysis run`.
        aims: the ratios that are aimed at, for kept connections and for new ones.
    """

    name: str
    bare: Sequence[str]
    ours: Sequence[str]
    aims: tuple[float, float]


# While the other server of a pair is measured, the connections of this one are idle: it shall not close them.
KEPT = "60"
UVICORN = ("uvicorn", ASGI, "--log-level", "warning", "--port", "{port}", "--timeout-keep-alive", KEPT)
HTTPTOOLS = ("--http", "httptools", "--loop", "uvloop")
H11 = ("--http", "h11", "--loop", "asyncio")
AIOHTTP = ("-m", "benchmarks.hello")
HYPERCORN = (
    "hypercorn",
    "-k",
    "uvloop",
    "--log-level",
    "warning",
    "-b",
    f"{HOST}:{{port}}",
    "--keep-alive",
    KEPT,
    ASGI,
)

OURS_HTTPTOOLS = (ASGI, "--timeout-keep-alive", KEPT, "--loop", "uvloop", "--server-option", "http=httptools")
OURS_H11 = (ASGI, "--timeout-keep-alive", KEPT, "--loop", "asyncio", "--server-option", "http=h11")
OURS_AIOHTTP = ("benchmarks.hello:make_aiohttp", "--factory", "--loop", "uvloop")
OURS_HYPERCORN = (ASGI, "--keep-alive", KEPT, "--server", "hypercorn", "--loop", "uvloop")

CASES = [
    Case("uvicorn (httptools) on uvloop, as installed", (*UVICORN, *HTTPTOOLS), OURS_HTTPTOOLS, (1.03, 1.10)),
    Case(
        "uvicorn (httptools) on uvloop, like for like",
        (*UVICORN, *HTTPTOOLS, QUIET, TRUSTS_NOBODY),
        (*OURS_HTTPTOOLS, QUIET, TRUSTS_NOBODY),
        (1.03, 1.10),
    ),
    Case("uvicorn (h11) on asyncio, as installed", (*UVICORN, *H11), OURS_H11, (1.03, 1.10)),
    Case("aiohttp on uvloop, as installed", AIOHTTP, OURS_AIOHTTP, (1.08, 1.10)),
    Case("aiohttp on uvloop, like for like", (*AIOHTTP, QUIET), (*OURS_AIOHTTP, QUIET, TRUSTS_NOBODY), (1.08, 1.10)),
    Case("hypercorn on uvloop, as installed", HYPERCORN, OURS_HYPERCORN, (1.05, 1.10)),
    Case("hypercorn on uvloop, like for like", HYPERCORN, (*OURS_HYPERCORN, QUIET, TRUSTS_NOBODY), (1.05, 1.10)),
]
# One of each kind, to show that it works.
QUICK_CASES = [CASES[0], CASES[4]]
CONTROL = Case("uvicorn (httptools) on uvloop, bare beside bare", CASES[0].bare, (), (1.0, 1.0))


FULL = Extent(processes=2, slices=10, seconds=0.3)


@contextlib.contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Run a server of the command on a port of its own; yield its process, and the port."""
    port = find_port()
    program, *rest = (word.format(port=port) for word in command)
    # The programs of this environment, whatever the path says.
    program = sys.executable if program.startswith("-") else str(Path(sys.executable).parent / program)
    start = [program, *rest] if not command[0].startswith("-") else [program, *command]
    # Its control socket is where no command looks for services of this machine.
    directory = tempfile.mkdtemp(prefix="steady-")
    server = subprocess.Popen(
        start,
        cwd=PROJECT,
        env={**os.environ, "PORT": str(port), "PYTHONPATH": str(PROJECT), "RUNTIME_DIRECTORY": directory},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_served(port, server)
        yield server.pid, port
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(directory)


def find_port() -> int:
    """Return a port that is free, outside of the range that the kernel gives to clients, who might be faster."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind((HOST, port))
            return port


def wait_until_served(
    port: int, server: subprocess.Popen[bytes], exchange: Exchange = EXCHANGE, seconds: float = LIMIT_SECONDS
) -> None:
    """Ask until there is an answer, for so many seconds.

    Raises:
        RuntimeError: there is none.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), connect(port) as sock:
            exchange.ask([sock])
            return
        time.sleep(0.05)
    raise RuntimeError(f"{server.args!r} does not serve")


def processes(pid: int) -> Iterator[int]:
    """Yield a process, and all of its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in children.read_text().split():
                yield from processes(int(child))


def tree_cpu_seconds(pid: int) -> float:
    """Return what a tree of processes has used of the processor so far."""
    spent = 0.0
    for each in processes(pid):
        # A process may end between the listing and the question.
        with contextlib.suppress(OSError):
            spent += cpu_seconds(each)
    return spent


@dataclass(slots=True)
class Comparison:
    """Pairs of slices, in processor seconds for each request: of the bare server, and of ours right beside it."""

    case: Case
    workload: str
    aim: float
    pairs: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ratio(self) -> tuple[float, float, float]:
        """How many times as much ours takes: the median of the pairs, and its quartiles."""
        return spread([ours / bare for bare, ours in self.pairs])


def compare(case: Case, extent: Extent) -> list[Comparison]:
    """Measure a case under each workload, on several pairs of processes: one process differs from the next by luck."""
    comparisons = [Comparison(case, workload.name, aim) for workload, aim in zip(WORKLOADS, case.aims, strict=True)]
    ours = (*ECDYSIS, *case.ours, "--bind", f"{HOST}:{{port}}", "--log-level", "warning") if case.ours else case.bare
    for _ in range(extent.processes):
        with serving(case.bare) as bare, serving(ours) as other:
            for comparison, workload in zip(comparisons, WORKLOADS, strict=True):
                comparison.pairs += load_in_turn((bare, other), workload, extent)
    return comparisons


def load_in_turn(
    servers: tuple[tuple[int, int], tuple[int, int]], workload: Workload, extent: Extent
) -> list[tuple[float, float]]:
    """Load a pair of servers in turn, once both are warm; return the processor time of a request of each."""
    loads = [workload(port, EXCHANGE) for _, port in servers]
    for load in loads:
        for _ in range(WARM_UP_TURNS):
            load.turn()

    def measure_one(which: int) -> float:
        return measure(loads[which], lambda: tree_cpu_seconds(servers[which][0]), extent.seconds).cpu_each

    pairs = alternate(extent.slices, measure_one)
    for load in loads:
        load.close()
    return pairs


def tabulate(comparisons: list[Comparison]) -> Table:
    """Make the table: medians of all pairs, and in brackets the quartiles of the ratio."""
    table = Table(
        "What `ecdysis run` costs while nothing happens",
        ["server", "workload", "CPU us each, bare", "ecdysis run", "ratio", "aim"],
        f"{len(comparisons[0].pairs)} pairs of slices each; processor time of the whole tree of processes; median "
        "[quartiles] of the pairs.",
    )
    for comparison in comparisons:
        bare, ours = (spread([pair[which] * 1e6 for pair in comparison.pairs])[0] for which in (0, 1))
        table.add(
            comparison.case.name,
            comparison.workload,
            f"{bare:.1f}",
            f"{ours:.1f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(*comparison.ratio),
            f"{comparison.aim:.2f}",
        )
    return table


def plot(comparisons: list[Comparison]) -> Figure:
    """Draw the ratios."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.35 * len(comparisons) + 1.5), layout="constrained")
    axes = figure.subplots()
    for row, comparison in enumerate(comparisons):
        middle, low, high = comparison.ratio
        axes.plot([low, high], [row, row], color="tab:gray")
        axes.plot([middle], [row], "o", color="tab:blue" if comparison.workload == KeepAlive.name else "tab:orange")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(comparisons)), [f"{each.case.name}: {each.workload}" for each in comparisons])
    axes.invert_yaxis()
    axes.set_xlabel("processor time of a request, times that of the bare server")
    return figure


def main() -> None:
    """Measure, and print."""
    options: Options = parse(__doc__)
    before = describe_machine()
    extent = QUICK if options.quick else FULL
    cases = QUICK_CASES if options.quick else [*CASES, CONTROL]
    comparisons = [each for case in cases if options.only in case.name for each in compare(case, extent)]
    figure = plot(comparisons) if options.output is not None else None
    publish("steady", [tabulate(comparisons)], figure, options, before)


if __name__ == "__main__":
    main()
