"""The verdict: a history in numbers, in words, and as JSON. Pure, as the rules are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .plan import Kind, Step
from .records import Ending, Exchange, Fault, History, Restart
from .rules import STEADY, Finding, check, name_phase, name_restart, percentile

__all__ = ["Latency", "Verdict", "judge"]

# How many findings of a kind are told in full.
EXAMPLES = 5

MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Latency:
    """Latencies of some answers, in seconds; None where there are none."""

    count: int
    p50: float | None
    p99: float | None
    p999: float | None
    max: float | None

    @classmethod
    def of(cls, exchanges: Iterable[Exchange]) -> Latency:
        """Take those that have an answer."""
        values = sorted(each.latency for each in exchanges if each.fault is None and each.ended is not None)
        found = [percentile(values, percent) if values else None for percent in (50, 99, 99.9, 100)]
        return cls(len(values), *found)


@dataclass(frozen=True)
class Verdict:
    """What a proof has shown.

    Attributes:
        findings: all that is wrong, with what is excused.
        history: what was seen.
    """

    findings: tuple[Finding, ...]
    history: History

    @property
    def failures(self) -> list[Finding]:
        """What the service is to blame for."""
        return [finding for finding in self.findings if finding.excuse is None]

    @property
    def excused(self) -> list[Finding]:
        """What a process that was killed on purpose took with it."""
        return [each for each in self.findings if each.excuse is not None and each.fault is not Fault.LATE]

    @property
    def late(self) -> list[Finding]:
        """Which answers took longer than the patience: they have come, so nothing is lost."""
        return [finding for finding in self.findings if finding.fault is Fault.LATE]

    @property
    def is_good(self) -> bool:
        """Whether nothing was wrong, and there was something that could have been."""
        return not self.failures and any(each.answer is not None for each in self.history.exchanges)

    def split(self) -> dict[str, list[Exchange]]:
        """Return the requests of each phase: of the time without a restart, and of each step."""
        history = self.history
        phases: dict[str, list[Exchange]] = {STEADY: []}
        phases |= {name_restart(number, each): [] for number, each in enumerate(history.restarts, 1)}
        for exchange in history.exchanges:
            end = exchange.ended if exchange.ended is not None else exchange.due
            phases[name_phase(history, exchange.due, end)].append(exchange)
        return phases

    def to_json(self) -> dict[str, Any]:
        """Return it as an object of JSON: the numbers, without the points that they are made of."""
        history = self.history
        phases = self.split()
        by_kind: dict[str, list[Exchange]] = {"steady": phases[STEADY], "restarts": [], "faults": []}
        for number, restart in enumerate(history.restarts, 1):
            kind = "restarts" if restart.step is Step.RESTART else "faults"
            by_kind[kind] += phases[name_restart(number, restart)]
        # What a client does not go on with may be closed.
        endings = Counter(each.ending for each in history.connections if each.is_kept or each.ending is Ending.BUSY)
        return {
            "verdict": "good" if self.is_good else "bad",
            "requests": len(history.exchanges),
            "answers": sum(each.answer is not None for each in history.exchanges),
            "kinds": dict(Counter(each.kind.value for each in history.exchanges)),
            "failures": _count(self.failures),
            "excused": _count(self.excused),
            "late": _count(self.late),
            "examples": [dataclasses.asdict(finding) for finding in _choose(self.findings)],
            "closed_by_server": {
                ending.name.lower(): endings[ending] for ending in Ending if ending is not Ending.OURS
            },
            "latency": {kind: dataclasses.asdict(Latency.of(exchanges)) for kind, exchanges in by_kind.items()},
            "memory": self.measure_memory(),
            "steps": [self.describe_step(number, each) for number, each in enumerate(history.restarts, 1)],
            "notes": history.notes,
            "seconds": history.ended,
        }

    def describe_step(self, number: int, restart: Restart) -> dict[str, Any]:
        """Return what one step did, and what it cost."""
        name = name_restart(number, restart)
        exchanges = self.split()[name]
        fresh = [each for each in exchanges if each.kind is Kind.NEW]
        report = restart.report or {}
        return {
            "name": name,
            "step": restart.step.value,
            "asked": restart.asked,
            "seconds": restart.end - restart.asked,
            "code": restart.code,
            "outcome": report.get("outcome"),
            "message": restart.message,
            "killed": restart.killed,
            "generation": restart.generation,
            "accept_gap": report.get("accept_gap"),
            "longest_new_connection": Latency.of(fresh).max,
            "first_answer": find_first_answer(self.history, restart),
            "latency": dataclasses.asdict(Latency.of(exchanges)),
        }

    def measure_memory(self) -> dict[str, int | None]:
        """Return the most memory that the service used, in bytes of PSS: left alone, and while a step went on."""
        parts: dict[bool, list[int]] = {True: [], False: []}
        for sample in self.history.memory:
            parts[name_phase(self.history, sample.at, sample.at) == STEADY].append(sample.bytes)
        return {"steady": max(parts[True], default=None), "restarts": max(parts[False], default=None)}

    def __str__(self) -> str:
        return "\n".join(_describe(self.to_json(), self))


def judge(history: History, max_slowdown: float) -> Verdict:
    """Apply the rules to a history."""
    return Verdict(tuple(check(history, max_slowdown)), history)


def find_first_answer(history: History, restart: Restart) -> float | None:
    """Return how long after a restart was asked for new code first answered; None where that is not known."""
    if restart.step in (Step.BROKEN, Step.SUCCESSOR_KILLED):
        return None

    def name(exchange: Exchange) -> int | str | None:
        answer = exchange.answer
        return None if answer is None else answer.pid or answer.generation or answer.release

    answered = [each for each in history.exchanges if each.answer is not None and name(each) is not None]
    known = {name(each) for each in answered if each.answer is not None and each.answer.at <= restart.asked}
    fresh = [each.answer for each in answered if each.answer is not None and name(each) not in known]
    later = [answer.at for answer in fresh if answer.at > restart.asked]
    return min(later) - restart.asked if later else None


def _count(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    counts = Counter((finding.fault, finding.phase) for finding in findings)
    return [{"class": fault.value, "phase": phase, "count": count} for (fault, phase), count in counts.items()]


def _choose(findings: Sequence[Finding]) -> list[Finding]:
    """Choose a few of each class."""
    seen: Counter[tuple[Fault, bool]] = Counter()
    chosen = []
    for finding in findings:
        key = finding.fault, finding.excuse is None
        seen[key] += 1
        if seen[key] <= EXAMPLES:
            chosen.append(finding)
    return chosen


def _describe(found: dict[str, Any], verdict: Verdict) -> Iterable[str]:
    """Tell it in lines."""
    for step in found["steps"]:
        yield _describe_step(step)
    yield ""
    yield f"{'':<10} {'answers':>8} {'p50':>10} {'p99':>10} {'p99.9':>10} {'max':>10}"
    for name, latency in found["latency"].items():
        if name == "faults" and not latency["count"]:
            continue
        times = " ".join(f"{_milliseconds(latency[key]):>10}" for key in ("p50", "p99", "p999", "max"))
        yield f"{name:<10} {latency['count']:>8,} {times}"
    memory = found["memory"]
    if memory["steady"] is not None and memory["restarts"] is not None:
        yield (
            f"memory (PSS): {memory['steady'] / MEGABYTE:.0f} MB, and {memory['restarts'] / MEGABYTE:.0f} MB "
            "at the most with both generations"
        )
    closed = found["closed_by_server"]
    yield (
        f"connections closed by the server: {closed['announced']} as announced, {closed['idle']} while idle, "
        f"{closed['busy']} with a request on them"
    )
    yield from (f"note: {note}" for note in found["notes"])
    if found["excused"]:
        yield f"{_total(found['excused'])} lost with the process that was killed on purpose, which nothing could save"
    if verdict.late:
        where = ", ".join(f"{each['count']:,} in {each['phase']}" for each in found["late"])
        yield f"answered late, after more than {verdict.history.patience:g} s (--patience), which is no loss: {where}"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["kinds"].items())
    yield f"{found['requests']:,} requests ({kinds}), {found['answers']:,} answers"
    if verdict.is_good:
        yield "verdict: nothing was lost"
        return
    yield "verdict: this service does not restart without a loss" if found["requests"] else "verdict: nothing was asked"
    for failure in found["failures"]:
        yield f"  {failure['count']:>5,} {failure['class']} ({failure['phase']})"
    for example in _choose(verdict.failures):
        yield f"  at {example.at:.2f} s: {example.text}"


def _describe_step(step: dict[str, Any]) -> str:
    outcome = step["outcome"] or ("done" if step["code"] == 0 else f"exit {step['code']}")
    if step["step"] in (Step.BROKEN, Step.SUCCESSOR_KILLED) and step["code"] == 1:
        outcome = "failed, as it had to"
    parts = [f"{step['name']:<22} {outcome}, {step['seconds']:.2f} s"]
    if step["accept_gap"] is not None:
        parts.append(f"accept gap {step['accept_gap'] * 1000:.2f} ms")
    if step["first_answer"] is not None:
        parts.append(f"new code answered after {step['first_answer']:.2f} s")
    if step["longest_new_connection"] is not None:
        parts.append(f"no new connection waited longer than {_milliseconds(step['longest_new_connection'])}")
    return ", ".join(parts)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _total(counts: Sequence[dict[str, Any]]) -> int:
    return sum(each["count"] for each in counts)
