"""Every interleaving of three generations, explored: a model checker for ``_handoff/protocol.py``.

P, S and T stand in a chain; each pair runs the handoff over a link of two channels. The checker walks through every
state that messages, deaths, broken channels, timers, stops, failures and requests lead to, in whatever order they
come, and asks in each whether the guarantees of a restart hold. A generation whose restart failed may try again. Here
stands what a supervisor does with the actions of the machines; no process is started, and no time passes.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import graphlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final, NamedTuple, Self, cast

import pytest

from ecdysis_async._handoff import protocol
from ecdysis_async._handoff.protocol import (
    PredecessorAction,
    PredecessorEvent,
    PredecessorState,
    SuccessorAction,
    SuccessorEvent,
    SuccessorState,
)

pytestmark = pytest.mark.main_python_only

# The checks below would pass with ease on a model in which nothing can happen.
FEWEST_STATES: Final = 15_000
FEWEST_STEPS: Final = 100_000


class Gate(enum.Enum):
    """Whether a generation accepts. An event that was generated but not handled yet is *unheard*."""

    CLOSED = "closed"
    OPENING = "opening"
    OPENED_UNHEARD = "opened, unheard"
    OPEN = "open"
    PAUSING = "pausing"
    PAUSED_UNHEARD = "paused, unheard"
    OPEN_STALE = "open, a PAUSED of before is still unheard"
    ENDED = "ended"


# Opening counts as accepting from its first moment, pausing to its last: stricter than any supervisor needs.
MAY_ACCEPT: Final = frozenset({Gate.OPENING, Gate.OPENED_UNHEARD, Gate.OPEN, Gate.PAUSING, Gate.OPEN_STALE})
ACCEPTS: Final = frozenset({Gate.OPEN, Gate.OPEN_STALE})


class Life(enum.Enum):
    """What has become of a process."""

    ABSENT = "absent"
    ALIVE = "alive"
    DEAD = "dead"


class Verdict(enum.IntEnum):
    """Whether anybody may still expect the service to be there."""

    EXPECTED = 0
    STOPPED = 1  # no: the generation with the last word was told to stop, and all shall end
    EXCUSED = 2  # no: that one failed without an heir, or its successor was told to stop in its probation


class Kind(enum.Enum):
    """What a step is. Those of the first two kinds are *fair*: sooner or later they happen."""

    ORDINARY = "ordinary"  # a message arrives, a death is learnt, an application gets ready
    TIMEOUT = "timeout"
    RESTART = "restart"  # is asked for
    END = "end"  # somebody calls a restart off, or stops a process
    FAULT = "fault"  # a crash, a process that hangs for good, a broken channel, an exception


FAIR: Final = frozenset({Kind.ORDINARY, Kind.TIMEOUT})


class Care(enum.Enum):
    """What the machines rely on a supervisor to do; without any of these the guarantees do not hold."""

    DEATH_BEFORE_SETTLING = "it looks at the successor's pidfd before it settles"
    DEATH_BEFORE_TIMEOUT = "it looks at the predecessor's pidfd before it gives up waiting"
    DEATH_BEFORE_END_OF_FILE = "it waits for the pidfd where a channel ends, since a dying process closes that first"


class Provision(enum.Enum):
    """Whether LISTENERS lies in the channel before the successor's process exists."""

    NONE = "none"  # a stash is due first, or the predecessor's release knows no provision
    KNOWN = "known"  # both sides know it: the answer to HELLO comes behind it
    UNKNOWN = "unknown"  # the successor's release does not know it: for that it is the answer, and no other one comes


class Duty(enum.IntEnum):
    """Who has to serve in the end, seen from one link: until SETTLED its upper generation, then its lower one."""

    UPPER = 0
    LOWER = 1
    ELSEWHERE = 2


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Interned:
    """A value of which equal ones are one object: states of the whole are then hashed by identity, which is fast."""

    _pool: ClassVar[dict[tuple[object, ...], Any]] = {}

    def but(self, **changes: Any) -> Self:
        """Return the same with some fields changed."""
        value = dataclasses.replace(self, **changes)
        key = (type(self), *(getattr(value, field.name) for field in dataclasses.fields(value)))
        return cast(Self, self._pool.setdefault(key, value))


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Generation(Interned):
    """One process."""

    life: Life = Life.ABSENT
    up: SuccessorState | None = None  # None: its program has not got as far as HELLO
    down: PredecessorState | None = None  # None: it was never asked to restart
    gate: Gate = Gate.CLOSED
    leaving: bool = False  # it serves what it has, at most, and exits
    wish: bool = False  # a restart was asked for during its probation
    condemned: bool = False  # its predecessor has sent it SIGTERM, and will send SIGKILL
    failed: bool = False  # its application has raised
    hung: bool = False  # it does nothing any more, and does not end either: SIGSTOP, or a loop that is blocked
    provision: bool = False  # it has read the provision, and no answer yet
    renounced: bool = False  # it shall not accept any more: it sent SETTLED, was stopped, or was called off

    @property
    def alive(self) -> bool:
        return self.life is Life.ALIVE

    @property
    def acts(self) -> bool:
        return self.alive and not self.hung

    @property
    def restarting(self) -> bool:
        return self.down is not None and not self.down.final

    @property
    def joining(self) -> bool:
        return self.alive and (self.up is None or not self.up.final)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Channel(Interned):
    """What is on its way to one side of a link, in order; BROKEN and DIED come after all that was sent before."""

    items: tuple[Any, ...] = ()
    cut: bool = False  # nothing that is sent from now on arrives


