"""One peer under load: some time without a restart, ordinary restarts, two at once, and a release that is broken."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import Counts, Failure, Http, Load, Mix, Outcome
from benchmarks.peers.results import Latency, Restart, Result, Timeline, Verdict
from benchmarks.peers.running import BROKEN, Peer, Running, reserved_ports
from benchmarks.peers.sampler import Sample, Usage

__all__ = ["FULL", "QUICK", "Extent", "measure"]

# What a restart may take to the first answer of its code before it is said that none came. Two at once have less: a
# server that refuses the second is waited for in vain.
FIRST_SECONDS = 15.0
TWICE_SECONDS = 8.0

# The time line begins before the restart, so that both can be seen.
LEAD_SECONDS = 0.5
STEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to measure.

    Attributes:
        restarts: ordinary ones of each peer.
        has_verdicts: whether there are the two that are not.
        import_seconds: how long a release takes to load.
        calm: how long to load without a restart, seconds.
        quiet: how long to load on after a restart was done, so that what it costs later is seen; longer than any
            request; seconds.
        watch: how long to watch what becomes of a broken release, seconds.
        mix: the clients.
    """

    restarts: int
    has_verdicts: bool
    import_seconds: float
    calm: float
    quiet: float
    watch: float
    mix: Mix

    def __str__(self) -> str:
        mix = self.mix
        return (
            f"{mix.new_per_second:g} new connections a second at random moments, {mix.keep_alive} clients that keep "
            f"theirs and pause for up to {mix.pause * 1000:g} ms, {mix.slow} whose requests take "
            f"{mix.slow_seconds[0]:g} to {mix.slow_seconds[1]:g} s, {mix.silent} that are idle; each release takes "
            f"{self.import_seconds:g} s to load, but for nginx and HAProxy, which load none"
        )


FULL = Extent(
    restarts=2,
    has_verdicts=True,
    import_seconds=1.0,
    calm=3.0,
    quiet=2.5,
    watch=4.0,
    mix=Mix(new_per_second=150, keep_alive=40, pause=0.15, slow=8, slow_seconds=(0.3, 2.0), silent=20),
)
QUICK = Extent(
    restarts=2,
    has_verdicts=False,
    import_seconds=0.2,
    calm=0.5,
    quiet=0.7,
    watch=0.0,
    mix=Mix(new_per_second=50, keep_alive=10, pause=0.1, slow=4, slow_seconds=(0.1, 0.6), silent=5),
)


@dataclass(slots=True)
class Mark:
    """What the counters said at one moment."""

    at: float
    failures: Counter[Failure]
    closed: int
    goodbyes: int

    @classmethod
    def now(cls, counts: Counts) -> Mark:
        """Read them."""
        return cls(time.monotonic(), counts.failures.copy(), counts.silent_closed, counts.goodbyes)


def failures_between(before: Mark, after: Mark) -> dict[str, int]:
    """Return what has failed, by how it did."""
    return {str(failure): number for failure, number in sorted((after.failures - before.failures).items())}


async def measure(peer: Peer, version: str, extent: Extent) -> Result:
    """Load a peer, restart it in all ways, and say what that cost."""
    with tempfile.TemporaryDirectory() as name, reserved_ports() as ports:
        running = Running(peer, ports, Path(name), extent.import_seconds)
        try:
            cold = await running.wait_until_all_serve()
            load = Load(running.port, extent.mix, Http())
            session = Session(running, load, extent)
            cpu = time.process_time()
            begun = time.monotonic()
            async with asyncio.TaskGroup() as task_group:
                task_group.create_task(load.run())
                await session.run()
                load.end()
            cpu = (time.process_time() - cpu) / (time.monotonic() - begun)
        finally:
            samples = running.end()
    return session.result(peer, version, cold, cpu, samples)


