"""A service that is made to fail goes on: a few cells of the table that ``python -m tests.faults`` prints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from tests.faults.cells import Cell, run, serving
from tests.faults.points import ERRORS, MESSAGES, faults_of, find_calls, find_messages, load_injector

pytestmark = pytest.mark.main_python_only

# The role that fails, where, how, and what becomes of the restart. Each way to fail is there, and each message on which
# it hangs.
PLAIN = [
    ("successor", "handoff 'hello' sent", "SIGKILL", "FAILED"),
    ("successor", "handoff 'hello' sent", "garbage", "FAILED"),
    # The sockets are sent a second time, in answer to HELLO.
    ("predecessor", "handoff 'listeners' sent", "ENOMEM", "settled"),
    ("successor", "handoff 'ready' sent", "SIGKILL", "FAILED"),
    ("predecessor", "handoff 'ready' received", "SIGKILL", "settled"),
    ("predecessor", "handoff 'commit' sent", "SIGSTOP", "settled"),
    ("successor", "handoff 'commit' received", "SIGKILL", "ROLLED_BACK"),
    # It takes the end that its predecessor makes of it for a stop of the service, and must leave its sockets alone.
    ("successor", "handoff 'serving' sent", "garbage", "ROLLED_BACK"),
    ("predecessor", "handoff 'serving' received", "slow", "settled"),
    ("predecessor", "handoff 'settled' sent", "SIGKILL", "settled"),
    # What it passes on from now on comes back to it.
    ("predecessor", "handoff 'settled' sent", "garbage", "settled"),
    ("predecessor", "_system.process:spawn subprocess._fork_exec", "ENOMEM", "FAILED"),
]
ANCHORED = [
    ("restart of a worker", "anchor", "line 'spawned' sent", "slow", "settled"),
    ("restart of a worker", "successor", "handoff 'serving' sent", "SIGKILL", "ROLLED_BACK"),
    ("anchor's upgrade", "anchor", "_anchor.reexec:seal os.memfd_create", "ENOMEM", "FAILED"),
]


def fail(cells: Sequence[tuple[Cell, str]], loop: str) -> None:
    """Let one service fail in each of these ways, and go on."""
    with serving(cells[0][0].operation, loop) as service:
        for cell, outcome in cells:
            seen = run(service, cell)
            assert (seen.wrong, seen.outcome) == ([], outcome), (cell, seen, service.log)
            assert seen.is_reached, cell
            assert seen.serves, cell
        service.stop()


def test_a_service_goes_on_whoever_fails_wherever() -> None:
    fail([(Cell("restart", *what), outcome) for *what, outcome in PLAIN], "uvloop")


def test_a_service_with_an_anchor_goes_on_whoever_fails_wherever() -> None:
    fail([(Cell(*what), outcome) for *what, outcome in ANCHORED], "asyncio")


def test_every_message_and_every_kind_of_call_is_a_point_with_faults() -> None:
    """What the injector can wrap is what is looked for, and each has an error of its own."""
    messages, calls = find_messages(), find_calls()
    assert len(messages) == 2 * len(
        {(where, each) for where, kinds in MESSAGES.items() for each in itertools.chain(*kinds)}
    )
    seams = load_injector().SEAMS
    assert set(ERRORS) == {f"{prefix}.{name}" for prefix, (_, names) in seams.items() for name in names}
    assert {call.rpartition(" ")[2] for call in calls} <= set(ERRORS)
    for point in (*messages, *calls):
        assert len(faults_of(point)) > 3
    # The cells above are of the product as it is.
    assert {what[1] for what in PLAIN} | {what[2] for what in ANCHORED} <= {*messages, *calls}