ABSENT: Final = Generation().but()
NEWBORN: Final = ABSENT.but(life=Life.ALIVE)
DEAD: Final = ABSENT.but(life=Life.DEAD)
FIRST: Final = NEWBORN.but(up=SuccessorState.SETTLED, gate=Gate.OPEN)
FRESH: Final = Channel().but()
DEAF: Final = FRESH.but(cut=True)  # nobody will ever read it


class Link(NamedTuple):
    """Two generations that follow each other."""

    upper: Generation
    lower: Generation
    downwards: Channel
    upwards: Channel
    duty: Duty
    verdict: Verdict


class World(NamedTuple):
    """A state of the whole."""

    p: Generation
    s: Generation
    t: Generation
    p_to_s: Channel
    s_to_p: Channel
    s_to_t: Channel
    t_to_s: Channel
    duty: int
    verdict: Verdict

    @property
    def chain(self) -> tuple[Generation, Generation, Generation]:
        return self[:3]


class Move(NamedTuple):
    """One step of one link."""

    label: str
    kind: Kind
    link: Link


class Violation(Exception):
    """A guarantee does not hold; the text is the shortest way there."""


cares = frozenset(Care)
provision = Provision.KNOWN

START: Final = World(FIRST, ABSENT, ABSENT, FRESH, FRESH, FRESH, FRESH, 0, Verdict.EXPECTED)

# What stands for the provision in a channel.
PROVISION: Final = "provision"
AT_SPAWN: Final = {
    Provision.NONE: FRESH,
    Provision.KNOWN: FRESH.but(items=(PROVISION,)),
    Provision.UNKNOWN: FRESH.but(items=(SuccessorEvent.LISTENERS,)),
}

TO_SUCCESSOR: Final = {
    PredecessorAction.SEND_LISTENERS: SuccessorEvent.LISTENERS,
    PredecessorAction.SEND_COMMIT: SuccessorEvent.COMMIT,
    PredecessorAction.SEND_SETTLED: SuccessorEvent.SETTLED,
    PredecessorAction.SEND_ABORT: SuccessorEvent.ABORT,
    PredecessorAction.SEND_STOP: SuccessorEvent.STOP,
    PredecessorAction.SEND_RECALL: SuccessorEvent.RECALL,
}
TO_PREDECESSOR: Final = {
    SuccessorAction.SEND_READY: PredecessorEvent.READY,
    SuccessorAction.SEND_FAILED: PredecessorEvent.FAILED,
    SuccessorAction.SEND_SERVING: PredecessorEvent.SERVING,
    SuccessorAction.SEND_SETTLE: PredecessorEvent.SETTLE,
    SuccessorAction.SEND_STOPPING: PredecessorEvent.STOPPING,
    SuccessorAction.RETURN: PredecessorEvent.RETURNED,
}
RESUMED: Final = {
    Gate.CLOSED: Gate.OPEN,
    Gate.PAUSING: Gate.OPEN_STALE,
    Gate.PAUSED_UNHEARD: Gate.OPEN_STALE,
}
# More than a machine has to say in a whole restart.
MOST_UNREAD: Final = 10
UNCOMMITTED: Final = frozenset({PredecessorState.SPAWNING, PredecessorState.INITIALISING, PredecessorState.PAUSING})
COMMITTED: Final = frozenset({SuccessorState.OPENING, SuccessorState.OPENING_ORPHANED, SuccessorState.PROBATION})


# --- what a supervisor does -------------------------------------------------------------------------------------------


def send(channel: Channel, item: object) -> Channel:
    """Put a message on its way; where the channel is cut, or nobody reads it, it is lost."""
    if channel.cut:
        return channel
    if len(channel.items) == MOST_UNREAD:
        raise Violation("a_channel_floods")
    return channel.but(items=(*channel.items, item))