class Session:
    """The restarts of one peer, one after the other."""

    def __init__(self, running: Running, load: Load, extent: Extent) -> None:
        self._running = running
        self._load = load
        self._extent = extent
        self._release = itertools.count(2)
        self._calm: tuple[Mark, Mark] | None = None
        self._restarts: list[tuple[Restart, Mark, Mark]] = []
        self._twice: Verdict | None = None
        self._broken: Verdict | None = None

    async def run(self) -> None:
        """Restart in all ways."""
        # What clients do as they start is no part of what comes later.
        await self._load.wait_for_end(0.3)
        before = self._mark()
        await self._load.wait_for_end(self._extent.calm)
        self._calm = before, self._mark()
        for _ in range(self._extent.restarts):
            await self._restart()
        if self._extent.has_verdicts:
            await self._restart_twice()
            await self._restart_to_broken()

    def _mark(self) -> Mark:
        return Mark.now(self._load.counts)

    async def _restart(self) -> None:
        before = self._mark()
        answer = asyncio.create_task(self._first_answer(self._next_release(), FIRST_SECONDS))
        said = await self._running.restart()
        first = await answer
        await self._load.wait_for_end(self._extent.quiet)
        after = self._mark()
        restart = Restart(
            said=said,
            first_answer=first,
            failures=failures_between(before, after),
            closed=after.closed - before.closed,
            dismissed=after.goodbyes - before.goodbyes,
            cpu=0.0,
            switches=0,
            pss=0.0,
            left=None,
        )
        self._restarts.append((restart, before, after))

    async def _restart_twice(self) -> None:
        before = self._mark()
        answer = asyncio.create_task(self._first_answer(self._next_release(), FIRST_SECONDS))
        first = asyncio.create_task(self._running.restart())
        await answer
        answer = asyncio.create_task(self._first_answer(self._next_release(), TWICE_SECONDS))
        said = await self._restart_anyhow()
        seconds = await answer
        await first
        await self._load.wait_for_end(self._extent.quiet)
        self._twice = Verdict(said, seconds, failures_between(before, self._mark()))

    async def _restart_to_broken(self) -> None:
        self._running.release(BROKEN)
        before = self._mark()
        said = await self._restart_anyhow()
        await self._load.wait_for_end(before.at + self._extent.watch - time.monotonic())
        # A release that still serves answers within the next second.
        known = len(self._load.counts.outcomes)
        await self._load.wait_for_end(1.0)
        after = self._mark()
        answers = any(each.generation is not None for each in self._load.counts.outcomes[known:])
        self._broken = Verdict(said, after.at - before.at if answers else None, failures_between(before, after))

    async def _restart_anyhow(self) -> bool | None:
        # A server that cannot take the command any more has failed, too.
        try:
            return await self._running.restart()
        except OSError:
            return False

    def _next_release(self) -> int:
        number = next(self._release)
        self._running.release(str(number))
        return number

    async def _first_answer(self, number: int, limit: float) -> float | None:
        asked_at = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while not self._load.counts.generations[number]:
                    await self._load.wait_for_end(0.001)
                return time.monotonic() - asked_at
        return None

    def result(self, peer: Peer, version: str, cold: float, load_cpu: float, samples: Sequence[Sample]) -> Result:
        """Say what it has cost."""
        assert self._calm is not None
        counts, mix = self._load.counts, self._extent.mix
        calm = usage_between(samples, self._calm[0].at, self._calm[1].at)
        for restart, before, after in self._restarts:
            usage = usage_between(samples, before.at, after.at)
            length = (after.at - before.at) / (self._calm[1].at - self._calm[0].at)
            restart.cpu = round(usage.cpu - calm.cpu * length, 3)
            restart.switches = round(usage.switches - calm.switches * length)
            restart.pss = round(usage.peak, 1)
            restart.left = None if usage.left is None else round(usage.left - before.at, 2)
            restart.first_answer = restart.first_answer and round(restart.first_answer, 4)
        for verdict in (self._twice, self._broken):
            if verdict is not None and verdict.answer is not None:
                verdict.answer = round(verdict.answer, 3)
        outcomes = sorted(counts.outcomes)
        answered = [seconds_of(outcomes, before.at, after.at) for _, before, after in self._restarts]
        last = self._restarts[-1]
        return Result(
            name=peer.name,
            language=peer.language,
            how=peer.how,
            version=version,
            keeps_connections=peer.keeps_connections,
            held=mix.keep_alive + mix.slow + mix.silent,
            requests=counts.requests.total(),
            cold=round(cold, 4),
            steady=Latency.of(seconds_of(outcomes, self._calm[0].at, self._calm[1].at)),
            steady_pss=round(calm.median, 1),
            restarted=Latency.of(list(itertools.chain(*answered))),
            restarts=[restart for restart, _, _ in self._restarts],
            twice=self._twice,
            broken=self._broken,
            timeline=timeline(outcomes, last[1].at, last[2].at, len(self._restarts) + 1),
            load_cpu=round(load_cpu, 3),
            load_late=Latency.of(counts.lateness),
        )


