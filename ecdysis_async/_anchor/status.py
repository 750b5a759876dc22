"""What an anchor tells of its service: to people who ask, to load balancers and to systemd.

Nothing here changes anything, or waits. Every answer is made of an `AnchorState`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from typing import Any

import anyio

from ecdysis_async._handoff.preflight import describe_place, describe_place_of
from ecdysis_async._management.status import counted, describe_failed_restart, describe_listeners, describe_load
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._system.launch import look_up_links
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.report import State

from .pool import Worker, WorkerPool
from .state import AnchorState, Life, RollOut, RollOutStage, Turn, TurnState

__all__ = [
    "describe",
    "describe_status",
    "describe_wait",
    "describe_waits",
    "describe_workers_place",
    "look_up_status",
    "why_not_ready",
]

# A worker that says nothing for so long hangs, seconds: its beat comes each second.
SILENT_SECONDS = 2.5

# A worker in one of these states accepts, or is about to, or can again.
_ACCEPTING = (State.WAITING, State.SERVING, State.PAUSED)


def why_not_ready(state: AnchorState) -> str | None:
    """Say why a load balancer shall send nobody here; None where it shall."""
    if state.is_leaving:
        return "the service is about to stop"
    if state.life is Life.STARTING:
        return f"the service is starting: {state.pool.serving} of {counted(state.pool.target, 'worker')} serving"
    if not _accepts(state):
        return "no worker serves: clients wait for one"
    return None


def describe_waits(state: AnchorState) -> list[dict[str, Any]]:
    """Say of each worker what its restart, or its drain, waits for."""
    roll_out = state.roll_out
    if state.is_stopping or roll_out is None or len(roll_out.turns) < 2:  # noqa: PLR2004 - one is no list
        return []
    return [{"slot": turn.slot.index, "waiting_for": _wait_of(turn)} for turn in roll_out.turns]


def describe_wait(state: AnchorState) -> str | None:
    """Say what the service waits for; None if for nothing but clients."""
    match state.life:
        case Life.STOPPING:
            workers = [worker for worker in state.pool if worker.is_alive]
            return _describe_end_of(workers) or _describe_ending(workers, state.config.settings.exit_timeout)
        case Life.UPGRADING:
            return "the new anchor to take over"
        case Life.LAME_DUCK:
            seconds = max(0.0, state.lame_duck_ends - anyio.current_time())
            return f"load balancers to look elsewhere, for {seconds:.1f} s more"
    if state.roll_out is not None and (wait := _wait_of_roll_out(state, state.roll_out)) is not None:
        return wait
    pool = state.pool
    if pool.serving < len(pool.slots):
        return f"{len(pool.slots) - pool.serving} of {counted(len(pool.slots), 'worker')} to serve"
    return None


def _describe_end_of(workers: list[Worker]) -> str | None:
    """Say what the end of some workers waits for; None if for nothing that is known."""
    now = anyio.current_time()
    silent = [each for each in workers if each.silent_seconds(now) >= SILENT_SECONDS]
    if silent:
        pids = ", ".join(str(each.pid) for each in silent)
        return f"pid {pids} to answer, silent for {max(each.silent_seconds(now) for each in silent):.0f} s"
    jobs = sum(each.jobs for each in workers)
    connections = sum(each.connections for each in workers) - jobs
    if not connections and not jobs:
        return None
    ends = [each.ends_at for each in workers if each.ends_at is not None]
    deadline = f", deadline in {max(0.0, max(ends) - now):.0f} s" if ends else ""
    return describe_load(connections, jobs) + deadline


def _describe_ending(workers: list[Worker], exit_timeout: float) -> str:
    """Say what the end of workers waits for that have nothing left to answer."""
    if not workers:
        return "the workers to end"
    pids = ", ".join(str(each.pid) for each in workers)
    return f"pid {pids} to end, with nothing left to answer (by force {exit_timeout:g} s after the drain)"


def _describe_stopping(state: AnchorState) -> dict[str, Any] | None:
    """Say what a service does that was told to stop, and for how long at the most; None where it was not told."""
    now = anyio.current_time()
    if state.life is Life.LAME_DUCK:
        return {"phase": "lame duck", "ends_in": max(0.0, state.lame_duck_ends - now)}
    if not state.is_stopping:
        return None
    ends = [worker.ends_at for worker in state.pool if worker.is_alive and worker.ends_at is not None]
    return {"phase": "draining", "ends_in": max(0.0, max(ends) - now) if ends else None}


def _wait_of_roll_out(state: AnchorState, roll_out: RollOut) -> str | None:
    """Say what a roll-out waits for; None if for nothing any more."""
    if roll_out.is_over:
        if roll_out.stage is RollOutStage.DRAINED:
            return None
        former = [turn.old for turn in roll_out.turns if turn.old is not None and turn.old.is_alive]
        return _describe_end_of(former) or _describe_ending(former, state.config.settings.exit_timeout)
    leaving = [turn.old for turn in roll_out.turns if turn.old is not None and turn.old.is_alive]
    if state.config.one_at_a_time and leaving:
        return f"the old release to end (--one-at-a-time): {_describe_end_of(leaving) or 'its processes'}"
    if (turn := roll_out.current) is not None:
        if (silence := _describe_silence(turn)) is not None:
            return silence
        place = f"worker {roll_out.turns.index(turn) + 1} of {len(roll_out.turns)}"
        filling = state.fillings.get(turn.slot)
        handoff = turn.old.handoff if turn.old is not None else None
        phase = filling.state if filling is not None else handoff.state if handoff is not None else None
        return f"{place}: {phase.value if phase is not None else 'its turn'}"
    if roll_out.probation_ends is not None:
        seconds = max(0.0, roll_out.probation_ends - anyio.current_time())
        return f"generation {roll_out.generation}, on probation for {seconds:.1f} s more"
    if roll_out.before is not None:
        return f"restart {roll_out.before.report.id} to settle, whose probation this one has ended"
    if state.life is Life.STARTING:
        return f"the start to end: {state.pool.serving} of {counted(state.pool.target, 'worker')} serving"
    if all(turn.state is TurnState.PENDING for turn in roll_out.turns):
        return "the first worker's turn"
    if state.config.one_at_a_time and state.former_release is not None:
        return "the former release to start again (--one-at-a-time)"
    if state.config.one_at_a_time and all(turn.state is TurnState.SERVED for turn in roll_out.turns):
        return f"the probation of generation {roll_out.generation} to begin"
    return "the former workers to take their places again"


def describe_workers_place(pool: WorkerPool) -> dict[str, Any]:
    """Return what a serving worker runs by, and where, which stands for all; without one, what the anchor does."""
    worker = next((worker for worker in reversed(list(pool)) if worker.serves and worker.pid is not None), None)
    return describe_place_of(worker.pid, worker.environment) if worker is not None else describe_place()


def describe_status(state: AnchorState, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return what `ecdysis status` is answered with.

    Args:
        state: what the anchor knows.
        entries: the sockets of the workers.
    """
    roll_out, pool = state.roll_out, state.pool
    draining = [worker for worker in pool if worker.state in (State.PAUSED, State.DRAINING)]
    now = anyio.current_time()
    return {
        "generation": state.generation,
        "pid": os.getpid(),
        "state": _describe_state(state).value,
        "stopping": _describe_stopping(state),
        "uptime": time.monotonic() - state.begun,
        "connections": pool.connections - sum(worker.jobs for worker in pool),
        "jobs": sum(worker.jobs for worker in pool),
        "release": next((worker.release for worker in pool if worker.serves and worker.release), ""),
        "listeners": describe_listeners(entries),
        "waiting_for": describe_wait(state),
        "restart": None
        if roll_out is None or roll_out.is_over
        else {
            "id": roll_out.report.id,
            "generation": roll_out.generation,
            "pid": None,
            "phase": describe_wait(state),
            "seconds": time.time() - roll_out.report.started_at,
        },
        "last_report": state.last_report.to_json() if state.last_report is not None else None,
        "anchor": {"upgrades": state.upgrades, "error": state.upgrade_error, "missing": dict(state.missing)},
        "process": {**describe_workers_place(pool), "environment": sorted(pool.environment)},
        "exclusive": [
            {"name": name, "is_held": is_held, "seconds": now - since, "slot": slot.index, "pid": worker.pid}
            for slot in pool.slots
            for worker in slot.workers
            for name, is_held, since in worker.exclusive
        ],
        "draining": [
            {
                "generation": worker.generation,
                "pid": worker.pid,
                "slot": next(slot.index for slot in pool.slots if worker in slot.workers),
                "state": worker.state.value,
                "connections": worker.connections - worker.jobs,
                "jobs": worker.jobs,
                "ends_in": max(0.0, worker.ends_at - now) if worker.ends_at is not None else None,
                "serving": worker.serving,
            }
            for worker in draining
        ],
        "workers": [
            {
                "slot": slot.index,
                "pid": worker.pid,
                "generation": worker.generation,
                "state": worker.state.value,
                "connections": worker.connections - worker.jobs,
                "jobs": worker.jobs,
                "release": worker.release,
                "requests": worker.requests,
                "rss": worker.rss,
                "uptime": now - worker.born,
                "silence": worker.silent_seconds(now),
            }
            for slot in pool.slots
            for worker in slot.workers
        ],
    }