def tell_predecessor(link: Link, event: PredecessorEvent) -> Link:
    """Handle one event in the upper generation, and carry out what its machine asks for."""
    upper, lower, downwards, upwards, duty, verdict = link
    # An orderly stop of a committed successor: the word is given, whatever the machine makes of it.
    bound = (PredecessorState.COMMITTING, PredecessorState.PROBATION, PredecessorState.RECALLING)
    if event is PredecessorEvent.STOPPING and upper.down in bound:
        upper = upper.but(renounced=True)
    if event is PredecessorEvent.STOP:
        upper = upper.but(renounced=True)
        verdict = Verdict.STOPPED if verdict is Verdict.EXPECTED else verdict
    before = upper.down
    assert before is not None
    state, actions = protocol.step_predecessor(before, event)
    upper = upper.but(down=state)
    for action in actions:
        match action:
            case PredecessorAction.PAUSE:
                upper = upper.but(gate=Gate.PAUSING)
            case PredecessorAction.RESUME:
                if upper.renounced:
                    raise Violation("who_renounced_resumes")
                upper = upper.but(gate=RESUMED.get(upper.gate, upper.gate))
            case PredecessorAction.SEND_LISTENERS if provision is Provision.UNKNOWN:
                pass
            case PredecessorAction.END_SUCCESSOR:
                lower = lower.but(condemned=True) if lower.alive else lower
            case _:
                downwards = send(downwards, TO_SUCCESSOR[action])
        if action is PredecessorAction.SEND_SETTLED:
            upper = upper.but(renounced=True)
            duty = Duty.LOWER
            # A failure that crosses SETTLED on its way up is as good as one a moment later.
            if (lower.failed or lower.hung) and verdict is Verdict.EXPECTED:
                verdict = Verdict.EXCUSED
    if before in UNCOMMITTED and state in (PredecessorState.ABORTING, PredecessorState.STOPPING) and lower.alive:
        lower = lower.but(renounced=True)
    if state in (PredecessorState.SETTLED, PredecessorState.STOPPED):
        upper = upper.but(gate=Gate.ENDED, leaving=True)
    return Link(upper, lower, downwards, upwards, duty, verdict)


def tell_successor(link: Link, event: SuccessorEvent) -> Link:
    """Handle one event in the lower generation, and carry out what its machine asks for."""
    upper, lower, downwards, upwards, duty, verdict = link
    assert lower.up is not None
    if lower.provision and event in (SuccessorEvent.DIED, SuccessorEvent.BROKEN):
        # No answer can come any more: what lay in the channel is the answer.
        return tell_successor(tell_successor(link, SuccessorEvent.LISTENERS), event)
    state, actions = protocol.step_successor(lower.up, event)
    lower = lower.but(up=state, provision=False)
    for action in actions:
        if action is SuccessorAction.OPEN:
            lower = lower.but(gate=Gate.OPENING)
        else:
            upwards = send(upwards, TO_PREDECESSOR[action])
    if state is SuccessorState.STOPPED:
        lower = lower.but(gate=Gate.ENDED, leaving=True)
    elif state is SuccessorState.RETURNED:
        lower = lower.but(gate=Gate.ENDED, leaving=True, renounced=True)
    elif state is SuccessorState.ABORTED:
        lower = lower.but(leaving=True)  # what it accepts on closes when it exits, at the latest
    return Link(upper, lower, downwards, upwards, duty, verdict)


def stop_alone(generation: Generation) -> Generation:
    """Stop a generation that has nobody to agree with."""
    return generation.but(gate=Gate.ENDED, leaving=True, renounced=True, wish=False)


# --- what can happen --------------------------------------------------------------------------------------------------


def link_moves(link: Link) -> Iterator[Move]:
    """Yield all that can happen next on one link, deaths excepted."""
    upper, lower = link.upper, link.lower
    if upper.acts:
        yield from upper_moves(link)
    if lower.acts:
        yield from lower_moves(link)
    if upper.alive and lower.alive:
        if not link.downwards.cut:
            garbled = send(link.downwards, SuccessorEvent.BROKEN).but(cut=True)
            yield Move("downwards breaks", Kind.FAULT, link._replace(downwards=garbled))
        if not link.upwards.cut:
            garbled = send(link.upwards, PredecessorEvent.BROKEN).but(cut=True)
            yield Move("upwards breaks", Kind.FAULT, link._replace(upwards=garbled))


def upper_moves(link: Link) -> Iterator[Move]:
    """Yield what the upper generation can do, or be told, as a predecessor."""
    upper, lower = link.upper, link.lower
    if upper.restarting:
        assert upper.down is not None
        careless = Care.DEATH_BEFORE_SETTLING not in cares
        may_settle = lower.alive or upper.down is not PredecessorState.PROBATION or careless
        if link.upwards.items:
            event, *rest = link.upwards.items
            read = link._replace(upwards=link.upwards.but(items=tuple(rest)))
            if event is PredecessorEvent.SETTLE and not may_settle:
                yield Move("upper drops the settle of a dead successor", Kind.ORDINARY, read)
            else:
                yield Move(f"upper handles {event.value}", Kind.ORDINARY, tell_predecessor(read, event))
        if upper.down.timer is not None and may_settle:
            yield Move("upper times out", Kind.TIMEOUT, tell_predecessor(link, PredecessorEvent.TIMED_OUT))
        yield Move("restart is cancelled", Kind.END, tell_predecessor(link, PredecessorEvent.CANCELLED))
        yield Move("successor is recalled", Kind.END, tell_predecessor(link, PredecessorEvent.RECALL))
        match upper.gate:
            case Gate.PAUSING:
                yield Move("upper has paused", Kind.ORDINARY, link._replace(upper=upper.but(gate=Gate.PAUSED_UNHEARD)))
            case Gate.PAUSED_UNHEARD:
                closed = link._replace(upper=upper.but(gate=Gate.CLOSED))
                yield Move("upper handles paused", Kind.ORDINARY, tell_predecessor(closed, PredecessorEvent.PAUSED))
            case Gate.OPEN_STALE:
                opened = link._replace(upper=upper.but(gate=Gate.OPEN))
                yield Move("upper hears old paused", Kind.ORDINARY, tell_predecessor(opened, PredecessorEvent.PAUSED))
    if upper.up is SuccessorState.SETTLED and not upper.leaving:
        if upper.restarting:
            yield Move("upper is told to stop", Kind.END, tell_predecessor(link, PredecessorEvent.STOP))
        else:
            stopped = link._replace(upper=stop_alone(upper))
            yield Move("upper is told to stop", Kind.END, excuse(stopped, Verdict.STOPPED))
            if not lower.alive:
                # Each restart is a machine of its own, and a PAUSED of the one before is none of its business.
                gate = Gate.OPEN if upper.gate is Gate.OPEN_STALE else upper.gate
                again = upper.but(down=PredecessorState.SPAWNING, wish=False, gate=gate)
                restarted = link._replace(upper=again, lower=NEWBORN, downwards=AT_SPAWN[provision], upwards=FRESH)
                yield Move("upper restarts", Kind.ORDINARY if upper.wish else Kind.RESTART, restarted)


