"""The two sides of a restart, carried out: the machines of ``protocol.py`` with their frames, processes and timers.

:class:`Handover` is the predecessor's side, :class:`Inheritance` the successor's. Each one runs its machine until the
restart is over and tells its generation what happened; neither decides anything that the machine has not decided.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import functools
import logging
import math
import mmap
import os
import signal
import socket
import struct
import sys
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import anyio
import anyio.to_thread

from .channel import Channel, Frame
from .errors import (
    ChannelError,
    GarbledFrame,
    HandoffAborted,
    ReadyTimeout,
    RestartError,
    RolledBack,
    SpawnFailed,
    SuccessorFailed,
)
from .peer import Death, Peer, wait_for_death
from .plane import Plane
from .protocol import (
    VERSIONS,
    Farewell,
    FromPredecessor,
    FromSuccessor,
    Predecessor,
    PredecessorAction,
    PredecessorEvent,
    Successor,
    SuccessorAction,
    SuccessorEvent,
    Timer,
    choose_version,
    predecessor_event,
    step_predecessor,
    step_successor,
    successor_event,
)
from .registry import Entry
from .report import Outcome, Phase, RestartReport
from .settings import Settings
from .spawn import Process, describe_exit, describe_launch, spawn

__all__ = ["Ancestor", "Generation", "Handover", "Inheritance"]

# Limits of waits that no setting is worth: each is far more than a healthy process needs, seconds.
PAUSE_SECONDS = 10.0
SERVING_SECONDS = 30.0
LISTENERS_SECONDS = 30.0
# A successor that is ready waits for the pause, and for what the predecessor still produces for it.
COMMIT_SECONDS = 120.0
# What a successor that has to leave gets between SIGTERM and SIGKILL.
END_GRACE_SECONDS = 3.0

# How long to wait where accepting again failed, for want of descriptors most likely.
RESUME_PAUSE_SECONDS = 0.2

STDERR_LINES = 40
STDERR_BYTES = 16 * 1024
ERROR_BYTES = 64 * 1024


class Numbered(logging.LoggerAdapter[logging.Logger]):
    """Puts generation and pid before each line: in a restart's log two processes speak."""

    def __init__(self, number: int) -> None:
        super().__init__(logging.getLogger("ecdysis_async"), {})
        self._prefix = f"[generation {number}, pid {os.getpid()}] "

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return self._prefix + str(msg), kwargs