async def look_up_status(state: AnchorState) -> dict[str, Any]:
    """Return what of the status stands in the file system."""
    runs = next((worker.launch for worker in state.pool if worker.serves and worker.launch is not None), None)
    command = state.config.settings.command
    return await run_in_thread(functools.partial(look_up_links, runs, command), abandon_on_cancel=True)


def describe(state: AnchorState) -> str:
    """Say in one line what `systemctl status` shows."""
    pool = state.pool
    serving = f"{pool.serving} of {counted(len(pool.slots), 'worker')} serving"
    jobs = sum(worker.jobs for worker in pool)
    parts = [f"generation {state.generation}: {serving}, {describe_load(pool.connections - jobs, jobs)}"]
    if (roll_out := state.roll_out) is not None and not roll_out.is_over:
        parts.append(f"rolling out generation {roll_out.generation}")
    elif roll_out is not None and roll_out.error is not None:
        parts.append(describe_failed_restart(roll_out.error))
    if state.missing:
        parts.append(f"without {', '.join(state.missing)}")
    return "; ".join(parts)


def _describe_state(state: AnchorState) -> State:
    if state.is_stopping:
        return State.DRAINING
    return State.SERVING if state.life is not Life.STARTING and _accepts(state) else State.STARTING


def _accepts(state: AnchorState) -> bool:
    """Say whether a worker serves, or will in a moment.

    Between a pause and a commit nobody accepts, and clients wait in the kernel's queue. That is no news.
    """
    return any(worker.is_alive and worker.state in _ACCEPTING for worker in state.pool)


def _wait_of(turn: Turn) -> str | None:
    old = turn.old
    match turn.state:
        case TurnState.PENDING:
            return "its turn"
        case TurnState.UNDER_WAY if (silence := _describe_silence(turn)) is not None:
            return silence
        case TurnState.UNDER_WAY if old is not None and old.handoff is not None and old.handoff.state is not None:
            return f"its successor: {old.handoff.state.value}"
        case TurnState.UNDER_WAY:
            return "its successor to start"
        case TurnState.SERVED:
            return "the end of its probation"
        case TurnState.SETTLED if old is not None and old.is_alive:
            load = describe_load(old.connections - old.jobs, old.jobs)
            return f"{load} of pid {old.pid}" if old.connections else "its end"
    return None


def _describe_silence(turn: Turn) -> str | None:
    """Say of a worker whose successor is waited for that it does not answer; None where it does."""
    old = turn.old
    if old is None or not old.is_alive or old.is_bypassed:
        return None
    seconds = old.silent_seconds(anyio.current_time())
    if seconds < SILENT_SECONDS:
        return None
    return f"worker {turn.slot.index} (pid {old.pid}) to answer, which has been silent for {seconds:.0f} s"