def lower_moves(link: Link) -> Iterator[Move]:
    """Yield what the lower generation can do, or be told, as a successor."""
    upper, lower = link.upper, link.lower
    if lower.condemned:
        if lower.up is not None and lower.joining:
            yield Move("lower takes the SIGTERM", Kind.ORDINARY, tell_successor(link, SuccessorEvent.STOP_HERE))
        elif lower.up is SuccessorState.SETTLED and not lower.restarting and not lower.leaving:
            yield Move("lower takes the SIGTERM", Kind.ORDINARY, link._replace(lower=stop_alone(lower)))
    if not lower.joining:
        return
    if lower.up is None:
        greeting = lower.but(up=SuccessorState.GREETING)
        hello = send(link.upwards, PredecessorEvent.HELLO)
        yield Move("lower says hello", Kind.ORDINARY, link._replace(lower=greeting, upwards=hello))
        return
    if link.downwards.items:
        event, *rest = link.downwards.items
        read = link._replace(downwards=link.downwards.but(items=tuple(rest)))
        if event == PROVISION:
            yield Move("lower reads the provision", Kind.ORDINARY, read._replace(lower=lower.but(provision=True)))
        else:
            yield Move(f"lower handles {event.value}", Kind.ORDINARY, tell_successor(read, event))
    if lower.up.timer is not None and (upper.alive or Care.DEATH_BEFORE_TIMEOUT not in cares):
        yield Move("lower times out", Kind.TIMEOUT, tell_successor(link, SuccessorEvent.TIMED_OUT))
    if lower.up in (SuccessorState.INITIALISING, SuccessorState.ORPHANED):
        yield Move("lower's application is ready", Kind.ORDINARY, tell_successor(link, SuccessorEvent.READY))
    match lower.gate:
        case Gate.OPENING:
            yield Move("lower has opened", Kind.ORDINARY, link._replace(lower=lower.but(gate=Gate.OPENED_UNHEARD)))
        case Gate.OPENED_UNHEARD:
            opened = link._replace(lower=lower.but(gate=Gate.OPEN))
            yield Move("lower handles opened", Kind.ORDINARY, tell_successor(opened, SuccessorEvent.OPENED))
    if lower.up is SuccessorState.PROBATION and not lower.wish:
        wishing = link._replace(lower=lower.but(wish=True))
        yield Move("lower is asked to restart", Kind.RESTART, tell_successor(wishing, SuccessorEvent.SETTLE))
    failed = tell_successor(link._replace(lower=lower.but(failed=True)), SuccessorEvent.FAILED)
    stopped = tell_successor(link, SuccessorEvent.STOP_HERE)
    # Before its commit it can go without being missed, and a failure after it is undone, unless it stands alone.
    if link.duty is Duty.LOWER:
        failed, stopped = excuse(failed, Verdict.EXCUSED), excuse(stopped, Verdict.STOPPED)
    elif lower.up in COMMITTED:
        stopped = excuse(stopped, Verdict.EXCUSED)
    yield Move("lower's application fails", Kind.FAULT, failed)
    yield Move("lower is told to stop", Kind.END, stopped)


def excuse(link: Link, verdict: Verdict) -> Link:
    """Note that from now on nobody may expect the service to be there."""
    return link._replace(verdict=verdict) if link.verdict is Verdict.EXPECTED else link


def tidy(link: Link) -> Link:
    """Forget what can make no difference any more, so that equal futures are equal states."""
    upper, lower, downwards, upwards, duty, verdict = link
    if lower.life is Life.ABSENT:
        return link._replace(downwards=FRESH, upwards=FRESH)
    if not lower.joining or lower.hung:
        downwards = DEAF
        lower = lower.but(wish=lower.wish and lower.up is SuccessorState.SETTLED)
    if not (upper.acts and upper.restarting):
        upwards = DEAF
    return Link(upper, lower, downwards, upwards, duty, verdict)


@functools.cache
def moves_of(link: Link) -> tuple[Move, ...]:
    """Return the moves of a link that change anything."""
    tidied = (move._replace(link=tidy(move.link)) for move in link_moves(link))
    return tuple(move for move in tidied if move.link != link)