@dataclass(slots=True)
class Ancestor:
    """An older generation that is still there, or the predecessor."""

    generation: int
    pid: int
    peer: Peer
    connections: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what travels in LISTENERS; channel and pidfd travel beside it, in this order."""
        return {"generation": self.generation, "pid": self.pid}


class Lineage:
    """The older generations that still drain: how far they are, and which of them is too many.

    Only one generation reads what they say: the newest one that has settled.
    """

    def __init__(self) -> None:
        self.ancestors: list[Ancestor] = []
        self.on_drained: Callable[[Ancestor, Mapping[str, Any]], None] = lambda ancestor, body: None
        self._following: anyio.CancelScope | None = None
        self._ended = anyio.Event()
        self._is_let_go = False

    async def follow(self, max_draining: int) -> None:
        """Listen to all of them until each one is dead, and tell those beyond ``max_draining`` to hurry."""
        with anyio.CancelScope() as self._following:
            if self._is_let_go:
                return
            for ancestor in sorted(self.ancestors, key=lambda each: each.generation)[:-max_draining]:
                with contextlib.suppress(ChannelError):  # it is leaving at this moment
                    await ancestor.peer.channel.send(Farewell.HURRY, timeout=2)
            async with anyio.create_task_group() as task_group:
                for ancestor in self.ancestors:
                    task_group.start_soon(ancestor.peer.run, functools.partial(self._deliver, ancestor))
        self._ended.set()

    async def let_go(self) -> list[dict[str, Any]]:
        """Listen to them no more; return what a successor has to know to go on where this one ended."""
        self._is_let_go = True
        if self._following is not None:
            self._following.cancel()
            await self._ended.wait()
        return [
            {"pid": ancestor.pid, "pending": base64.b64encode(ancestor.peer.channel.pending).decode()}
            for ancestor in self.ancestors
        ]

    def close(self) -> None:
        """Let go of the descriptors. Not while ``follow`` runs."""
        while self.ancestors:
            self.ancestors.pop().peer.close()

    def _deliver(self, ancestor: Ancestor, item: Frame | ChannelError | Death) -> None:
        match item:
            case Frame(type=Farewell.PROGRESS):
                ancestor.connections = item.body.get("connections")
            case Frame(type=Farewell.DRAINED):
                ancestor.connections = 0
                self.on_drained(ancestor, item.body)
            case Death():
                # Still in the list means still to be closed; its tasks end with this call.
                self.ancestors.remove(ancestor)
                ancestor.peer.close()
        if isinstance(item, Frame):
            item.close()


@dataclass(slots=True)
class Generation:
    """What the two sides of a handoff share with their supervisor."""

    number: int
    settings: Settings
    plane: Plane
    log: Numbered
    # Keys that this generation's environment got from the env file: forgotten before it is read afresh.
    env_file_keys: tuple[str, ...] = ()
    lineage: Lineage = field(default_factory=Lineage)
    # Pausing and resuming may be asked for at the same time; they must not interleave within the gate.
    gate_lock: anyio.Lock = field(default_factory=anyio.Lock)


State = TypeVar("State", bound=Predecessor | Successor)
Event = TypeVar("Event", bound=PredecessorEvent | SuccessorEvent)
Action = TypeVar("Action", bound=PredecessorAction | SuccessorAction)


class Side(abc.ABC, Generic[State, Event, Action]):
    """A machine with its queue of events and its timer."""

    timed_out: Event
    failed: Event
    limits: Mapping[Timer, float]

    def __init__(
        self, state: State, step: Callable[[State, Event], tuple[State, tuple[Action, ...]]], generation: Generation
    ) -> None:
        self.state: State = state
        self.over = anyio.Event()
        self.generation = generation
        self._step = step
        self._events: deque[tuple[Event, object]] = deque()
        self._wakeup = anyio.Event()

    def post(self, event: Event, cause: object = None) -> None:
        """Let an event happen, after those that were posted before. Harmless once the restart is over."""
        self._events.append((event, cause))
        self._wakeup.set()

    async def advance(self) -> None:
        """Run the machine until its state is final."""
        timer: Timer | None = None
        deadline = math.inf
        try:
            while not self.state.final:
                if self.state.timer is not timer:
                    timer = self.state.timer
                    deadline = anyio.current_time() + self.limits[timer] if timer is not None else math.inf
                event, cause = await self._next(deadline)
                if not await self.foresee(event, cause):
                    continue
                before = self.state
                self.state, actions = self._step(before, event)
                self.changed(before, event, cause)
                for action in actions:
                    try:
                        await self.perform(action)
                    except Exception as error:
                        # No descriptors, no memory: whatever it is, it fails this restart and not the service.
                        self.generation.log.exception("%s failed", action.value)
                        self.post(self.failed, error)
        finally:
            # Only now, after the last action: whoever is woken by a failure finds this side accepting again.
            self.over.set()

    async def foresee(self, event: Event, cause: object) -> bool:
        """Prepare for an event; return False where another one, which is on its way, must come first."""
        return True

    @abc.abstractmethod
    def changed(self, before: State, event: Event, cause: object) -> None:
        """Take note of what an event has led to, before its actions are carried out."""

    @abc.abstractmethod
    async def perform(self, action: Action) -> None:
        """Carry out one action. What it leads to comes back as an event; so does an exception, as ``failed``."""

    async def _next(self, deadline: float) -> tuple[Event, object]:
        with anyio.CancelScope(deadline=deadline):
            while not self._events:
                self._wakeup = anyio.Event()
                await self._wakeup.wait()
        return self._events.popleft() if self._events else (self.timed_out, None)


# A phase ends with the event that leads from its last state to another phase.
_PHASES: Final = {
    Predecessor.SPAWNING: Phase.START,
    Predecessor.INITIALISING: Phase.INITIALISE,
    Predecessor.PAUSING: Phase.PAUSE,
    Predecessor.COMMITTING: Phase.COMMIT,
    Predecessor.PROBATION: Phase.PROBATION,
}
_OUTCOMES: Final = {
    Predecessor.PROBATION: Outcome.SERVING,
    Predecessor.SETTLED: Outcome.SETTLED,
    Predecessor.FAILED: Outcome.FAILED,
    Predecessor.ROLLED_BACK: Outcome.ROLLED_BACK,
    Predecessor.STOPPED: Outcome.STOPPED,
}


class Handover(Side[Predecessor, PredecessorEvent, PredecessorAction]):
    """One restart, as the generation that was asked for it carries it out.

    Attributes:
        report: what stands so far.
        error: why there is no successor, once it failed.
        serving: set when the successor serves; not set where it never did.
    """

    timed_out = PredecessorEvent.TIMED_OUT
    failed = PredecessorEvent.BROKEN

    def __init__(self, generation: Generation, on_change: Callable[[Handover], None]) -> None:
        super().__init__(Predecessor.SPAWNING, step_predecessor, generation)
        settings = generation.settings
        self.limits = {
            Timer.READY: settings.ready_timeout,
            Timer.PAUSE: PAUSE_SECONDS,
            Timer.SERVING: SERVING_SECONDS,
            Timer.PROBATION: settings.probation,
        }
        self.report = RestartReport(
            id=uuid.uuid4().hex[:12],
            generation=generation.number + 1,
            predecessor_pid=os.getpid(),
            started_at=time.time(),
        )
        self.error: RestartError | None = None
        self.serving = anyio.Event()
        self.unclaimed: list[Entry] = []
        self._on_change = on_change
        self._entries: list[Entry] = []
        self._entered = time.monotonic()
        self._paused_at = math.nan
        self._process: Process | None = None
        self._peer: Peer | None = None
        self._counters = -1
        self._env_file_keys: tuple[str, ...] = ()
        self._stderr: StderrTail | None = None

    # What the supervisor asks

    @property
    def committed(self) -> bool:
        """Whether the successor was told to accept: from then on the restart cannot be called off any more."""
        return self.state not in (
            Predecessor.SPAWNING,
            Predecessor.INITIALISING,
            Predecessor.PAUSING,
            Predecessor.ABORTING,
            Predecessor.STOPPING,
            Predecessor.FAILED,
        )

    async def run(self) -> None:
        """Carry the restart out, to its very end: after it has settled, until the successor ends or this is cancelled.

        Never raises what went wrong with the successor: that stands in ``error``.
        """
        log = self.generation.log
        log.info("restart %s: starting generation %d", self.report.id, self.report.generation)
        try:
            try:
                await self._start()
            except RestartError as error:
                self.state = Predecessor.FAILED
                self._fail(error, Phase.START)
                return
            assert self._peer is not None and self._process is not None and self._stderr is not None
            async with anyio.create_task_group() as task_group:
                self._tasks = task_group
                task_group.start_soon(self._peer.run, self._deliver)
                task_group.start_soon(self._stderr.run)
                await self.advance()
                if self.state in (Predecessor.FAILED, Predecessor.ROLLED_BACK):
                    task_group.cancel_scope.cancel()
                else:
                    # Its zombie is this process' to reap, also if its own successor lets it go before this one has
                    # drained. What it says meanwhile (Farewell.HURRY) is still heard.
                    await self._process.wait()
                    task_group.cancel_scope.cancel()
        finally:
            self._close()

    def refuse(self, error: RestartError) -> None:
        """Let it fail before anything has begun."""
        self.state = Predecessor.FAILED
        self._fail(error, None)
        self.over.set()

    async def tell(self, message: Farewell, body: Mapping[str, Any], *, timeout: float = 2) -> None:
        """Tell the successor how the drain goes; it may be gone, or busy, and then it is not told."""
        if self._peer is None:
            return
        try:
            await self._peer.channel.send(message, body, timeout=timeout)
        except ChannelError as error:
            self.generation.log.debug("the successor was not told of the drain: %s", error)

    # What happens

    def _deliver(self, item: Frame | ChannelError | Death) -> None:
        match item:
            case Death():
                self.post(PredecessorEvent.DIED)
            case ChannelError():
                self.post(PredecessorEvent.BROKEN, item)
            case Frame(type=Farewell.HURRY):
                item.close()
                self.generation.log.warning("too many generations drain: the deadline of this one is now")
                self.generation.plane.tracker.hurry()
            case Frame():
                try:
                    self.post(self._read(item), item)
                except (ChannelError, KeyError, TypeError, ValueError) as error:
                    item.close()
                    self.post(PredecessorEvent.BROKEN, _as_channel_error(error, item))

    def _read(self, frame: Frame) -> PredecessorEvent:
        """Check what came before it counts. A successor may be of an older or a newer release."""
        event = predecessor_event(frame.type)
        if event is PredecessorEvent.HELLO:
            if self._counters >= 0:
                raise GarbledFrame("the successor said HELLO twice")
            choose_version(frame.body)
            self.report.successor_pid = int(frame.body["pid"])
            pidfd, self._counters = frame.descriptors
            # Another process than the spawned one speaks where the command is a wrapper: that one counts from here on.
            assert self._peer is not None
            self._peer.watch(pidfd)
            return event
        frame.close()
        if frame.descriptors:
            raise GarbledFrame(f"{frame.type!r} came with descriptors")
        if event is PredecessorEvent.READY:
            claimed = {int(index) for index in frame.body["claimed"]}
            self.report.created = [str(name) for name in frame.body["created"]]
            self.report.inherited = [entry.name for index, entry in enumerate(self._entries) if index in claimed]
            self.unclaimed = [entry for index, entry in enumerate(self._entries) if index not in claimed]
            self.report.unclaimed = [entry.name for entry in self.unclaimed]
        elif event is PredecessorEvent.SERVING:
            self.report.accept_gap = max(0.0, float(frame.body["opened_at"]) - self._paused_at)
        return event

    async def foresee(self, event: PredecessorEvent, cause: object) -> bool:
        if event is PredecessorEvent.DIED:
            await self._bury()
        elif self.state is Predecessor.PROBATION and event in (PredecessorEvent.TIMED_OUT, PredecessorEvent.SETTLE):
            # Never settle on a successor that is dead, or has just said that it fails: this side could not take over
            # again. Its death, or its word, is on its way here.
            assert self._peer is not None
            return not self._peer.is_dead() and not self._peer.has_news()
        return True

    def changed(self, before: Predecessor, event: PredecessorEvent, cause: object) -> None:
        if self.state is before:
            return
        phase = _PHASES.get(before)
        # Not the loop's clock: uvloop's stands still within one turn, and counts whole milliseconds.
        now = time.monotonic()
        if phase is not None:
            self.report.phases[phase] = now - self._entered
        self._entered = now
        failed = (Predecessor.ABORTING, Predecessor.REVERTING, Predecessor.FAILED, Predecessor.ROLLED_BACK)
        if self.state in failed and self.error is None:
            self._fail(self._explain(before, event, cause), phase)
        if self.state is Predecessor.ROLLED_BACK:
            try:
                # Read rather than mapped: a file that was cut short would be a SIGBUS here.
                opened, closed = COUNTERS.unpack(os.pread(self._counters, COUNTERS.size, 0))
                self.report.lost = max(0, opened - closed)
            except (OSError, struct.error) as error:
                self.generation.log.warning("what the successor had accepted cannot be read: %r", error)
        self.report.outcome = _OUTCOMES.get(self.state, self.report.outcome)
        if event is PredecessorEvent.STOP:
            self.report.outcome = Outcome.STOPPED
        self.generation.log.info(
            "restart %s: %s (generation %d, pid %s)",
            self.report.id,
            self.report.outcome.value if self.state.final else self.state.value,
            self.report.generation,
            self.report.successor_pid,
        )
        if self.state is Predecessor.SETTLED and self.unclaimed:
            self.generation.log.warning(
                "generation %d did not claim %s: closing what nobody listens on any more",
                self.report.generation,
                ", ".join(entry.name for entry in self.unclaimed),
            )
        self._on_change(self)
        if self.state is Predecessor.PROBATION:
            self.serving.set()

    async def perform(self, action: PredecessorAction) -> None:
        match action:
            case PredecessorAction.SEND_LISTENERS:
                await self._send_listeners()
            case PredecessorAction.PAUSE:
                self._tasks.start_soon(self._pause)
            case PredecessorAction.RESUME:
                await self._resume()
            case PredecessorAction.SEND_COMMIT:
                await self._send(FromPredecessor.COMMIT)
            case PredecessorAction.SEND_SETTLED:
                # Whoever is told to settle hears the ancestors from now on; two readers would tear frames apart.
                ancestors = await self.generation.lineage.let_go()
                await self._send(FromPredecessor.SETTLED, {"report": self.report.to_json(), "ancestors": ancestors})
            case PredecessorAction.SEND_ABORT:
                await self._send(FromPredecessor.ABORT)
            case PredecessorAction.SEND_STOP:
                await self._send(FromPredecessor.STOP)
            case PredecessorAction.END_SUCCESSOR:
                self._tasks.start_soon(self._end_successor)

    # How it is done

    async def _start(self) -> None:
        """Run the successor's process.

        Raises:
            RestartError: it could not be run.
        """
        settings = self.generation.settings
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise SpawnFailed(f"no channel for a successor: {error}; is the limit of open files reached?") from error
        try:
            self._stderr = StderrTail()
        except OSError as error:
            ours.close()
            theirs.close()
            raise SpawnFailed(f"no pipe for a successor: {error}; is the limit of open files reached?") from error
        try:
            # In a thread: looking for files may block, and so does vfork until the exec is done (vfork(2)).
            def start() -> Process:
                launch, self._env_file_keys = describe_launch(
                    settings.command, settings.environment, settings.env_file, self.generation.env_file_keys
                )
                assert self._stderr is not None
                return spawn(launch, theirs, self._stderr.write_end)

            self._process = await anyio.to_thread.run_sync(start)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            self._stderr.close_write_end()
        self.report.successor_pid = self._process.pid
        self._peer = Peer(Channel(ours), os.dup(self._process.pidfd))

    async def _send(
        self, message: FromPredecessor, body: Mapping[str, Any] | None = None, descriptors: Sequence[int] = ()
    ) -> None:
        """Send, or let a channel that does not carry it be the event that it is."""
        assert self._peer is not None
        try:
            await self._peer.channel.send(message, body, descriptors)
        except ChannelError as error:
            self.post(PredecessorEvent.BROKEN, error)

    async def _send_listeners(self) -> None:
        generation = self.generation
        self._entries = list(generation.plane.registry.entries)
        descriptions, sockets = generation.plane.registry.describe(self._entries)
        ancestors = list(generation.lineage.ancestors)
        with contextlib.ExitStack() as ours:

            def owned(descriptor: int) -> int:
                ours.callback(os.close, descriptor)
                return descriptor

            # Duplicates, because an ancestor may end, and be closed here, while this is being sent.
            ends = [owned(os.dup(end)) for each in ancestors for end in (each.peer.channel.fileno(), each.peer.pidfd)]
            await self._send(
                FromPredecessor.LISTENERS,
                {
                    "version": VERSIONS[1],
                    "restart": self.report.id,
                    "generation": self.report.generation,
                    "predecessor": {"generation": generation.number, "pid": os.getpid()},
                    "sockets": descriptions,
                    "ancestors": [ancestor.to_json() for ancestor in ancestors],
                    "env_file_keys": list(self._env_file_keys),
                },
                [owned(os.pidfd_open(os.getpid())), owned(_duplicate_stderr()), *sockets, *ends],
            )

    async def _pause(self) -> None:
        unclaimed = set(self.unclaimed)
        try:
            with anyio.CancelScope(shield=True):
                async with self.generation.gate_lock:
                    self._paused_at = time.monotonic()
                    # It may have been resumed, for a successor that died, before this had its turn.
                    if self.state is Predecessor.PAUSING:
                        await self.generation.plane.gate.pause(spare=unclaimed.__contains__)
        except Exception as error:
            self.generation.log.exception("this generation could not stop accepting; the restart is called off")
            self.post(PredecessorEvent.BROKEN, error)
        else:
            self.post(PredecessorEvent.PAUSED)

    async def _resume(self) -> None:
        while True:
            try:
                async with self.generation.gate_lock:
                    await self.generation.plane.gate.open()
            except OSError:
                # There is no successor, and nobody else to accept: it has to work in the end.
                self.generation.log.exception("this generation cannot accept again yet; trying on")
                await anyio.sleep(RESUME_PAUSE_SECONDS)
            else:
                return

    async def _end_successor(self) -> None:
        assert self._process is not None and self._peer is not None
        speaker = self._peer.pidfd
        await self._process.end(END_GRACE_SECONDS)
        # Where a wrapper was spawned, the one that speaks is its child, and has to be ended too.
        if not self._peer.is_dead():
            signal.pidfd_send_signal(speaker, signal.SIGTERM)
            with anyio.move_on_after(END_GRACE_SECONDS):
                await wait_for_death(speaker)
            if not self._peer.is_dead():
                signal.pidfd_send_signal(speaker, signal.SIGKILL)

    async def _bury(self) -> None:
        """Learn how the successor died, and hear its last words."""
        assert self._process is not None and self._stderr is not None
        self._exit_status = await self._process.end(END_GRACE_SECONDS)
        await self._stderr.read_rest()

    def _explain(self, before: Predecessor, event: PredecessorEvent, cause: object) -> RestartError:
        """Say what went wrong, and what to do about it."""
        assert self._stderr is not None
        pid = self.report.successor_pid
        match event, cause:
            case PredecessorEvent.CANCELLED, _:
                what = "the restart was called off"
            case PredecessorEvent.FAILED, Frame(body=body):
                what = f"the successor (pid {pid}) failed: {str(body.get('error'))[-ERROR_BYTES:]}"
            case PredecessorEvent.TIMED_OUT, _ if before in (Predecessor.SPAWNING, Predecessor.INITIALISING):
                seconds = self.limits[Timer.READY]
                what = f"the successor (pid {pid}) was not ready within {seconds:g} seconds and was ended"
                if before is Predecessor.SPAWNING:
                    what += "; it never entered `async with Ecdysis()`: does its command run this service?"
                else:
                    what += "; where its start-up takes longer, raise ready_timeout"
                return ReadyTimeout(what, phase=_PHASES[before], stderr=self._stderr.text)
            case PredecessorEvent.TIMED_OUT, _:
                what = f"the successor (pid {pid}) did not answer in time while {before.value}"
            case PredecessorEvent.DIED, _:
                what = f"the successor (pid {pid}) ended with {describe_exit(self._exit_status)} while {before.value}"
                if before is Predecessor.SPAWNING:
                    what += ", before it entered `async with Ecdysis()`"
            case _:
                what = f"the successor (pid {pid}) broke the handoff while {before.value}: {cause}"
        committed = before in (Predecessor.COMMITTING, Predecessor.PROBATION)
        kind = RolledBack if committed else SuccessorFailed
        error = kind(what, phase=_PHASES.get(before), stderr=self._stderr.text)
        if isinstance(cause, BaseException):
            error.__cause__ = cause
        return error

    def _fail(self, error: RestartError, phase: Phase | None) -> None:
        error.phase = phase or error.phase
        self.error = error
        self.report.error = str(error)
        if self.report.outcome is Outcome.IN_PROGRESS:
            self.report.outcome = Outcome.FAILED

    def _close(self) -> None:
        if self._peer is not None:
            self._peer.close()
        if self._stderr is not None:
            self._stderr.close()
        if self._counters >= 0:
            os.close(self._counters)
        if self._process is not None:
            self._process.close()
        self.over.set()


class StderrTail:
    """The successor's stderr until it is ready: passed on as it comes, its last lines kept for the error."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        self._tail = b""

    @property
    def text(self) -> str:
        """The last lines."""
        return "\n".join(self._tail.decode(errors="replace").splitlines()[-STDERR_LINES:])

    async def run(self) -> None:
        """Pass it on until every writer has closed it; that is long after the successor has put its own in place."""
        while True:
            await anyio.wait_readable(self._read_end)
            if not await self._read():
                return

    async def read_rest(self) -> None:
        """Take what a dead successor has left, without waiting for those who may have inherited its stderr."""
        with contextlib.suppress(BlockingIOError):
            while await self._read():
                pass

    def close_write_end(self) -> None:
        """Leave the writing to the successor."""
        os.close(self.write_end)

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._read_end)

    async def _read(self) -> bool:
        data = os.read(self._read_end, 64 * 1024)
        self._tail = (self._tail + data)[-STDERR_BYTES:]
        if data:
            # In a thread: a log that nobody reads must not stop the service. A closed stderr loses what it always did.
            with contextlib.suppress(OSError):
                await anyio.to_thread.run_sync(_write_all, 2, data, abandon_on_cancel=True)
        return bool(data)