def between(outcomes: Sequence[Outcome], since: float, until: float) -> Sequence[Outcome]:
    """Return those that were begun in some time, of a sorted sequence."""
    begun = [each.begun for each in outcomes]
    return outcomes[bisect.bisect_left(begun, since) : bisect.bisect_left(begun, until)]


def seconds_of(outcomes: Sequence[Outcome], since: float, until: float) -> list[float]:
    """Return how long the answers took."""
    return [each.seconds for each in between(outcomes, since, until) if each.generation is not None]


def timeline(outcomes: Sequence[Outcome], asked_at: float, until: float, generation: int) -> Timeline:
    """Cut the time around a restart into steps."""
    since = asked_at - LEAD_SECONDS
    number = int((until - since) / STEP_SECONDS)
    line = Timeline(-LEAD_SECONDS, STEP_SECONDS, [0.0] * number, [0] * number, [0] * number, [0] * number)
    for each in between(outcomes, since, since + number * STEP_SECONDS):
        step = min(number - 1, int((each.begun - since) / STEP_SECONDS))
        if each.generation is None:
            line.failed[step] += 1
            continue
        line.worst[step] = max(line.worst[step], round(each.seconds * 1000, 1))
        answered = line.new if each.generation >= generation else line.old
        answered[step] += 1
    return line


@dataclass(slots=True)
class Sum:
    """What all processes have used in some time.

    Attributes:
        cpu: seconds.
        switches: of context.
        median: memory at a moment, in megabytes.
        peak: the most memory at any moment.
        left: when the last process was seen that had been there at the beginning, and was not at the end.
    """

    cpu: float
    switches: int
    median: float
    peak: float
    left: float | None


def usage_between(samples: Sequence[Sample], since: float, until: float) -> Sum:
    """Add up what the samples of some time say."""
    earlier = [sample for sample in samples if sample.at < since][-1:]
    # Where the machine is that busy there is none of this time, or even none before it.
    seen = earlier + [sample for sample in samples if since <= sample.at <= until] or list(samples[:1])
    first = seen[0].processes
    cpu, switches = 0.0, 0
    for pid, (last, _) in last_seen(seen).items():
        begun = first.get(pid)
        cpu += last.cpu - (begun.cpu if begun else 0.0)
        switches += max(0, last.switches - (begun.switches if begun else 0))
    gone = [at for pid, (_, at) in last_seen(seen).items() if pid in first and pid not in seen[-1].processes]
    memory = [sample.pss() for sample in seen]
    return Sum(cpu, switches, statistics.median(memory), max(memory), max(gone, default=None))


def last_seen(samples: Sequence[Sample]) -> dict[int, tuple[Usage, float]]:
    """Return the last that was seen of each process, and when."""
    return {pid: (usage, sample.at) for sample in samples for pid, usage in sample.processes.items()}
