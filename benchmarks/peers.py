"""What a restart costs with other servers, each restarted as its documentation says, side by side in one run.

One application, one load: new connections at random moments, clients that keep theirs, and slow requests. The load
runs on the same processors as what it measures: compare only the rows of one table.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from .bench import Options, Table, describe_machine, parse, publish
from .load import HOST, Counts, Http, Load, Mix, percentile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECT = Path(__file__).resolve().parent.parent

MODULE = (sys.executable, "-m")

# What a server may take over its start, and a restart to its first answer, before something is wrong.
LIMIT_SECONDS = 30.0

# gunicorn's documentation leaves it to who restarts to know when the new master serves. It is guessed, generously.
GUESS_SECONDS = 2.5

# Marks what a server has started, so that it is found at the end, whoever its parent is by then.
MARK = "PEERS_MARK"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to measure.

    Attributes:
        restarts: of each peer.
        import_seconds: how long the application takes to import.
        quiet: how long to load on after a restart was done, so that what it costs later is seen; longer than any
            request; seconds.
        mix: the clients.
    """

    restarts: int
    import_seconds: float
    quiet: float
    mix: Mix


FULL = Extent(
    restarts=3,
    import_seconds=1.0,
    quiet=4.0,
    mix=Mix(new_per_second=100, keep_alive=30, pause=0.1, slow=10, slow_seconds=(0.3, 3.0), silent=0),
)
QUICK = Extent(
    restarts=1,
    import_seconds=0.1,
    quiet=0.3,
    mix=Mix(new_per_second=30, keep_alive=4, pause=0.1, slow=2, slow_seconds=(0.05, 0.2), silent=0),
)


class Running:
    """One server that runs.

    Attributes:
        port: where.
        directory: for its files.
        process: what was started last.
    """

    def __init__(self, peer: Peer, port: int, directory: Path, extent: Extent) -> None:
        self.port = port
        self.directory = directory
        self._peer = peer
        self._mark = str(uuid.uuid4())
        self._environment = {
            **os.environ,
            MARK: self._mark,
            "HOME": str(directory),
            "PYTHONPATH": str(PROJECT),
            "PYTHONWARNINGS": "ignore",  # some of them use what is deprecated
            "RELEASE_FILE": str(directory / "release"),
            "IMPORT_SECONDS": str(extent.import_seconds),
        }
        self.start()

    def start(self) -> None:
        """Start it."""
        command = self._peer.command(self)
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def run(self, *command: str) -> None:
        """Run a command to its end.

        Raises:
            RuntimeError: it failed.
        """
        process = await asyncio.create_subprocess_exec(
            *MODULE, *command, env=self._environment, stdout=subprocess.DEVNULL
        )
        if await asyncio.wait_for(process.wait(), LIMIT_SECONDS):
            raise RuntimeError(f"{' '.join(command)} failed")

    def end(self) -> None:
        """Kill all that was started."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.AccessDenied, psutil.NoSuchProcess):
                if process.environ().get(MARK) == self._mark:
                    process.kill()
        self.process.wait()


@dataclass(frozen=True, slots=True)
class Peer:
    """A server, and how its documentation says that it is restarted.

    Attributes:
        name: for the table.
        module: what has to be installed.
        command: starts it.
        restart: returns when it is done, as far as it can be told.
        is_quick: whether a quick run has it.
    """

    name: str
    module: str
    command: Callable[[Running], Sequence[str]]
    restart: Callable[[Running], Awaitable[None]]
    is_quick: bool = False


@dataclass(slots=True)
class Result:
    """What the restarts of one peer have cost."""

    name: str
    counts: Counts
    first_answers: list[float] = field(default_factory=list)  # by the new code, seconds after it was asked for
    calm: float = 0.0  # the longest latency before the first restart


def send(number: signal.Signals) -> Callable[[Running], Awaitable[None]]:
    """Restart by a signal, which says nothing of when that is done."""

    async def restart(running: Running) -> None:
        running.process.send_signal(number)

    return restart


async def restart_ecdysis(running: Running) -> None:
    """Restart, and wait until that is final."""
    await running.run("ecdysis_async.cli", "restart", "--control", str(running.directory / "control"))


async def upgrade_gunicorn(running: Running) -> None:
    """Start a new master, guess when it serves, and end the old one."""
    masters = running.directory / "pid"
    old = int(masters.read_text())
    os.kill(old, signal.SIGUSR2)
    await asyncio.sleep(GUESS_SECONDS)
    os.kill(old, signal.SIGTERM)


async def stop_and_start(running: Running) -> None:
    """Stop, and start again."""
    running.process.terminate()
    await asyncio.to_thread(running.process.wait)
    running.start()


def gunicorn(running: Running) -> Sequence[str]:
    """Serve by gunicorn, with uvicorn's worker."""
    bind = f"--bind={HOST}:{running.port}"
    # Its USR2 does not work where it was started by `python -m`.
    program = str(Path(sys.executable).with_name("gunicorn"))
    return [program, "benchmarks.asgi:app", bind, "--worker-class=uvicorn.workers.UvicornWorker", "--pid=pid"]


