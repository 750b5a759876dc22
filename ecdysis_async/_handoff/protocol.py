"""The handoff as two pure state machines: events in, a new state and actions out.

No I/O, no clock and no loop: the supervisor turns frames, deaths, timers and requests into events, and carries out the
actions in the order given. A state is one member of an enum and remembers nothing besides, so that all interleavings
of three generations can be explored exhaustively (tests/handoff/test_protocol_exploration.py).

    predecessor                                successor
     SPAWNING      <------------- hello        GREETING
     INITIALISING  listeners ------------->    INITIALISING
     PAUSING       <------------- ready        WAITING
     COMMITTING    commit ---------------->    OPENING
     PROBATION     <----------- serving        PROBATION
                   <------------ settle        (only if the successor is itself asked to restart)
     RECALLING     recall -------------->      RETURNED     (only if a roll-out over several workers goes back)
     ROLLED_BACK   <---------- returned
     SETTLED       settled --------------->    SETTLED

The predecessor puts LISTENERS into the channel a first time before the successor's process exists: the *provision*. The
successor finds it there when it says HELLO, and waits for the answer all the same. Where it finds the predecessor dead
instead, the provision is the answer, so that a death during the import costs nothing. A release that knows no provision
takes it for the answer, and gets no other one.

The death of the peer is one event (``DIED``), delivered after everything that the peer has said; a channel that ends
while its process lives is another (``BROKEN``). The first alone ever makes a process accept.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from ecdysis_async.errors import GarbledFrame, UnknownMessage, VersionMismatch

__all__ = [
    "VERSIONS",
    "DrainMessage",
    "FromPredecessor",
    "FromSuccessor",
    "PredecessorAction",
    "PredecessorEvent",
    "PredecessorState",
    "SuccessorAction",
    "SuccessorEvent",
    "SuccessorState",
    "Timer",
    "choose_version",
    "predecessor_event",
    "step_predecessor",
    "step_successor",
    "successor_event",
]

VERSIONS: Final = (1, 1)
"""The oldest and the newest version of the protocol that this release speaks. HELLO itself never changes."""


class FromSuccessor(enum.StrEnum):
    """Messages on their way up."""

    HELLO = "hello"  # versions [min, max], pid, its pidfd and the memory with its connection counters
    READY = "ready"  # claimed and unclaimed sockets
    FAILED = "failed"  # the exception that ended it
    SERVING = "serving"  # it accepts
    SETTLE = "settle"  # it needs the probation to end now, because it is asked to restart itself
    STOPPING = "stopping"  # it ends because it was told to: no failure, nobody shall resume
    RETURNED = "returned"  # it was recalled, and will never accept again; it serves what it has


class FromPredecessor(enum.StrEnum):
    """Messages on their way down."""

    LISTENERS = "listeners"  # sockets, its pidfd, stderr, channels and pidfds of ancestors that still drain
    COMMIT = "commit"  # it has paused: accept now
    SETTLED = "settled"  # it will never accept again
    ABORT = "abort"  # the restart is called off: leave
    STOP = "stop"  # the service is being stopped: serve what you have, then leave
    RECALL = "recall"  # nothing is wrong with you, but the service goes back: accept no more


class DrainMessage(enum.StrEnum):
    """Messages of a drain, after the handoff is over: they change no state, and an older release may ignore them."""

    PROGRESS = "progress"  # down: how many connections are left
    DRAINED = "drained"  # down: none; the report of the restart is complete
    FORCED = "forced"  # down: it is ended by force; what had kept it
    PUBLISHED = "published"  # up: it has settled, pid file and all; a service manager may be told
    MAIN = "main"  # down: the service manager has been told, and takes the successor for the main process
    TRANSFER = "transfer"  # down: a socket over which the connections come that can go on in the successor
    HURRY = "hurry"  # up: too many generations drain, and this is the oldest; its deadline is now
    REOPEN_LOGS = "reopen logs"  # up: log files were moved away


class Timer(enum.Enum):
    """What a state may wait for no longer than a limit that the supervisor knows."""

    READY = "ready"
    PAUSE = "pause"
    SERVING = "serving"
    PROBATION = "probation"
    LISTENERS = "listeners"
    COMMIT = "commit"


class PredecessorState(enum.Enum):
    """Where one restart stands, as its predecessor sees it: it exists from the request to the end of that restart.

    Two other enums sound alike. ``report.State`` is where a generation stands, from its start to its end, whatever
    restarts there are. ``report.Outcome`` is what a caller is told of one restart; several states have one outcome.
    """

    SPAWNING = "spawning"  # the successor's process runs; nothing is heard of it yet
    INITIALISING = "initialising"  # it has the sockets and prepares itself
    PAUSING = "pausing"  # it is ready; this side stops accepting
    COMMITTING = "committing"  # it was told to accept; from here on only its death makes this side accept again
    PROBATION = "probation"  # it serves; this side is paused and can still take over again
    ABORTING = "aborting"  # the restart failed before the commit; the successor is being ended, this side serves
    RECALLING = (
        "recalling"  # the service goes back; the successor is to stop accepting, and lives on to serve what it has
    )
    REVERTING = "reverting"  # it failed after the commit; it is being ended, nobody accepts until it is dead
    STOPPING = "stopping"  # the service stops, and a successor that was not committed is being ended
    FAILED = "failed"  # final: this side serves as if nothing had been asked
    ROLLED_BACK = "rolled back"  # final: this side accepts again
    SETTLED = "settled"  # final: this side drains; the successor serves, or drains too where the service stops
    STOPPED = "stopped"  # final: this side drains; there is no successor

    @property
    def timer(self) -> Timer | None:
        """What the time in this state is limited by."""
        return _PREDECESSOR_TIMERS.get(self)

    @property
    def final(self) -> bool:
        """Whether the restart is over."""
        return self not in _PREDECESSOR


class PredecessorEvent(enum.Enum):
    """What can happen to a predecessor."""

    HELLO = "hello"
    READY = "ready"
    FAILED = "failed"
    SERVING = "serving"
    SETTLE = "settle"
    STOPPING = "stopping"
    RETURNED = "returned"
    BROKEN = "broken"  # the channel ended or carried garbage, or an expected thing was impossible; the peer may live
    DIED = "died"  # the successor's pidfd is readable, and all that it had sent was handled
    TIMED_OUT = "timed out"  # the timer of the state
    PAUSED = "paused"  # this side accepts no more
    CANCELLED = "cancelled"  # the caller of the restart has called it off
    STOP = "stop"  # the service shall stop
    RECALL = "recall"  # this side shall serve again, because the restart is part of a larger one that has failed


class PredecessorAction(enum.Enum):
    """What the supervisor of a predecessor carries out."""

    SEND_LISTENERS = "send listeners"
    SEND_COMMIT = "send commit"
    SEND_SETTLED = "send settled"
    SEND_ABORT = "send abort"
    SEND_STOP = "send stop"
    SEND_RECALL = "send recall"
    PAUSE = "pause"  # answered by the event PAUSED
    RESUME = "resume"  # undoes a pause, also one that has only begun
    END_SUCCESSOR = "end successor"  # SIGTERM, then SIGKILL; answered by the event DIED


class SuccessorState(enum.Enum):
    """The successor's side of one restart."""

    GREETING = "greeting"  # said hello; has no sockets yet
    INITIALISING = "initialising"  # the application prepares itself
    ORPHANED = "orphaned"  # the same, and the predecessor is dead: nobody's word is needed to accept
    WAITING = "waiting"  # ready; waits for the commit
    OPENING = "opening"  # was told to accept, and begins to
    OPENING_ORPHANED = "opening orphaned"  # the same, and the predecessor is dead
    PROBATION = "probation"  # accepts; the predecessor can still take over again
    SETTLED = "settled"  # final: the predecessor will never accept again
    ABORTED = "aborted"  # final: this process leaves, and must not accept
    STOPPED = "stopped"  # final: this process serves what it has, and leaves; the predecessor will not resume
    RETURNED = "returned"  # final: the same, and the predecessor resumes

    @property
    def timer(self) -> Timer | None:
        """What the time in this state is limited by."""
        return _SUCCESSOR_TIMERS.get(self)

    @property
    def final(self) -> bool:
        """Whether the handoff is over."""
        return self not in _SUCCESSOR


