"""What a restart costs: the accept gap, the time until the new generation serves, and the stalls of the old loop.

Each beside a baseline from the same run, in turns: clients of a service that is not restarted; the same service started
afresh, with an ``Ecdysis`` and without one; the loop of a service that nobody restarts, and one whose successor is
forked. Run `python -m benchmarks.restart`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ecdysis_async import Phase, RestartReport

from .bench import (
    Options,
    Subject,
    Table,
    context_switches,
    describe_machine,
    memory,
    parse,
    publish,
    running,
)
from .load import percentile
from .subject import BEAT_SECONDS, HOST, LOOPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE = b"hello\n"

# No answer takes longer, seconds.
PATIENCE_SECONDS = 30.0

GAP_AIM_MS = 2.0
START_AIM_MS = 30.0
STALL_AIM_MS = 5.0

# Until the successor serves; what follows is the probation.
BEFORE_SERVING = (Phase.START, Phase.INITIALISE, Phase.PAUSE, Phase.COMMIT)


@dataclass(frozen=True, slots=True)
class Extent:
    """How often to measure each of the three, with how much memory, in megabytes, and how long to let a start settle.

    What a start leaves behind for a while, such as the end of the process before it, is no part of what comes next.
    """

    loops: Sequence[str]
    quiet: float  # seconds
    restarts: int
    starts: int
    stalls: int
    residents: Sequence[int]


FULL = Extent(loops=LOOPS, quiet=0.2, restarts=30, starts=8, stalls=3, residents=(50, 1024, 4096))
QUICK = Extent(loops=("asyncio", "trio"), quiet=0.05, restarts=2, starts=1, stalls=1, residents=(50,))


class Caller(threading.Thread):
    """A client that connects, asks and reads its answer, again and again.

    Attributes:
        calls: when each one began and how long it took to its answer, in seconds.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.calls: list[tuple[float, float]] = []
        self._port = port
        self._is_over = threading.Event()
        self._error: OSError | RuntimeError | None = None

    def run(self) -> None:
        try:
            while not self._is_over.is_set():
                begun = time.monotonic()
                with socket.create_connection((HOST, self._port), timeout=PATIENCE_SECONDS) as sock:
                    sock.sendall(LINE)
                    if sock.recv(len(LINE)) != LINE:
                        raise RuntimeError("a restart has lost a connection")
                    self.calls.append((begun, time.monotonic() - begun))
        except (OSError, RuntimeError) as error:
            self._error = error

    def end(self) -> None:
        """Stop calling.

        Raises:
            OSError, RuntimeError: a call has failed.
        """
        self._is_over.set()
        self.join()
        if self._error is not None:
            raise self._error

    def longest(self, since: float, until: float) -> float:
        """Return how long the longest call took that has begun between two moments."""
        return max(seconds for begun, seconds in self.calls if since <= begun <= until)


@dataclass(slots=True)
class Gaps:
    """Accept gaps on one loop, and the longest calls with a restart and, as long before it, without; in seconds."""

    loop: str
    gaps: list[float] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)
    restarted: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Starts:
    """Starts on one loop, from the exec to where it serves, in seconds."""

    loop: str
    bare: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Stalls:
    """What the old process went through, with so much memory: a row for each time it was measured."""

    loop: str
    resident: int
    is_forked: bool
    calm: list[float] = field(default_factory=list)  # the longest lateness of its loop, seconds
    restarted: list[float] = field(default_factory=list)
    unhindered: list[float] = field(default_factory=list)  # the same, without what it waited for a processor
    calm_switches: list[tuple[int, int]] = field(default_factory=list)
    switches: list[tuple[int, int]] = field(default_factory=list)
    shared: list[float] = field(default_factory=list)  # proportional memory of both processes together, megabytes
    private: list[tuple[float, float]] = field(default_factory=list)  # of the old one and of the new one


def measure_gaps(loop: str, extent: Extent) -> Gaps:
    """Restart a service that is called all the time."""
    result = Gaps(loop)
    with running("--loop", loop, "--style", style_on(loop)) as subject:
        caller = Caller(subject.port)
        caller.start()
        try:
            for _ in range(extent.restarts):
                asked_at, left_at, report = restart(subject)
                assert report.accept_gap is not None
                result.gaps.append(report.accept_gap)
                # A window as long in which nothing happens; before it, some time for the old process to be gone.
                time.sleep(extent.quiet / 3 + left_at - asked_at)
                now = time.monotonic()
                result.restarted.append(caller.longest(asked_at, left_at))
                result.calm.append(caller.longest(now - (left_at - asked_at), now))
        finally:
            caller.end()
    return result