def uvicorn(running: Running) -> Sequence[str]:
    """Serve by uvicorn."""
    return [*MODULE, "uvicorn", "benchmarks.asgi:app", "--host", HOST, "--port", str(running.port), "--no-access-log"]


PEERS = [
    Peer(
        "ecdysis run (uvicorn), ecdysis restart",
        "uvicorn",
        lambda running: [
            *(*MODULE, "ecdysis_async.cli", "run", "benchmarks.asgi:app", "--bind", f"{HOST}:{running.port}"),
            *("--control", str(running.directory / "control"), "--no-access-log"),
        ],
        restart_ecdysis,
        is_quick=True,
    ),
    Peer("gunicorn (uvicorn's worker), USR2, 2.5 s, TERM", "gunicorn", gunicorn, upgrade_gunicorn),
    Peer("gunicorn (uvicorn's worker), HUP", "gunicorn", gunicorn, send(signal.SIGHUP)),
    Peer(
        "uvicorn --workers 2, HUP", "uvicorn", lambda running: [*uvicorn(running), "--workers=2"], send(signal.SIGHUP)
    ),
    Peer("uvicorn, stop and start", "uvicorn", uvicorn, stop_and_start, is_quick=True),
    Peer(
        "hypercorn, HUP",
        "hypercorn",
        lambda running: [*MODULE, "hypercorn", "benchmarks.asgi:app", "--bind", f"{HOST}:{running.port}"],
        send(signal.SIGHUP),
    ),
    Peer(
        "granian, HUP",
        "granian",
        lambda running: [
            *(
                *MODULE,
                "granian",
                "benchmarks.asgi:app",
                "--interface=asgi",
                "--host",
                HOST,
                "--port",
                str(running.port),
            ),
        ],
        send(signal.SIGHUP),
    ),
]


async def measure(peer: Peer, extent: Extent) -> Result:
    """Load a peer, and restart it several times."""
    with tempfile.TemporaryDirectory() as name, reserved_port() as port:
        release = Path(name) / "release"
        release.write_text("1")
        running = Running(peer, port, Path(name), extent)
        try:
            await wait_until_serving(running)
            load = Load(port, extent.mix, Http())
            result = Result(peer.name, load.counts)
            async with asyncio.TaskGroup() as task_group:
                task_group.create_task(load.run())
                await load.wait_for_end(extent.quiet)
                result.calm = percentile(load.counts.latencies, 100)
                for number in range(2, extent.restarts + 2):
                    release.write_text(str(number))
                    asked_at = time.monotonic()
                    first_answer = task_group.create_task(wait_for_release(load, number))
                    await peer.restart(running)
                    result.first_answers.append(await first_answer - asked_at)
                    await load.wait_for_end(extent.quiet)
                load.end()
        finally:
            running.end()
    return result