class SuccessorEvent(enum.Enum):
    """What can happen to a successor."""

    LISTENERS = "listeners"
    COMMIT = "commit"
    SETTLED = "settled"
    ABORT = "abort"
    STOP = "stop"  # the message: the predecessor was told to stop the service
    RECALL = "recall"
    BROKEN = "broken"
    DIED = "died"  # the predecessor's pidfd is readable, and all that it had sent was handled
    TIMED_OUT = "timed out"
    READY = "ready"  # the application has called ready()
    OPENED = "opened"  # this side accepts
    FAILED = "failed"  # the application raised an exception, or a socket could not be opened
    STOP_HERE = "stop here"  # this very process was told to stop, or its application is done
    SETTLE = "settle"  # this side is asked to restart, and can only once it has settled


class SuccessorAction(enum.Enum):
    """What the supervisor of a successor carries out."""

    SEND_READY = "send ready"
    SEND_FAILED = "send failed"
    SEND_SERVING = "send serving"
    SEND_SETTLE = "send settle"
    SEND_STOPPING = "send stopping"
    OPEN = "open"  # answered by the event OPENED
    RETURN = "return"  # stop accepting for good, and only if that has worked, say so


_P, _PE, _PA = PredecessorState, PredecessorEvent, PredecessorAction
_S, _SE, _SA = SuccessorState, SuccessorEvent, SuccessorAction

