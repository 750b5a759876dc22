"""The tables that a run of the peers ends in."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable

from benchmarks.bench import Table
from benchmarks.peers.results import Latency, Result, Run, Verdict

__all__ = ["describe_failures", "full_name", "mean", "tables"]

UNKNOWN = "-"


def tables(run: Run) -> list[Table]:
    """Make all of them."""
    made = [tabulate_clients(run), tabulate_times(run)]
    if any(result.broken for result in run.results):
        made.append(tabulate_verdicts(run))
    made.append(tabulate_costs(run))
    if run.missing:
        table = Table("What was not there", ["server", "why"])
        for name, why in run.missing.items():
            table.add(name, why)
        made.append(table)
    return made


def tabulate_clients(run: Run) -> Table:
    """What clients notice."""
    table = Table(
        "What clients notice",
        [
            *("server", "restarted by", "requests", "failed per restart", "which"),
            *("connections closed, of those held", "with a goodbye"),
            *("p50 / p99 / p99.9 / longest answer in a restart, ms", "without, ms"),
        ],
        f"{run.load}. Closed are connections without a request in flight; with a goodbye, those that ended behind an "
        "answer with `Connection: close`. Both are no failures, and per restart. They are counted for 2.5 s after the "
        "new code has answered: a server that closes idle connections at the end of its drain, as ours without "
        "transfer and gunicorn at USR2 may, shows none here.",
    )
    for result in run.results:
        restarts = result.restarts
        which = failures(result)
        keeps = result.keeps_connections
        table.add(
            full_name(result),
            result.how,
            f"{result.requests:,}",
            describe_failures(result),
            ", ".join(f"{number} {failure}" for failure, number in which.items()) or UNKNOWN,
            f"{mean(restart.closed for restart in restarts)} of {result.held}" if keeps else "keeps none",
            mean(restart.dismissed for restart in restarts) if keeps else "all",
            latencies(result.restarted),
            latencies(result.steady),
        )
    return table


def tabulate_times(run: Run) -> Table:
    """How long until new code answers, and until the old has gone."""
    table = Table(
        "From the command to new code",
        [
            *("server", "restarted by", "own start, s", "first answer of new code, s", "beyond the own start, s"),
            "last old process gone, s",
        ],
        "Medians. The own start is that of the whole service, to its first answer. An old process waits for "
        "requests under way.",
    )
    for result in run.results:
        first = [restart.first_answer for restart in result.restarts if restart.first_answer is not None]
        left = [restart.left for restart in result.restarts if restart.left is not None]
        table.add(
            full_name(result),
            result.how,
            f"{result.cold:.3f}",
            f"{statistics.median(first):.3f}" if first else "none came",
            f"{statistics.median(first) - result.cold:+.3f}" if first else UNKNOWN,
            f"{statistics.median(left):.1f}" if left else UNKNOWN,
        )
    return table


def tabulate_verdicts(run: Run) -> Table:
    """What is not an ordinary restart."""
    table = Table(
        "Two at once, and a broken release",
        [
            *("server", "restarted by", "second restart, while one drains", "failed requests of both"),
            *("whoever asked for a broken release learns", "what answers then", "failed requests of it"),
        ],
        "The second restart is asked for with the first answer of the first. A broken release fails as it is loaded. "
        "Learning is what the command says, or its exit status; a log is not counted.",
    )
    for result in run.results:
        if result.twice is None or result.broken is None:
            continue
        table.add(
            full_name(result),
            result.how,
            describe_second(result.twice),
            str(sum(result.twice.failures.values())),
            {True: "that it was done", False: "that it failed", None: "nothing"}[result.broken.said],
            "nothing" if result.broken.answer is None else "the release before",
            str(sum(result.broken.failures.values())),
        )
    return table


def tabulate_costs(run: Run) -> Table:
    """What a restart costs the machine."""
    table = Table(
        "What a restart costs the machine",
        [
            *("server", "restarted by", "memory without, MB", "most in a restart, MB", "times"),
            *("processor time per restart, s", "context switches per restart"),
        ],
        "Memory is that of all processes together, each with its share of what it shares (PSS). Processor time and "
        "switches are what a restart takes beyond the same time without one; what is less than none is noise.",
    )
    for result in run.results:
        peak = max(restart.pss for restart in result.restarts)
        table.add(
            full_name(result),
            result.how,
            f"{result.steady_pss:.0f}",
            f"{peak:.0f}",
            f"{peak / result.steady_pss:.1f}" if result.steady_pss else UNKNOWN,
            f"{statistics.mean(restart.cpu for restart in result.restarts):.2f}",
            f"{statistics.mean(restart.switches for restart in result.restarts):.0f}",
        )
    return table


def describe_second(verdict: Verdict) -> str:
    """Say what became of a second restart."""
    if verdict.answer is not None:
        return f"answers after {verdict.answer:.2f} s"
    return "refused, and said so" if verdict.said is False else "never answers"


def failures(result: Result) -> Counter[str]:
    """Return what has failed in the ordinary restarts."""
    which = Counter[str]()
    for restart in result.restarts:
        which.update(restart.failures)
    return which


def describe_failures(result: Result) -> str:
    """Write how many requests a restart has cost."""
    return decimals(failures(result).total() / len(result.restarts))


def full_name(result: Result) -> str:
    """Return what a row begins with."""
    return f"{result.name} {result.version}, {result.language}"


def latencies(latency: Latency) -> str:
    """Write percentiles."""
    return " / ".join(
        f"{value:.{0 if value >= 10 else 1}f}" for value in (latency.p50, latency.p99, latency.p999, latency.max)
    )


def mean(values: Iterable[int]) -> str:
    """Write an average."""
    return decimals(statistics.mean(list(values)))


def decimals(value: float) -> str:
    """Write it with the digits that tell something."""
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"
