"""What a history has to fulfil, and where it does not: pure functions of what was seen.

A request is answered once, in order on its connection, with the status that was expected, by a generation that was
serving. A connection is not closed while a client may be about to ask. A restart has the outcome that it has to have.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .plan import Step
from .records import Answer, Connection, Ending, Fault, History, Restart

__all__ = ["STEADY", "Finding", "check", "name_phase", "name_restart", "percentile"]

STEADY = "steady"

# A connection of a process that was killed on purpose has ended within this time, seconds.
KILL_SECONDS = 10.0

# Between what a client sees and what the service says lie two clocks' worth of scheduling, seconds.
LEEWAY_SECONDS = 1.0

# Of fewer answers nothing is concluded about a generation's speed.
ENOUGH_ANSWERS = 20

# What a machine adds by itself, seconds. What a busy one adds is seen by how late clients wake up: a few times that.
NOISE_SECONDS = 0.003
NOISE_FACTOR = 5

# A slower generation is slower in its best answers, too: those tell it from a machine that has other work.
QUANTILES = (10.0, 50.0)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        fault: what.
        at: when, in seconds.
        phase: what the service was doing.
        text: the same in words.
        request: the id of the request, where it is about one.
        excuse: why it is no failure of the service; None: it is one.
    """

    fault: Fault
    at: float
    phase: str
    text: str
    request: int | None = None
    excuse: str | None = None


def check(history: History, max_slowdown: float = math.inf) -> list[Finding]:
    """Return all that is wrong in a history, in the order of time.

    Args:
        history: what was seen.
        max_slowdown: how many times slower than the first generation a later one may be.
    """
    findings = [
        *check_exchanges(history),
        *check_order(history),
        *check_idle(history),
        *check_generations(history),
        *check_restarts(history),
        *check_speed(history, max_slowdown),
    ]
    return sorted(findings, key=lambda finding: finding.at)


def check_exchanges(history: History) -> Iterator[Finding]:
    """Each request has its answer."""
    connections = {connection.number: connection for connection in history.connections}
    for exchange in history.exchanges:
        fault, detail = exchange.fault, exchange.detail
        if fault is None and exchange.answer is None:
            fault, detail = Fault.UNANSWERED, "the load was over before it had an answer"
        what = f"request {exchange.id} ({exchange.kind} {exchange.what}): {fault or Fault.LATE}"
        if fault is None:
            if exchange.ended is not None and exchange.latency > history.patience:
                phase = name_phase(history, exchange.due, exchange.ended)
                text = f"{what}: after {exchange.latency:.1f} s"
                yield Finding(Fault.LATE, exchange.ended, phase, text, exchange.id, "it was answered")
            continue
        at = exchange.ended if exchange.ended is not None else exchange.due
        connection = connections.get(exchange.connection) if exchange.connection is not None else None
        excuse = _excuse(history, connection, at) if fault in _BY_A_KILL else None
        text = f"{what}: {detail}" if detail else what
        yield Finding(fault, at, name_phase(history, exchange.due, at), text, exchange.id, excuse)


def check_order(history: History) -> Iterator[Finding]:
    """The answers on a connection are those to its requests, in their order, and no more than these."""
    for connection in history.connections:
        answered: set[int] = set()
        waiting = deque(connection.requests)
        for answer in connection.answers:
            expected = waiting[0] if waiting else None
            named = answer.request if answer.request is not None else expected
            phase = name_phase(history, answer.at, answer.at)
            where = f"on connection {connection.number} ({connection.kind})"
            if named in answered or expected is None:
                text = f"request {named or connection.requests[-1]} was answered again {where}"
                yield Finding(Fault.REPEATED, answer.at, phase, text, named)
                continue
            waiting.popleft()
            if named != expected:
                text = f"request {expected} got the answer to request {named} {where}"
                yield Finding(Fault.ORDER, answer.at, phase, text, expected)
            answered.add(expected if named is None else named)


def check_idle(history: History) -> Iterator[Finding]:
    """No connection is closed while a client may be about to ask on it: not without having said so in an answer."""
    for connection in history.connections:
        if connection.is_kept and connection.ending is Ending.IDLE and connection.ended is not None:
            phase = name_phase(history, connection.ended, connection.ended)
            text = f"connection {connection.number} ({connection.kind}) was closed while idle, without notice"
            excuse = _excuse(history, connection, connection.ended)
            yield Finding(Fault.IDLE_CLOSED, connection.ended, phase, text, None, excuse)


def check_generations(history: History) -> Iterator[Finding]:
    """Each answer is from a generation that was serving, and that was still accepting when its connection began."""
    if history.generation is None:
        return
    reigns = find_reigns(history)
    for connection in history.connections:
        for answer in connection.answers:
            if answer.generation is None:
                continue
            phase = name_phase(history, answer.at, answer.at)
            text: str | None = None
            what = f"request {answer.request or connection.requests[-1]} was answered by generation {answer.generation}"
            if answer.generation not in reigns:
                text = f"{what}, which was never to serve"
            elif (reign := reigns[answer.generation]).begins > answer.at:
                text = f"{what}, whose restart had not been asked for yet"
            elif connection.began > reign.accepts_until + LEEWAY_SECONDS:
                text = f"{what} on a new connection, {connection.began - reign.accepts_until:.2f} s after its successor"
                text += " had settled"
            elif answer.at > reign.ends + LEEWAY_SECONDS:
                text = f"{what}, {answer.at - reign.ends:.2f} s after the end of that generation"
            else:
                text = _check_process(history, answer, what)
            if text is not None:
                yield Finding(Fault.GENERATION, answer.at, phase, text, answer.request)