def restart(subject: Subject) -> tuple[float, float, RestartReport]:
    """Restart a subject; return when it was asked to, when the old generation had left, and the report."""
    asked_at = subject.ask_to_restart()
    subject.expect("serving")
    subject.expect("draining")
    left = subject.expect("left")
    return asked_at, left["at"], RestartReport.from_json(left["report"])


def measure_starts(loop: str, extent: Extent) -> Starts:
    """Start the service without an ``Ecdysis``, with one, and by a restart, in turns."""
    result = Starts(loop)
    arguments = ["--loop", loop, "--style", style_on(loop)]
    for _ in range(extent.starts):
        with running(*arguments, "--bare") as subject:
            result.bare.append(subject.served_at - subject.started_at)
        with running(*arguments) as subject:
            result.fresh.append(subject.served_at - subject.started_at)
            time.sleep(extent.quiet)
            _, _, report = restart(subject)
            result.restarts.append(sum(report.phases[phase] for phase in BEFORE_SERVING))
    return result


def measure_stalls(loop: str, resident: int, extent: Extent, *, is_forked: bool = False) -> Stalls:
    """Restart a service that holds memory, and look at its loop, its context switches and its memory."""
    result = Stalls(loop, resident, is_forked)
    arguments = ["--loop", loop, "--style", style_on(loop), "--resident", str(resident), "--beats"]
    for _ in range(extent.stalls):
        with running(*arguments, *(["--fork"] if is_forked else [])) as subject:
            old = subject.pid
            # A connection that the old generation still has keeps it alive until it was looked at.
            with socket.create_connection((HOST, subject.port)) as sock:
                sock.sendall(LINE)
                sock.recv(len(LINE))
                time.sleep(extent.quiet)
                switches = [context_switches(old)]
                asked_at = subject.ask_to_restart()
                subject.expect("serving")
                settled_at = subject.expect("draining")["at"]
                switches.append(context_switches(old))
                proportional, private = zip(memory(old), memory(subject.pid), strict=True)
                # Draining, its loop still beats: the same process without a restart, for as long.
                switches.append(context_switches(old))
                calm_at = time.monotonic()
                time.sleep(settled_at - asked_at)
                switches.append(context_switches(old))
                calm_until = time.monotonic()
            beats = subject.expect("left")["beats"]
        during = [beat for beat in beats if asked_at <= beat[0] <= settled_at]
        result.restarted.append(max(late for _, late, _ in during))
        result.unhindered.append(max(late - waited for _, late, waited in during))
        result.calm.append(max(late for at, late, _ in beats if calm_at <= at <= calm_until))
        result.switches.append(difference(switches[0], switches[1]))
        result.calm_switches.append(difference(switches[2], switches[3]))
        result.shared.append(sum(proportional))
        result.private.append(private)
    return result


def difference(before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int]:
    """Return what has been added."""
    return after[0] - before[0], after[1] - before[1]


def style_on(loop: str) -> str:
    """Return what is native to a loop."""
    return "trio" if loop == "trio" else "streams"


def tabulate_gaps(results: Sequence[Gaps]) -> Table:
    """Make the table of the accept gaps."""
    table = Table(
        "The accept gap",
        ["loop", "restarts", "gap p50", "p99", "max", "longest call without restart, p50", "max", "with, p50", "max"],
        f"Milliseconds. One client connects, asks and reads without a pause; its longest call in each restart, and in "
        f"a window as long without one. Aim: p99 under {GAP_AIM_MS:g} ms on an idle machine.",
    )
    for result in results:
        table.add(
            result.loop,
            str(len(result.gaps)),
            *(milliseconds(percentile(result.gaps, percent)) for percent in (50, 99, 100)),
            *(milliseconds(percentile(result.calm, percent)) for percent in (50, 100)),
            *(milliseconds(percentile(result.restarted, percent)) for percent in (50, 100)),
        )
    return table


def tabulate_starts(results: Sequence[Starts]) -> Table:
    """Make the table of the starts."""
    table = Table(
        "From restart() to SERVING",
        ["loop", "times", "bare start", "start with Ecdysis", "restart", "beyond its own start", "beyond the bare one"],
        f"Milliseconds, medians. The bare start is the same program with the same imports, without an Ecdysis. "
        f"Aim: under {START_AIM_MS:g} ms beyond the service's own start.",
    )
    for result in results:
        bare, fresh, again = (percentile(each, 50) for each in (result.bare, result.fresh, result.restarts))
        table.add(
            result.loop,
            str(len(result.restarts)),
            *(milliseconds(each) for each in (bare, fresh, again, again - fresh, again - bare)),
        )
    return table