# Each failure before the commit leads to ABORTING, which serves; each one after it to REVERTING, which waits for the
# successor's death, because a successor that was committed may accept for as long as it lives (G2).
_PREDECESSOR: Final[
    Mapping[PredecessorState, Mapping[PredecessorEvent, tuple[PredecessorState, tuple[PredecessorAction, ...]]]]
] = {
    # The successor may find a provision in its channel (see above), and would go on with it if this process died.
    _P.SPAWNING: {
        _PE.HELLO: (_P.INITIALISING, (_PA.SEND_LISTENERS,)),
        _PE.FAILED: (_P.ABORTING, (_PA.END_SUCCESSOR,)),
        _PE.BROKEN: (_P.ABORTING, (_PA.SEND_ABORT, _PA.END_SUCCESSOR)),
        _PE.TIMED_OUT: (_P.ABORTING, (_PA.SEND_ABORT, _PA.END_SUCCESSOR)),
        _PE.CANCELLED: (_P.ABORTING, (_PA.SEND_ABORT, _PA.END_SUCCESSOR)),
        _PE.STOP: (_P.STOPPING, (_PA.SEND_ABORT, _PA.END_SUCCESSOR)),
        _PE.DIED: (_P.FAILED, ()),
    },
    _P.INITIALISING: {
        _PE.READY: (_P.PAUSING, (_PA.PAUSE,)),
        _PE.FAILED: (_P.ABORTING, (_PA.END_SUCCESSOR,)),
        _PE.BROKEN: (_P.ABORTING, (_PA.SEND_ABORT, _PA.END_SUCCESSOR)),
        _PE.TIMED_OUT: (_P.ABORTING, (_PA.SEND_ABORT, _PA.END_SUCCESSOR)),
        _PE.CANCELLED: (_P.ABORTING, (_PA.SEND_ABORT, _PA.END_SUCCESSOR)),
        _PE.STOP: (_P.STOPPING, (_PA.SEND_ABORT, _PA.END_SUCCESSOR)),
        _PE.DIED: (_P.FAILED, ()),
    },
    # A successor that was not committed accepts only over this process's dead body: resuming at once is safe. The word
    # to leave goes first, so that it is there before this process can die.
    _P.PAUSING: {
        _PE.PAUSED: (_P.COMMITTING, (_PA.SEND_COMMIT,)),
        _PE.FAILED: (_P.ABORTING, (_PA.RESUME, _PA.END_SUCCESSOR)),
        _PE.BROKEN: (_P.ABORTING, (_PA.SEND_ABORT, _PA.RESUME, _PA.END_SUCCESSOR)),
        _PE.TIMED_OUT: (_P.ABORTING, (_PA.SEND_ABORT, _PA.RESUME, _PA.END_SUCCESSOR)),
        _PE.CANCELLED: (_P.ABORTING, (_PA.SEND_ABORT, _PA.RESUME, _PA.END_SUCCESSOR)),
        _PE.STOP: (_P.STOPPING, (_PA.SEND_ABORT, _PA.END_SUCCESSOR)),
        _PE.DIED: (_P.FAILED, (_PA.RESUME,)),
    },
    _P.COMMITTING: {
        _PE.SERVING: (_P.PROBATION, ()),
        _PE.FAILED: (_P.REVERTING, (_PA.END_SUCCESSOR,)),
        _PE.BROKEN: (_P.REVERTING, (_PA.END_SUCCESSOR,)),
        _PE.TIMED_OUT: (_P.REVERTING, (_PA.END_SUCCESSOR,)),
        _PE.STOP: (_P.SETTLED, (_PA.SEND_STOP,)),
        _PE.STOPPING: (_P.STOPPED, ()),
        _PE.DIED: (_P.ROLLED_BACK, (_PA.RESUME,)),
    },
    _P.PROBATION: {
        _PE.TIMED_OUT: (_P.SETTLED, (_PA.SEND_SETTLED,)),
        _PE.SETTLE: (_P.SETTLED, (_PA.SEND_SETTLED,)),
        _PE.FAILED: (_P.REVERTING, (_PA.END_SUCCESSOR,)),
        _PE.BROKEN: (_P.REVERTING, (_PA.END_SUCCESSOR,)),
        _PE.STOP: (_P.SETTLED, (_PA.SEND_STOP,)),
        _PE.STOPPING: (_P.STOPPED, ()),
        _PE.RECALL: (_P.RECALLING, (_PA.SEND_RECALL,)),
        _PE.DIED: (_P.ROLLED_BACK, (_PA.RESUME,)),
    },
    # The one way back that needs no death: the successor's own word that it will never accept again.
    _P.RECALLING: {
        _PE.RETURNED: (_P.ROLLED_BACK, (_PA.RESUME,)),
        _PE.SETTLE: (_P.RECALLING, ()),
        _PE.TIMED_OUT: (_P.REVERTING, (_PA.END_SUCCESSOR,)),
        _PE.FAILED: (_P.REVERTING, (_PA.END_SUCCESSOR,)),
        _PE.BROKEN: (_P.REVERTING, (_PA.END_SUCCESSOR,)),
        _PE.STOP: (_P.SETTLED, (_PA.SEND_STOP,)),
        _PE.STOPPING: (_P.STOPPED, ()),
        _PE.DIED: (_P.ROLLED_BACK, (_PA.RESUME,)),
    },
    _P.ABORTING: {
        _PE.STOP: (_P.STOPPING, ()),
        _PE.DIED: (_P.FAILED, ()),
    },
    # A successor that is being ended for a failure may take the SIGTERM for an orderly stop and say so: not heard here.
    _P.REVERTING: {
        _PE.STOP: (_P.STOPPING, ()),
        _PE.DIED: (_P.ROLLED_BACK, (_PA.RESUME,)),
    },
    _P.STOPPING: {
        _PE.DIED: (_P.STOPPED, ()),
    },
}

