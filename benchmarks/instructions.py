"""How many instructions a request costs beside the bare server: run `python -m benchmarks.instructions`.

Instructions repeat where times do not, on a busy machine too. They are counted by Valgrind's callgrind, in user space,
of the processes that serve. Ours is one process (`benchmarks.alone`): Valgrind does not know the system calls by which
an anchor watches its workers. It ends with status 1 where a ratio is more than 5 % above its aim. Echoes have no aim
here: most of their time is the kernel's, which is not counted.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import tracking
from .bench import LIMIT_SECONDS, PROJECT, Options, Table, describe_machine, parse, publish
from .hello import BODY
from .pairs import WORKLOADS, Exchange, Workload
from .steady import CASES, H11, OURS_H11, QUIET, TRUSTS_NOBODY, UVICORN, Case, find_port, processes, wait_until_served
from .subject import Style
from .tracking import LINE

# What a ratio may be above its aim.
TOLERANCE = 1.05

# A simulated process is some fifty times slower: it starts in seconds.
START_SECONDS = 10 * LIMIT_SECONDS

CLIENTS = 4
HTTP = Exchange(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", BODY, CLIENTS)
ECHO = Exchange(LINE, LINE, CLIENTS)

# Requests before any are counted, and those that are, in turns of all clients.
WARM_UP_TURNS = 100
TURNS = 100

VALGRIND = ("valgrind", "--tool=callgrind", "--trace-children=yes", "--instr-atstart=no", "--quiet")


@dataclass(frozen=True, slots=True)
class Pair:
    """A bare server, and ours in one process.

    Attributes:
        name: in the table.
        bare: the command of a Python, without the port.
        ours: likewise.
        exchange: what clients ask for.
        aims: the ratios that are aimed at, for kept connections and for new ones; None where there is no aim.
    """

    name: str
    bare: Sequence[str]
    ours: Sequence[str]
    exchange: Exchange
    aims: tuple[float | None, float | None]


def pair_servers(case: Case) -> Pair:
    """Return the pair of one case of ``steady``."""
    bare = case.bare if case.bare[0].startswith("-") else ("-m", *case.bare)
    server, loop = case.name.split()[0], case.name.partition(" on ")[2].partition(",")[0]
    options = [each for each in case.ours if "=" in each]
    ours = ("-m", "benchmarks.alone", server, loop, "{port}", *options)
    return Pair(case.name, bare, ours, HTTP, case.aims)


def pair_plain(case: tracking.Case) -> Pair:
    """Return the pair of one case of ``tracking``."""
    ours = ("-m", "benchmarks.subject", "--loop", case.loop, "--style", case.style, "--port", "{port}")
    return Pair(case.name, (*ours, "--bare"), ours, ECHO, (None, None))


UVICORN_H11 = Case(
    "uvicorn (h11) on asyncio, like for like", (*UVICORN, *H11, QUIET, TRUSTS_NOBODY), OURS_H11, (1.03, 1.10)
)
PAIRS = [
    *(pair_servers(case) for case in CASES if case.name.endswith("like for like")),
    pair_servers(UVICORN_H11),
    *(pair_plain(case) for case in tracking.CASES if not case.is_control),
    pair_plain(tracking.Case("asyncio", Style.SAFE_ANYIO)),
    pair_plain(tracking.Case("uvloop", Style.SAFE_ANYIO)),
    pair_plain(tracking.Case("trio", Style.SAFE_TRIO)),
]


@dataclass(frozen=True, slots=True)
class Subject:
    """One server under one workload."""

    command: Sequence[str]
    exchange: Exchange
    workload: Workload


def count(subject: Subject) -> float:
    """Return the instructions of a request.

    Raises:
        RuntimeError: the server does not serve.
    """
    directory = tempfile.mkdtemp(prefix="instructions-")
    port = find_port()
    command = [word.format(port=port) for word in subject.command]
    server = subprocess.Popen(
        [*VALGRIND, f"--callgrind-out-file={directory}/out.%p", sys.executable, *command],
        cwd=PROJECT,
        env={**os.environ, "PORT": str(port), "PYTHONPATH": str(PROJECT), "RUNTIME_DIRECTORY": directory},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_served(port, server, subject.exchange, START_SECONDS)
        load = subject.workload(port, subject.exchange)
        for _ in range(WARM_UP_TURNS):
            load.turn()
        served = list(processes(server.pid))
        switch(served, "on")
        for _ in range(TURNS):
            load.turn()
        switch(served, "off")
        load.close()
    finally:
        stop(server)
    written = [path.read_text() for path in Path(directory).glob("out.*")]
    shutil.rmtree(directory)
    # A process that served nothing writes no total, or 0.
    totals = [int(number) for text in written for number in re.findall(r"^totals: (\d+)", text, re.MULTILINE)]
    return sum(totals) / (TURNS * CLIENTS)


def switch(pids: Sequence[int], state: str) -> None:
    """Begin to count in these processes, or end it."""
    for pid in pids:
        # Processes that are not simulated any more have nothing to switch.
        command = ["callgrind_control", "-i", state, str(pid)]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server, which writes its counts then."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def measure(options: Options) -> tuple[Table, list[str]]:
    """Count all cases; return the table, and what is above its limit."""
    # One of them shows that it holds.
    pairs = [pair for pair in PAIRS[: 1 if options.quick else None] if options.only in pair.name]
    subjects = [
        Subject(command, pair.exchange, load)
        for pair in pairs
        for load in WORKLOADS
        for command in (pair.bare, pair.ours)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        counts = iter(list(pool.map(count, subjects)))
    table = Table(
        "Instructions of a request while nothing happens",
        ["server", "workload", "thousands, bare", "ours", "ratio", "aim"],
        f"Callgrind, user space, {TURNS * CLIENTS} requests each; ours in one process.",
    )
    above = []
    for pair in pairs:
        for workload, aim in zip(WORKLOADS, pair.aims, strict=True):
            bare, ours = next(counts), next(counts)
            cells = [
                f"{bare / 1000:.1f}",
                f"{ours / 1000:.1f}",
                f"{ours / bare:.3f}",
                "-" if aim is None else f"{aim:.2f}",
            ]
            table.add(pair.name, workload.name, *cells)
            if aim is not None and ours / bare > aim * TOLERANCE:
                above.append(f"{pair.name}, {workload.name}: {ours / bare:.3f} times the bare server, aim {aim:.2f}")
    return table, above


def main() -> None:
    """Count, print, and compare with the aims."""
    options = parse(__doc__)
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed: it counts the instructions")
    before = describe_machine()
    table, above = measure(options)
    publish("instructions", [table], None, options, before)
    if above:
        sys.exit("\n".join(above))


if __name__ == "__main__":
    main()