def link_of(world: World, index: int) -> Link:
    """Return the link below generation ``index``."""
    duty = {index: Duty.UPPER, index + 1: Duty.LOWER}.get(world.duty, Duty.ELSEWHERE)
    if index == 0:
        return Link(world.p, world.s, world.p_to_s, world.s_to_p, duty, world.verdict)
    return Link(world.s, world.t, world.s_to_t, world.t_to_s, duty, world.verdict)


def with_link(world: World, index: int, link: Link) -> World:
    """Return the world with one of its links changed."""
    upper, lower, downwards, upwards, duty, verdict = link
    responsible = world.duty if duty is Duty.ELSEWHERE else index + duty
    if index == 0:
        return World(upper, lower, world.t, downwards, upwards, world.s_to_t, world.t_to_s, responsible, verdict)
    return World(world.p, upper, lower, world.p_to_s, world.s_to_p, downwards, upwards, responsible, verdict)


def last_words_of(channel: Channel, broken: object, died: object) -> Channel:
    """Let a channel end with the death of its sender, which arrives by the pidfd even where the channel is cut."""
    if Care.DEATH_BEFORE_END_OF_FILE not in cares:
        channel = send(channel, broken)
    return channel.but(items=(*channel.items, died))


def die(world: World, index: int) -> World:
    """Let a process end: what it has sent still arrives, then its neighbours learn of its death, by its pidfd."""
    for upper in (index - 1, index):
        if upper in (0, 1):
            link = link_of(world, upper)
            if upper == index:
                last_words = last_words_of(link.downwards, SuccessorEvent.BROKEN, SuccessorEvent.DIED)
                link = link._replace(upper=DEAD, downwards=last_words)
            else:
                last_words = last_words_of(link.upwards, PredecessorEvent.BROKEN, PredecessorEvent.DIED)
                link = link._replace(lower=DEAD, upwards=last_words)
            world = with_link(world, upper, tidy(link))
    return world


def has_sockets(generation: Generation, channel: Channel) -> bool:
    """Say whether a generation has the sockets, or will find them in its channel."""
    is_given = generation.provision or not {PROVISION, SuccessorEvent.LISTENERS}.isdisjoint(channel.items)
    return is_given or generation.up not in (None, SuccessorState.GREETING)


def is_heir(generation: Generation, channel: Channel) -> bool:
    """Say whether a successor has to serve in the place of its predecessor, which crashes now (G6)."""
    given_up = generation.leaving or generation.condemned or channel.cut
    called_off = {SuccessorEvent.ABORT, SuccessorEvent.STOP, SuccessorEvent.RECALL}.intersection(channel.items)
    return generation.acts and has_sockets(generation, channel) and not given_up and not called_off


def crash(world: World, index: int) -> World:
    """Kill a process from outside; where it had the last word, its heir has it now, if there is one."""
    if world.duty == index and world.verdict is Verdict.EXPECTED:
        if index < 2 and is_heir(world.chain[index + 1], link_of(world, index).downwards):
            world = world._replace(duty=index + 1)
        else:
            world = world._replace(verdict=Verdict.EXCUSED)
    return die(world, index)


def hang(world: World, index: int) -> World:
    """Let a process do nothing from now on; over one that hangs nobody is promoted, so it needs no heir."""
    if world.duty == index and world.verdict is Verdict.EXPECTED:
        world = world._replace(verdict=Verdict.EXCUSED)
    hung = world.chain[index].but(hung=True)
    for upper in (index - 1, index):
        if upper in (0, 1):
            link = link_of(world, upper)
            link = link._replace(upper=hung) if upper == index else link._replace(lower=hung)
            world = with_link(world, upper, tidy(link))
    return world


def world_moves(world: World) -> Iterator[tuple[str, Kind, World]]:
    """Yield all that can happen next: a label, its kind, and where it leads."""
    for index in (0, 1):
        for label, kind, link in moves_of(link_of(world, index)):
            yield f"{'PS'[index]}-{'ST'[index]}: {label}", kind, with_link(world, index, link)
    for index, generation in enumerate(world.chain):
        if generation.alive:
            yield f"{'PST'[index]} crashes", Kind.FAULT, crash(world, index)
            if generation.acts:
                yield f"{'PST'[index]} hangs", Kind.FAULT, hang(world, index)
            if generation.acts and generation.leaving and not generation.restarting:
                yield f"{'PST'[index]} exits", Kind.ORDINARY, die(world, index)
            if generation.condemned and world.chain[index - 1].acts:
                yield f"{'PST'[index]} is killed by its predecessor", Kind.ORDINARY, die(world, index)
    if world.t.acts and world.t.up is SuccessorState.SETTLED and not world.t.leaving:
        stopped = link_of(world, 1)._replace(lower=stop_alone(world.t))
        yield "T is told to stop", Kind.END, with_link(world, 1, excuse(stopped, Verdict.STOPPED))


# --- what has to hold -------------------------------------------------------------------------------------------------


def somebody_holds_the_sockets(world: World) -> bool:
    """G1: at every instant a live generation holds every listening socket open."""
    if world.verdict is not Verdict.EXPECTED:
        return True
    return any(
        generation.alive and not generation.leaving and has_sockets(generation, channel)
        for generation, channel in zip(world.chain, (FRESH, world.p_to_s, world.s_to_t), strict=True)
    )