_PREDECESSOR_TIMERS: Final = {
    _P.SPAWNING: Timer.READY,
    _P.INITIALISING: Timer.READY,
    _P.PAUSING: Timer.PAUSE,
    _P.COMMITTING: Timer.SERVING,
    _P.PROBATION: Timer.PROBATION,
    _P.RECALLING: Timer.PAUSE,
}

_SUCCESSOR: Final[
    Mapping[SuccessorState, Mapping[SuccessorEvent, tuple[SuccessorState, tuple[SuccessorAction, ...]]]]
] = {
    _S.GREETING: {
        _SE.LISTENERS: (_S.INITIALISING, ()),
        _SE.ABORT: (_S.ABORTED, ()),
        _SE.BROKEN: (_S.ABORTED, ()),
        _SE.DIED: (_S.ABORTED, ()),
        _SE.TIMED_OUT: (_S.ABORTED, ()),
        _SE.FAILED: (_S.ABORTED, (_SA.SEND_FAILED,)),
        _SE.STOP_HERE: (_S.ABORTED, (_SA.SEND_FAILED,)),
    },
    _S.INITIALISING: {
        _SE.READY: (_S.WAITING, (_SA.SEND_READY,)),
        _SE.DIED: (_S.ORPHANED, ()),
        _SE.ABORT: (_S.ABORTED, ()),
        _SE.BROKEN: (_S.ABORTED, ()),
        _SE.FAILED: (_S.ABORTED, (_SA.SEND_FAILED,)),
        _SE.STOP_HERE: (_S.ABORTED, (_SA.SEND_FAILED,)),
    },
    _S.ORPHANED: {
        _SE.READY: (_S.OPENING_ORPHANED, (_SA.OPEN,)),
        _SE.FAILED: (_S.ABORTED, ()),
        _SE.STOP_HERE: (_S.ABORTED, ()),
    },
    _S.WAITING: {
        _SE.COMMIT: (_S.OPENING, (_SA.OPEN,)),
        _SE.DIED: (_S.OPENING_ORPHANED, (_SA.OPEN,)),
        _SE.ABORT: (_S.ABORTED, ()),
        _SE.BROKEN: (_S.ABORTED, ()),
        _SE.TIMED_OUT: (_S.ABORTED, ()),
        _SE.FAILED: (_S.ABORTED, (_SA.SEND_FAILED,)),
        _SE.STOP_HERE: (_S.ABORTED, (_SA.SEND_FAILED,)),
    },
    _S.OPENING: {
        _SE.OPENED: (_S.PROBATION, (_SA.SEND_SERVING,)),
        _SE.DIED: (_S.OPENING_ORPHANED, ()),
        _SE.STOP: (_S.STOPPED, ()),
        _SE.BROKEN: (_S.ABORTED, ()),
        _SE.FAILED: (_S.ABORTED, (_SA.SEND_FAILED,)),
        _SE.STOP_HERE: (_S.STOPPED, (_SA.SEND_STOPPING,)),
    },
    _S.OPENING_ORPHANED: {
        _SE.OPENED: (_S.SETTLED, ()),
        _SE.FAILED: (_S.ABORTED, ()),
        _SE.STOP_HERE: (_S.STOPPED, ()),
    },
    _S.PROBATION: {
        _SE.SETTLED: (_S.SETTLED, ()),
        _SE.DIED: (_S.SETTLED, ()),
        _SE.STOP: (_S.STOPPED, ()),
        _SE.RECALL: (_S.RETURNED, (_SA.RETURN,)),
        # The predecessor may have settled, and what it said is lost: leaving now would leave nobody. To stay is safe,
        # as it resumes only over this process's dead body: it ends this process, if it reverts, or ends itself.
        _SE.BROKEN: (_S.PROBATION, ()),
        _SE.FAILED: (_S.ABORTED, (_SA.SEND_FAILED,)),
        _SE.STOP_HERE: (_S.STOPPED, (_SA.SEND_STOPPING,)),
        _SE.SETTLE: (_S.PROBATION, (_SA.SEND_SETTLE,)),
    },
}

