"""The main job, shown: a real service under real load is restarted several times, and a table tells what that cost.

``python -m benchmarks.demo [--loop asyncio|uvloop|anyio|trio] [--restarts N] [--seconds S]``; exit status 1 where a
single request failed. What it prints is what it measured, on this machine, at this moment.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from benchmarks.load import Counts, Kind, Load, Mix, percentile
from benchmarks.running import RunningService, running
from benchmarks.service import LOOPS
from ecdysis_async import Phase, RestartReport

PROBATION_SECONDS = 0.5

# Long enough for the slowest request, and short enough for silent connections to reach it before the demo is over.
DRAIN_SECONDS = 4.0
MIX = Mix(slow_seconds=(0.3, 2.5))


async def main(loop: str, restarts: int, seconds: float) -> int:
    """Show it, and return the exit status."""
    clients = MIX.keep_alive + MIX.slow + MIX.silent
    say(f"A line server on {loop}, {clients} clients that stay, {MIX.new_per_second:g} a second that come and go.")
    say("No proxy in front: each restart replaces the very process that they talk to.\n")
    async with running(
        "--loop", loop, "--probation", str(PROBATION_SECONDS), "--drain-timeout", str(DRAIN_SECONDS)
    ) as service:
        say(f"  generation 1 serves on 127.0.0.1:{service.port}, pid {service.newest.pid}")
        load = Load(service.port, MIX)
        async with asyncio.TaskGroup() as task_group:
            task_group.create_task(load.run())
            await restart_repeatedly(service, load, restarts, seconds)
            load.end()
        await service.wait_for_drained()
        await service.stop()
    say("\n" + "\n".join(table(load.counts, list(service.reports.values()))) + "\n")
    requests = load.counts.requests.total()
    failures = requests - load.counts.answers.total()
    if failures:
        say(f"NOT what it should be: {failures:,} of {requests:,} requests failed.")
        return 1
    say(f"Shown: {restarts} restarts under load, and each of the {requests:,} requests was answered.")
    return 0


async def restart_repeatedly(service: RunningService, load: Load, restarts: int, seconds: float) -> None:
    """Spread the restarts evenly over the time that the load runs, a line for each."""
    now = asyncio.get_running_loop().time
    begun = now()
    for number in range(1, restarts + 1):
        await load.wait_for_end(begun + seconds * number / (restarts + 1) - now())
        report = await service.restart()
        say(
            f"  restart {number}: generation {report.generation} serves after {milliseconds(time_to_serving(report))}; "
            f"{load.counts.requests.total():,} requests, {load.counts.failures.total()} failed"
        )
    await load.wait_for_end(begun + seconds - now())


def table(counts: Counts, reports: Sequence[RestartReport]) -> list[str]:
    """Return the lines that tell what it cost."""
    gaps = [report.accept_gap for report in reports if report.accept_gap is not None]
    times = [time_to_serving(report) for report in reports]
    starts = [report.phases[Phase.START] for report in reports]
    kinds = ", ".join(f"{counts.requests[kind]:,} {kind}" for kind in Kind)
    failures = ", ".join(f"{number:,} {failure}" for failure, number in counts.failures.items())
    answers = [counts.generations[number] for number in range(1, len(reports) + 2)]
    latencies = [milliseconds(percentile(counts.latencies, percent)) for percent in (50, 99, 100)]
    drains = [report.drain for report in reports]
    rows = [
        ("restarts", len(reports), ""),
        ("generations", len(answers), f"the least busy one answered {min(answers):,} requests"),
        ("requests", f"{counts.requests.total():,}", kinds),
        ("failures", f"{counts.failures.total():,}", failures or "none refused, reset, unanswered or wrong"),
        ("latency p50", latencies[0], "of slow ones: what came on top of their time"),
        ("latency p99", latencies[1], ""),
        ("latency max", latencies[2], ""),
        ("accept gap, median", milliseconds(percentile(gaps, 50)), "new connections wait in the kernel"),
        ("accept gap, max", milliseconds(percentile(gaps, 100)), ""),
        (
            "restart, median",
            milliseconds(percentile(times, 50)),
            "until the new one serves; so far the old one did",
        ),
        ("  of that: start", milliseconds(percentile(starts, 50)), "a new interpreter and its imports"),
        ("restart, max", milliseconds(percentile(times, 100)), ""),
        ("drained", f"{sum(drain.drained for drain in drains):,}", "connections of old ones that ended well"),
        (
            "closed when silent",
            f"{sum(drain.silent for drain in drains):,}",
            "nothing was in flight at the drain's deadline",
        ),
        ("cut", f"{sum(drain.cut for drain in drains):,}", "were still busy at the deadline"),
        ("reconnects", f"{counts.reconnects:,}", "of clients that were told goodbye"),
    ]
    return [f"  {name:<18}{value:>10}  {remark}".rstrip() for name, value, remark in rows]


def time_to_serving(report: RestartReport) -> float:
    """Return how long a restart took, in seconds, from the request until the successor served."""
    return sum(report.phases[phase] for phase in (Phase.START, Phase.INITIALISE, Phase.PAUSE, Phase.COMMIT))


def milliseconds(seconds: float) -> str:
    """Return a duration as people read it."""
    return f"{seconds * 1000:,.{0 if seconds >= 0.1 else 1}f} ms"


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def run() -> int:
    """Read the command line and show it."""
    parser = argparse.ArgumentParser(description="Restart a real service under real load, and tell what it cost.")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio", help="what the service runs on")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="how long the load runs")
    arguments = parser.parse_args()
    try:
        return asyncio.run(main(arguments.loop, arguments.restarts, arguments.seconds))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
