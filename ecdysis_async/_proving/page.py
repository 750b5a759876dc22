"""The verdict as a page: one file that needs nothing else, with a time line of what happened to whom.

The page (page.html) draws itself from the JSON that stands in it; here that JSON is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ecdysis_async._system.pages import fill
from ecdysis_async.report import Phase

from .records import Exchange, History, Restart
from .verdict import Verdict

__all__ = ["write"]

TEMPLATE = Path(__file__).with_name("page.html")

# A browser draws so many points at once; of more, the slowest of each moment are kept.
MAX_POINTS = 4000


def write(verdict: Verdict, subject: str) -> str:
    """Return the page.

    Args:
        verdict: what it tells.
        subject: what was proved, in a few words.
    """
    return fill(TEMPLATE, f"ecdysis prove: {subject}", describe(verdict, subject))


def describe(verdict: Verdict, subject: str) -> dict[str, Any]:
    """Return what the page is drawn from; times in seconds from the beginning."""
    history = verdict.history
    answered = [each for each in history.exchanges if each.fault is None and each.answer and each.ended is not None]
    return {
        "subject": subject,
        "verdict": verdict.to_json(),
        "text": str(verdict),
        "end": max([history.ended, *(restart.end for restart in history.restarts)]),
        "points": [
            {
                "at": round(each.due, 4),
                "seconds": round(each.latency, 6),
                "generation": _generation_of(history, each),
                "text": f"request {each.id}: {each.kind} {each.what}",
            }
            for each in choose(answered, history.ended)
        ],
        "failures": [
            {"at": each.at, "class": each.fault.value, "text": each.text, "excuse": each.excuse}
            for each in verdict.findings
        ],
        "processes": [
            {
                "pid": each.pid,
                "generation": each.generation,
                "seen": each.seen,
                "gone": each.gone,
                "states": [{"at": at, "state": state} for at, state in each.states],
                "killed": next((it.killed_at for it in history.restarts if it.killed == each.pid), None),
            }
            for each in history.processes
        ],
        "steps": [
            {**step, "phases": list(_find_phases(history, restart))}
            for step, restart in zip(verdict.to_json()["steps"], history.restarts, strict=True)
        ],
        "memory": [{"at": each.at, "bytes": each.bytes} for each in history.memory],
    }


def choose(exchanges: Sequence[Exchange], end: float) -> list[Exchange]:
    """Return no more requests than can be drawn: the slowest of each moment."""
    if len(exchanges) <= MAX_POINTS:
        return list(exchanges)
    moments = MAX_POINTS // 4
    buckets: dict[int, list[Exchange]] = {}
    for exchange in exchanges:
        buckets.setdefault(int(exchange.due / max(end, 1e-9) * moments), []).append(exchange)
    return [each for bucket in buckets.values() for each in sorted(bucket, key=lambda it: it.latency)[-4:]]


def _generation_of(history: History, exchange: Exchange) -> int | str | None:
    assert exchange.answer is not None
    if exchange.answer.generation is None and exchange.connection is not None:
        # On a WebSocket only the first answer tells.
        first = history.connections[exchange.connection].answers[:1]
        return next((each.generation or each.release for each in first), None)
    return exchange.answer.generation or exchange.answer.release


def _find_phases(history: History, restart: Restart) -> Iterator[dict[str, Any]]:
    """Return the phases of a step, of each worker, as the service has told of them."""
    report = restart.report or {}
    for worker in report.get("workers") or [report] if report else []:
        begin = worker["started_at"] - history.began_at
        for phase in Phase:
            if phase in worker["phases"]:
                seconds = worker["phases"][phase]
                yield {"phase": phase.value, "begin": begin, "seconds": seconds, "pid": worker["predecessor_pid"]}
                begin += seconds