# Connections opened and closed (see Tracker.share), in the order of bytes of this machine.
COUNTERS = struct.Struct("@QQ")


class Inheritance(Side[Successor, SuccessorEvent, SuccessorAction]):
    """The start of a generation that has a predecessor.

    Attributes:
        opened: set when this generation accepts, or never will.
        predecessor: what is known of the predecessor, once its sockets are here.
        report: the predecessor's report, once the restart has settled.
        restart_id: what the restart is asked for by, also where the predecessor dies before it has reported.
        reason: why it was aborted.
    """

    timed_out = SuccessorEvent.TIMED_OUT
    failed = SuccessorEvent.FAILED
    limits: Mapping[Timer, float] = {Timer.LISTENERS: LISTENERS_SECONDS, Timer.COMMIT: COMMIT_SECONDS}

    def __init__(self, sock: socket.socket, generation: Generation, on_change: Callable[[Inheritance], None]) -> None:
        super().__init__(Successor.GREETING, step_successor, generation)
        self.opened = anyio.Event()
        self.predecessor: Ancestor | None = None
        self.report: RestartReport | None = None
        self.restart_id = ""
        self.reason = ""
        self._on_change = on_change
        self._channel = Channel(sock)
        self._inherited = 0
        # The service's real stderr, and the pipe that stands in its place until this generation is ready.
        self._stderr = -1
        self._stderr_pipe = _identity(2)

    async def greet(self) -> None:
        """Say hello, and take over what the predecessor holds.

        Raises:
            HandoffAborted: it has called the restart off, is gone, or does not answer.
        """
        frame: Frame | None = None
        try:
            with anyio.move_on_after(LISTENERS_SECONDS):
                await self._say_hello()
                frame = await self._channel.receive()
            # A process that was stopped for longer wakes to both: what is here already was in time.
            frame = frame or self._channel.receive_nowait()
            if frame is None:
                raise TimeoutError(f"it did not answer within {LISTENERS_SECONDS:g} seconds")
            self.state, _ = self._step(self.state, successor_event(frame.type))
            if self.state is not Successor.INITIALISING:
                frame.close()
                raise HandoffAborted("ecdysis: the predecessor called the restart off")
            self._take_over(frame)
        except (ChannelError, TimeoutError, OSError, KeyError, TypeError, ValueError) as error:
            raise HandoffAborted(f"ecdysis: the predecessor did not hand over its sockets: {error!r}") from error
        finally:
            if self.predecessor is None:
                self.state = Successor.ABORTED
                self.close()

    async def run(self) -> None:
        """Carry the handoff out until it has settled; then listen to the drain of the predecessor, until it is dead."""
        assert self.predecessor is not None
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._listen)
            await self.advance()
            self._tasks.cancel_scope.cancel()

    def close(self) -> None:
        """Let go of the descriptors; harmless if done already."""
        self._channel.close()
        if self.predecessor is not None:
            self.predecessor.peer.close()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1

    # What happens

    async def _listen(self) -> None:
        assert self.predecessor is not None
        await self.predecessor.peer.run(self._deliver)

    def _deliver(self, item: Frame | ChannelError | Death) -> None:
        match item:
            case Death():
                self.post(SuccessorEvent.DIED)
            case ChannelError():
                self.post(SuccessorEvent.BROKEN, item)
            case Frame():
                item.close()
                try:
                    event = successor_event(item.type)
                    if event is SuccessorEvent.SETTLED:
                        self._read_settled(item.body)
                except (ChannelError, KeyError, TypeError, ValueError) as error:
                    self.post(SuccessorEvent.BROKEN, _as_channel_error(error, item))
                else:
                    self.post(event, item)

    def _read_settled(self, body: Mapping[str, Any]) -> None:
        self.report = RestartReport.from_json(body["report"])
        pending = {int(each["pid"]): base64.b64decode(each["pending"]) for each in body["ancestors"]}
        for ancestor in self.generation.lineage.ancestors:
            ancestor.peer.channel.resume(pending.get(ancestor.pid, b""))

    async def foresee(self, event: SuccessorEvent, cause: object) -> bool:
        # A process that was stopped for longer wakes to both, its timer and a predecessor that died meanwhile; leaving
        # for the first would leave nobody. The death is on its way here.
        assert self.predecessor is not None
        return event is not SuccessorEvent.TIMED_OUT or not self.predecessor.peer.is_dead()

    def changed(self, before: Successor, event: SuccessorEvent, cause: object) -> None:
        if event is SuccessorEvent.OPENED or self.state.final:
            self.opened.set()
        if self.state is before:
            return
        log = self.generation.log
        assert self.predecessor is not None
        if event is SuccessorEvent.DIED:
            self._restore_stderr()
            log.warning("the predecessor (pid %d) died; this generation goes on without it", self.predecessor.pid)
        if self.state is Successor.ABORTED:
            if isinstance(cause, BaseException):
                self.reason = "".join(traceback.format_exception(cause))[-ERROR_BYTES:]
            else:
                self.reason = _REASONS.get(event, event.value)
            log.warning("the restart is called off, this generation leaves: %s", self.reason.strip().splitlines()[-1])
        else:
            log.info("handoff: %s", self.state.value)
        self._on_change(self)

    async def perform(self, action: SuccessorAction) -> None:
        match action:
            case SuccessorAction.SEND_READY:
                registry = self.generation.plane.registry
                # Inherited ones stand first, in the predecessor's order.
                inherited = registry.entries[: self._inherited]
                claimed = [index for index, entry in enumerate(inherited) if entry.claimed]
                # A copy that nobody accepts on would reset what queues on it; the predecessor still answers there.
                registry.close_unclaimed()
                created = [entry.name for entry in registry.entries if not entry.inherited]
                self._restore_stderr()
                await self._send(FromSuccessor.READY, {"claimed": claimed, "created": created})
            case SuccessorAction.SEND_FAILED:
                await self._send(FromSuccessor.FAILED, {"error": self.reason})
            case SuccessorAction.OPEN:
                self._restore_stderr()
                async with self.generation.gate_lock:
                    # What was created here, also where the task that will accept has not had its turn yet.
                    self.generation.plane.registry.start_listening()
                    await self.generation.plane.gate.open()
                self._opened_at = time.monotonic()
                self.post(SuccessorEvent.OPENED)
            case SuccessorAction.SEND_SERVING:
                await self._send(FromSuccessor.SERVING, {"opened_at": self._opened_at})
            case SuccessorAction.SEND_SETTLE:
                await self._send(FromSuccessor.SETTLE)
            case SuccessorAction.SEND_STOPPING:
                await self._send(FromSuccessor.STOPPING)

    # How it is done

    async def _send(self, message: FromSuccessor, body: Mapping[str, Any] | None = None) -> None:
        try:
            await self._channel.send(message, body)
        except ChannelError as error:
            # Whether that is a death or a fault, the listener finds out and posts.
            self.generation.log.debug("%s was not sent: %s", message, error)

    async def _say_hello(self) -> None:
        pidfd = os.pidfd_open(os.getpid())
        counters = os.memfd_create("ecdysis-counters", os.MFD_CLOEXEC)
        try:
            os.ftruncate(counters, COUNTERS.size)
            self.generation.plane.tracker.share(memoryview(mmap.mmap(counters, COUNTERS.size)).cast("Q"))
            body = {"versions": list(VERSIONS), "pid": os.getpid()}
            await self._channel.send(FromSuccessor.HELLO, body, [pidfd, counters])
        finally:
            os.close(pidfd)
            os.close(counters)

    def _take_over(self, frame: Frame) -> None:
        generation, body = self.generation, frame.body
        sockets, ancestors = body["sockets"], body["ancestors"]
        if len(frame.descriptors) != 2 + len(sockets) + 2 * len(ancestors):
            frame.close()
            raise GarbledFrame(f"{len(frame.descriptors)} descriptors do not match the {len(sockets)} sockets named")
        descriptors = iter(frame.descriptors)
        peer = Peer(self._channel, next(descriptors))
        self._stderr = next(descriptors)
        generation.plane.registry.inherit(sockets, [next(descriptors) for _ in sockets])
        self._inherited = len(sockets)
        for ancestor in ancestors:
            channel = Channel(socket.socket(fileno=next(descriptors)))
            generation.lineage.ancestors.append(
                Ancestor(int(ancestor["generation"]), int(ancestor["pid"]), Peer(channel, next(descriptors)))
            )
        generation.number = int(body["generation"])
        generation.log = Numbered(generation.number)
        generation.env_file_keys = tuple(body["env_file_keys"])
        self.restart_id = str(body["restart"])
        self.predecessor = Ancestor(int(body["predecessor"]["generation"]), int(body["predecessor"]["pid"]), peer)

    def _restore_stderr(self) -> None:
        """Put the service's real stderr in the place of the predecessor's pipe, which breaks when that one leaves."""
        if self._stderr < 0:
            return
        # Unless the application has pointed it elsewhere by now.
        if self._stderr_pipe is not None and _identity(2) == self._stderr_pipe:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None: nothing is buffered
                sys.stderr.flush()
            os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._stderr = -1


_REASONS: Final = {
    SuccessorEvent.ABORT: "the predecessor called it off",
    SuccessorEvent.STOP: "the service is being stopped",
    SuccessorEvent.STOP_HERE: "this process was told to stop before it served",
    SuccessorEvent.TIMED_OUT: "the predecessor does not answer",
    SuccessorEvent.BROKEN: "the predecessor's channel is broken",
}


def _as_channel_error(error: Exception, frame: Frame) -> ChannelError:
    if isinstance(error, ChannelError):
        return error
    garbled = GarbledFrame(f"the message {frame.type!r} is not what it should be: {error!r}")
    garbled.__cause__ = error
    return garbled


def _duplicate_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:  # a daemon that has closed it
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
