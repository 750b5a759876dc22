"""A failed restart in words: which error it is, what has happened, and what can be done about it.

Everything here is computed from what is passed in; nothing is read, awaited or logged.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Final

from ecdysis_async._ipc.channel import Frame
from ecdysis_async._system.process import describe_end
from ecdysis_async._system.wording import is_by_command, name_setting
from ecdysis_async.errors import (
    ChannelError,
    DescriptorsLost,
    ReadyTimeout,
    RestartError,
    RolledBack,
    StashFailed,
    SuccessorFailed,
)
from ecdysis_async.report import Outcome, Phase, RestartReport

from .protocol import PredecessorEvent, PredecessorState
from .side import ERROR_BYTES

__all__ = ["PHASES", "Failure", "explain", "record"]

# A phase ends with the event that leads from its last state to another phase.
PHASES: Final = {
    PredecessorState.SPAWNING: Phase.START,
    PredecessorState.INITIALISING: Phase.INITIALISE,
    PredecessorState.PAUSING: Phase.PAUSE,
    PredecessorState.COMMITTING: Phase.COMMIT,
    PredecessorState.PROBATION: Phase.PROBATION,
}


# What a process does that runs this service, in the words of who wrote its program, or of who runs the command.
_ENTERED: Final = {False: "entered `async with Ecdysis()`", True: "came to run `ecdysis run`"}


@dataclass(frozen=True, slots=True)
class Failure:
    """What a predecessor knows when its restart fails.

    Attributes:
        before: the state in which it happened.
        event: what happened.
        cause: the error, or the frame, that it came of; None where there is none.
        successor_pid: the successor's process.
        limit: how long that state may take, seconds.
        exit_status: how the successor ended, where it did.
        stash: the name of what was being made for the successor, which waited for it; None where it waited for nothing.
        stderr: the last lines that the successor wrote.
        who: what the successor is called.
        place: where it stood when its time was over; None where it has not told.
    """

    before: PredecessorState
    event: PredecessorEvent
    cause: object = None
    successor_pid: int | None = None
    limit: float = 0.0
    exit_status: int = 0
    stash: str | None = None
    stderr: str = ""
    who: str = "the successor"
    place: str | None = None


def explain(failure: Failure) -> RestartError:
    """Return the error that a restart fails with. Its text says what went wrong, and what to do about it."""
    before, pid, who = failure.before, failure.successor_pid, failure.who
    doing = "on probation" if before is PredecessorState.PROBATION else before.value
    kind: type[RestartError] = SuccessorFailed
    if before in (PredecessorState.COMMITTING, PredecessorState.PROBATION):
        kind = RolledBack
    match failure.event, failure.cause:
        case _, RestartError() as error:
            return error
        case PredecessorEvent.CANCELLED, _:
            what = "the restart was called off"
        case PredecessorEvent.TIMED_OUT, _ if failure.stash is not None:
            kind = StashFailed
            what = f"the stash {failure.stash!r} was not made within {failure.limit:g} seconds: make it smaller"
            what += (
                ', or at="start"'
                if before is PredecessorState.PAUSING
                else f", or raise {name_setting('ready_timeout')}"
            )
        case PredecessorEvent.FAILED, Frame(body=body):
            what = f"{who} (pid {pid}) failed: {str(body.get('error'))[-ERROR_BYTES:]}"
        case PredecessorEvent.TIMED_OUT, _ if before in (PredecessorState.SPAWNING, PredecessorState.INITIALISING):
            kind = ReadyTimeout
            what = f"{who} (pid {pid}) was not ready within {failure.limit:g} seconds and was ended"
            if failure.place is not None:
                what += f": it stood at {failure.place}"
            if before is PredecessorState.SPAWNING and failure.place is None:
                what += f"; it never {_ENTERED[is_by_command()]}: does its command run this service?"
            else:
                what += f"; where its start-up takes longer, raise {name_setting('ready_timeout')}"
        case PredecessorEvent.TIMED_OUT, _:
            what = f"{who} (pid {pid}) did not answer in time while {doing}"
        case PredecessorEvent.DIED, _:
            what = f"{who} (pid {pid}) {describe_end(failure.exit_status)} while {doing}"
            if before is PredecessorState.SPAWNING:
                what += f", before it {_ENTERED[is_by_command()]}"
        case _, DescriptorsLost() | OSError() as cause:
            # The successor has no part in it, and no change to it would help.
            what = f"{_this_generation(doing)}: {cause}; {who} (pid {pid}) was ended"
            if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
                what += "; raise the limit of open files (ulimit -n, LimitNOFILE=)"
        case _, Exception() as cause if not isinstance(cause, ChannelError):
            what = f"{_this_generation(doing)}: {cause!r}; its log has the traceback"
        case _, cause:
            what = f"{who} (pid {pid}) broke the handoff while {doing}: {cause}"
    error = kind(what, phase=PHASES.get(before), stderr=failure.stderr)
    if kind in (SuccessorFailed, RolledBack) and isinstance(failure.cause, BaseException):
        error.__cause__ = failure.cause
    if failure.event is PredecessorEvent.FAILED and isinstance(failure.cause, Frame):
        error.is_usage = failure.cause.body.get("is_usage") is True
    return error


def record(error: RestartError, phase: Phase | None, report: RestartReport) -> None:
    """Let an error and a report tell of each other: the phase that failed, and why the restart did.

    Args:
        error: what the restart fails with.
        phase: the one that failed; None where it is not known better than the error knows it.
        report: of that restart.
    """
    error.phase = phase or error.phase
    report.error = str(error)
    if report.outcome is Outcome.IN_PROGRESS:
        report.outcome = Outcome.FAILED


def _this_generation(doing: str) -> str:
    return f"this generation (pid {os.getpid()}) could not go on with the restart while {doing}"
