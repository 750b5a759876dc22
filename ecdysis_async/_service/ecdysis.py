"""`Ecdysis`: one generation of a service, from its first socket to the last of its connections.

The supervisor connects what the other modules do: sockets, the gate before them, the connections behind it, and the
handoff on both of its sides. It is written on anyio and runs on asyncio, uvloop and trio; what is native to a loop
stands in the data planes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import anyio

from ecdysis_async._accepting import data_plane
from ecdysis_async._accepting.gate import Gate
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._connections.receiver import Receiver
from ecdysis_async._connections.sender import Sender, socketpair
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._handoff import preflight
from ecdysis_async._handoff.ancestors import Ancestor
from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.host import AcceptingHost
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import (
    DrainMessage,
    PredecessorEvent,
    PredecessorState,
    SuccessorEvent,
    SuccessorState,
)
from ecdysis_async._handoff.stash import At, InheritedStash, Producer, Stashes, Version
from ecdysis_async._handoff.successor import SuccessorSide
from ecdysis_async._ipc.worker_link import FromWorker
from ecdysis_async._management.changes import Changes
from ecdysis_async._management.control_path import locate
from ecdysis_async._management.control_server import ControlServer
from ecdysis_async._management.controlled import ControlHandlers, Restart
from ecdysis_async._management.descriptor_store import DescriptorStore
from ecdysis_async._management.pid_file import PidFile
from ecdysis_async._management.status import (
    counted,
    describe_ancestors,
    describe_failed_restart,
    describe_listeners,
    describe_process,
    describe_restart,
    describe_wait,
    report_of,
)
from ecdysis_async._management.systemd import find_systemd
from ecdysis_async._management.systemd_unit import check_unit, find_shortcoming, forbid_restart
from ecdysis_async._management.takeover import ask_for_channel
from ecdysis_async._sockets.registry import Entry, Registry, Until
from ecdysis_async._system.claims import is_check, is_worker, take_activation, take_channel, take_line
from ecdysis_async._system.forking import withholding_from_children
from ecdysis_async._system.process import Spawner, supported
from ecdysis_async._system.signals import SignalReceiver, can_handle_signals, handled_signals, is_handled
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import (
    ChannelError,
    GarbledFrame,
    HandoffAborted,
    NotReady,
    RestartError,
    RestartInProgress,
    RestartUnsupported,
    RestartWhileDraining,
)
from ecdysis_async.report import Outcome, Phase, RestartReport, State
from ecdysis_async.settings import Settings, StrPath, read_signals

from .anchor_client import AnchorClient, WorkerCommands
from .backlogs import Backlogs
from .listeners import Listeners

__all__ = ["Ecdysis", "current", "track", "until_draining"]

T = TypeVar("T")

# How often a draining generation tells the newest one how many connections are left, seconds.
PROGRESS_SECONDS = 1.0

# What a restart asked for during probation waits for the predecessor's word that it will never accept again, seconds.
SETTLE_SECONDS = 10.0

# How long the predecessor waits for the word that the successor's pid file is in place, seconds.
PUBLISH_SECONDS = 5.0

# How often systemd is told the number of connections, seconds.
STATUS_SECONDS = 5.0

# What a restart may take at most besides ready_timeout and probation, and a stop besides drain_timeout, seconds.
LEEWAY_SECONDS = 60.0

# How long the connections of "exit" listeners get once everything else has drained, seconds.
EXIT_SECONDS = 1.0


_current: Ecdysis | None = None


def current() -> Ecdysis:
    """Return the ``Ecdysis`` of this process, for an admin endpoint or a handler.

    Raises:
        LookupError: there is none now.
    """
    if _current is None or _current.pid != os.getpid():
        raise LookupError("no Ecdysis runs in this process: enter `async with Ecdysis() as ecdysis:` first")
    return _current


def until_draining(awaitable: Awaitable[T]) -> Coroutine[Any, Any, T]:
    """Await something at a safe point of this process' :class:`Ecdysis`; see :meth:`Ecdysis.until_draining`."""
    return current().until_draining(awaitable)


def track() -> AbstractAsyncContextManager[None]:
    """Let the drain of this process' :class:`Ecdysis` wait for work; see :meth:`Ecdysis.track`."""
    return current().track()


