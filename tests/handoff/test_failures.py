"""A failed restart in words: each row of what can go wrong, the error that it is, and the sentence."""

from __future__ import annotations

import errno
import os

import pytest

from ecdysis_async._handoff.failures import Failure, explain, record
from ecdysis_async._handoff.protocol import PredecessorEvent, PredecessorState
from ecdysis_async._ipc.channel import Frame
from ecdysis_async.errors import (
    ChannelClosed,
    DescriptorsLost,
    ReadyTimeout,
    RestartError,
    RolledBack,
    SpawnFailed,
    StashFailed,
    SuccessorFailed,
)
from ecdysis_async.report import Outcome, Phase, RestartReport

SPAWNING, INITIALISING = PredecessorState.SPAWNING, PredecessorState.INITIALISING
PAUSING, COMMITTING, PROBATION = PredecessorState.PAUSING, PredecessorState.COMMITTING, PredecessorState.PROBATION
TIMED_OUT, DIED, BROKEN = PredecessorEvent.TIMED_OUT, PredecessorEvent.DIED, PredecessorEvent.BROKEN
FAILED, CANCELLED = PredecessorEvent.FAILED, PredecessorEvent.CANCELLED
OURS = f"this generation (pid {os.getpid()}) could not go on with the restart while"


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (Failure(SPAWNING, CANCELLED), SuccessorFailed, "the restart was called off"),
        (
            Failure(SPAWNING, TIMED_OUT, None, 7, 1.5),
            ReadyTimeout,
            (
                "the successor (pid 7) was not ready within 1.5 seconds and was ended; it never entered "
                "`async with Ecdysis()`: does its command run this service?"
            ),
        ),
        (
            Failure(INITIALISING, TIMED_OUT, None, 7, 60.0),
            ReadyTimeout,
            (
                "the successor (pid 7) was not ready within 60 seconds and was ended; where its start-up takes longer, "
                "raise ready_timeout"
            ),
        ),
        (
            Failure(SPAWNING, TIMED_OUT, None, 7, 60.0, stash="cache"),
            StashFailed,
            "the stash 'cache' was not made within 60 seconds: make it smaller, or raise ready_timeout",
        ),
        (
            Failure(PAUSING, TIMED_OUT, None, 7, 10.0, stash="cache"),
            StashFailed,
            "the stash 'cache' was not made within 10 seconds: make it smaller, or at=\"start\"",
        ),
        (
            Failure(COMMITTING, TIMED_OUT, None, 7, 30.0),
            RolledBack,
            "the successor (pid 7) did not answer in time while committing",
        ),
        (
            Failure(INITIALISING, FAILED, Frame("failed", {"error": "no such table"}), 7),
            SuccessorFailed,
            "the successor (pid 7) failed: no such table",
        ),
        (
            Failure(SPAWNING, DIED, None, 7, exit_status=2),
            SuccessorFailed,
            "the successor (pid 7) ended with exit status 2 while spawning, before it entered `async with Ecdysis()`",
        ),
        (
            Failure(PROBATION, DIED, None, 7, exit_status=-9),
            RolledBack,
            "the successor (pid 7) was killed by SIGKILL while on probation",
        ),
        (
            Failure(PAUSING, BROKEN, OSError(errno.EMFILE, "Too many open files"), 7),
            SuccessorFailed,
            (
                f"{OURS} pausing: [Errno 24] Too many open files; the successor (pid 7) was ended; raise the limit of "
                "open files (ulimit -n, LimitNOFILE=)"
            ),
        ),
        (
            Failure(PAUSING, BROKEN, DescriptorsLost("descriptors were lost"), 7),
            SuccessorFailed,
            f"{OURS} pausing: descriptors were lost; the successor (pid 7) was ended",
        ),
        (
            Failure(PAUSING, BROKEN, KeyError("x"), 7),
            SuccessorFailed,
            f"{OURS} pausing: KeyError('x'); its log has the traceback",
        ),
        (
            Failure(COMMITTING, BROKEN, ChannelClosed("the other end is closed"), 7),
            RolledBack,
            "the successor (pid 7) broke the handoff while committing: the other end is closed",
        ),
    ],
    ids=lambda value: f"{value.before.value}-{value.event.value}" if isinstance(value, Failure) else None,
)
def test_each_failure_has_its_sentence(failure: Failure, kind: type[RestartError], text: str) -> None:
    error = explain(failure)
    assert (type(error), error.args[0]) == (kind, text)
    assert error.__cause__ is (failure.cause if isinstance(failure.cause, BaseException) else None)


def test_what_failed_and_the_last_words_are_told() -> None:
    error = explain(Failure(INITIALISING, DIED, None, 7, exit_status=1, stderr="Traceback"))
    assert (error.phase, error.stderr) == (Phase.INITIALISE, "Traceback")
    assert explain(Failure(PredecessorState.RECALLING, DIED, None, 7)).phase is None


def test_an_error_of_ours_is_told_as_it_is() -> None:
    error = StashFailed("the stash 'cache' was not made")
    assert explain(Failure(PAUSING, BROKEN, error, 7)) is error


def test_the_report_and_the_error_tell_of_each_other() -> None:
    report = RestartReport("id", 2, 1)
    error = SpawnFailed("there is no such program", phase=Phase.START)
    record(error, None, report)
    assert (error.phase, report.error, report.outcome) == (Phase.START, "there is no such program", Outcome.FAILED)
    report.outcome = Outcome.ROLLED_BACK
    record(error, Phase.PROBATION, report)
    assert (error.phase, report.outcome) == (Phase.PROBATION, Outcome.ROLLED_BACK)
