"""Every interleaving in which an anchor fills the place of a worker that hangs, explored.

The anchor is the predecessor of the new worker, by the tables of ``_handoff/protocol.py``, and accepts nothing itself.
The worker that hangs accepts on, may wake up at any moment, and may die. What a supervisor does with the actions is
restated here; ``_anchor/hanging.py`` and ``_anchor/filling.py`` do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from ecdysis_async._handoff.protocol import (
    PredecessorAction,
    PredecessorEvent,
    PredecessorState,
    SuccessorAction,
    SuccessorEvent,
    SuccessorState,
    step_predecessor,
    step_successor,
)

pytestmark = pytest.mark.main_python_only

# The checks below would pass with ease on a model in which nothing can happen.
FEWEST_STATES = 500

TO_SUCCESSOR = {
    PredecessorAction.SEND_LISTENERS: SuccessorEvent.LISTENERS,
    PredecessorAction.SEND_COMMIT: SuccessorEvent.COMMIT,
    PredecessorAction.SEND_SETTLED: SuccessorEvent.SETTLED,
    PredecessorAction.SEND_ABORT: SuccessorEvent.ABORT,
    PredecessorAction.SEND_STOP: SuccessorEvent.STOP,
    PredecessorAction.SEND_RECALL: SuccessorEvent.RECALL,
}
TO_ANCHOR = {
    SuccessorAction.SEND_READY: PredecessorEvent.READY,
    SuccessorAction.SEND_FAILED: PredecessorEvent.FAILED,
    SuccessorAction.SEND_SERVING: PredecessorEvent.SERVING,
    SuccessorAction.SEND_SETTLE: PredecessorEvent.SETTLE,
    SuccessorAction.SEND_STOPPING: PredecessorEvent.STOPPING,
    SuccessorAction.RETURN: PredecessorEvent.RETURNED,
}


class World(NamedTuple):
    """A state of the whole.

    Attributes:
        anchor: where its handoff stands.
        is_pausing: whether it lets the hung worker end its accepting.
        successor: where the new worker stands; None before its HELLO.
        lives: whether the new worker does.
        accepts: whether it does, from the moment in which it opens.
        down: what is on its way to it.
        up: what is on its way from it.
        hung_lives: whether the worker that hung does.
        hung_accepts: whether it does as soon as its loop turns.
        hung_turns: whether it has woken up.
        told: whether the order to leave lies on its link, or was obeyed.
    """

    anchor: PredecessorState = PredecessorState.SPAWNING
    is_pausing: bool = False
    successor: SuccessorState | None = None
    lives: bool = True
    accepts: bool = False
    down: tuple[SuccessorEvent, ...] = ()
    up: tuple[PredecessorEvent, ...] = ()
    hung_lives: bool = True
    hung_accepts: bool = True
    hung_turns: bool = False
    told: bool = False


def tell_anchor(world: World, event: PredecessorEvent) -> World:
    """Handle one event in the anchor, and carry out what its machine asks for."""
    state, actions = step_predecessor(world.anchor, event)
    world = world._replace(anchor=state)
    for action in actions:
        match action:
            case PredecessorAction.PAUSE:
                # The order lies on the link of the hung worker before anything is waited for.
                world = world._replace(is_pausing=True, told=True)
            case PredecessorAction.RESUME:
                # An anchor has nothing to accept again.
                pass
            case PredecessorAction.END_SUCCESSOR:
                world = die(world)
            case _:
                world = world._replace(down=(*world.down, TO_SUCCESSOR[action]))
    return world


def tell_successor(world: World, event: SuccessorEvent) -> World:
    """Handle one event in the new worker."""
    assert world.successor is not None
    state, actions = step_successor(world.successor, event)
    world = world._replace(successor=state)
    for action in actions:
        if action is SuccessorAction.OPEN:
            world = world._replace(accepts=True)
        else:
            world = world._replace(up=(*world.up, TO_ANCHOR[action]))
    if state in (SuccessorState.ABORTED, SuccessorState.STOPPED, SuccessorState.RETURNED):
        world = die(world)
    return world


def die(world: World) -> World:
    """Let the new worker end: what it has said arrives, and then its death."""
    if not world.lives:
        return world
    return world._replace(lives=False, accepts=False, down=(), up=(*world.up, PredecessorEvent.DIED))


def moves(world: World) -> Iterator[tuple[str, World]]:
    """Yield all that can happen next."""
    if not world.anchor.final:
        if world.up:
            yield f"anchor: {world.up[0].value}", tell_anchor(world._replace(up=world.up[1:]), world.up[0])
        if world.anchor.timer is not None:
            yield "anchor: times out", tell_anchor(world, PredecessorEvent.TIMED_OUT)
        yield "anchor: is told to stop", tell_anchor(world, PredecessorEvent.STOP)
        yield "anchor: calls it off", tell_anchor(world, PredecessorEvent.CANCELLED)
        if world.is_pausing:
            # It is waited for a worker that answers, and for one that does not only so long.
            yield "anchor: has paused", tell_anchor(world._replace(is_pausing=False), PredecessorEvent.PAUSED)
    if world.lives:
        yield "new: dies", die(world)
        if world.successor is None:
            greeting = world._replace(successor=SuccessorState.GREETING, up=(*world.up, PredecessorEvent.HELLO))
            yield "new: says hello", greeting
        elif not world.successor.final:
            if world.down:
                yield f"new: {world.down[0].value}", tell_successor(world._replace(down=world.down[1:]), world.down[0])
            if world.successor is SuccessorState.INITIALISING:
                yield "new: is ready", tell_successor(world, SuccessorEvent.READY)
            if world.successor is SuccessorState.OPENING:
                yield "new: has opened", tell_successor(world, SuccessorEvent.OPENED)
            yield "new: fails", die(tell_successor(world, SuccessorEvent.FAILED))
    if world.hung_lives:
        yield "hung: dies", world._replace(hung_lives=False, hung_accepts=False)
        if not world.hung_turns:
            yield "hung: wakes up", world._replace(hung_turns=True, hung_accepts=not world.told)
        elif world.told and world.hung_accepts:
            yield "hung: obeys", world._replace(hung_accepts=False)


def two_never_accept_of_their_own_accord(world: World) -> bool:
    """G2: where both could, the order to leave is the next thing that the hung worker reads."""
    return not (world.accepts and world.hung_accepts) or world.told


def nothing_changes_before_the_commit(world: World) -> bool:
    """G4: where the new worker fails before the commit was near, the hung one serves on when it wakes up."""
    if world.anchor in (PredecessorState.SPAWNING, PredecessorState.INITIALISING):
        return not world.told
    return world.told or world.hung_accepts == world.hung_lives


def nobody_accepts_in_a_place_that_is_taken(world: World) -> bool:
    """The new worker accepts only where the hung one was told to leave before."""
    return world.told or not world.accepts


def ends_well(world: World) -> bool:
    """Where nothing is left to happen but deaths, somebody accepts, or the slot is seen to be empty.

    An empty slot is filled anew (``_anchor/reconcile.py``).
    """
    if world.anchor is PredecessorState.SETTLED:
        # The new worker reads SETTLED before it is final itself; its death is learnt by its pidfd.
        return world.told and (world.accepts or not world.lives)
    # The hung worker is told to leave only where its place was about to be another one's.
    return not world.lives and (world.told or world.hung_accepts == world.hung_lives)


INVARIANTS: tuple[Callable[[World], bool], ...] = (
    two_never_accept_of_their_own_accord,
    nothing_changes_before_the_commit,
    nobody_accepts_in_a_place_that_is_taken,
)


def explore() -> tuple[list[World], set[Any]]:
    """Walk through everything that can happen; return the states, and those of the anchor's handoff among them."""
    worlds = [World()]
    origins: dict[World, tuple[World, str] | None] = {worlds[0]: None}
    for world in worlds:  # grows meanwhile
        following = list(moves(world))
        promises = list(INVARIANTS)
        if all(label.endswith(("dies", "fails", "wakes up")) for label, _ in following) and world.anchor.final:
            promises.append(ends_well)
        for promise in promises:
            assert promise(world), f"{promise.__name__}: {story(world, origins)}"
        for label, after in following:
            if after not in origins:
                origins[after] = world, label
                worlds.append(after)
    return worlds, {world.anchor for world in worlds}


