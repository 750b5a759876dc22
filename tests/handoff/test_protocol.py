"""The machines one by one: their tables, their vocabulary, and what released versions have said to each other."""

from __future__ import annotations

import ast
import inspect
import json
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from ecdysis_async._handoff import protocol
from ecdysis_async._handoff.protocol import (
    DrainMessage,
    FromPredecessor,
    FromSuccessor,
    PredecessorAction,
    PredecessorEvent,
    PredecessorState,
    SuccessorAction,
    SuccessorEvent,
    SuccessorState,
    Timer,
    choose_version,
    predecessor_event,
    step_predecessor,
    step_successor,
    successor_event,
)
from ecdysis_async.errors import GarbledFrame, UnknownMessage, VersionMismatch

State = TypeVar("State", PredecessorState, SuccessorState)
Event = TypeVar("Event", PredecessorEvent, SuccessorEvent)

RUNNING_PREDECESSORS: Final = [state for state in PredecessorState if not state.final]
RUNNING_SUCCESSORS: Final = [state for state in SuccessorState if not state.final]
ORPHANS: Final = {SuccessorState.ORPHANED, SuccessorState.OPENING_ORPHANED}
FROM_SUCCESSOR: Final = [predecessor_event(message) for message in FromSuccessor]
FROM_PREDECESSOR: Final = [successor_event(message) for message in FromPredecessor]

RECORDED: Final = sorted((Path(__file__).parent / "transcripts").glob("version-*.json"))
RESTARTS: Final = [
    pytest.param(restart, id=f"{path.stem} {name}")
    for path in RECORDED
    for name, restart in json.loads(path.read_text()).items()
]


def reachable(
    start: State, events: Iterable[Event], step: Callable[[State, Event], tuple[State, tuple[Any, ...]]]
) -> set[State]:
    found = [start]
    for state in found:  # grows meanwhile
        found += {step(state, event)[0] for event in events} - set(found)
    return set(found)


# --- the tables -------------------------------------------------------------------------------------------------------


def test_the_module_is_pure() -> None:
    tree = ast.parse(inspect.getsource(protocol))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"__future__", "collections.abc", "ecdysis_async.errors", "enum", "typing"}


def test_every_state_can_be_reached() -> None:
    assert reachable(PredecessorState.SPAWNING, PredecessorEvent, step_predecessor) == set(PredecessorState)
    assert reachable(SuccessorState.GREETING, SuccessorEvent, step_successor) == set(SuccessorState)


def test_the_final_states() -> None:
    assert {state for state in PredecessorState if state.final} == {
        PredecessorState.FAILED,
        PredecessorState.ROLLED_BACK,
        PredecessorState.SETTLED,
        PredecessorState.STOPPED,
    }
    assert {state for state in SuccessorState if state.final} == {
        SuccessorState.SETTLED,
        SuccessorState.ABORTED,
        SuccessorState.STOPPED,
        SuccessorState.RETURNED,
    }


@pytest.mark.parametrize("state", [state for state in PredecessorState if state.final])
def test_a_final_predecessor_changes_no_more(state: PredecessorState) -> None:
    assert {step_predecessor(state, event) for event in PredecessorEvent} == {(state, ())}
    assert state.timer is None


@pytest.mark.parametrize("state", [state for state in SuccessorState if state.final])
def test_a_final_successor_changes_no_more(state: SuccessorState) -> None:
    assert {step_successor(state, event) for event in SuccessorEvent} == {(state, ())}
    assert state.timer is None


@pytest.mark.parametrize("state", RUNNING_PREDECESSORS)
def test_the_death_of_the_successor_ends_every_restart(state: PredecessorState) -> None:
    assert step_predecessor(state, PredecessorEvent.DIED)[0].final


@pytest.mark.parametrize("state", RUNNING_SUCCESSORS)
def test_the_death_of_the_predecessor_is_heard_once_in_every_state(state: SuccessorState) -> None:
    following, _ = step_successor(state, SuccessorEvent.DIED)
    if state in ORPHANS:
        assert following is state
    else:
        assert following.final or following in ORPHANS


@pytest.mark.parametrize("state", RUNNING_PREDECESSORS)
def test_a_stop_is_heard_in_every_state(state: PredecessorState) -> None:
    following, actions = step_predecessor(state, PredecessorEvent.STOP)
    assert following in (PredecessorState.STOPPING, PredecessorState.SETTLED)
    assert PredecessorAction.RESUME not in actions


@pytest.mark.parametrize("event", [SuccessorEvent.STOP_HERE, SuccessorEvent.FAILED])
@pytest.mark.parametrize("state", RUNNING_SUCCESSORS)
def test_a_successor_that_stops_or_fails_leaves_in_every_state(state: SuccessorState, event: SuccessorEvent) -> None:
    following, actions = step_successor(state, event)
    assert following in (SuccessorState.ABORTED, SuccessorState.STOPPED)
    # A predecessor that is alive is told why.
    assert bool(actions) == (state not in ORPHANS)