_SUCCESSOR_TIMERS: Final = {_S.GREETING: Timer.LISTENERS, _S.WAITING: Timer.COMMIT}

# A message that nobody expects is as good as a broken channel, until nothing hangs on the channel any more.
_P_MESSAGES: Final = frozenset(_PE(message.value) for message in FromSuccessor)
_S_MESSAGES: Final = frozenset(_SE(message.value) for message in FromPredecessor)
_P_DEAF: Final = frozenset({_P.ABORTING, _P.REVERTING, _P.STOPPING})
_S_DEAF: Final = frozenset({_S.ORPHANED, _S.OPENING_ORPHANED})


def step_predecessor(
    state: PredecessorState, event: PredecessorEvent
) -> tuple[PredecessorState, tuple[PredecessorAction, ...]]:
    """Return the state that follows, and what has to be done, in this order. A final state stays as it is."""
    return _step(_PREDECESSOR, state, event, _P_MESSAGES, _P_DEAF, _PE.BROKEN)


def step_successor(state: SuccessorState, event: SuccessorEvent) -> tuple[SuccessorState, tuple[SuccessorAction, ...]]:
    """Return the state that follows, and what has to be done, in this order. A final state stays as it is."""
    return _step(_SUCCESSOR, state, event, _S_MESSAGES, _S_DEAF, _SE.BROKEN)