def tabulate_stalls(results: Sequence[Stalls]) -> Table:
    """Make the table of the stalls."""
    table = Table(
        "The old process during a restart",
        [
            "loop",
            "resident",
            "successor by",
            "stall without restart, p50",
            "max",
            "with, p50",
            "max",
            "less waiting for a processor, max",
            "switches without (forced)",
            "with",
            "private old + new",
            "PSS of both",
        ],
        f"Stalls: by how much a beat of {BEAT_SECONDS * 1000:g} ms came late at the most, milliseconds. Context "
        f"switches: of the old process, in that window. Memory: while both live, megabytes. Aim: no stall over "
        f"{STALL_AIM_MS:g} ms.",
    )
    for result in results:
        old, new = (percentile(each, 50) for each in zip(*result.private, strict=True))
        table.add(
            result.loop,
            f"{result.resident} MB",
            "fork and exec" if result.is_forked else "vfork and exec",
            *(milliseconds(percentile(result.calm, percent)) for percent in (50, 100)),
            *(milliseconds(percentile(result.restarted, percent)) for percent in (50, 100)),
            milliseconds(percentile(result.unhindered, 100)),
            *(describe_switches(each) for each in (result.calm_switches, result.switches)),
            f"{old:.0f} + {new:.0f}",
            f"{percentile(result.shared, 50):.0f}",
        )
    return table


def describe_switches(switches: Sequence[tuple[int, int]]) -> str:
    """Write the medians of all switches, and of those that were forced."""
    voluntary, forced = (percentile(each, 50) for each in zip(*switches, strict=True))
    return f"{voluntary + forced:.0f} ({forced:.0f})"


def milliseconds(seconds: float) -> str:
    """Write a duration."""
    return f"{seconds * 1000:.2f}"


def plot(gaps: Sequence[Gaps], starts: Sequence[Starts], stalls: Sequence[Stalls]) -> Figure:
    """Draw all three, each with its aim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    gap_axes, start_axes, stall_axes = figure.subplots(1, 3)
    draw_points(gap_axes, {f"{gap.loop}\ngap": gap.gaps for gap in gaps}, "ms", "Accept gap")
    gap_axes.axhline(GAP_AIM_MS, color="tab:red", linestyle="--", linewidth=0.8)
    draw_points(
        start_axes,
        {
            f"{start.loop}\n{name}": values
            for start in starts
            for name, values in (("bare", start.bare), ("own", start.fresh), ("restart", start.restarts))
        },
        "ms",
        "From the exec, or restart(), to where it serves",
    )
    draw_points(
        stall_axes,
        {
            f"{stall.loop}, {stall.resident} MB, {name}": values
            for stall in stalls
            for name, values in (
                [("fork", stall.restarted)] if stall.is_forked else [("calm", stall.calm), ("restart", stall.restarted)]
            )
        },
        "ms",
        "Longest stall of the old loop",
    )
    for axes in (gap_axes, start_axes):
        axes.set_ylim(bottom=0)
    stall_axes.set_yscale("log")
    stall_axes.axhline(STALL_AIM_MS, color="tab:red", linestyle="--", linewidth=0.8)
    return figure


def draw_points(axes: Axes, groups: dict[str, list[float]], unit: str, title: str) -> None:
    """Draw each value of each group."""
    for column, values in enumerate(groups.values()):
        axes.plot([column] * len(values), [value * 1000 for value in values], "o", alpha=0.5)
    axes.set_xticks(range(len(groups)), list(groups), fontsize="x-small", rotation=90 if len(groups) > 9 else 0)
    axes.set_ylabel(unit)
    axes.set_title(title)


def run(options: Options) -> None:
    """Measure all three, and say what came out."""
    before = describe_machine()
    extent = QUICK if options.quick else FULL
    gaps: list[Gaps] = []
    starts: list[Starts] = []
    stalls: list[Stalls] = []
    if options.only in "gaps":
        gaps = [measure_gaps(loop, extent) for loop in extent.loops]
    if options.only in "starts":
        starts = [measure_starts(loop, extent) for loop in extent.loops]
    if options.only in "stalls":
        for resident in extent.residents:
            stalls += [measure_stalls(loop, resident, extent) for loop in extent.loops]
            stalls.append(measure_stalls("asyncio", resident, extent, is_forked=True))
    tables = [
        *([tabulate_gaps(gaps)] if gaps else []),
        *([tabulate_starts(starts)] if starts else []),
        *([tabulate_stalls(stalls)] if stalls else []),
    ]
    publish("restart", tables, plot(gaps, starts, stalls) if options.output is not None else None, options, before)


if __name__ == "__main__":
    run(parse(__doc__))