def story(world: World, origins: dict[World, tuple[World, str] | None]) -> str:
    """Tell the shortest way to a state."""
    lines = [repr(world)]
    while (origin := origins[world]) is not None:
        world, label = origin
        lines.append(label)
    return "\n".join(reversed(lines))


def test_every_interleaving_with_a_worker_that_hangs_keeps_the_guarantees() -> None:
    worlds, states = explore()
    print(f"{len(worlds)} states")  # noqa: T201
    assert len(worlds) >= FEWEST_STATES
    assert {PredecessorState.SETTLED, PredecessorState.FAILED, PredecessorState.STOPPED} <= states
    # It wakes up while its successor accepts, and when that has died.
    assert any(world.accepts and world.hung_accepts and not world.hung_turns for world in worlds)
    assert any(world.told and world.hung_turns and not world.lives for world in worlds)


@pytest.mark.parametrize("careless", ["it is not told", "it is told behind the commit"])
def test_an_order_that_comes_late_is_found(careless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the check: without the order before the commit, two accept together."""
    tell = tell_anchor

    def tell_late(world: World, event: PredecessorEvent) -> World:
        after = tell(world, event)
        is_late = careless == "it is told behind the commit" and after.anchor is PredecessorState.SETTLED
        return after._replace(told=world.told or is_late)

    monkeypatch.setattr(f"{__name__}.tell_anchor", tell_late)
    with pytest.raises(AssertionError, match="two_never_accept"):
        explore()