async def wait_for_release(load: Load, number: int) -> float:
    """Return when it gives its first answer: never, if that takes too long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIMIT_SECONDS):
            while not load.counts.generations[number]:
                await load.wait_for_end(0.001)
            return time.monotonic()
    return math.inf


async def wait_until_serving(running: Running) -> None:
    """Wait until something listens, for whom an answer is made."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while True:
            if running.process.poll() is not None:
                raise RuntimeError((running.directory / "log").read_text())
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(HOST, running.port)
                writer.write(Http().encode("echo", "hello"))
                answer = await Http().read(reader)
                writer.close()
                if answer:
                    return
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Return a port that the kernel gives to nobody else, and that a server may still listen on.

    Two sockets with SO_REUSEADDR may be bound to it, if only one of them listens: socket(7).
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        yield holder.getsockname()[1]


def tabulate(results: Sequence[Result], extent: Extent) -> Table:
    """Make the table."""
    mix = extent.mix
    table = Table(
        "A restart, with this and with that",
        [
            "server, and how it is restarted",
            "restarts",
            "failed per restart",
            "which",
            "first answer by new code, ms",
            "longest answer without restart, ms",
            "with, ms",
            "closed without a word, per restart",
            "by Connection: close",
        ],
        f"{mix.new_per_second:g} new connections a second, {mix.keep_alive} clients that keep theirs and pause for up "
        f"to {mix.pause * 1000:g} ms, {mix.slow} whose requests take {mix.slow_seconds[0]:g} to "
        f"{mix.slow_seconds[1]:g} s; the import takes {extent.import_seconds:g} s, the clients' own processor time is "
        "in all rows. Connections that were closed with no request in flight were opened again, and are no failures.",
    )
    for result in results:
        counts, restarts = result.counts, len(result.first_answers)
        table.add(
            result.name,
            str(restarts),
            f"{counts.failures.total() / restarts:.1f}",
            ", ".join(f"{number} {failure}" for failure, number in counts.failures.items()) or "-",
            milliseconds(percentile(result.first_answers, 50)),
            f"{result.calm * 1000:.0f}",
            f"{percentile(counts.latencies, 100) * 1000:.0f}",
            f"{counts.silent_closed / restarts:.1f}",
            f"{(counts.reconnects - counts.silent_closed) / restarts:.1f}",
        )
    return table


def milliseconds(seconds: float) -> str:
    """Write when something came, if it did."""
    return f"{seconds * 1000:.0f}" if math.isfinite(seconds) else "never"


def plot(results: Sequence[Result]) -> Figure:
    """Draw what fails, when the new code answers, and how long the longest answer takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    columns = {
        "Failed requests per restart": [each.counts.failures.total() / len(each.first_answers) for each in results],
        "First answer by new code, ms": [percentile(each.first_answers, 50) * 1000 for each in results],
        "Longest answer, ms": [percentile(each.counts.latencies, 100) * 1000 for each in results],
    }
    for axes, (title, values) in zip(figure.subplots(1, len(columns), sharey=True), columns.items(), strict=True):
        bars = axes.barh([each.name for each in results], values)
        axes.bar_label(bars, fmt="%.3g")
        axes.set_xscale("symlog")
        axes.set_title(title, fontsize="medium")
        axes.invert_yaxis() if axes.get_subplotspec().is_first_col() else None
    return figure


def run(options: Options) -> None:
    """Measure those that are installed, and say what came out."""
    before = describe_machine()
    extent = QUICK if options.quick else FULL
    peers = [peer for peer in PEERS if options.only in peer.name and (peer.is_quick or not options.quick)]
    missing = [peer.name for peer in peers if importlib.util.find_spec(peer.module) is None]
    results = [asyncio.run(measure(peer, extent)) for peer in peers if peer.name not in missing]
    if missing:
        print(f"Not installed: {', '.join(missing)}.\n")
    figure = plot(results) if options.output is not None else None
    publish("peers", [tabulate(results, extent)], figure, options, before)


if __name__ == "__main__":
    run(parse(__doc__))