@pytest.mark.parametrize("state", RUNNING_PREDECESSORS)
def test_a_restart_can_be_called_off_until_the_commit(state: PredecessorState) -> None:
    following, actions = step_predecessor(state, PredecessorEvent.CANCELLED)
    if state in (PredecessorState.SPAWNING, PredecessorState.INITIALISING, PredecessorState.PAUSING):
        assert following is PredecessorState.ABORTING
        assert actions[0] is PredecessorAction.SEND_ABORT
        assert PredecessorAction.END_SUCCESSOR in actions
        assert (PredecessorAction.RESUME in actions) == (state is PredecessorState.PAUSING)
    else:
        assert (following, actions) == (state, ())


@pytest.mark.parametrize("state", PredecessorState)
def test_a_predecessor_times_out_where_it_has_a_timer(state: PredecessorState) -> None:
    assert (step_predecessor(state, PredecessorEvent.TIMED_OUT)[0] is not state) == (state.timer is not None)


@pytest.mark.parametrize("state", SuccessorState)
def test_a_successor_times_out_where_it_has_a_timer(state: SuccessorState) -> None:
    assert (step_successor(state, SuccessorEvent.TIMED_OUT)[0] is not state) == (state.timer is not None)


def test_every_timer_is_used() -> None:
    assert {state.timer for state in (*PredecessorState, *SuccessorState)} == {None, *Timer}


# --- the vocabulary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", FromSuccessor)
def test_what_a_successor_may_say(message: FromSuccessor) -> None:
    assert predecessor_event(message) is PredecessorEvent[message.name]


@pytest.mark.parametrize("message", FromPredecessor)
def test_what_a_predecessor_may_say(message: FromPredecessor) -> None:
    assert successor_event(message) is SuccessorEvent[message.name]


@pytest.mark.parametrize(
    "message", ["", "HELLO", "greetings", "died", "broken", "timed out", "paused", *DrainMessage, "stop"]
)
def test_what_no_successor_may_say(message: str) -> None:
    with pytest.raises(UnknownMessage, match=f"^the successor sent .*{message!r}"):
        predecessor_event(message)


@pytest.mark.parametrize(
    "message", ["", "commit ", "died", "broken", "opened", "stop here", *DrainMessage, "settle", "ready"]
)
def test_what_no_predecessor_may_say(message: str) -> None:
    with pytest.raises(UnknownMessage, match=f"^the predecessor sent .*{message!r}"):
        successor_event(message)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (PredecessorState.SPAWNING, PredecessorEvent.READY),
        (PredecessorState.INITIALISING, PredecessorEvent.HELLO),
        (PredecessorState.PAUSING, PredecessorEvent.SERVING),
        (PredecessorState.COMMITTING, PredecessorEvent.READY),
        (PredecessorState.PROBATION, PredecessorEvent.SERVING),
    ],
)
def test_a_message_out_of_turn_breaks_the_channel_to_the_successor(
    state: PredecessorState, message: PredecessorEvent
) -> None:
    following, actions = step_predecessor(state, message)
    assert (following, actions) == step_predecessor(state, PredecessorEvent.BROKEN)
    assert PredecessorAction.END_SUCCESSOR in actions


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (SuccessorState.GREETING, SuccessorEvent.COMMIT),
        (SuccessorState.INITIALISING, SuccessorEvent.COMMIT),
        (SuccessorState.INITIALISING, SuccessorEvent.LISTENERS),
        (SuccessorState.WAITING, SuccessorEvent.SETTLED),
        (SuccessorState.OPENING, SuccessorEvent.SETTLED),
        (SuccessorState.OPENING, SuccessorEvent.COMMIT),
    ],
)
def test_a_message_out_of_turn_breaks_the_channel_to_the_predecessor(
    state: SuccessorState, message: SuccessorEvent
) -> None:
    assert (
        step_successor(state, message) == step_successor(state, SuccessorEvent.BROKEN) == (SuccessorState.ABORTED, ())
    )


@pytest.mark.parametrize("event", [SuccessorEvent.BROKEN, SuccessorEvent.COMMIT, SuccessorEvent.ABORT])
def test_a_successor_in_probation_serves_on_when_the_channel_breaks(event: SuccessorEvent) -> None:
    assert step_successor(SuccessorState.PROBATION, event) == (SuccessorState.PROBATION, ())


@pytest.mark.parametrize("state", [PredecessorState.ABORTING, PredecessorState.REVERTING, PredecessorState.STOPPING])
def test_a_successor_that_is_being_ended_is_not_listened_to(state: PredecessorState) -> None:
    assert {step_predecessor(state, event) for event in FROM_SUCCESSOR} == {(state, ())}