def _check_process(history: History, answer: Answer, what: str) -> str | None:
    for restart in history.restarts:
        if answer.pid is not None and answer.pid == restart.killed and restart.killed_at is not None:
            if answer.at > restart.killed_at + LEEWAY_SECONDS:
                return f"{what}, by process {answer.pid} that had been killed"
            if restart.step is Step.SUCCESSOR_KILLED:
                return f"{what}, by process {answer.pid} that was still starting"
    return None


@dataclass(frozen=True, slots=True)
class Reign:
    """When a generation may answer.

    Attributes:
        begins: when its restart was asked for.
        accepts_until: when the restart to the next one was over: it may have new connections until then.
        ends: when nothing was left of it.
    """

    begins: float
    accepts_until: float = math.inf
    ends: float = math.inf


def find_reigns(history: History) -> dict[int, Reign]:
    """Return when each generation may answer; of a generation that failed there is none."""
    assert history.generation is not None
    current, begins = history.generation, -math.inf
    reigns = {current: Reign(begins)}
    for restart in history.restarts:
        if restart.generation is not None and restart.generation != current:
            reigns[current] = Reign(begins, restart.answered or restart.end, restart.end)
            current, begins = restart.generation, restart.asked
            reigns[current] = Reign(begins)
    return reigns


def check_restarts(history: History) -> Iterator[Finding]:
    """Each step has its outcome: what is broken, or killed, fails, and everything else succeeds."""
    for number, restart in enumerate(history.restarts, 1):
        name = name_restart(number, restart)
        failed = restart.code != 0
        why = (restart.message or "").strip().partition("\n")[0]
        text = None
        match restart.step:
            case Step.RESTART | Step.PREDECESSOR_KILLED if failed:
                text = f"{name}: it failed (exit {restart.code}): {why}"
            case Step.BROKEN if not failed:
                text = f"{name}: the release that cannot start was taken for good"
            case Step.SUCCESSOR_KILLED if not failed:
                text = f"{name}: it is said to have succeeded"
            case Step.BROKEN | Step.SUCCESSOR_KILLED if restart.code != 1:
                text = f"{name}: it ended with exit {restart.code}, and not with 1 (the old one serves): {why}"
        if restart.step in (Step.SUCCESSOR_KILLED, Step.PREDECESSOR_KILLED) and restart.killed is None:
            text = f"{name}: there was nobody to be killed before the restart was over"
        if text is not None:
            yield Finding(Fault.RESTART, restart.end, name, text)


def check_speed(history: History, max_slowdown: float) -> Iterator[Finding]:
    """No generation is much slower than the first one, in what it answers while no restart goes on."""
    speeds: dict[str, dict[int | str, list[float]]] = defaultdict(lambda: defaultdict(list))
    lateness: dict[int | str, list[float]] = defaultdict(list)
    for exchange in history.exchanges:
        answer = exchange.answer
        if exchange.fault is None and answer is not None and exchange.ended is not None:
            who = answer.generation if answer.generation is not None else answer.release
            if who is None or name_phase(history, exchange.due, exchange.ended) != STEADY:
                continue
            speeds[f"{exchange.kind} {exchange.what}"][who].append(exchange.latency)
            if exchange.late is not None:
                lateness[who].append(exchange.late)
    for what, generations in speeds.items():
        (first, former), *others = generations.items()
        for generation, latencies in others:
            if min(len(former), len(latencies)) < ENOUGH_ANSWERS:
                continue
            pairs = [(percentile(former, percent), percentile(latencies, percent)) for percent in QUANTILES]
            noise = NOISE_SECONDS + NOISE_FACTOR * percentile(lateness[generation] or [0.0], QUANTILES[-1])
            if all(new > old * max_slowdown + noise for old, new in pairs):
                old, new = pairs[-1]
                text = (
                    f"generation {generation} is {new / old:.1f} times slower than generation {first} in {what}: "
                    f"median {new * 1000:.1f} ms instead of {old * 1000:.1f} ms (--max-slowdown {max_slowdown:g})"
                )
                yield Finding(Fault.SLOWER, history.ended, STEADY, text)


def name_restart(number: int, restart: Restart) -> str:
    """Name a step in the words of the verdict."""
    return f"{restart.step} {number}" if restart.step is Step.RESTART else f"{number}: {restart.step}"


def name_phase(history: History, begin: float, end: float) -> str:
    """Say what the service was doing meanwhile: the step, or that it was left alone."""
    for number, restart in enumerate(history.restarts, 1):
        if begin <= restart.end and end >= restart.asked:
            return name_restart(number, restart)
    return STEADY


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many percent do not exceed; not a number where there are none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


_BY_A_KILL = {Fault.RESET, Fault.UNANSWERED, Fault.TRUNCATED}


def _excuse(history: History, connection: Connection | None, at: float) -> str | None:
    """Say what has cost a connection that nothing could have saved: it was in the process that was killed."""
    if connection is None or connection.opened is None:
        return None
    for restart in history.restarts:
        if restart.step is Step.PREDECESSOR_KILLED and restart.killed_at is not None:
            is_its = connection.pid in (None, restart.killed)
            is_then = connection.opened <= restart.killed_at <= at + LEEWAY_SECONDS
            if is_its and is_then and at <= restart.killed_at + KILL_SECONDS:
                return f"it was in process {restart.killed}, which was killed on purpose"
    return None
