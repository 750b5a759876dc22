"""The predecessor's side of a restart, carried out: the successor's process, the frames to it, and its end."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import signal
import socket
import struct
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import anyio

from ecdysis_async._ipc.channel import Channel, Frame
from ecdysis_async._ipc.peer import Death, Peer
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._system.history import Note, history
from ecdysis_async._system.launch import Launch, describe_launch
from ecdysis_async._system.process import Child, Spawner, spawn
from ecdysis_async._system.release import describe_release
from ecdysis_async._system.signals import catches
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async._system.trace_context import add_resource, trace_contexts
from ecdysis_async._system.whereabouts import find_place, leave_application
from ecdysis_async._system.wording import name_setting
from ecdysis_async.errors import (
    ChannelError,
    GarbledFrame,
    RestartError,
    RolledBack,
    StashFailed,
    SuccessorFailed,
)
from ecdysis_async.report import Outcome, Phase, RestartReport

from .ancestors import STOPPED, beyond
from .failures import PHASES, Failure, explain, record
from .generation import Generation
from .protocol import (
    DrainMessage,
    FromPredecessor,
    PredecessorAction,
    PredecessorEvent,
    PredecessorState,
    Timer,
    choose_version,
    predecessor_event,
    step_predecessor,
)
from .provision import Provision
from .side import HandoffSide, as_channel_error
from .stash import At, Batch
from .successor_process import SuccessorProcess
from .verdict import describe_verdict

__all__ = ["PredecessorSide", "make_restart_id"]

# Limits of waits that no setting is worth: each is far more than a healthy process needs, seconds.
PAUSE_SECONDS = 10.0
SERVING_SECONDS = 30.0
# How long to wait for what is on its way here already.
FORESEE_SECONDS = 0.01
# How long to wait where accepting again failed, for want of descriptors most likely.
RESUME_PAUSE_SECONDS = 0.2

_OUTCOMES: Final = {
    PredecessorState.PROBATION: Outcome.SERVING,
    PredecessorState.SETTLED: Outcome.SETTLED,
    PredecessorState.FAILED: Outcome.FAILED,
    PredecessorState.ROLLED_BACK: Outcome.ROLLED_BACK,
    PredecessorState.STOPPED: Outcome.STOPPED,
}


def make_restart_id() -> str:
    """Return what names a restart in logs, reports and questions for its verdict."""
    return uuid.uuid4().hex[:12]


class PredecessorSide(HandoffSide[PredecessorState, PredecessorEvent, PredecessorAction]):
    """One restart, as the generation that was asked for it carries it out.

    It is long, because each event and each action of the machine has its lines here, and all share what is known of one
    restart. What needs less than that stands in ``provision.py``, ``failures.py`` and
    ``successor_process.py``.

    Args:
        generation: the predecessor.
        on_change: called after each change of the state.
        spawner: who brings the successor, where it is not started in the way of this generation.
        number: the successor's, where it is not the next one: a worker may be replaced within one generation.
        probation: how long the successor can be called back, seconds; None: as long as the settings say.
        restart: the id of the restart that it belongs to; None: it is a restart of its own; empty: it belongs to none.
        asked_by: who has asked for it, in words.
        title: what the log calls it, where it is no restart but a start.

    Attributes:
        report: what stands so far.
        error: why there is no successor, once it failed.
        successor_work: what a successor had done that was rolled back: requests, and closed connections.
        is_called_off: whether it failed because nobody wanted it any more.
        serving: set when the successor serves; not set where it never did.
        published: set when the successor has settled on its side, and its pid file names it.
    """

    timed_out = PredecessorEvent.TIMED_OUT
    failed = PredecessorEvent.BROKEN

    def __init__(
        self,
        generation: Generation,
        on_change: Callable[[PredecessorSide], None],
        *,
        spawner: Spawner | None = None,
        number: int | None = None,
        probation: float | None = None,
        restart: str | None = None,
        asked_by: str = "",
        title: str | None = None,
    ) -> None:
        super().__init__(PredecessorState.SPAWNING, step_predecessor, generation)
        settings = generation.settings
        self.limits = {
            Timer.READY: settings.ready_timeout,
            Timer.PAUSE: PAUSE_SECONDS,
            Timer.SERVING: SERVING_SECONDS,
            Timer.PROBATION: settings.probation if probation is None else probation,
        }
        self.report = RestartReport(
            id=restart or make_restart_id(),
            generation=generation.number + 1 if number is None else number,
            predecessor_pid=os.getpid(),
            started_at=time.time(),
            asked_by=asked_by,
        )
        # What is written here belongs to this restart; other lines of this process may not.
        self.log = generation.log.of(self.report.id if restart is None else restart)
        self._title = title or ("the restart" if restart is None else "the part of this worker")
        self._who = title or "the successor"
        # Of a part of something bigger, that tells itself how it begins and ends.
        self._level = logging.INFO if restart is None else logging.DEBUG
        self.error: RestartError | None = None
        self.is_called_off = False
        self.successor_work = (0, 0)
        self.serving = anyio.Event()
        self.published = anyio.Event()
        self.unclaimed: list[Entry] = []
        # How many generations the successor lets drain.
        self._max_draining = settings.max_draining
        self._on_change = on_change
        self._entered = time.monotonic()
        self._paused_at = math.nan
        # None: this process starts the successor itself.
        self._spawner = spawner
        self._launch: Launch | None = None
        self._provision = Provision(generation, self.report.generation, self.log.restart)
        self._successor: SuccessorProcess | None = None
        # Whether the successor has said that it fails.
        self._has_failed = False
        self._gone = anyio.Event()
        # It is cleared while this side is to accept again and does not yet.
        self._resumed = anyio.Event()
        self._resumed.set()
        self._greeted = anyio.Event()
        self._prepared = anyio.Event()
        self._stash = Batch()
        # Cancelled as soon as the restart does not need any more what is being made.
        self._making = anyio.CancelScope()

    # What the supervisor asks

    @property
    def committed(self) -> bool:
        """Whether the successor was told to accept: from then on the restart cannot be called off any more."""
        return self.state not in (
            PredecessorState.SPAWNING,
            PredecessorState.INITIALISING,
            PredecessorState.PAUSING,
            PredecessorState.ABORTING,
            PredecessorState.STOPPING,
            PredecessorState.FAILED,
        )

    @property
    def successor_is_dead(self) -> bool:
        """Whether the successor has ended, or there never was one."""
        return self._successor is None or self._successor.is_dead()

    async def run(self) -> None:
        """Carry the restart out, to its very end: after it has settled, until the successor ends or this is cancelled.

        Never raises what went wrong with the successor: that stands in ``error``.
        """
        log, report = self.log, self.report
        if log.restart:
            history.write_from_now_on()
        history.note(
            Note.HANDOFF,
            restart=report.id,
            title=self._title,
            is_restart=bool(self.log.restart),
            former=self.generation.number,
            generation=report.generation,
        )
        log.log(
            self._level,
            "%s begins, asked for by %s: from generation %d (%s) to generation %d",
            self._title,
            report.asked_by or "this process",
            self.generation.number,
            describe_release(),
            report.generation,
        )
        try:
            await self._run()
        except Exception:
            # A defect of this library, or a machine in distress: it may cost the restart, never the service.
            log.exception("%s broke down", self._title)
            with anyio.CancelScope(shield=True):
                await self._break_off()
        finally:
            self._close()

    async def _run(self) -> None:
        try:
            await self._start()
        except RestartError as error:
            self.state = PredecessorState.FAILED
            self._fail(error, Phase.START)
            self._note_outcome()
            self._tell_end()
            return
        successor = self._running
        async with anyio.create_task_group() as task_group:
            self._tasks = task_group
            task_group.start_soon(self._listen, successor.peer)
            task_group.start_soon(successor.stderr.run)
            if self.generation.stashes.names(At.START):
                task_group.start_soon(self._prepare)
            else:
                self._prepared.set()
            await self.advance()
            if self.state in (PredecessorState.FAILED, PredecessorState.ROLLED_BACK):
                await successor.stderr.pass_rest_on()
            else:
                # Its zombie is this process' to reap, even if the successor's own successor lets it go before this
                # process has drained. The newest generation by then shares the channel, and is still heard
                # (DrainMessage.HURRY).
                await successor.process.wait()
                await self._gone.wait()
            task_group.cancel_scope.cancel()

    async def _break_off(self) -> None:
        """End a restart that cannot go on, so that this side accepts again wherever nobody else may."""
        if self.state in (PredecessorState.SETTLED, PredecessorState.STOPPED):
            # The service is the successor's, or nobody's; the end of this process tells it what is left to be told.
            return
        if self._successor is not None:
            await self._successor.kill()
        is_over = self.state.final
        if not is_over:
            # First, so that a stop is heard while this side cannot accept yet: a restart that is over delays none.
            kind, self.state = (
                (RolledBack, PredecessorState.ROLLED_BACK)
                if self.committed
                else (SuccessorFailed, PredecessorState.FAILED)
            )
            self.report.outcome = Outcome.ROLLED_BACK if kind is RolledBack else Outcome.FAILED
            self._fail(kind("the restart broke down in this process; its log has the traceback"), None)
            self._tell_end()
        if self.state in (PredecessorState.FAILED, PredecessorState.ROLLED_BACK):
            await self._resume()
        if not is_over:
            self._on_change(self)

    async def let_go(self) -> None:
        """Let a successor that has settled be a child of systemd; it is watched as before."""
        if self._successor is not None:
            await self._successor.process.let_go()

    def refuse(self, error: RestartError) -> None:
        """Let it fail before anything has begun."""
        self.state = PredecessorState.FAILED
        self._fail(error, None)
        self._tell_end()
        self.over.set()

    @property
    def successor_died(self) -> anyio.Event:
        """Set when the successor is dead; there must have been one."""
        return self._running.peer.died

    async def tell(
        self, message: DrainMessage, body: Mapping[str, Any], descriptors: Sequence[int] = (), *, timeout: float = 2
    ) -> None:
        """Tell the successor how the drain goes; it may be gone, or busy, and then it is not told."""
        if self._successor is None:
            return
        try:
            await self._successor.peer.channel.send(message, body, descriptors, timeout=timeout)
        except ChannelError as error:
            self.log.debug("the successor was not told of the drain: %s", error)

    def pass_signal_on(self, number: signal.Signals) -> bool:
        """Send the successor a signal that was meant for the service, if it has a handler for it; say whether."""
        pid = self.report.successor_pid
        return (
            self._successor is not None
            and pid is not None
            and not self._successor.is_dead()
            and catches(pid, number)
            and self._successor.peer.send_signal(number)
        )

    def duplicate_channel(self) -> socket.socket | None:
        """Return another socket for the channel to the successor, by which a last word can be said, if there is one.

        Raises:
            OSError: there is no descriptor for it.
        """
        return self._successor.peer.channel.duplicate() if self._successor is not None else None

    # What happens

    async def _listen(self, peer: Peer) -> None:
        await peer.run(self._deliver)
        # The successor is dead. Its own successor has the other end as well, and may have to tell this one to hurry.
        with contextlib.suppress(ChannelError):
            while True:
                self._deliver(await peer.receive())
        self._gone.set()

    def _deliver(self, item: Frame | ChannelError | Death) -> None:
        match item:
            case Death():
                self.post(PredecessorEvent.DIED)
            case ChannelError():
                self.post(PredecessorEvent.BROKEN, item)
            case Frame(type=DrainMessage.PUBLISHED):
                item.close()
                self.published.set()
            case Frame(type=DrainMessage.HURRY):
                item.close()
                why = (
                    ("the service is to stop at once", "")
                    if item.body.get("why") == STOPPED
                    else ("too many generations drain", f" ({name_setting('max_draining')})")
                )
                self.log.warning(
                    "%s: the deadline of this one is now%s; open connections: %d",
                    *why,
                    self.generation.host.connections,
                )
                self.generation.host.hurry()
            case Frame(type=DrainMessage.REOPEN_LOGS):
                item.close()
                self._tasks.start_soon(self.generation.reopen_logs, str(item.body.get("request", "")))
            case Frame():
                history.note(Note.GOT, restart=self.report.id, message=item.type, peer=self.report.successor_pid)
                try:
                    event = self._read(item)
                    if event is PredecessorEvent.HELLO:
                        self._greeted.set()
                    if event is not PredecessorEvent.HELLO or self._prepared.is_set():
                        self.post(event, item)
                except (ChannelError, KeyError, OverflowError, TypeError, ValueError) as error:
                    item.close()
                    self.post(PredecessorEvent.BROKEN, as_channel_error(error, item))

    def _read(self, frame: Frame) -> PredecessorEvent:
        """Check what came before it counts. A successor may be of an older or a newer release."""
        event = predecessor_event(frame.type)
        self._has_failed |= event is PredecessorEvent.FAILED
        if event is PredecessorEvent.HELLO:
            if self._running.is_known:
                raise GarbledFrame("the successor said HELLO twice")
            choose_version(frame.body)
            self.report.successor_pid = int(frame.body["pid"])
            self._provision.is_known = bool(frame.body.get("provision"))
            pidfd, counters = frame.descriptors
            self._running.know(pidfd, counters)
            return event
        if frame.descriptors:
            raise GarbledFrame(f"{frame.type!r} came with descriptors")
        if event is PredecessorEvent.READY:
            self._running.stderr.stop()
            claimed = {int(index) for index in frame.body["claimed"]}
            self.report.created = [str(name) for name in frame.body["created"]]
            self.report.inherited = [
                entry.name for index, entry in enumerate(self._provision.entries) if index in claimed
            ]
            self.unclaimed = [entry for index, entry in enumerate(self._provision.entries) if index not in claimed]
            # A release that does not say it has the limit that this one has.
            self._max_draining = int(frame.body.get("max_draining", self._max_draining))
            self.report.unclaimed = [entry.name for entry in self.unclaimed]
            self.report.release = str(frame.body.get("release", ""))
        elif event is PredecessorEvent.SERVING:
            self.report.accept_gap = max(0.0, float(frame.body["opened_at"]) - self._paused_at)
        return event

    async def before_event(self, event: PredecessorEvent, cause: object) -> bool:
        if event is PredecessorEvent.DIED:
            await self._running.collect_exit()
        elif event is PredecessorEvent.TIMED_OUT and self.state in (
            PredecessorState.SPAWNING,
            PredecessorState.INITIALISING,
        ):
            if self.report.successor_pid is not None:
                await self._running.learn_where_it_stands(self.report.successor_pid)
                if stood := leave_application(self._running.stacks):
                    self.log.warning("where pid %d stands now:\n%s", self.report.successor_pid, stood)
        elif event is PredecessorEvent.FAILED and self.state is not PredecessorState.STOPPING:
            self._running.stderr.read_rest()
        elif self.state is PredecessorState.PROBATION and event in (
            PredecessorEvent.TIMED_OUT,
            PredecessorEvent.SETTLE,
        ):
            # Never settle on a successor that is dead, or has just said that it fails: this side could not take over
            # again. Its death, or its word, is on its way here.
            peer = self._running.peer
            if peer.is_dead() or peer.has_news():
                await anyio.sleep(FORESEE_SECONDS)
                if event is PredecessorEvent.SETTLE:
                    # Asked for once, where the timer would come again; behind the news, which may make it void.
                    self.post(event, cause)
                return False
        return True

    def changed(self, before: PredecessorState, event: PredecessorEvent, cause: object) -> None:
        if self.state is before:
            return
        phase = PHASES.get(before)
        # Take the system's clock: uvloop's stands still within one turn, and counts whole milliseconds.
        now = time.monotonic()
        if phase is not None:
            self.report.phases[phase] = now - self._entered
        self._entered = now
        self._making.cancel()
        failed = (
            PredecessorState.ABORTING,
            PredecessorState.RECALLING,
            PredecessorState.REVERTING,
            PredecessorState.FAILED,
            PredecessorState.ROLLED_BACK,
        )
        if self.state in failed and self.error is None:
            self.is_called_off = event is PredecessorEvent.CANCELLED
            self._fail(explain(self._describe_failure(before, event, cause)), phase)
        # One that has returned serves what it has accepted to the end.
        if self.state is PredecessorState.ROLLED_BACK and event is not PredecessorEvent.RETURNED:
            try:
                self.report.lost = self._running.read_open_connections()
                self.successor_work = self._running.read_work()
            except (OSError, struct.error) as error:
                self.log.warning("what the successor had accepted cannot be read: %r", error)
        if self.state is PredecessorState.SETTLED:
            # This generation, which is not among its own ancestors, begins to drain as well.
            hurried = beyond(self.generation.lineage.ancestors, self._max_draining - 1)
            self.report.hurried = [each.describe() for each in hurried if each.connections != 0]
        self.report.outcome = _OUTCOMES.get(self.state, self.report.outcome)
        if event is PredecessorEvent.STOP:
            self.report.outcome = Outcome.STOPPED
        self.log.debug("%s: %s (pid %s)", self._title, self.state.value, self.report.successor_pid)
        if self.state.final:
            self._tell_end()
        if self.state is PredecessorState.SETTLED and self.unclaimed:
            self.log.warning(
                "generation %d did not claim %s: closing what nobody listens on any more",
                self.report.generation,
                ", ".join(entry.name for entry in self.unclaimed),
            )
        history.note(
            Note.STATE,
            restart=self.report.id,
            side="predecessor",
            state=self.state.value,
            event=event.value,
            peer=self.report.successor_pid,
        )
        if self.state.final:
            self._note_outcome()
        self._on_change(self)
        if self.state is PredecessorState.PROBATION:
            self.serving.set()

    async def perform(self, action: PredecessorAction) -> None:
        match action:
            case PredecessorAction.SEND_LISTENERS:
                await self._send_listeners()
            case PredecessorAction.PAUSE:
                self._tasks.start_soon(self._pause)
            case PredecessorAction.RESUME:
                # In a task: where it has to be tried for long, the service can be stopped all the same.
                self._resumed = anyio.Event()
                self._tasks.start_soon(self._resume)
            case PredecessorAction.SEND_COMMIT:
                await self._send(
                    FromPredecessor.COMMIT,
                    {"stash": self._stash.describe(), "counts": self.generation.count()},
                    self._stash.descriptors,
                )
                self._stash.close()
            case PredecessorAction.SEND_SETTLED:
                # The successor hears the ancestors from now on; two readers would tear frames apart.
                ancestors = await self.generation.lineage.let_go()
                await self._send(
                    FromPredecessor.SETTLED,
                    {"report": self.report.to_json(), "ancestors": ancestors, "counts": self.generation.count()},
                )
            case PredecessorAction.SEND_ABORT:
                await self._send(FromPredecessor.ABORT)
            case PredecessorAction.SEND_STOP:
                await self._send(FromPredecessor.STOP)
            case PredecessorAction.SEND_RECALL:
                await self._send(FromPredecessor.RECALL)
            case PredecessorAction.END_SUCCESSOR:
                # A worker's sockets are held by its anchor as well, and it shuts none.
                at_once = self.state is PredecessorState.REVERTING and self._spawner is None
                end = functools.partial(self._running.end, leaves_by_itself=self._has_failed, at_once=at_once)
                self._tasks.start_soon(end)

    # How it is done

    async def _start(self) -> None:
        begun = time.monotonic()
        self._provision.keep_counts()
        if self._spawner is not None:
            # The anchor that starts the successor has the sockets as well, or the successor has started already.
            self._successor = await SuccessorProcess.start(self._spawner)
        else:
            self._successor = await SuccessorProcess.start(self._spawn, self._prepare_spawn)
        self.report.successor_pid = child = self._successor.process.pid
        history.note(Note.SPAWNED, restart=self.report.id, child=child, begun=begun)

    async def _prepare_spawn(self, channel: Channel, stderr: int) -> None:
        settings = self.generation.settings
        # In a thread: looking for files may block.
        launch, self._provision.env_file_keys = await run_in_thread(
            lambda: describe_launch(
                settings.command, settings.environment, settings.env_file, self.generation.env_file_keys
            )
        )
        if trace_contexts.is_wanted:
            facts = {"service__instance__id": uuid.uuid4(), "ecdysis__generation": self.report.generation}
            launch.environment.update(add_resource(launch.environment, **facts))
        self._launch = launch
        self._provision.send_ahead(channel, stderr)

    async def _spawn(self, channel: socket.socket, stderr: int) -> Child:
        launch, lock_file, last_word = self._launch, self.generation.lock_file, self._provision.last_word
        assert launch is not None
        # In a thread: vfork blocks until the exec is done (vfork(2)).
        return await run_in_thread(
            lambda: spawn(
                launch,
                channel,
                stderr,
                is_kept=self.generation.is_supervised,
                lock_file=lock_file.fileno() if lock_file is not None else -1,
                last_word=last_word.descriptor if last_word is not None else -1,
                restart=self.log.restart,
            )
        )

    async def _send(
        self, message: FromPredecessor, body: Mapping[str, Any] | None = None, descriptors: Sequence[int] = ()
    ) -> None:
        """Send, or let a channel that does not carry it be the event that it is."""
        history.note(Note.SENT, restart=self.report.id, message=message.value, peer=self.report.successor_pid)
        try:
            await self._running.peer.channel.send(message, body, descriptors)
        except ChannelError as error:
            self.post(PredecessorEvent.BROKEN, error)

    async def _send_listeners(self) -> None:
        with self._provision.answer(self._stash, self._running.stderr.read_end) as message:
            if message is not None:
                await self._send(FromPredecessor.LISTENERS, *message)
        # The successor has it, and with its end it is gone.
        self._stash.close()

    async def _prepare(self) -> None:
        """Make what the successor finds from its first line on, while it starts; its HELLO counts only then."""
        if await self._make(At.START):
            self._prepared.set()
            if self._greeted.is_set():
                self.post(PredecessorEvent.HELLO)

    async def _make(self, at: At) -> bool:
        """Make what is to be handed over at a moment; False where that moment does not come any more."""
        if self.state not in (PredecessorState.SPAWNING, PredecessorState.PAUSING):
            return False
        self._stash = self.generation.stashes.batch(at)
        self._making = anyio.CancelScope()
        with self._making:
            try:
                await self._stash.make()
            except StashFailed as error:
                self.log.warning("%s", error)
                self.post(PredecessorEvent.BROKEN, error)
            else:
                return True
        self._stash.close()
        return False

    async def _pause(self) -> None:
        unclaimed = set(self.unclaimed)
        try:
            with anyio.CancelScope(shield=True):
                async with self.generation.gate_lock:
                    self._paused_at = time.monotonic()
                    # It may have been resumed, for a successor that died, before this had its turn.
                    if self.state is PredecessorState.PAUSING:
                        await self.generation.host.pause(unclaimed.__contains__)
        except Exception as error:
            self.log.exception("this generation could not stop accepting; the restart is called off")
            self.post(PredecessorEvent.BROKEN, error)
        else:
            # Make it now, when nobody is accepted any more whose changes would be missing in it.
            if await self._make(At.COMMIT):
                self.post(PredecessorEvent.PAUSED)

    async def conclude(self) -> None:
        # The next restart must not begin earlier: this side would open its gate next to the next successor. Where the
        # service stops, no restart follows, and there is nothing to open.
        if self.state is not PredecessorState.STOPPED:
            await self._resumed.wait()
        if self.error is not None:
            self.generation.host.registry.clear_dead_paths()

    async def _resume(self) -> None:
        """Accept again; there is no successor, and nobody else to do it, so it has to work in the end.

        Where the service is stopped meanwhile, the gate has ended, and there is nothing left to open.
        """
        is_said = False
        while True:
            try:
                async with self.generation.gate_lock:
                    await self.generation.host.resume()
            except OSError:
                if not is_said:
                    is_said = True
                    self.log.exception("this generation cannot accept again yet; trying on")
                await anyio.sleep(RESUME_PAUSE_SECONDS)
            else:
                self._resumed.set()
                return

    def _describe_failure(self, before: PredecessorState, event: PredecessorEvent, cause: object) -> Failure:
        is_awaited = before is PredecessorState.PAUSING or self._greeted.is_set()
        written = self._running.stderr.read(without_reason=self._has_failed)
        return Failure(
            before,
            event,
            cause,
            self.report.successor_pid,
            self.limits[before.timer] if before.timer is not None else math.inf,
            self._running.exit_status,
            self._stash.making if is_awaited else None,
            "\n".join(filter(None, (written, leave_application(self._running.stacks)))),
            self._who,
            find_place(self._running.stacks),
        )

    def _tell_end(self) -> None:
        level = self._level
        if self.error is not None and self.report.outcome is not Outcome.STOPPED:
            level = max(level, logging.ERROR) if level > logging.DEBUG else level
        self.log.log(level, "%s %s", self._title, describe_verdict(self.report, self.error, self.generation.number))

    def _fail(self, error: RestartError, phase: Phase | None) -> None:
        self.error = error
        record(error, phase, self.report)

    def _note_outcome(self) -> None:
        error = self.error
        history.note(
            Note.OUTCOME,
            restart=self.report.id,
            report=self.report.to_json(),
            why=str(error.args[0]) if error is not None else None,
            phase=error.phase if error is not None else None,
            stderr=error.stderr if error is not None else "",
            status=self._successor.exit_status if self._successor is not None and self._successor.is_dead() else None,
        )

    @property
    def _running(self) -> SuccessorProcess:
        assert self._successor is not None
        return self._successor

    def _close(self) -> None:
        self._stash.close()
        self._provision.close()
        if self._successor is not None:
            self._successor.close()
        self.over.set()