@pytest.mark.parametrize("state", sorted(ORPHANS, key=str))
def test_a_dead_predecessor_is_not_listened_to(state: SuccessorState) -> None:
    assert {step_successor(state, event) for event in FROM_PREDECESSOR} == {(state, ())}


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "chosen"),
    [
        ([1, 1], (1, 1), 1),
        ([1, 4], (1, 2), 2),  # the release was rolled back: the successor is the newer one
        ([1, 2], (1, 4), 2),
        ([3, 5], (1, 3), 3),
        ([1, 3], (3, 5), 3),
        ([2, 3], (1, 9), 3),
    ],
)
def test_the_highest_common_version_is_chosen(theirs: list[int], ours: tuple[int, int], chosen: int) -> None:
    assert choose_version({"versions": theirs, "pid": 1}, ours) == chosen


@pytest.mark.parametrize(("theirs", "ours"), [([2, 3], (1, 1)), ([1, 1], (2, 3)), ([0, 0], (1, 1))])
def test_no_common_version_is_a_typed_failure(theirs: list[int], ours: tuple[int, int]) -> None:
    expected = f"{theirs[0]} to {theirs[1]}, this generation {ours[0]} to {ours[1]}"
    with pytest.raises(VersionMismatch, match=expected):
        choose_version({"versions": theirs}, ours)


@pytest.mark.parametrize("versions", [None, 1, "11", [], [1], [1, 1, 1], [2, 1], ["1", "1"], [1.0, 1.0], {"1": 1}])
def test_a_hello_without_versions_is_garbled(versions: object) -> None:
    with pytest.raises(GarbledFrame, match="names no versions"):
        choose_version({"versions": versions})
    with pytest.raises(GarbledFrame, match="names no versions"):
        choose_version({})


def test_this_release_speaks_every_version_that_was_recorded() -> None:
    oldest, newest = protocol.VERSIONS
    recorded = [int(path.stem.removeprefix("version-")) for path in RECORDED]
    assert sorted(recorded) == list(range(oldest, newest + 1))


# --- transcripts ------------------------------------------------------------------------------------------------------

# What happens to a side before it says these of its own accord; all else it says in answer to the other.
PREDECESSOR_CAUSES: Final = {
    FromPredecessor.SETTLED: PredecessorEvent.TIMED_OUT,
    FromPredecessor.ABORT: PredecessorEvent.CANCELLED,
    FromPredecessor.STOP: PredecessorEvent.STOP,
}
SUCCESSOR_CAUSES: Final = {
    FromSuccessor.READY: SuccessorEvent.READY,
    FromSuccessor.FAILED: SuccessorEvent.FAILED,
    FromSuccessor.SETTLE: SuccessorEvent.SETTLE,
    FromSuccessor.STOPPING: SuccessorEvent.STOP_HERE,
}


class PredecessorReplay:
    """A predecessor whose supervisor does everything at once."""

    def __init__(self) -> None:
        self.state = PredecessorState.SPAWNING
        self.said: deque[FromPredecessor] = deque()
        self.ends_successor = False

    def handle(self, event: PredecessorEvent) -> None:
        self.state, actions = step_predecessor(self.state, event)
        for action in actions:
            if action.name.startswith("SEND_"):
                self.said.append(FromPredecessor[action.name.removeprefix("SEND_")])
            elif action is PredecessorAction.PAUSE:
                self.handle(PredecessorEvent.PAUSED)
            elif action is PredecessorAction.END_SUCCESSOR:
                self.ends_successor = True


class SuccessorReplay:
    """A successor that has just said hello, and whose supervisor does everything at once."""

    def __init__(self) -> None:
        self.state = SuccessorState.GREETING
        self.said = deque([FromSuccessor.HELLO])

    def handle(self, event: SuccessorEvent) -> None:
        self.state, actions = step_successor(self.state, event)
        for action in actions:
            if action is SuccessorAction.OPEN:
                self.handle(SuccessorEvent.OPENED)
            else:
                self.said.append(FromSuccessor[action.name.removeprefix("SEND_")])


@pytest.mark.parametrize("restart", RESTARTS)
def test_a_recorded_successor_is_understood(restart: dict[str, Any]) -> None:
    predecessor = PredecessorReplay()
    for direction, frame in restart["frames"]:
        if direction == "up":
            predecessor.handle(predecessor_event(frame["type"]))
            if frame["type"] == FromSuccessor.HELLO:
                assert choose_version(frame) in frame["versions"]
            continue
        message = FromPredecessor(frame["type"])
        if not predecessor.said:
            predecessor.handle(PREDECESSOR_CAUSES[message])
        assert predecessor.said.popleft() is message
    assert not predecessor.said
    if predecessor.ends_successor:
        predecessor.handle(PredecessorEvent.DIED)
    assert predecessor.state is PredecessorState(restart["predecessor"])


@pytest.mark.parametrize("restart", RESTARTS)
def test_a_recorded_predecessor_is_understood(restart: dict[str, Any]) -> None:
    successor = SuccessorReplay()
    for direction, frame in restart["frames"]:
        if direction == "down":
            successor.handle(successor_event(frame["type"]))
            continue
        message = FromSuccessor(frame["type"])
        if not successor.said:
            successor.handle(SUCCESSOR_CAUSES[message])
        assert successor.said.popleft() is message
    assert not successor.said
    assert successor.state is SuccessorState(restart["successor"])