def nobody_accepts_together(world: World) -> bool:
    """G2: two generations of one slot never accept together, whatever fails."""
    return (world.p.gate in MAY_ACCEPT) + (world.s.gate in MAY_ACCEPT) + (world.t.gate in MAY_ACCEPT) <= 1


def failure_before_commit_costs_nothing(world: World) -> bool:
    """G4: the old generation goes on as if nothing had been asked; trying again works at once."""
    return all(
        upper.gate in ACCEPTS and (upper.down is PredecessorState.ABORTING or not lower.alive)
        for upper, lower in ((world.p, world.s), (world.s, world.t))
        if upper.down in (PredecessorState.ABORTING, PredecessorState.FAILED) and not upper.leaving
    )


def failure_after_commit_rolls_back(world: World) -> bool:
    """G5: if the new one dies before it has settled, or returns, the old one accepts again."""
    return all(
        upper.gate in ACCEPTS and (not lower.alive or lower.renounced)
        for upper, lower in ((world.p, world.s), (world.s, world.t))
        if upper.down is PredecessorState.ROLLED_BACK and not upper.leaving
    )


def who_renounced_never_accepts_again(world: World) -> bool:
    """G5: a generation that sent SETTLED never accepts again, one that was called off never does; nor after a stop."""
    return not any(
        generation.renounced and (generation.leaving or generation.joining) and generation.gate in MAY_ACCEPT
        for generation in world.chain
    )


def one_restart_at_a_time(world: World) -> bool:
    """G7: a third generation exists only once the first can never accept again."""
    return world.t is ABSENT or not world.p.alive or (world.p.renounced and world.p.gate not in MAY_ACCEPT)


INVARIANTS: Final[tuple[Callable[[World], bool], ...]] = (
    somebody_holds_the_sockets,
    nobody_accepts_together,
    failure_before_commit_costs_nothing,
    failure_after_commit_rolls_back,
    who_renounced_never_accepts_again,
    one_restart_at_a_time,
)


def comes_to_rest_well(world: World) -> bool:
    """G4 to G6, in the end: where only fair steps are left to take, one process is left, and it accepts.

    Nobody may be left only where the service was stopped, or where the generation with the last word failed; and only
    a predecessor that hangs keeps its successor from having settled.
    """
    acting = [generation for generation in world.chain if generation.acts]
    for upper, generation in zip((ABSENT, *world.chain), world.chain, strict=False):
        over = not generation.restarting and (generation.up is SuccessorState.SETTLED or upper.hung)
        if generation.acts and not (over and generation.gate in ACCEPTS):
            return False
    return len(acting) == 1 or (not acting and world.verdict is not Verdict.EXPECTED)


def a_stop_ends_everybody(world: World) -> bool:
    """G5: an orderly stop resurrects nobody. Asked where nothing fails, since a word to stop may be lost in a crash."""
    return world.verdict is not Verdict.STOPPED or not any(generation.alive for generation in world.chain)


# --- the search -------------------------------------------------------------------------------------------------------


class Exploration(NamedTuple):
    """How far it went, and which states of the machines it has seen."""

    states: int
    steps: int
    resting: int
    predecessors: frozenset[PredecessorState]
    successors: frozenset[SuccessorState]


def explore(
    kinds: frozenset[Kind] = frozenset(Kind), at_rest: tuple[Callable[[World], bool], ...] = (comes_to_rest_well,)
) -> Exploration:
    """Walk breadth-first through everything that can happen; raise Violation with the shortest way to a fault."""
    moves_of.cache_clear()
    steps = resting = 0
    worlds = [START]
    origins: dict[World, tuple[World, str] | None] = {START: None}
    fair: dict[World, list[World]] = {}
    for world in worlds:  # grows meanwhile
        try:
            check(world, INVARIANTS)
            moves = [move for move in world_moves(world) if move[1] in kinds]
            fair[world] = [following for _, kind, following in moves if kind in FAIR]
            if not fair[world]:
                resting += 1
                check(world, at_rest)
        except Violation as violation:
            raise Violation(f"{violation}\n{story(world, origins)}") from None
        steps += len(moves)
        for label, _, following in moves:
            if following not in origins:
                origins[following] = world, label
                worlds.append(following)
    try:
        graphlib.TopologicalSorter(fair).prepare()
    except graphlib.CycleError as error:
        raise Violation(f"a_circle_of_fair_steps\n{story(error.args[1][0], origins)}") from None
    return Exploration(
        len(worlds),
        steps,
        resting,
        frozenset(each.down for world in worlds for each in world.chain if each.down is not None),
        frozenset(each.up for world in worlds for each in world.chain[1:] if each.up is not None),
    )


def check(world: World, promises: tuple[Callable[[World], bool], ...]) -> None:
    """Raise Violation where a promise is broken."""
    for promise in promises:
        if not promise(world):
            raise Violation(promise.__name__)


def story(world: World, origins: dict[World, tuple[World, str] | None]) -> str:
    """Tell the shortest way to a state."""
    lines = [repr(part) for part in reversed(world)]
    while (origin := origins[world]) is not None:
        world, label = origin
        lines.append(label)
    return "\n".join(reversed(lines))


