"""What the benchmarks share: subjects that run, what the kernel says of a process, and tables of what was measured.

Nothing here decides what to measure.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Options", "Subject", "Table", "cpu_seconds", "parse", "publish", "running", "spread"]

PROJECT = Path(__file__).resolve().parent.parent

# What a subject may take over anything before something is wrong, seconds; gigabytes of memory included.
LIMIT_SECONDS = 60.0


class Subject:
    """A subject, and the generations that follow it.

    Attributes:
        started_at: the moment before the first process was started, in seconds of CLOCK_MONOTONIC.
        served_at: when it served.
        port: where it serves, on 127.0.0.1.
        pid: the newest generation.
    """

    def __init__(self, *options: str) -> None:
        self._pidfds: list[int] = []
        self._facts: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.started_at = time.monotonic()
        self._first = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.subject", *options],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        self.port, self.pid = 0, 0
        self.served_at = 0.0

    def expect(self, event: str) -> dict[str, Any]:
        """Wait for the next thing it tells, which has to be this.

        Raises:
            RuntimeError: it is something else, or the subject has ended.
        """
        fact = self._facts.get(timeout=LIMIT_SECONDS)
        if fact is None or fact["event"] != event:
            raise RuntimeError(f"expected {event!r} of the subject, and got {fact!r}")
        if event == "serving":
            self.port, self.pid, self.served_at = fact["port"], fact["pid"], fact["at"]
        return fact

    def ask_to_restart(self) -> float:
        """Send the signal; return when."""
        asked_at = time.monotonic()
        os.kill(self.pid, signal.SIGHUP)
        return asked_at

    def close(self) -> None:
        """Kill all there is of it, and wait until it is gone."""
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):  # an earlier generation that has left
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        self._first.kill()
        self._first.wait()
        # Its end is the end of the pipe, which all generations hold.
        self._listener.join(LIMIT_SECONDS)
        assert self._first.stdout is not None
        self._first.stdout.close()

    def _listen(self) -> None:
        assert self._first.stdout is not None
        for line in self._first.stdout:
            fact = json.loads(line)
            if fact["event"] == "serving":
                # It may be gone only if it was killed, and then nobody asks for it any more.
                with contextlib.suppress(ProcessLookupError):
                    self._pidfds.append(os.pidfd_open(fact["pid"]))
            self._facts.put(fact)
        self._facts.put(None)


@contextlib.contextmanager
def running(*options: str) -> Iterator[Subject]:
    """Start a subject, yield it when it serves, and leave nothing of it."""
    subject = Subject(*options)
    try:
        subject.expect("serving")
        yield subject
    finally:
        subject.close()


def cpu_seconds(pid: int) -> float:
    """Return what a process has used of the processor so far, to the nanosecond and over all of its threads."""
    # The clock that clock_getcpuclockid(3) names; /proc/PID/stat counts hundredths of seconds.
    return time.clock_gettime((~pid << 3) | 2)


def context_switches(pid: int) -> tuple[int, int]:
    """Return the voluntary and the involuntary context switches of a process so far, over its present threads."""
    voluntary = involuntary = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        # A thread may end between the listing and the reading.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in status.read_text().splitlines():
                name, _, value = line.partition(":")
                if name == "voluntary_ctxt_switches":
                    voluntary += int(value)
                elif name == "nonvoluntary_ctxt_switches":
                    involuntary += int(value)
    return voluntary, involuntary


def memory(pid: int) -> tuple[float, float]:
    """Return the proportional and the private memory of a process, in megabytes."""
    sizes: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        sizes[name] = int(value) / 1024
    return sizes["Pss:"], sizes["Private_Clean:"] + sizes["Private_Dirty:"]


@dataclass(slots=True)
class Table:
    """What was measured, as it is printed: Markdown, in columns."""

    title: str
    columns: Sequence[str]
    note: str = ""
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row, a cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)

    def __str__(self) -> str:
        rows = [self.columns, *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.columns))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        note = f"\n{self.note}\n" if self.note else ""
        return f"### {self.title}\n{note}\n" + "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles around it."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return middle, low, high


@dataclass(frozen=True, slots=True)
class Options:
    """What every benchmark is asked for."""

    quick: bool
    output: Path | None
    only: str


def parse(description: str | None) -> Options:
    """Read a benchmark's command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="show that it works, in seconds; the numbers mean nothing")
    parser.add_argument("--output", type=Path, help="a directory for the tables and a plot, which needs matplotlib")
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    return Options(**vars(parser.parse_args()))


def describe_machine() -> str:
    """Say where, and how disturbed, this runs."""
    return (
        f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} "
        f"{platform.release().split('-')[0]}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.2f}"
    )


def publish(name: str, tables: Sequence[Table], figure: Figure | None, options: Options, before: str) -> None:
    """Print the tables; with an output directory, write them and the plot there."""
    text = "\n".join(str(table) for table in tables)
    text += f"\nMachine: {before} before, {os.getloadavg()[0]:.2f} after.\n"
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.md").write_text(text)
        kept = {
            "machine": before,
            "date": datetime.now(UTC).date().isoformat(),
            "tables": [dataclasses.asdict(table) for table in tables],
        }
        (options.output / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        if figure is not None:
            figure.savefig(options.output / f"{name}.png", dpi=120)
