"""What tracking costs in steady state: our servers beside those of asyncio, uvloop, anyio and trio themselves.

A tracked server and a bare one run at the same time, each a process of its own on one processor, and are loaded in
turn from this process on another one. So a pair of measurements is milliseconds apart, whatever else the machine does.
A bare server beside another bare one shows how much of a difference is noise: run `python -m benchmarks.tracking`.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .bench import Options, Subject, Table, cpu_seconds, describe_machine, parse, publish, running, spread
from .pairs import QUICK, WORKLOADS, Exchange, Extent, KeepAlive, Rate, Workload, alternate, measure
from .subject import Style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE = b"GET / HTTP/1.1 Host: localhost User-Agent: benchmark Accept: */*\n"

# Our servers answer a line with itself.
EXCHANGE = Exchange(LINE, LINE, clients=16)

AIM_PERCENT = 1.0


FULL = Extent(processes=4, slices=6, seconds=0.12)


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared: a loop, and what the service is written with on it."""

    loop: str
    style: Style
    is_control: bool = False  # bare beside bare

    @property
    def name(self) -> str:
        """What it is called in the table."""
        style = self.style.value.removeprefix("safe-")
        kind = style if style == self.style.value else f"{style} in until_draining"
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
                comparison.pairs += load_in_turn((bare, tracked), workload, extent)
    return comparisons


def load_in_turn(subjects: tuple[Subject, Subject], workload: Workload, extent: Extent) -> list[tuple[Rate, Rate]]:
    """Load a pair of servers in turn, after a slice each that warms them up."""
    loads = [workload(subject.port, EXCHANGE) for subject in subjects]

    def measure_one(which: int) -> Rate:
        return measure(loads[which], lambda: cpu_seconds(subjects[which].pid), extent.seconds)

    measure_one(0), measure_one(1)
    pairs = alternate(extent.slices, measure_one)
    for load in loads:
        load.close()
    return pairs


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