# --- the tests --------------------------------------------------------------------------------------------------------


def assert_restarts_succeed() -> None:
    """Assert that where nothing fails, and nobody is slow, no restart does."""
    exploration = explore(frozenset({Kind.ORDINARY, Kind.RESTART}), at_rest=())
    failures = {
        PredecessorState.ABORTING,
        PredecessorState.FAILED,
        PredecessorState.REVERTING,
        PredecessorState.ROLLED_BACK,
    }
    failures |= {PredecessorState.RECALLING}
    stops = {PredecessorState.STOPPING, PredecessorState.STOPPED}
    assert exploration.predecessors == frozenset(PredecessorState) - failures - stops
    orphans = {SuccessorState.ORPHANED, SuccessorState.OPENING_ORPHANED}
    ends = {SuccessorState.ABORTED, SuccessorState.STOPPED, SuccessorState.RETURNED}
    assert exploration.successors == frozenset(SuccessorState) - orphans - ends


def assert_stops_end_everybody() -> None:
    """Assert that where nothing fails, whoever stops the generation with the last word stops the service."""
    exploration = explore(FAIR | {Kind.RESTART, Kind.END}, (comes_to_rest_well, a_stop_ends_everybody))
    assert PredecessorState.STOPPED in exploration.predecessors


@pytest.fixture(params=Provision, ids=lambda param: f"provision={param.value}")
def each_provision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Explore with and without a provision."""
    monkeypatch.setattr(sys.modules[__name__], "provision", request.param)


@pytest.mark.usefixtures("each_provision")
def test_every_interleaving_keeps_the_guarantees() -> None:
    exploration = explore()
    print(f"{exploration.states} states, {exploration.steps} steps, {exploration.resting} states of rest")  # noqa: T201
    assert exploration.states >= FEWEST_STATES
    assert exploration.steps >= FEWEST_STEPS
    assert exploration.predecessors == frozenset(PredecessorState)
    assert exploration.successors == frozenset(SuccessorState)


@pytest.mark.usefixtures("each_provision")
def test_where_nothing_fails_every_restart_succeeds() -> None:
    assert_restarts_succeed()


@pytest.mark.usefixtures("each_provision")
def test_where_nothing_fails_a_stop_ends_everybody() -> None:
    assert_stops_end_everybody()


@pytest.mark.parametrize("care", Care, ids=lambda care: care.name)
def test_what_a_supervisor_has_to_take_care_of(care: Care, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "cares", frozenset(Care) - {care})
    with pytest.raises(Violation, match=r"somebody_holds_the_sockets|comes_to_rest_well"):
        explore()


P, PE, PA = PredecessorState, PredecessorEvent, PredecessorAction
S, SE, SA = SuccessorState, SuccessorEvent, SuccessorAction

# One transition each, changed (or taken out: None), and what is found to be broken then.
DEFECTS: Final[tuple[tuple[Any, Any, tuple[Any, tuple[Any, ...]] | None, str], ...]] = (
    # Accepting too early, or twice.
    (P.INITIALISING, PE.READY, (P.COMMITTING, (PA.SEND_COMMIT, PA.PAUSE)), "nobody_accepts_together"),
    (P.COMMITTING, PE.TIMED_OUT, (P.ABORTING, (PA.RESUME, PA.END_SUCCESSOR)), "nobody_accepts_together"),
    (P.PROBATION, PE.BROKEN, (P.REVERTING, (PA.RESUME, PA.END_SUCCESSOR)), "nobody_accepts_together"),
    (P.PROBATION, PE.FAILED, (P.ROLLED_BACK, (PA.RESUME,)), "nobody_accepts_together"),
    (P.PROBATION, PE.RECALL, (P.ROLLED_BACK, (PA.SEND_RECALL, PA.RESUME)), "nobody_accepts_together"),
    (P.RECALLING, PE.BROKEN, (P.ROLLED_BACK, (PA.RESUME,)), "nobody_accepts_together"),
    (S.INITIALISING, SE.BROKEN, (S.ORPHANED, ()), "nobody_accepts_together"),
    (S.WAITING, SE.BROKEN, (S.OPENING_ORPHANED, (SA.OPEN,)), "nobody_accepts_together"),
    (S.WAITING, SE.ABORT, (S.OPENING_ORPHANED, (SA.OPEN,)), "nobody_accepts_together"),
    (S.WAITING, SE.TIMED_OUT, (S.OPENING_ORPHANED, (SA.OPEN,)), "nobody_accepts_together"),
    # Leaving nobody who serves.
    (P.PROBATION, PE.TIMED_OUT, None, "comes_to_rest_well"),
    (P.REVERTING, PE.DIED, (P.STOPPED, ()), "somebody_holds_the_sockets"),
    (S.INITIALISING, SE.DIED, (S.ABORTED, ()), "somebody_holds_the_sockets"),
    (S.WAITING, SE.DIED, (S.ABORTED, ()), "somebody_holds_the_sockets"),
    (S.ORPHANED, SE.READY, (S.WAITING, ()), "comes_to_rest_well"),
    (S.OPENING, SE.DIED, None, "comes_to_rest_well"),
    (S.PROBATION, SE.DIED, (S.ABORTED, ()), "somebody_holds_the_sockets"),
    (S.PROBATION, SE.BROKEN, (S.ABORTED, ()), "somebody_holds_the_sockets"),
    # Going on worse than before.
    (P.PAUSING, PE.TIMED_OUT, (P.ABORTING, (PA.SEND_ABORT, PA.END_SUCCESSOR)), "failure_before_commit_costs_nothing"),
    (P.PAUSING, PE.DIED, (P.FAILED, ()), "failure_before_commit_costs_nothing"),
    (P.INITIALISING, PE.FAILED, (P.FAILED, ()), "failure_before_commit_costs_nothing"),
    (P.PROBATION, PE.DIED, (P.ROLLED_BACK, ()), "failure_after_commit_rolls_back"),
    # Coming back after an orderly stop, or in spite of the word to leave.
    (P.COMMITTING, PE.STOPPING, None, "who_renounced_resumes"),
    (P.PROBATION, PE.STOPPING, None, "who_renounced_resumes"),
    (P.STOPPING, PE.DIED, (P.ROLLED_BACK, (PA.RESUME,)), "who_renounced_resumes"),
    (P.PAUSING, PE.STOP, (P.STOPPING, (PA.END_SUCCESSOR,)), "who_renounced_never_accepts_again"),
    (P.INITIALISING, PE.CANCELLED, (P.ABORTING, (PA.END_SUCCESSOR,)), "who_renounced_never_accepts_again"),
    (P.REVERTING, PE.STOP, None, "who_renounced_resumes"),
    (P.SPAWNING, PE.TIMED_OUT, (P.ABORTING, (PA.END_SUCCESSOR,)), "who_renounced_never_accepts_again"),
    (P.SPAWNING, PE.BROKEN, (P.ABORTING, (PA.END_SUCCESSOR,)), "who_renounced_never_accepts_again"),
    (P.PROBATION, PE.STOP, (P.SETTLED, (PA.SEND_SETTLED,)), "a_stop_ends_everybody"),
    (P.RECALLING, PE.STOPPING, (P.ROLLED_BACK, (PA.RESUME,)), "who_renounced_resumes"),
    # Waiting for ever.
    (P.SPAWNING, PE.TIMED_OUT, (P.ABORTING, ()), "comes_to_rest_well"),
    (P.COMMITTING, PE.TIMED_OUT, None, "comes_to_rest_well"),
    (P.RECALLING, PE.TIMED_OUT, None, "comes_to_rest_well"),
    (P.ABORTING, PE.DIED, None, "comes_to_rest_well"),
    (S.GREETING, SE.DIED, None, "comes_to_rest_well"),
    (S.WAITING, SE.TIMED_OUT, None, "comes_to_rest_well"),
    # Never coming to an end.
    (S.WAITING, SE.TIMED_OUT, (S.INITIALISING, ()), "a_channel_floods"),
    (S.OPENING_ORPHANED, SE.OPENED, (S.ORPHANED, ()), "a_circle_of_fair_steps"),
)


# The same, for a restart that can do no harm any more, because it cannot succeed.
OBSTACLES: Final[tuple[tuple[Any, Any, tuple[Any, tuple[Any, ...]] | None], ...]] = (
    (P.COMMITTING, PE.SERVING, None),
    (P.PROBATION, PE.SETTLE, None),
    (S.INITIALISING, SE.READY, (S.WAITING, ())),
    (S.OPENING, SE.OPENED, (S.PROBATION, ())),
    (S.PROBATION, SE.SETTLE, None),
)


def change_reaction(monkeypatch: pytest.MonkeyPatch, state: Any, event: Any, reaction: Any) -> None:
    """Change one transition of the real tables, or take it out, until the test ends."""
    name = "_PREDECESSOR" if isinstance(state, PredecessorState) else "_SUCCESSOR"
    table = {each: dict(reactions) for each, reactions in getattr(protocol, name).items()}
    assert table[state].pop(event) != reaction
    if reaction is not None:
        table[state][event] = reaction
    monkeypatch.setattr(protocol, name, table)


def explore_everything() -> None:
    """Explore with and without faults."""
    assert_stops_end_everybody()
    explore()


@pytest.mark.parametrize(
    ("state", "event", "reaction", "broken"),
    [pytest.param(*each, id=f"{number}-{each[0].name}-{each[1].name}") for number, each in enumerate(DEFECTS)],
)
def test_a_defect_is_found(state: Any, event: Any, reaction: Any, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change_reaction(monkeypatch, state, event, reaction)
    if state is S.GREETING:
        # With a provision it can go on without an answer.
        monkeypatch.setattr(sys.modules[__name__], "provision", Provision.NONE)
    with pytest.raises(Violation, match=broken):
        explore_everything()


@pytest.mark.parametrize(("state", "event", "reaction"), OBSTACLES)
def test_an_obstacle_is_found(state: Any, event: Any, reaction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change_reaction(monkeypatch, state, event, reaction)
    with pytest.raises(AssertionError):
        assert_restarts_succeed()