State = TypeVar("State", bound=enum.Enum)
Event = TypeVar("Event", bound=enum.Enum)
Action = TypeVar("Action", bound=enum.Enum)


def _step(
    table: Mapping[State, Mapping[Event, tuple[State, tuple[Action, ...]]]],
    state: State,
    event: Event,
    messages: frozenset[Event],
    deaf: frozenset[State],
    broken: Event,
) -> tuple[State, tuple[Action, ...]]:
    reactions = table.get(state)
    if reactions is None:
        return state, ()
    if event in messages and event not in reactions and state not in deaf:
        event = broken
    return reactions.get(event, (state, ()))


def predecessor_event(message: str) -> PredecessorEvent:
    """Return the event that a successor's message is.

    Raises:
        UnknownMessage: a successor of this protocol version sends no such message.
    """
    try:
        return PredecessorEvent(FromSuccessor(message).value)
    except ValueError:
        raise UnknownMessage(f"the successor sent a message of the unknown type {message!r}") from None


def successor_event(message: str) -> SuccessorEvent:
    """Return the event that a predecessor's message is.

    Raises:
        UnknownMessage: a predecessor of this protocol version sends no such message.
    """
    try:
        return SuccessorEvent(FromPredecessor(message).value)
    except ValueError:
        raise UnknownMessage(f"the predecessor sent a message of the unknown type {message!r}") from None


def choose_version(hello: Mapping[str, Any], ours: tuple[int, int] = VERSIONS) -> int:
    """Return the highest protocol version that the successor's HELLO and this release have in common.

    Raises:
        GarbledFrame: the HELLO names no versions.
        VersionMismatch: there is none in common.
    """
    match hello.get("versions"):
        case [int(oldest), int(newest)] if oldest <= newest:
            common = min(newest, ours[1])
            if common >= max(oldest, ours[0]):
                return common
            raise VersionMismatch(
                f"the successor speaks handoff versions {oldest} to {newest}, this generation {ours[0]} to {ours[1]}: "
                "restart the service once with stop and start, or install a release in between first"
            )
        case versions:
            raise GarbledFrame(f"the successor's HELLO names no versions: {versions!r}")