class Ecdysis(Listeners):
    """One generation of a service that restarts without losing a connection.

    Enter it with ``async with``; one per process. All times are in seconds.

    Args:
        ready_timeout: how long a successor may take from its start to ``ready()``.
        drain_timeout: how long connections may take to finish once this generation leaves.
        probation: how long a successor has to serve before a restart is final; until then its death undoes it.
        max_draining: how many old generations may drain at once; beyond it the oldest one's deadline is now.
        restart_signals: signals that restart the service.
        stop_signals: signals that stop it; a second one makes the drain's deadline now.
        pid_file: names the process that serves; written atomically, moved when a restart has settled.
        control_socket: where `ecdysis restart`, `stop` and `status` reach this service: a path whose directory is the
            service's own, or a bare name in the default directory, where they find it by themselves.
        systemd: whether to speak to systemd, and to take the sockets it has passed; None: if it started this process
            with NOTIFY_SOCKET (Type=notify), or with sockets; True: NOTIFY_SOCKET must be there; False: never.
        takeover: the control socket of a running service, of which this process takes the sockets over as if that
            one had started it. A successor of this process, whose sockets come from its predecessor, ignores it.
        command: the successor's command line; the one of this process where it is None.
        environment: the successor's complete environment; that of this process where it is None.
        env_file: a file of KEY=VALUE lines, read afresh at each restart, on top of the environment. A variable whose
            line has gone is gone as well, unless ``environment`` has it.

    Raises:
        ValueError, TypeError: a setting that could not work.
    """

    def __init__(
        self,
        *,
        ready_timeout: float = 60,
        drain_timeout: float = 30,
        probation: float = 5,
        max_draining: int = 3,
        restart_signals: Collection[int] = Settings().restart_signals,
        stop_signals: Collection[int] = Settings().stop_signals,
        pid_file: StrPath | None = None,
        control_socket: StrPath | None = None,
        systemd: bool | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        env_file: StrPath | None = None,
        takeover: StrPath | None = None,
    ) -> None:
        self._settings = Settings(
            ready_timeout=ready_timeout,
            drain_timeout=drain_timeout,
            probation=probation,
            max_draining=max_draining,
            restart_signals=read_signals(restart_signals),
            stop_signals=read_signals(stop_signals),
            pid_file=Path(pid_file) if pid_file is not None else None,
            command=command if isinstance(command, str) or command is None else tuple(command),  # type: ignore[arg-type]
            environment=dict(environment) if environment is not None else None,
            env_file=Path(env_file).absolute() if env_file is not None else None,
        )
        self.pid = os.getpid()
        self._begun = time.monotonic()
        # Of a worker only the anchor is known to systemd.
        self._systemd = find_systemd(False if is_worker() else systemd)
        self._takes_activation = systemd is not False
        self._store = DescriptorStore(self._systemd, os.environ.get("FDSTORE", ""))
        # Why a restart would end the systemd unit that this process is in, if it would.
        self._unit_end: str | None = None
        self._control_path = locate(control_socket) if control_socket is not None else None
        self._takeover_path = locate(takeover) if takeover is not None else None
        self._control: ControlServer | None = None
        self._state = State.STARTING
        self._entered: Generation | None = None
        self._registry = Registry()
        self._gate = Gate()
        self._tracker = Tracker()
        self._stashes = Stashes()
        self._stashes.keep = self._store.keep
        self._inherited_stash = InheritedStash()
        self._inheritance: SuccessorSide | None = None
        self._handover: PredecessorSide | None = None
        self._anchor_client: AnchorClient | None = None
        self._last_report: RestartReport | None = None
        self._pid_file = PidFile(self._settings.pid_file) if self._settings.pid_file is not None else None
        self._signals: SignalReceiver | None = None
        # Whether this generation was ever to accept, once it leaves.
        self._has_served = False
        self._stopping = False
        self._stops_partially = False
        self._failure: str | None = None
        self._stop_signals = 0
        # On the loop's clock, for those who ask: since when a restart is in its state, and until when a drain may last.
        self._phase_begun = 0.0
        self._drain_deadline: float | None = None

    # What it is

    @property
    def state(self) -> State:
        """Where this generation stands."""
        return self._state

    @property
    def generation(self) -> int:
        """The number of this generation; the first one is 1."""
        return self._generation.number

    @property
    def is_successor(self) -> bool:
        """Whether this process was started by a restart."""
        return self._inheritance is not None

    @property
    def predecessor_pid(self) -> int | None:
        """The process that this one follows, whether or not it is still there."""
        if self._inheritance is None or self._inheritance.predecessor is None:
            return None
        return self._inheritance.predecessor.pid

    @property
    def draining(self) -> anyio.Event:
        """An event to await: this generation leaves, and each reply from then on should say goodbye.

        Ask ``draining.is_set()`` before the reply is sent, and put the goodbye into it: after a reply without one, the
        client's next request may be on its way.
        """
        return self._tracker.draining

    @property
    def drain_timeout(self) -> float:
        """How long connections may take to finish once this generation leaves, in seconds."""
        return self._settings.drain_timeout

    @property
    def connections(self) -> int:
        """How many connections, and pieces of tracked work, this generation has at this moment."""
        return len(self._tracker.connections())

    @property
    def draining_generations(self) -> tuple[Ancestor, ...]:
        """The older generations that are still there, and how many connections they have left."""
        return tuple(self._generation.lineage.ancestors)

    @property
    def last_report(self) -> RestartReport | None:
        """The last restart that this generation was asked for, or else the one that it came from."""
        return self._last_report

    # The block

    def _require_entered(self) -> Generation:
        if self._entered is None:
            raise RuntimeError("this Ecdysis was not entered: do this inside `async with Ecdysis() as ecdysis:`")
        return self._entered

    @property
    def _generation(self) -> Generation:
        return self._require_entered()

    @property
    def _plane(self) -> data_plane.DataPlane:
        self._require_entered()
        return self._data_plane

    async def __aenter__(self) -> Self:
        global _current
        if self._state is not State.STARTING or self.pid != os.getpid():
            raise RuntimeError("an Ecdysis is entered once, in the process that made it: make a new one")
        if is_check():
            # What it would serve, only its run would tell.
            await preflight.tell(take_channel(), preflight.describe_release(None, os.environ))
            raise SystemExit(0)
        self._finished = anyio.Event()
        self._leaving = anyio.Event()
        self._drained = anyio.Event()
        self._inherited = anyio.Event()
        # Cancelled where this generation is not to serve any more: the supervisor's own tasks see to the rest.
        self._body = anyio.CancelScope()
        self._tracker.draining = anyio.Event()
        self._changes = Changes()
        self._resources = ExitStack()
        self._task_group = anyio.create_task_group()
        self._data_plane = plane = data_plane.DataPlane(self._registry, self._gate, self._tracker, self._task_group)
        self._entered = Generation(
            1,
            self._settings,
            AcceptingHost(plane),
            GenerationLog(1),
            is_supervised=self._systemd.is_there,
            stashes=self._stashes,
            inherited_stash=self._inherited_stash,
        )
        self._backlogs = Backlogs(self._entered, plane, self._store)
        data_plane.activate(plane)
        _current = self
        try:
            self._resources.callback(self._systemd.close)
            self._resources.callback(self._store.close)
            self._resources.callback(self._registry.close, unlink=False)
            self._resources.enter_context(
                withholding_from_children(lambda: [entry.sock for entry in self._registry.entries])
            )
            self._resources.callback(self._generation.lineage.close)
            if (line_to_anchor := take_line()) is not None:
                self._report_for_duty(line_to_anchor)
            sock = take_channel()
            is_child = sock is not None
            if sock is None and self._takeover_path is not None:
                sock = await run_in_thread(functools.partial(ask_for_channel, self._takeover_path))
            if sock is not None:
                self._inheritance = SuccessorSide(
                    sock, self._generation, plane, self._on_inheritance, is_child=is_child
                )
                self._resources.callback(self._inheritance.close)
                await self._inheritance.greet()
                self._store.inherit(self._registry.entries)
            elif self._takes_activation:
                self._registry.activate(self._store.recover(take_activation(), self._registry))
                self._recover_state()
                self._unit_end = forbid_restart()
                if (complaint := check_unit()) is not None:
                    self._generation.log.warning("%s", complaint)
            if self._control_path is not None:
                self._control = ControlServer(self._control_path, plane, self._controlled())
                self._resources.callback(self._control.close)
                await self._control.open()
            self._install_signals()
            await self._task_group.__aenter__()
        except BaseException:
            self._vacate()
            raise
        self._registry.on_release = self._park
        self._task_group.start_soon(self._drain_when_leaving)
        if self._signals is not None:
            self._task_group.start_soon(self._signals.run)
        if self._anchor_client is not None:
            self._task_group.start_soon(self._anchor_client.run)
        if self._systemd.is_there:
            self._task_group.start_soon(self._systemd.run)
            self._task_group.start_soon(self._tell_status)
            if self._inheritance is None:
                self._task_group.start_soon(self._check_systemd)
        if self._inheritance is not None:
            self._task_group.start_soon(self._inherit, self._inheritance)
        if not is_child:
            # Also a newcomer: where there is a systemd, this is the main process of a unit of its own.
            self._systemd.begin()
            self._systemd.ask_for_time(self._settings.ready_timeout)
            # If this start cannot cope with it, the next one does without.
            self._store.drop()
        if self._control is not None:
            self._task_group.start_soon(self._control.run)
        self._body.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        cancelled: BaseException | None = None
        try:
            is_cut_short = self._body.__exit__(kind, error, trace)
            if is_cut_short:
                kind = error = trace = None
            try:
                if self._task_group.cancel_scope.cancel_called:
                    # One of the supervisor's tasks has failed, and its exception says why.
                    self._tracker.hurry()
                    self._leave()
                else:
                    cancelled = await self._leave_whatever_comes(error)
            finally:
                self._task_group.cancel_scope.cancel()
                try:
                    await self._task_group.__aexit__(kind, error, trace)
                except BaseExceptionGroup as group:
                    # The body's own exception goes its own way, as itself; what else there is is the supervisor's.
                    others = [each for each in group.exceptions if each is not error]
                    if error is None or others:
                        raise others[0] if len(others) == 1 else group from error
        finally:
            self._state = State.ENDED
            self._vacate()
        if error is not None:
            return False
        if cancelled is not None:
            raise cancelled
        if self._aborted:
            assert self._inheritance is not None
            summary = self._inheritance.summary
            raise HandoffAborted(f"ecdysis: this generation leaves without having served: {summary}")
        return is_cut_short

    async def _leave_whatever_comes(self, error: BaseException | None) -> BaseException | None:
        """Leave in a task of its own, which no cancellation of this one cuts short; return the last such."""
        left = anyio.Event()

        async def leave() -> None:
            try:
                with anyio.CancelScope(shield=True):
                    await self._leave_block(error)
            finally:
                left.set()

        cancelled: BaseException | None = None
        self._task_group.start_soon(leave)
        while not left.is_set():
            try:
                with anyio.CancelScope(shield=True):
                    await left.wait()
            except anyio.get_cancelled_exc_class() as cancellation:
                # asyncio's own, which knows no shield: whoever sends it has no time for the whole drain.
                cancelled = cancellation
                self._tracker.hurry()
        return cancelled

    def _vacate(self) -> None:
        global _current
        _current = None
        data_plane.deactivate()
        self._inherited_stash.clear()
        self._resources.close()

    @property
    def _aborted(self) -> bool:
        return self._inheritance is not None and self._inheritance.state is SuccessorState.ABORTED

    @property
    def _has_successor(self) -> bool:
        """Whether a successor goes on with what this generation leaves."""
        return self._handover is not None and self._handover.report.outcome is Outcome.SETTLED

    async def _leave_block(self, error: BaseException | None) -> None:
        """Bring everything to its end that this block has begun."""
        log = self._generation.log
        orderly = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        if not orderly:
            self._failure = f"generation {self.generation} has failed: {error!r}"
            self._systemd.tell_status(self._failure)
            if error is not None:
                self._systemd.tell_failure(error)
        has_served = self._state not in (State.STARTING, State.WAITING)
        if not has_served and orderly:
            log.warning("the block is left without ready(): nothing was ever accepted")
        if self._inheritance is not None and not self._inheritance.state.final:
            self._inheritance.post(SuccessorEvent.STOP_HERE if orderly else SuccessorEvent.FAILED, error)
            await self._inheritance.over.wait()
        if not orderly and (self._aborted or not isinstance(error, Exception)):
            # Cancelled, interrupted, or failed on probation: then the predecessor waits for this process' death.
            self._tracker.hurry()
        await self._let_handover_end()
        self._leave()
        await self._drained.wait()
        if self._handover is not None:
            await self._handover.over.wait()
        if self._has_successor and self._systemd.is_there:
            await self._main_named.wait()
        elif self._systemd.is_main:
            await self._outlive_others()
        if self._pid_file is not None:
            discard = self._pid_file.discard if self._aborted or self._has_successor else self._pid_file.remove
            await run_in_thread(discard)
        if self._aborted or not has_served:
            # The predecessor serves on what it handed down, or the next start on what a crash has left; what was made
            # here goes.
            for entry in self._registry.entries:
                self._registry.release(entry, unlink=not entry.inherited)
        else:
            if not self._has_successor:
                # Nobody can come to these any more, whatever systemd does next.
                if orderly:
                    self._store.drop()
                self._store.park(entry for entry in self._registry.entries if entry.inode is None)
            self._registry.close(unlink=not self._has_successor)
        if self._control is not None:
            await self._control.finish()
        if self._systemd.is_main:
            await self._systemd.synchronize()
        if self._anchor_client is not None:
            await self._anchor_client.flush()
        log.info("this generation ends")

    async def _let_handover_end(self) -> None:
        """See a restart through that is under way while the body leaves: call it off, or let it settle."""
        handover = self._handover
        if handover is None or handover.state.final or self._state is State.DRAINING:
            return
        if not handover.committed:
            handover.post(PredecessorEvent.CANCELLED)
        else:
            await _first(handover.serving, handover.over)
            handover.post(PredecessorEvent.SETTLE)
        await handover.over.wait()

    # Serving

    async def ready(self) -> None:
        """Announce that this generation is ready; return when it accepts.

        In the first generation that is at once, in a successor after the predecessor's commit. Calling it again
        does nothing.

        Raises:
            OSError: a socket cannot listen, or the pid file cannot be written.
            RuntimeError: the block was not entered.
        """
        self._require_entered()
        if self._state is not State.STARTING:
            return
        if self._pid_file is not None:
            await run_in_thread(self._pid_file.prepare)
        if self._inheritance is not None:
            self._state = State.WAITING
            if self._anchor_client is not None:
                self._anchor_client.share_created()
                # Before the rest, so that the anchor, which says it once for all workers, has it when it serves.
                self._anchor_client.tell(FromWorker.DESCRIPTION, {"text": self._describe_serving()})
            self._inheritance.post(SuccessorEvent.READY)
            await self._inheritance.opened.wait()
            if self._aborted:
                # The body is being cancelled; but a task that was woken before gets one more turn on asyncio.
                await anyio.sleep_forever()
            self._log_serving()
            self._tell_serving()
            return
        async with self._generation.gate_lock:
            # Also where the task that will accept has not had its turn yet, which on trio is a matter of chance: who
            # hears "ready" connects at once, and was refused.
            self._registry.start_listening()
            # Wholly, also for a stop at this moment, which cancels the body: the drain begins where this has ended.
            with anyio.CancelScope(shield=True):
                await self._gate.open()
        # Before the pid file, which takes a thread: who waited in the queue may ask for a restart by now.
        if self._state is State.STARTING:
            self._state = State.SERVING
            self._announce()
        if self._pid_file is not None:
            await run_in_thread(self._pid_file.publish)
        self._log_serving()
        for entry in self._registry.unclaimed():
            if entry.number is None:
                self._generation.log.warning("nobody asks for %s, which systemd has kept: closing it", entry)
            else:
                self._generation.log.warning("systemd has passed %s, and nobody asks for it: clients wait there", entry)
        self._registry.close_unclaimed(unlink=True)
        self._park()
        self._tell_serving()

    def _log_serving(self) -> None:
        level = logging.INFO if self._anchor_client is None else logging.DEBUG
        self._generation.log.log(level, "%s", self._describe_serving())

    def _describe_serving(self) -> str:
        return f"serving on {', '.join(map(str, self._registry.entries)) or 'nothing'}"

    async def finished(self) -> None:
        """Return when this generation shall leave: its successor has settled, or the service is to stop.

        Leaving the block then drains.

        Raises:
            RuntimeError: the block was not entered.
        """
        self._require_entered()
        await self._finished.wait()

    async def serve_forever(self) -> None:
        """Announce readiness, then return when this generation shall leave: ``ready()`` and ``finished()``."""
        await self.ready()
        await self.finished()

    # Restarting and stopping

    async def restart(self, until: Literal["serving", "settled", "drained"] = "serving") -> RestartReport:
        """Restart this service: start a successor, hand the sockets over, and let it serve.

        Args:
            until: how far to wait: until the successor serves, until that is final, or until this generation's
                connections have drained as well.

        Returns:
            The report, which goes on being filled in until the drain has ended.

        Raises:
            RestartInProgress: another restart has not ended.
            NotReady: this generation does not serve yet.
            RestartWhileDraining: it is leaving.
            RestartUnsupported: not from this process, or not on this platform.
            SpawnFailed, SuccessorFailed, ReadyTimeout: there is no successor, and nothing has changed.
            RolledBack: the successor failed after it had begun to serve; this generation accepts again.
            RuntimeError: ``until="drained"`` from a connection that the drain would wait for.

        Cancelling it calls the restart off, as long as the successor was not told to accept; later it only stops
        waiting.
        """
        if until not in ("serving", "settled", "drained"):
            raise ValueError(f'until is "serving", "settled" or "drained", not {until!r}')
        if until == "drained" and current_connection.get() is not None:
            raise RuntimeError(
                'until="drained" from a connection of this generation would wait for itself: '
                'use until="settled", or ask from outside'
            )
        if self._anchor_client is not None:
            self._last_report = await self._anchor_client.restart(until)
            return self._last_report
        handover = self._begin_restart()
        try:
            return await self._see_through(handover, until)
        except BaseException:
            handover.post(PredecessorEvent.CANCELLED)
            raise

    async def _see_through(self, handover: PredecessorSide, until: str) -> RestartReport:
        await _first(*((handover.serving, handover.over) if until == "serving" else (handover.over,)))
        if handover.error is None and until == "drained":
            await self._drained.wait()
        if handover.error is not None:
            raise handover.error
        if until != "serving" and self._has_successor and self._systemd.is_there:
            # Once this is known, ExecReload= may end, and systemd looks at the pid file again.
            await self._main_named.wait()
        if handover.over.is_set() and handover.report.outcome is Outcome.STOPPED:
            raise RestartWhileDraining("the service was stopped while it restarted")
        return handover.report

    def stop(self, partial: bool = False) -> None:  # noqa: FBT001, FBT002 - the name ecdysis' users know
        """Stop the service: accept no more, and let ``finished()`` return; leaving the block then drains.

        A restart that is under way is called off, or its successor is stopped as well. Before ``ready()`` the body of
        the block is cancelled, as it is in a successor that shall not come; what follows after the block goes on.

        Args:
            partial: leave it to the application to tell the service manager that the service stops.
        """
        if self._anchor_client is not None:
            self._anchor_client.stop_service()
        else:
            self._stop_here(partial=partial)

    def _stop_here(self, *, partial: bool = False) -> None:
        self._generation.log.info("stopping%s", " (partially)" if partial else "")
        if self._state in (State.DRAINING, State.ENDED):
            return
        # Remembered, because what is posted to a restart that is over in the same moment is not heard any more.
        self._stopping = True
        self._stops_partially = partial
        if self._inheritance is not None and not self._inheritance.state.final:
            self._inheritance.post(SuccessorEvent.STOP_HERE)
        elif self._handover is not None and not self._handover.state.final:
            self._handover.post(PredecessorEvent.STOP)
        else:
            if self._state is State.STARTING:
                # Nobody is served yet, and whoever stops the service would have to wait for the end of this start.
                self._body.cancel()
            self._leave()

    def until_draining(self, awaitable: Awaitable[T]) -> Coroutine[Any, Any, T]:
        """Await something that is safe to cancel, at a point where this connection may also end.

        ``StreamReader.readline`` is safe to cancel, ``loop.sock_recv`` is not: what it has received is lost.

        Returns:
            Its result, also where it is finished at the very moment the drain wants to end.

        Raises:
            DrainInterrupt: the connection should say goodbye and close. Not at once when the drain begins, because
                closing an idle connection races with the client's next request; shortly before the deadline.
        """
        return self._tracker.until_draining(awaitable)

    def transfer(self, state: Any = None) -> Coroutine[Any, Any, None]:
        """Offer the connection of the running handler to the successor, when ``until_draining`` was interrupted.

        It returns where the connection stays here, to be served as before. That is so where its server has no
        ``resume=``, with TLS, and where there is no successor or it cannot go on with it. Nothing may be half written,
        and no read may be under way. What asyncio's and anyio's streams have buffered moves along; what the handler
        itself has read belongs into the state.

        Args:
            state: what ``resume`` is called with in the successor, beside the stream: anything that JSON can hold.

        Raises:
            DrainInterrupt: the handler shall end. Either the connection has moved (``moved``: whatever is written has
                nobody to go to), or it is time to say goodbye.
            TypeError, ValueError: the state is no JSON.
        """
        return self._tracker.transfer(state)

    def track(self) -> AbstractAsyncContextManager[None]:
        """Let the drain wait for work of the application's own: ``async with ecdysis.track():``.

        Raises:
            DrainInterrupt: at its end, where the deadline has cancelled the work.
        """
        return self._tracker.track()

    # What is left to the next generation

    def stash(
        self,
        name: str,
        producer: Producer,
        at: At | Literal["start", "commit"],
        version: Version = 0,
        *,
        keep: bool = False,
    ) -> None:
        """Leave state to the next generation: at each restart it is made anew, and read in ``inherited_stash`` there.

        A restart that fails discards it. What the bytes mean is the application's business, and a release may be
        followed by an older one: the version says which format they are in.

        Args:
            name: what the successor finds it by, and ignores where it does not know it.
            producer: returns bytes, or anything else with a buffer, or yields them in pieces; it may be async. It is
                called on the loop, so that what it reads cannot change meanwhile; each piece is written in a thread
                while the loop goes on, and must not be changed until the next one is asked for. One that computes for
                long should yield pieces, or do so in a thread of its own.
            at: ``"start"``: it is made while the successor starts, within ``ready_timeout``, and can be read there
                from its first line on. ``"commit"``: it is made once this generation accepts no more, and can be read
                there after ``ready()``. New connections wait meanwhile, for 10 seconds at the most; what those of this
                generation change later is not in it.
            version: travels with it.
            keep: whether systemd keeps the last one that was made (``FileDescriptorStoreMax=``, systemd 254), so that
                the start after a crash, or a kill, finds it in ``inherited_stash``. It is as old as the last restart,
                and only one start is given it: one that it kills is followed by one without. Ask for it before
                ``ready()``: what a crash has left under a name that nobody keeps then is let go. An orderly stop drops
                it. Not for workers of ``ecdysis run``.

        Raises:
            ValueError, TypeError: an argument is not what it should be, or there is a stash of this name.

        A producer that raises, or takes too long, fails the restart with ``StashFailed``; this generation goes on.
        """
        self._stashes.add(name, producer, at, version, keep=keep)

    @property
    def inherited_stash(self) -> InheritedStash:
        """What the predecessor has left to this generation, by name; empty in the first one, but for a crash's."""
        return self._inherited_stash

    # What happens

    def _report_for_duty(self, sock: socket.socket) -> None:
        """Work for an anchor: what there is one of in a service is its business from now on."""
        orders = WorkerCommands(
            begin_restart=lambda number: self._begin_restart(number=number),
            stop=self._stop_here,
            reopen_logs=self._generation.reopen_logs,
            state=lambda: self._state.value,
        )
        self._anchor_client = AnchorClient(sock, self._plane, orders)
        self._resources.callback(self._anchor_client.close)
        self._registry.owns_paths = False
        self._generation.shares_sockets = True
        self._pid_file = self._control_path = None
        # The others are caught since the import (claims.py).
        self._settings = dataclasses.replace(self._settings, restart_signals=(), stop_signals=(signal.SIGTERM,))
        self._generation.settings = self._settings

    def _install_signals(self) -> None:
        settings = self._settings
        if not settings.stop_signals and not settings.restart_signals:
            return
        if not can_handle_signals():
            self._generation.log.warning(
                "off the main thread, and off POSIX, no signals can be handled: call restart() and stop() instead"
            )
            return
        handlers = dict.fromkeys(settings.restart_signals, self._on_restart_signal)
        handlers |= dict.fromkeys(settings.stop_signals, self._on_stop_signal)
        # Unless the application has another use for it; without anybody's it would end the process.
        if signal.SIGUSR1 not in handlers and not is_handled(signal.SIGUSR1):
            handlers[signal.SIGUSR1] = self._on_reopen_signal
        self._signals = self._resources.enter_context(handled_signals(handlers))

    def _on_stop_signal(self) -> None:
        assert self._signals is not None
        # Also once this block has put the former handlers back: one more on the way out must not change the status.
        self._signals.keep_ignoring(self._settings.stop_signals)
        self._stop_signals += 1
        if self._stop_signals > 1:
            self._generation.log.warning("told to stop again: the deadline of the drain is now")
            self._tracker.hurry()
        self._hurry_if_forsaken()
        self._stop_here()

    def _on_restart_signal(self) -> None:
        self._task_group.start_soon(self._restart_by_signal)

    async def _restart_by_signal(self) -> None:
        # Also a restart that is refused, because systemd waits for an answer to its signal (Type=notify-reload).
        self._systemd.tell_reloading(LEEWAY_SECONDS)
        try:
            report = await self.restart(until="settled")
            self._generation.log.info("%s", report)
        except RestartWhileDraining as error:
            self._generation.log.info("%s", error)
        except RestartInProgress as error:
            # READY=1 comes with the end of that one.
            self._generation.log.error("the restart that a signal asked for is refused: %s", error)  # noqa: TRY400
        except RestartError as error:
            self._systemd.tell("READY=1")
            # Without a traceback: the message says what happened, in the successor's own words.
            self._generation.log.error("the restart that a signal asked for failed: %s", error)  # noqa: TRY400

    def _on_reopen_signal(self) -> None:
        self._task_group.start_soon(self._generation.reopen_logs)

    def _begin_restart(
        self, spawner: Spawner | None = None, *, number: int | None = None, is_told: bool = False
    ) -> PredecessorSide:
        """Begin a restart, unless that is not possible now.

        Args:
            spawner: starts the successor; None: a child of this process.
            number: of the successor; None: the next one.
            is_told: systemd may know of it already, because ExecReload= has asked for it. Where it heard RELOADING=1 as
                well, systemd 254 would go on to wait for READY=1 once ExecReload= has ended, even if the main process
                has died meanwhile (seen).
        """
        if self._state in (State.DRAINING, State.ENDED):
            raise RestartWhileDraining("this generation is leaving; ask the newest one")
        if self._handover is not None and not self._handover.over.is_set():
            raise RestartInProgress(
                f"restart {self._handover.report.id} is in progress ({self._handover.state.value}); await that one"
            )
        if self._state in (State.STARTING, State.WAITING):
            raise NotReady("this generation does not serve yet: a restart is possible after ready()")
        if not supported():
            raise RestartUnsupported(
                "a restart needs pidfds and descriptors passed over Unix sockets, which this platform does not have: "
                "stop and start the service instead"
            )
        if os.getpid() == 1:
            raise RestartUnsupported(
                "this process is PID 1 and must not leave: a restart would end the container. "
                "Run the service by `ecdysis run`, which keeps one process in front of all generations"
            )
        if self._unit_end is not None:
            raise RestartUnsupported(self._unit_end)
        if self._anchor_client is not None:
            spawner = self._anchor_client.spawn
        handover = PredecessorSide(self._generation, self._on_handover, spawner=spawner, number=number)
        self._handover, self._last_report = handover, handover.report
        self._handed_over, self._main_named = anyio.Event(), anyio.Event()
        self._note_change()
        self._task_group.start_soon(self._hand_over, handover, is_told)
        return handover

    async def _hand_over(self, handover: PredecessorSide, is_told: bool) -> None:  # noqa: FBT001 - start_soon has no keywords
        try:
            await self._carry_out(handover, is_told=is_told)
        finally:
            self._handed_over.set()
        self._hurry_if_forsaken()
        if handover.error is not None:
            self._tell_serving()
        if self._stopping:
            self._leave()

    async def _carry_out(self, handover: PredecessorSide, *, is_told: bool) -> None:
        if self._inheritance is not None and not self._inherited.is_set():
            # A second restart during probation: so that no more than two generations can ever accept in turn, the
            # predecessor gives up its right to come back first.
            self._inheritance.post(SuccessorEvent.SETTLE)
            with anyio.move_on_after(SETTLE_SECONDS):
                await self._inherited.wait()
        if self._inheritance is not None and not self._inherited.is_set():
            handover.refuse(
                RestartError(
                    f"the restart before this one is not settled, and the predecessor (pid {self.predecessor_pid}) "
                    "does not answer: is it stopped (SIGSTOP, a debugger)? Continue or kill it, and try again"
                )
            )
            return
        if self._inheritance is not None and self._systemd.is_there:
            # Only who is the main process can make another one so. The predecessor is about to say it.
            with anyio.move_on_after(SETTLE_SECONDS):
                await self._systemd.begun.wait()
        # Not earlier: systemd may have sent its signal here before this process has learnt that it may speak.
        settings = self._settings
        tell = self._systemd.ask_for_time if is_told else self._systemd.tell_reloading
        tell(settings.ready_timeout + settings.probation + LEEWAY_SECONDS)
        await handover.run()

    def _on_handover(self, handover: PredecessorSide) -> None:
        match handover.state:
            case PredecessorState.STOPPING | PredecessorState.SETTLED | PredecessorState.STOPPED:
                self._leave()
            case (
                PredecessorState.PAUSING
                | PredecessorState.COMMITTING
                | PredecessorState.PROBATION
                | PredecessorState.RECALLING
                | PredecessorState.REVERTING
            ):
                self._state = State.PAUSED
            case _:
                self._state = State.SERVING
        if self._stopping and handover.state.final:
            # The restart was over before it could hear of the stop, and may now wait until this side accepts again.
            self._leave()
        if self._anchor_client is not None:
            self._anchor_client.tell_handover()
        self._note_change()
        if handover.state in (PredecessorState.FAILED, PredecessorState.ROLLED_BACK):
            self._tell_serving()
        elif self._has_successor and self._systemd.is_there:
            self._task_group.start_soon(self._name_main, handover)

    async def _inherit(self, inheritance: SuccessorSide) -> None:
        await inheritance.run()
        if inheritance.state is not SuccessorState.SETTLED:
            return
        if self._stopping:
            self._leave()
        assert inheritance.predecessor is not None
        lineage = self._generation.lineage
        if self._anchor_client is None or inheritance.predecessor.pid != self._anchor_client.anchor_pid:
            lineage.ancestors.append(inheritance.predecessor)
        else:
            # An anchor that began this slot neither serves nor drains.
            inheritance.close()
        lineage.on_drained = self._note_drained
        lineage.on_transfer = self._receive_transfers
        for item in inheritance.farewells:
            lineage.deliver(inheritance.predecessor, item)
        inheritance.farewells.clear()
        self._inherited.set()
        if self._last_report is None:
            self._last_report = inheritance.report
        if self._pid_file is not None:
            try:
                await run_in_thread(self._pid_file.publish)
            except OSError as error:
                self._generation.log.error("the pid file still names the former generation: %s", error)  # noqa: TRY400
        lineage.on_main = self._become_main
        if self._systemd.is_there:
            with contextlib.suppress(ChannelError):  # it has left
                await inheritance.predecessor.peer.channel.send(DrainMessage.PUBLISHED, timeout=2)
        await lineage.follow(self._settings.max_draining)

    def _on_inheritance(self, inheritance: SuccessorSide) -> None:
        match inheritance.state:
            case SuccessorState.PROBATION | SuccessorState.SETTLED if self._state is State.WAITING:
                self._state = State.SERVING
            case SuccessorState.ABORTED:
                if self._signals is not None:
                    # The predecessor, who may be the reason, sends SIGTERM as well, perhaps on the way out.
                    self._signals.keep_ignoring(self._settings.stop_signals)
                self._body.cancel()
            case SuccessorState.STOPPED | SuccessorState.RETURNED:
                self._leave()
        self._announce()

    def _receive_transfers(self, sock: socket.socket) -> None:
        receiver = Receiver(sock, self._gate.find_resumer, self._generation.log)
        self._task_group.start_soon(self._run_receiver, receiver)

    async def _run_receiver(self, receiver: Receiver) -> None:
        """Take the predecessor's connections over, until this generation leaves itself."""
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(_cancel_at, self._leaving, task_group.cancel_scope)
            try:
                await receiver.run()
            except Exception:
                # What was not taken the predecessor keeps.
                self._generation.log.exception("the transfer broke down")
            task_group.cancel_scope.cancel()

    def _note_drained(self, ancestor: Ancestor, body: Mapping[str, Any]) -> None:
        report = RestartReport.from_json(body["report"])
        if self._last_report is not None and self._last_report.id == report.id:
            self._last_report = report
        self._generation.log.info("generation %d (pid %d) has drained: %s", ancestor.generation, ancestor.pid, report)

    # What systemd is told

    def _hurry_if_forsaken(self) -> None:
        # The main process has died, and systemd starts the service anew once the last process of this one has ended:
        # until then nobody listens, which costs more than what drains here.
        if self._systemd.is_there and self._stop_signals and self._has_successor and self._handed_over.is_set():
            self._generation.log.warning("the successor is dead, and the service is stopped: the deadline is now")
            self._tracker.hurry()

    def _become_main(self, ancestor: Ancestor) -> None:
        # The predecessor's own predecessor may still drain, and die, while that one has yet to hand its role on.
        if self._inheritance is not None and ancestor is self._inheritance.predecessor:
            self._systemd.begin()
            versions = self._inherited_stash.versions()
            self._store.inherit_state(versions)
            for name in versions:
                if not self._stashes.is_kept(name):
                    self._store.drop(name)
            self._park()
            self._systemd.tell_status(self._describe())

    async def _name_main(self, handover: PredecessorSide) -> None:
        """Make the successor the unit's main process, once and for good."""
        try:
            # systemd reads PIDFile= again when a reload has ended: one that is behind MAINPID would point it back to
            # this process, and nothing could ever correct that (DESIGN.md, trap 14).
            with anyio.move_on_after(PUBLISH_SECONDS):
                await handover.published.wait()
            if self._systemd.is_main:
                await handover.let_go()
                await self._systemd.name_main(handover.report.successor_pid or 0, "READY=1")
                await handover.tell(DrainMessage.MAIN, {})
        finally:
            self._main_named.set()

    async def _outlive_others(self) -> None:
        """Wait for all other generations: with the exit of the main process systemd ends them, drained or not."""
        with anyio.move_on_after(self._settings.drain_timeout + EXIT_SECONDS):
            if self._handover is not None:
                await self._handed_over.wait()
            await self._generation.lineage.outlive()

    def _tell_serving(self) -> None:
        self._systemd.tell_status(self._describe())
        self._systemd.tell("READY=1")

    async def _check_systemd(self) -> None:
        has_socket_unit = any(entry.number is not None for entry in self._registry.entries)
        if (complaint := await find_shortcoming(has_socket_unit=has_socket_unit)) is not None:
            self._generation.log.warning("%s", complaint)

    async def _tell_status(self) -> None:
        while True:
            self._systemd.tell_status(self._describe())
            # What has begun to listen since then.
            self._park()
            await anyio.sleep(STATUS_SECONDS)

    def _park(self) -> None:
        # Not before it serves, when what a crash has left is not claimed yet; nor once it leaves: what it closes then
        # the successor goes on with, or the next start, for which clients wait (`systemctl restart`).
        if self._state in (State.SERVING, State.PAUSED):
            self._store.park(self._registry.entries)
            while self._store.state:
                # What a crash has left, and this start has survived.
                (name, version), descriptor = self._store.state.popitem()
                if self._stashes.is_kept(name):
                    self._store.keep(name, version, descriptor)
                os.close(descriptor)

    def _recover_state(self) -> None:
        for (name, version), descriptor in self._store.state.items():
            size = os.fstat(descriptor).st_size
            try:
                self._inherited_stash.receive([{"name": name, "version": version, "size": size}], [descriptor])
            except (OSError, GarbledFrame) as error:
                self._generation.log.warning("the stash %r that a crash has left cannot be read: %s", name, error)

    def _describe(self) -> str:
        """Say in one line what `systemctl status` shows."""
        if self._failure is not None:
            return self._failure
        parts = [f"generation {self.generation} is {self._state.value}, {counted(self.connections, 'connection')}"]
        parts += [
            f"generation {each.generation} drains, {counted(each.connections, 'connection')}"
            for each in self._generation.lineage.ancestors
            if each.connections is not None
        ]
        if self._handover is not None and (error := self._handover.error) is not None:
            parts.append(describe_failed_restart(error))
        return "; ".join(parts)

    # What the control socket is told

    def _controlled(self) -> ControlHandlers:
        return ControlHandlers(
            status=self._status,
            waiting_for=self._waiting_for,
            begin_restart=self._restart,
            find_report=self._find_report,
            stop=self.stop,
            changes=self._changes,
            reopen_logs=self._generation.reopen_logs,
            begin_takeover=self._hand_over_to,
            check=self._check,
            compare=self._compare,
        )

    def _restart(self) -> Restart:
        handover = self._begin_restart(is_told=True)
        return Restart(handover.report, functools.partial(self._see_through, handover))

    async def _check(self) -> dict[str, Any]:
        return await preflight.check_release(
            self._settings, self._generation.env_file_keys, self._public_entries(), os.environ
        )

    def _compare(self, release: dict[str, Any]) -> dict[str, Any]:
        return preflight.compare(release, self._public_entries(), os.environ)

    def _public_entries(self) -> list[Entry]:
        return [entry for entry in self._registry.entries if entry.address != self._control_path]

    def _hand_over_to(self, spawner: Spawner) -> Restart:
        if self._systemd.is_there:
            raise RestartUnsupported(
                "this service belongs to a unit of systemd, which ends it, and starts it again, when its main process "
                "is another unit's: restart it by systemctl reload or ecdysis restart, or stop it"
            )
        handover = self._begin_restart(spawner)
        return Restart(handover.report, functools.partial(self._see_through, handover))

    def _note_change(self) -> None:
        self._phase_begun = anyio.current_time()
        self._announce()

    def _announce(self) -> None:
        self._changes.announce()
        if self._anchor_client is not None:
            self._anchor_client.note()

    def _waiting_for(self) -> str | None:
        now = anyio.current_time()
        return describe_wait(
            self._handover,
            self._inheritance,
            phase_seconds=now - self._phase_begun,
            connections=self.connections,
            deadline_seconds=self._drain_deadline - now if self._drain_deadline is not None else None,
        )

    def _status(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "pid": self.pid,
            "state": self._state.value,
            "uptime": time.monotonic() - self._begun,
            "connections": self.connections,
            "listeners": describe_listeners(self._registry.entries),
            "waiting_for": self._waiting_for(),
            "restart": describe_restart(self._handover, phase_seconds=anyio.current_time() - self._phase_begun),
            "last_report": self._last_report.to_json() if self._last_report is not None else None,
            "draining": describe_ancestors(self._generation.lineage.ancestors),
            "process": describe_process(),
        }

    def _find_report(self, id: str) -> RestartReport | None:
        if self._last_report is not None and self._last_report.id == id:
            return self._last_report
        if self._inheritance is not None and self._inheritance.restart_id == id:
            return report_of(self._inheritance)
        return None

    # The end

    def _leave(self) -> None:
        """Accept no more, and begin to drain; there is no way back."""
        if self._state not in (State.DRAINING, State.ENDED):
            # Committed, and stopped before it could note that it accepts: so is a successor that stops at that moment.
            is_committed = self._inheritance is not None and self._inheritance.state is SuccessorState.STOPPED
            self._has_served = self._state in (State.SERVING, State.PAUSED) or is_committed
            self._state = State.DRAINING
            # Known to everybody who learns that this generation leaves: then nobody is to be sent away.
            self._tracker.moves = self._has_successor
            self._tracker.draining.set()
            if not self._has_successor:
                self._systemd.ask_for_time(self._settings.drain_timeout + LEEWAY_SECONDS)
                if not self._stops_partially:
                    self._systemd.tell("STOPPING=1")
            # An event, because this may be called from a callback of the loop, where no task can be started.
            self._leaving.set()

    async def _drain_when_leaving(self) -> None:
        # Cancelled from outside, this block waits for the drain, which would never come if its task were cancelled too.
        with anyio.CancelScope(shield=True):
            await self._leaving.wait()
            try:
                try:
                    await self._end_accepting()
                finally:
                    # Only now: whoever hears of it may close its servers, and those who queue there are to be answered.
                    self._finished.set()
                await self._drain()
            except Exception:
                # Whatever it is: what has drained has, and the rest ends with this process.
                self._generation.log.exception("the drain broke down")
            finally:
                self._drained.set()

    async def _end_accepting(self) -> None:
        """Accept no more, for good; what waits in a queue that nobody goes on with is answered first."""
        if self._handover is not None and self._handover.state is PredecessorState.STOPPING:
            # The successor is being ended; where the commit had failed, it may accept until it is dead.
            await self._handover.over.wait()
        async with self._generation.gate_lock:
            if self._has_successor or not self._is_last():
                await self._backlogs.finish(self._handover.unclaimed if self._handover is not None else ())
            else:
                await self._backlogs.answer()
            await self._gate.end(spare=lambda entry: entry.until is Until.EXIT and not self._has_successor)

    def _is_last(self) -> bool:
        """Say whether no generation of this slot will accept after this one; where in doubt, another one will (G2).

        An heir that died after it had settled may have had an heir of its own, and cannot be asked any more. So nobody
        answers who waits on what it had inherited, if it was the last one: they are reset when this generation ends.
        """
        if not self._has_served:
            return False
        if self._inheritance is not None and self._inheritance.state not in (
            SuccessorState.SETTLED,
            SuccessorState.STOPPED,
        ):
            return False
        # A successor that has stopped by itself during its probation answers, for as long as it lives; one that was
        # called back accepts no more.
        return (
            self._handover is None
            or self._handover.state is PredecessorState.ROLLED_BACK
            or self._handover.successor_is_dead
        )

    async def _drain(self) -> None:
        begun = anyio.current_time()
        log, timeout = self._generation.log, self._settings.drain_timeout
        self._drain_deadline = begun + timeout
        self._announce()
        log.info("draining %d connections, for %g seconds at the most", len(self._tracker), timeout)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self._tell_progress)
            if self._has_successor:
                await self._tracker.drain(timeout, move=self._move_connections)
            else:
                await self._tracker.drain(timeout, kinds=(Until.DRAIN,))
            task_group.cancel_scope.cancel()
        async with self._generation.gate_lock:
            if self._is_last():
                await self._backlogs.empty([each for each in self._gate.acceptors if each.entry.has_queue])
            await self._gate.end()
        await self._tracker.drain(min(EXIT_SECONDS, timeout))
        count = self._tracker.count
        log.info("drained: %d by themselves, %d silent, %d cut", count.drained, count.silent, count.cut)
        if self._handover is not None and self._has_successor:
            report = self._handover.report
            report.drain = count
            report.phases[Phase.DRAIN] = anyio.current_time() - begun
            if self._anchor_client is not None:
                self._anchor_client.tell_handover()
            await self._handover.tell(DrainMessage.DRAINED, {"report": report.to_json()})

    async def _move_connections(self, on_swept: Callable[[], None]) -> None:
        """Pass on to the successor what can go on there."""
        handover = self._handover
        assert handover is not None
        # Not before it is told that this has settled.
        await handover.over.wait()
        try:
            ours, theirs = socketpair()
        except OSError as error:
            self._tracker.moves = False
            self._generation.log.warning("no connection can be passed on: %s", error)
            return
        # Also where the goodbyes begin before the successor could be told.
        with ours:
            with theirs:
                await handover.tell(DrainMessage.TRANSFER, {}, [theirs.fileno()])
            try:
                await Sender(ours, self._tracker, self._generation.log).run(handover.successor_died, on_swept)
            except Exception:
                # A defect of this library, or no memory: it may cost the transfer, never the drain.
                self._generation.log.exception("the transfer broke down; what is left drains here")

    async def _tell_progress(self) -> None:
        while self._has_successor and self._handover is not None:
            await self._handover.tell(DrainMessage.PROGRESS, {"connections": len(self._tracker)})
            await anyio.sleep(PROGRESS_SECONDS)


async def _cancel_at(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _first(*events: anyio.Event) -> None:
    """Wait until one of several events has happened."""

    async def wait(event: anyio.Event) -> None:
        await event.wait()
        task_group.cancel_scope.cancel()

    async with anyio.create_task_group() as task_group:
        for event in events:
            task_group.start_soon(wait, event)
