"""Where a generation stands, in words and as an object of JSON: for people who ask from outside.

Nothing here changes anything, or waits. It is told what it describes, and asks nobody.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import anyio

from ecdysis_async._handoff.ancestors import Ancestor
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.preflight import describe_place
from ecdysis_async._handoff.protocol import PredecessorState, SuccessorState
from ecdysis_async._handoff.successor import SuccessorSide
from ecdysis_async._handoff.verdict import summarize
from ecdysis_async._sockets.entry import Entry, Kind
from ecdysis_async.errors import RestartError
from ecdysis_async.report import Outcome, RestartReport, State

__all__ = [
    "counted",
    "describe_ancestors",
    "describe_failed_restart",
    "describe_listeners",
    "describe_load",
    "describe_process",
    "describe_restart",
    "describe_wait",
    "report_of",
]

_WAITS = {
    PredecessorState.SPAWNING: "{successor} to start, for {seconds:.1f} s so far",
    PredecessorState.INITIALISING: "{successor} to get ready, for {seconds:.1f} s so far",
    PredecessorState.PAUSING: "the end of accepting here",
    PredecessorState.COMMITTING: "{successor} to accept, for {seconds:.1f} s so far",
    PredecessorState.ABORTING: "{successor} to end, because the restart has failed",
    PredecessorState.RECALLING: "{successor} to give the sockets back",
    PredecessorState.REVERTING: "{successor} to end, because it has failed",
    PredecessorState.STOPPING: "{successor} to end, because the service stops",
}


def counted(number: int, noun: str) -> str:
    """Say how many there are of something."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_load(connections: int, jobs: int) -> str:
    """Say how many connections there are, and how many jobs of the application's own that have none."""
    if jobs and not connections:
        return counted(jobs, "job")
    return counted(connections, "connection") + (f" and {counted(jobs, 'job')}" if jobs else "")


def describe_failed_restart(error: RestartError) -> str:
    """Say in one line why the last restart failed, for `systemctl status`."""
    return f"the last restart failed: {summarize(error)}"


def describe_wait(
    handover: PredecessorSide | None,
    inheritance: SuccessorSide | None,
    *,
    phase_seconds: float,
    connections: int,
    jobs: int = 0,
    deadline_seconds: float | None,
) -> str | None:
    """Say what a generation waits for; None if for nothing but clients.

    Args:
        handover: its last restart.
        inheritance: the handoff that it came from.
        phase_seconds: how long the restart has been in its state.
        connections: how many connections it has.
        jobs: how many jobs without a connection it has.
        deadline_seconds: how long the connections still get, where it drains.
    """
    if deadline_seconds is not None:
        return f"{describe_load(connections, jobs)}, deadline in {max(0.0, deadline_seconds):.0f} s"
    if handover is not None and not handover.state.final:
        report = handover.report
        successor = f"generation {report.generation}"
        if report.successor_pid is not None:
            successor += f" (pid {report.successor_pid})"
        if handover.state is PredecessorState.PROBATION:
            left = max(0.0, handover.generation.settings.probation - phase_seconds)
            return f"{successor}, on probation for {left:.1f} s more"
        return _WAITS[handover.state].format(successor=successor, seconds=phase_seconds)
    if (
        inheritance is not None
        and inheritance.state is SuccessorState.PROBATION
        and inheritance.predecessor is not None
    ):
        former = inheritance.predecessor
        return f"the end of its probation: generation {former.generation} (pid {former.pid}) can still take over again"
    return None


def describe_restart(handover: PredecessorSide | None, *, phase_seconds: float) -> dict[str, Any] | None:
    """Return the restart that is in progress, with what it is doing and for how many seconds."""
    if handover is None or handover.state.final:
        return None
    return {
        "id": handover.report.id,
        "generation": handover.report.generation,
        "pid": handover.report.successor_pid,
        "phase": handover.state.value,
        "seconds": phase_seconds,
    }


def describe_listeners(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """Return name, address and kind of each socket; the address is the real one, also where port 0 was asked for."""
    return [{"name": entry.name, "address": _address_of(entry), "kind": entry.kind.value} for entry in entries]


def describe_ancestors(ancestors: Sequence[Ancestor]) -> list[dict[str, Any]]:
    """Return the older generations that still drain; what one has not told yet is None."""
    now = anyio.current_time()
    return [
        {
            "generation": each.generation,
            "pid": each.pid,
            "state": State.DRAINING.value,
            "connections": each.connections,
            "jobs": each.jobs,
            "ends_in": max(0.0, each.ends_at - now) if each.ends_at is not None else None,
            "serving": each.serving,
        }
        for each in sorted(ancestors, key=lambda each: each.generation)
    ]


def describe_process() -> dict[str, Any]:
    """Return what this process runs in: of the environment the names alone, because a value may be a secret."""
    return {**describe_place(), "environment": sorted(os.environ)}


def report_of(inheritance: SuccessorSide) -> RestartReport:
    """Return what a successor itself knows of the restart that it came from: its predecessor may have died since."""
    assert inheritance.predecessor is not None
    return inheritance.report or RestartReport(
        id=inheritance.restart_id,
        generation=inheritance.generation.number,
        predecessor_pid=inheritance.predecessor.pid,
        successor_pid=os.getpid(),
        outcome=Outcome.SETTLED if inheritance.state is SuccessorState.SETTLED else Outcome.SERVING,
    )


def _address_of(entry: Entry) -> str:
    if entry.kind not in (Kind.TCP, Kind.UDP):
        return entry.address
    host, port = entry.sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
