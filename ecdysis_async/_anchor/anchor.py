"""The anchor: the process with a stable pid that holds the sockets and runs the workers of a service.

It accepts nothing and imports no server. It starts workers and reaps them, replaces those that crash, hang or grow,
rolls a new release out over them one after the other (``rollout.py``), and is the one that signals, the control
socket, the pid file and systemd speak of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import anyio

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import Gate
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.preflight import check_release, compare
from ecdysis_async._handoff.protocol import PredecessorEvent, PredecessorState
from ecdysis_async._ipc.channel import Frame
from ecdysis_async._ipc.worker_link import (
    FromAnchor,
    FromWorker,
    WorkerLink,
    describe_loss,
    error_from_json,
    error_to_json,
)
from ecdysis_async._management.changes import Changes
from ecdysis_async._management.control_server import ControlServer
from ecdysis_async._management.controlled import ControlHandlers, Restart
from ecdysis_async._management.pid_file import PidFile
from ecdysis_async._management.status import counted
from ecdysis_async._management.systemd import find_systemd
from ecdysis_async._management.systemd_unit import check_unit, find_shortcoming
from ecdysis_async._sockets.addresses import listen
from ecdysis_async._sockets.registry import Entry, Registry
from ecdysis_async._system.claims import take_activation
from ecdysis_async._system.launch import describe_launch
from ecdysis_async._system.log_files import reopen_logs
from ecdysis_async._system.process import Child, Process, describe_exit, find_process, spawn
from ecdysis_async._system.signals import SignalReceiver, handled_signals
from ecdysis_async._system.stderr import say
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import (
    ChannelClosed,
    ChannelError,
    NotReady,
    RestartError,
    RestartInProgress,
    RestartWhileDraining,
    SpawnFailed,
)
from ecdysis_async.report import Outcome, RestartReport

from . import reexec
from . import status as account
from .config import AnchorConfig
from .health import HealthServer
from .pool import HandoffStatus, Slot, SlotActivity, Worker, WorkerPool, WorkerState
from .reconcile import Reconciler
from .reload import watch_files
from .rollout import RollOut, TurnState, wait_until
from .sockets import HeldSockets
from .upgrade import Upgrade

__all__ = ["STARTUP_FAILED", "Anchor"]

# The exit status where the service does not start.
STARTUP_FAILED = 3

# How long a worker that has hung up may take to be dead, seconds.
HUNG_UP_SECONDS = 1.0

# How long a worker may take to open its log files anew, seconds.
REOPEN_SECONDS = 5.0
# What workers get at a stop besides the drain: for the application's own clean-up, seconds.
EXIT_SECONDS = 15.0
# The same once it was told to hurry.
HURRY_SECONDS = 5.0
# What a restart may take besides its own limits, as systemd is told, seconds.
LEEWAY_SECONDS = 60.0

# How often it is looked whether the control socket is still there, seconds.
CONTROL_SECONDS = 1.0

# A channel and a stderr.
SPAWN_DESCRIPTORS = 2

# The anchor's business, and not the workers'.
ANCHORS_KEYS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class AnchorLog(GenerationLog):
    """Puts the anchor's pid before each line."""

    def __init__(self) -> None:
        super().__init__(0)
        self._prefix = f"[anchor, pid {os.getpid()}] "


class _CrewsChild:
    """A worker as its handoff sees it: waited for and ended, but owned by the crew."""

    def __init__(self, process: Process) -> None:
        self.pid = process.pid
        self.pidfd = process.pidfd
        self.wait = process.wait
        self.end = process.end
        self.let_go = process.let_go

    def close(self) -> None:
        """Nothing: the crew does."""


class _AnchorHost:
    """What the predecessor of a slot that nobody serves is part of: an anchor, which accepts nothing itself.

    Clients wait in the queues of its sockets until the worker that comes accepts.
    """

    connections = 0

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    async def pause(self, spare: Callable[[Entry], bool]) -> None:
        """Nothing: nobody accepts here."""

    async def resume(self) -> None:
        """Nothing: nobody accepts here."""

    def hurry(self) -> None:
        """Nothing: nothing drains here."""


class Anchor:
    """The anchor of one service.

    Args:
        plan: what it runs.
        state: what the former code of this process has left, where it was executed anew (reexec.py), or another
            anchor (succession.py).
        former_pid: of that one.
    """

    def __init__(
        self, plan: AnchorConfig, state: Mapping[str, Any] | None = None, former_pid: int | None = None
    ) -> None:
        self.crew = WorkerPool(plan.workers)
        self.changes = Changes()
        self.log: GenerationLog = AnchorLog()
        self.ready_timeout = plan.settings.ready_timeout
        self.generation = 1
        self.plan = plan
        self.begun = time.monotonic()
        self._systemd = find_systemd(plan.systemd)
        self._reconciler = Reconciler(self, self._systemd.watchdog)
        self._held_sockets = HeldSockets(self._systemd, self.log)
        self.registry = self._held_sockets.service
        self._pid_file = PidFile(plan.settings.pid_file) if plan.settings.pid_file is not None else None
        self._control: ControlServer | None = None
        self.roll_out: RollOut | None = None
        self.last_report: RestartReport | None = None
        # The sockets there were before the last roll-out.
        self._entries_before: set[Entry] = set()
        # The handoffs of workers that follow nobody.
        self.fillings: dict[Slot, PredecessorSide] = {}
        # Worker and number of each who waits for a restart of the service.
        self._askers: dict[tuple[Worker, int], RollOut] = {}
        self._numbers = itertools.count(1)
        self._description = ""
        self.is_serving = False
        self.is_stopping = False
        self._stop_signals = 0
        self._spawning = 0
        self._stop_deadline: anyio.CancelScope | None = None
        self._signals: SignalReceiver | None = None
        # Since it was told to stop, and is to go on for a while.
        self.lame_duck: anyio.CancelScope | None = None
        self.renewal = Upgrade(self)
        self._signals_before = -1
        self._former_pid = former_pid
        if state is not None:
            self._restore(state)

    # From its start to its end

    async def run(self) -> int:
        """Serve until the service is stopped, and return the exit status."""
        self._stopped = anyio.Event()
        with ExitStack() as resources:
            resources.callback(self._systemd.close)
            # What a crash has left is the next start's, where this one has failed.
            resources.callback(lambda: self._held_sockets.close(unlink=self.is_serving))
            self._signals = resources.enter_context(handled_signals(self._handlers()))
            if self._signals_before >= 0:
                reexec.repeat_signals(self._signals_before)
                reexec.unblock_signals()
            # Nothing here accepts: the gate of the workers' sockets has nobody behind it.
            async with anyio.create_task_group() as self._tasks:
                self._tasks.start_soon(self._signals.run)
                try:
                    await self._open(resources)
                except (OSError, LookupError, ValueError) as error:
                    if not self.renewal.count:
                        say(str(error))
                        self._systemd.begin()
                        await self._tell_failure(error)
                        self._tasks.cancel_scope.cancel()
                        return STARTUP_FAILED
                    # The workers serve, whatever this is.
                    self.log.error("the upgraded anchor goes on without something: %s", error)  # noqa: TRY400
                status = await self._run()
                self._tasks.cancel_scope.cancel()
        return status

    async def _open(self, resources: ExitStack) -> None:
        """Open what the service needs, before the first worker."""
        if self.plan.systemd is not False:
            self._held_sockets.activate(take_activation())
            if (complaint := check_unit()) is not None:
                self.log.warning("%s", complaint)
        self._host = _AnchorHost(self.registry)
        if self.plan.control_path is not None:
            plane = DataPlane(self._held_sockets.control, Gate(), Tracker(), self._tasks)
            self._control = ControlServer(self.plan.control_path, plane, self._controlled())
            resources.callback(self._control.close)
            await self._control.open()
            self._held_sockets.control.start_listening()
            await plane.gate.open()
            self._tasks.start_soon(self._control.run)
            self.begin(self._keep_control, self._control)
        # Another anchor's, whose place was elsewhere.
        self._held_sockets.control.close_unclaimed(unlink=True)
        if self.plan.health is not None:
            for entry in await run_in_thread(functools.partial(listen, self._held_sockets.health, self.plan.health)):
                entry.start_listening()
                self._tasks.start_soon(HealthServer(entry.sock, functools.partial(account.why_not_ready, self)).run)
        self._held_sockets.health.close_unclaimed(unlink=True)
        if self._pid_file is not None:
            await run_in_thread(self._pid_file.prepare)
            resources.callback(self._pid_file.remove)
        await run_in_thread(functools.partial(self.plan.open_sockets, self.registry))

    async def _keep_control(self, control: ControlServer) -> None:
        """See that commands find the service, also after somebody has cleared the directory."""
        while not self.is_stopping:
            await control.renew()
            await anyio.sleep(CONTROL_SECONDS)

    async def _run(self) -> int:
        if self._systemd.is_there:
            self._tasks.start_soon(self._systemd.run)
            if not self.renewal.count:
                self._tasks.start_soon(self._check_systemd)
        self._systemd.begin()
        self._systemd.is_sound = self._reconciler.has_sound_worker
        self._tasks.start_soon(self._reconciler.watch)
        if self.plan.reload_paths and self.plan.control_path is not None:
            # Before the workers load what is watched: nothing that is saved meanwhile is missed.
            self.begin(watch_files, self.plan.control_path, self.plan.reload_paths)
        if self.renewal.count:
            error = None
            self._held_sockets.know_parked()
            for slot in self.crew.slots:
                for worker in slot.workers:
                    self._employ(slot, worker)
        else:
            self._systemd.ask_for_time(self.ready_timeout + LEEWAY_SECONDS)
            error = await self._start_first()
        if error is None and not self.is_stopping:
            await self._announce_serving()
            self._tasks.start_soon(self._reconciler.manage)
            await self._stopped.wait()
        elif error is not None:
            await self._tell_failure(error)
            self.is_stopping = True
        if self._refuses_newcomers:
            # Workers answer who queues by now.
            self._held_sockets.refuse_newcomers()
        await self._end_all()
        if self._control is not None:
            await self._control.finish()
        if self._systemd.is_main:
            if self.is_serving:
                self._held_sockets.park_for_next_start()
            await self._systemd.synchronize()
        if error is not None and not self._stopped.is_set():
            # What else it has written stands above.
            say(f"the service does not start: {error.args[0]}")
            return STARTUP_FAILED
        self.log.info("the service has ended")
        return 0

    async def _check_systemd(self) -> None:
        has_socket_unit = any(entry.number is not None for entry in self.registry.entries)
        if (complaint := await find_shortcoming(has_socket_unit=has_socket_unit)) is not None:
            self.log.warning("%s", complaint)

    async def _tell_failure(self, error: Exception) -> None:
        self._systemd.tell_status(f"the start has failed: {error}")
        self._systemd.tell_failure(error, STARTUP_FAILED)
        if self._systemd.is_main:
            await self._systemd.synchronize()

    async def _start_first(self) -> RestartError | None:
        """Start all workers: one alone, which may show that none can, then the others."""
        first = self.crew.enlarge()
        handover = await self.fill(first, self.generation)
        if handover.error is not None or self.is_stopping:
            return handover.error
        self._held_sockets.drop_unclaimed([handover.report])
        others = [self.crew.enlarge() for _ in range(self.crew.target - len(self.crew.slots))]
        errors = []

        async def fill(slot: Slot) -> None:
            errors.append((await self.fill(slot, self.generation)).error)

        async with anyio.create_task_group() as task_group:
            for slot in others:
                task_group.start_soon(fill, slot)
        return next((error for error in errors if error is not None), None)

    async def _announce_serving(self) -> None:
        self.is_serving = True
        if self._pid_file is not None:
            await run_in_thread(self._pid_file.publish)
        control = f", control socket {self.plan.control_path}" if self.plan.control_path is not None else ""
        verb = f"upgraded (pid {os.getpid()} as before): " if self.renewal.count else ""
        if self._former_pid is not None:
            verb = f"taken over from pid {self._former_pid}: "
            # So far its workers are those of the other one: of its command line, its environment and its code.
            self.begin(self._restart_by_signal)
        self.log.info("%s%s %s%s", verb, counted(len(self.crew.slots), "worker"), self._description, control)
        self._held_sockets.park()
        self.tell_status()
        self._systemd.tell("READY=1")
        self.changes.announce()

    @property
    def _refuses_newcomers(self) -> bool:
        """Whether nobody comes after this service, with whom clients could wait."""
        return self.is_serving and not self._held_sockets.are_kept

    async def _end_all(self) -> None:
        """Let every worker leave, and end those that do not; nobody queues where none accepts any more."""
        self._systemd.ask_for_time(self.plan.settings.drain_timeout + LEEWAY_SECONDS)
        self._systemd.tell("STOPPING=1")
        self._tell_all_to_leave()
        with anyio.move_on_after(self.plan.settings.drain_timeout + EXIT_SECONDS) as self._stop_deadline:
            if self._stop_signals > 1:
                self._hurry()
            if self._refuses_newcomers:
                await wait_until(
                    self.changes, lambda: not self.fillings and all(worker.is_done_accepting for worker in self.crew)
                )
                self._held_sockets.stop_listening()
            await wait_until(self.changes, lambda: not any(self.crew) and not self.fillings)
        for worker in tuple(self.crew):
            self.log.error("worker pid %d has not ended in time: it is killed", worker.pid)
            worker.process.send_signal(signal.SIGKILL)
        await wait_until(self.changes, lambda: not any(self.crew) and not self.fillings)

    def _tell_all_to_leave(self) -> None:
        for handover in self.fillings.values():
            handover.post(PredecessorEvent.STOP)
        for worker in self.crew:
            worker.is_told_to_leave = True
            worker.line.tell(FromAnchor.STOP, {})

    def tell_status(self) -> None:
        """Tell systemd how things are."""
        self._systemd.tell_status(account.describe(self))

    def begin(self, function: Callable[..., Coroutine[Any, Any, object]], *arguments: object) -> None:
        """Run something beside all else, whose defects cost that, and never the service."""

        async def run() -> None:
            try:
                await function(*arguments)
            except Exception:
                self.log.exception("%s broke down", function.__name__.strip("_"))
                self.changes.announce()

        self._tasks.start_soon(run)

    # Workers come and go

    async def fill(self, slot: Slot, generation: int) -> PredecessorSide:
        """Start a worker where there is none; return once it serves, or has failed."""
        slot.activity = SlotActivity.FILLING
        before = set(slot.workers)
        try:
            # The anchor could not serve in its place: there is nothing to keep a probation for.
            settings = dataclasses.replace(self.plan.settings, probation=0, pid_file=None)
            starter = functools.partial(self._spawn, slot, generation, None)
            predecessor = Generation(generation - 1, settings, self._host, self.log)
            handover = PredecessorSide(
                predecessor,
                lambda handover: self.changes.announce(),
                spawner=starter,
                number=generation,
                title=f"worker {slot.index}",
            )
            self.fillings[slot] = handover
            if self.is_stopping:
                handover.post(PredecessorEvent.STOP)
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(handover.run)
                await handover.over.wait()
                if handover.error is None:
                    # It would go on to the worker's death, which is learnt elsewhere.
                    task_group.cancel_scope.cancel()
            # What it says on its line comes on a way of its own: that it lives, and then that it serves. Without that,
            # a service would say that it serves, and its status that one of its workers does not yet.
            coming = (
                {WorkerState.STARTING} if handover.error is not None else {WorkerState.STARTING, WorkerState.WAITING}
            )
            # One that blocks its loop just then says nothing.
            with anyio.move_on_after(self.ready_timeout):
                await wait_until(
                    self.changes, lambda: all(worker.state not in coming for worker in set(slot.workers) - before)
                )
        finally:
            del self.fillings[slot]
            slot.activity = SlotActivity.NONE
            self.changes.announce()
        return handover

    async def _spawn(
        self, slot: Slot, generation: int, starter: Worker | None, channel: socket.socket, stderr: int
    ) -> Child:
        """Start a process for a slot.

        Raises:
            RestartError: it could not be started.
        """
        settings = self.plan.settings
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise SpawnFailed(f"no line to a worker: {error}; is the limit of open files reached?") from error

        environment: Mapping[str, str] = {}

        def start() -> Process:
            nonlocal environment
            launch, _ = describe_launch(settings.command, settings.environment, settings.env_file)
            for key in ANCHORS_KEYS:
                launch.environment.pop(key, None)
            environment = launch.environment
            return spawn(launch, channel, stderr, line=theirs)

        try:
            with self.spawning():
                process = await run_in_thread(start)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = Worker(generation, process, WorkerLink(ours), anyio.current_time(), starter, pid=process.pid)
        worker.environment = environment
        self._engage(slot, worker)
        return _CrewsChild(process)

    def _engage(self, slot: Slot, worker: Worker) -> None:
        """Take a worker into the crew."""
        plan = self.plan
        if plan.max_requests is not None:
            worker.request_limit = plan.max_requests + random.randint(0, plan.max_requests_jitter)  # noqa: S311 - no secret
        slot.workers.append(worker)
        self._employ(slot, worker)

    def _employ(self, slot: Slot, worker: Worker) -> None:
        """Welcome a worker, and look after it."""
        worker.line.tell(FromAnchor.WELCOME, {"beat_seconds": self._reconciler.beat_seconds})
        if self.is_stopping:
            worker.is_told_to_leave = True
            worker.line.tell(FromAnchor.STOP, {})
        self.begin(self._attend, slot, worker)
        self.changes.announce()

    async def _attend(self, slot: Slot, worker: Worker) -> None:
        """Hear a worker until it has died, and reap it."""
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(worker.line.run)
            task_group.start_soon(self._listen, slot, worker)
            status = await worker.process.wait()
            task_group.cancel_scope.cancel()
        self._hear_rest(slot, worker)
        worker.exit_status = status
        worker.line.close()
        worker.process.close()
        slot.note_end(worker, anyio.current_time())
        if worker.state in (WorkerState.SERVING, WorkerState.PAUSED) and not worker.is_told_to_leave:
            self.log.warning("worker %d (pid %d) has died: %s", slot.index, worker.pid, describe_exit(status))
        elif worker.left_unasked and not worker.is_told_to_leave:
            self.log.warning(
                "worker %d (pid %d) has left, and nobody has told it to: %s",
                slot.index,
                worker.pid,
                describe_exit(status),
            )
        for other in self.crew:
            if other is worker.starter:
                other.line.tell(FromAnchor.EXITED, {"pid": worker.process.pid, "status": status})
        for asker in [asker for asker in self._askers if asker[0] is worker]:
            del self._askers[asker]
        self.changes.announce()

    async def _listen(self, slot: Slot, worker: Worker) -> None:
        try:
            while True:
                self._hear(slot, worker, await worker.line.receive())
        except ChannelClosed as ended:
            error: ChannelError = ended
            # It has died, as will be known in a moment; or it leaves, and has said so.
            await anyio.sleep(HUNG_UP_SECONDS)
        except ChannelError as broken:
            error = broken
        # Without a line it leaves, if it lives: its place is free from now on.
        worker.line.close()
        is_leaving = worker.is_told_to_leave or worker.state in (WorkerState.DRAINING, WorkerState.ENDED)
        if not is_leaving:
            self.log.error("worker pid %d can be told nothing any more, and has to leave: %s", worker.pid, error)
            worker.state = WorkerState.DRAINING
            self.changes.announce()

    def hear_all(self) -> None:
        """Hear what the workers have said until now."""
        for slot in self.crew.slots:
            for worker in slot.workers:
                self._hear_rest(slot, worker)

    def _hear_rest(self, slot: Slot, worker: Worker) -> None:
        """Hear what a worker has said until now."""
        with contextlib.suppress(ChannelError):
            while (frame := worker.line.receive_nowait()) is not None:
                self._hear(slot, worker, frame)

    def _hear(self, slot: Slot, worker: Worker, frame: Frame) -> None:
        worker.silence = 0.0
        try:
            if frame.lost_descriptors:
                self._miss(worker, frame)
            else:
                self._obey(slot, worker, frame)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # Of another release, or broken.
            self.log.warning("worker pid %d says %r, which cannot be read: %r", worker.pid, frame.type, error)
            frame.close()

    def _miss(self, worker: Worker, frame: Frame) -> None:
        """Do without what a worker has sent and this process has no room for."""
        loss = describe_loss(frame)
        self.log.error("worker pid %d cannot be obeyed: %s", worker.pid, loss)
        if frame.type == FromWorker.SPAWN:
            error = error_to_json(SpawnFailed(loss))
            worker.line.tell(FromAnchor.SPAWN_FAILED, {"number": int(frame.body["number"]), "error": error})

    def _obey(self, slot: Slot, worker: Worker, frame: Frame) -> None:
        body = frame.body
        match frame.type:
            case FromWorker.SPAWN:
                if len(frame.descriptors) != SPAWN_DESCRIPTORS:
                    raise ValueError(f"it came with {len(frame.descriptors)} descriptors")
                self.begin(self._spawn_for, slot, worker, int(body["number"]), frame)
                return
            case FromWorker.CREATED:
                self._held_sockets.take(body["sockets"], frame.descriptors)
                return
            case FromWorker.BEAT:
                self._note_beat(slot, worker, body)
            case FromWorker.HANDOVER:
                worker.handoff = HandoffStatus(
                    PredecessorState(body["state"]) if body["state"] is not None else None,
                    bool(body["is_over"]),
                    RestartReport.from_json(body["report"]) if body["report"] is not None else None,
                    error_from_json(body["error"]) if body["error"] is not None else None,
                )
                self.changes.announce()
            case FromWorker.END:
                for other in slot.workers:
                    if other.process.pid == body["pid"]:
                        self.begin(other.process.end, float(body["grace"]))
            case FromWorker.RESTART:
                self._restart_for(worker, int(body["number"]), str(body["until"]))
            case FromWorker.DESCRIPTION:
                self._description = str(body["text"])
            case FromWorker.REOPENED:
                worker.reopened = int(body["number"]), int(body["handlers"])
                self.changes.announce()
            case FromWorker.CANCEL:
                roll_out = self._askers.pop((worker, int(body["number"])), None)
                if roll_out is not None:
                    roll_out.call_off()
            case FromWorker.STOP:
                self.stop()
            case other:
                self.log.debug("worker pid %d says %r", worker.pid, other)
        frame.close()

    def _note_beat(self, slot: Slot, worker: Worker, body: dict[str, Any]) -> None:
        before, was_done = worker.state, worker.is_done_accepting
        worker.pid = int(body["pid"])
        worker.state = WorkerState(body["state"])
        # One of an earlier release does not say it.
        worker.is_done_accepting = bool(body.get("is_done_accepting", False))
        worker.connections = int(body["connections"])
        worker.requests = int(body["requests"])
        worker.rss = int(body["rss"]) if body["rss"] is not None else None
        if worker.serves and math.isnan(worker.served_since):
            worker.served_since = anyio.current_time()
        if worker.state is WorkerState.DRAINING and before is not WorkerState.DRAINING:
            slot.note_leaving(worker, anyio.current_time())
        has_changed = (worker.state, worker.is_done_accepting) != (before, was_done)
        if has_changed or self._reconciler.why_recycle(worker) is not None:
            self.changes.announce()

    async def _spawn_for(self, slot: Slot, worker: Worker, number: int, frame: Frame) -> None:
        """Start the successor of a worker, which has asked for it."""
        end, stderr = frame.descriptors
        child: Child | None = None
        try:
            with socket.socket(fileno=end) as channel:
                child = await self._spawn(slot, worker.successor_generation, worker, channel, stderr)
            descriptor = os.dup(child.pidfd)
        except (OSError, RestartError) as error:
            if child is not None:
                await child.end(0)
            failure = (
                error if isinstance(error, RestartError) else SpawnFailed(f"the worker cannot be watched: {error}")
            )
            worker.line.tell(FromAnchor.SPAWN_FAILED, {"number": number, "error": error_to_json(failure)})
        else:
            worker.line.tell(FromAnchor.SPAWNED, {"number": number, "pid": child.pid}, [descriptor])
        finally:
            os.close(stderr)

    # Roll-outs

    def begin_replacing(self, slot: Slot, worker: Worker, generation: int) -> None:
        """Let a worker make its successor."""
        worker.handoff = None
        worker.successor_generation = generation
        try:
            descriptions, descriptors = self._held_sockets.share()
        except OSError as error:
            raise RestartError(f"worker {slot.index} cannot be given its sockets: {error}") from error
        worker.line.tell(FromAnchor.RESTART, {"generation": generation, "sockets": descriptions}, descriptors)

    def settle(self, worker: Worker) -> None:
        """Tell a worker that its successor is there to stay."""
        worker.line.tell(FromAnchor.SETTLE, {})

    def revert(self, worker: Worker, error: RestartError) -> None:
        """Tell a worker to take the place of its successor again."""
        worker.line.tell(FromAnchor.REVERT, {"error": error_to_json(error)})

    def restart(self, *, is_told: bool = False) -> RollOut:
        """Begin a roll-out; if another one is on probation, that ends now, and this one waits for it.

        Args:
            is_told: systemd may know of it already.

        Raises:
            RestartError: not now.
        """
        if self.is_stopping or self.is_lame_duck:
            raise RestartWhileDraining("the service is being stopped")
        before = self.roll_out if self.roll_out is not None and not self.roll_out.over.is_set() else None
        if before is not None and not before.serving.is_set():
            raise RestartInProgress(f"restart {before.report.id} is in progress; await that one")
        if self.renewal.is_under_way:
            raise RestartInProgress("the anchor is being upgraded; try again in a moment")
        if not self.is_serving:
            raise NotReady("the service is starting: a restart is possible once all workers serve")
        if before is not None:
            before.end_probation()
        # The number of the one before is its own, also if it fails in this very moment.
        generation = (self.generation if before is None else before.generation) + 1
        roll_out = self.roll_out = RollOut(
            self, generation, self.plan.settings.probation, is_told=is_told, before=before
        )
        self.last_report = roll_out.report
        self.begin(roll_out.run)
        self.changes.announce()
        return roll_out

    def prepare(self, roll_out: RollOut) -> None:
        """Tell systemd that a roll-out begins, now that no other is under way, whose end it was told."""
        # Not as well where ExecReload= has asked; see Ecdysis._begin_restart.
        tell = self._systemd.ask_for_time if roll_out.is_told else self._systemd.tell_reloading
        tell(len(self.crew.slots) * self.ready_timeout + self.plan.settings.probation + LEEWAY_SECONDS)
        self._entries_before = set(self.registry.entries)

    def conclude(self, roll_out: RollOut) -> None:
        """Draw the consequences of what a roll-out has come to, and tell systemd."""
        outcome = roll_out.report.outcome
        try:
            if outcome is Outcome.SETTLED:
                self.generation = roll_out.generation
                self._held_sockets.drop_unclaimed([turn.report for turn in roll_out.turns])
            # Of one that was stopped, the new workers may serve to the end of the service.
            elif outcome is not Outcome.STOPPED and not any(turn.state is TurnState.KEPT for turn in roll_out.turns):
                self._held_sockets.drop_newer(self._entries_before)
            self._held_sockets.park()
        finally:
            self.tell_status()
            self._systemd.tell("READY=1")
            self.changes.announce()

    async def see_through(self, roll_out: RollOut, until: str) -> RestartReport:
        """Wait until a roll-out is "serving", "settled" or "drained".

        Raises:
            RestartError: why it failed.
        """
        event = {"serving": roll_out.serving, "settled": roll_out.over, "drained": roll_out.drained}[until]
        await wait_until(self.changes, lambda: event.is_set() or roll_out.error is not None)
        if roll_out.error is not None:
            await roll_out.over.wait()
            raise roll_out.error
        return roll_out.report

    def _restart_for(self, worker: Worker, number: int, until: str) -> None:
        """Restart the service because a worker's application asks for it."""
        # At once: what is asked for in the moment of an upgrade must be refused, or stand in `_askers`, before the
        # anchor is executed anew; and who calls it off must find it there.
        try:
            roll_out = self.restart()
        except RestartError as error:
            worker.line.tell(FromAnchor.VERDICT, {"number": number, "error": error_to_json(error)})
            return
        self._askers[worker, number] = roll_out
        self.begin(self._tell_verdict, worker, number, roll_out, until)

    def dismiss_askers(self) -> None:
        """Tell those who wait for a drain what there is to tell."""
        for worker, number in tuple(self._askers):
            roll_out = self._askers.pop((worker, number))
            worker.line.tell(FromAnchor.VERDICT, {"number": number, "report": roll_out.report.to_json()})

    async def _tell_verdict(self, worker: Worker, number: int, roll_out: RollOut, until: str) -> None:
        try:
            report = await self.see_through(roll_out, until)
        except RestartError as error:
            verdict = {"number": number, "error": error_to_json(error)}
        else:
            verdict = {"number": number, "report": report.to_json()}
        if self._askers.pop((worker, number), None) is not None:
            worker.line.tell(FromAnchor.VERDICT, verdict)

    # What is left to the code that follows

    def describe_state(self) -> tuple[dict[str, Any], list[int]]:
        """Return what the next code has to know, and the descriptors that it names."""
        assert self._signals is not None
        crew, descriptors = reexec.describe_crew(self.crew)
        sockets, numbers = self._held_sockets.describe()
        state = {
            "crew": crew,
            "sockets": sockets,
            "signals": self._signals.fileno(),
            "generation": self.generation,
            "planned_workers": self.plan.workers,
            "begun": self.begun,
            "upgrades": self.renewal.count + 1,
            "description": self._description,
            "last_report": self.last_report.to_json() if self.last_report is not None else None,
        }
        return state, [*descriptors, *numbers, self._signals.fileno()]

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the former code of this process has ended."""
        self._held_sockets.restore(state["sockets"])
        self.crew = reexec.restore_crew(state["crew"])
        if self.plan.workers != state["planned_workers"]:
            self.crew.target = self.plan.workers
        self.generation = int(state["generation"])
        self.begun = float(state["begun"])
        self.renewal.count = int(state["upgrades"])
        # They have served all the while.
        self.is_serving = True
        self._description = str(state["description"])
        if state["last_report"] is not None:
            self.last_report = RestartReport.from_json(state["last_report"])
        self._signals_before = int(state["signals"])
        os.set_inheritable(self._signals_before, False)

    # What it is told

    def _handlers(self) -> dict[signal.Signals, Callable[[], None]]:
        handlers: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self._on_term_signal,
            signal.SIGINT: self._on_stop_signal,
            signal.SIGHUP: self._on_restart_signal,
            signal.SIGUSR2: self._on_restart_signal,
            signal.SIGUSR1: self._on_reopen_signal,
            signal.SIGTTIN: functools.partial(self.resize, 1),
            signal.SIGTTOU: functools.partial(self.resize, -1),
        }
        if self._reaps_others:
            handlers[signal.SIGCHLD] = self._reap_orphans
        return handlers

    @property
    def _reaps_others(self) -> bool:
        return os.getpid() == 1 or self.renewal.count > 0

    def _on_term_signal(self) -> None:
        if self.lame_duck is None and self.plan.lame_duck and self.is_serving and not self.is_stopping:
            self.lame_duck = anyio.CancelScope()
            self.begin(self._be_lame_duck, self.lame_duck)
        elif self.is_lame_duck and self.lame_duck is not None:
            self.lame_duck.cancel()
        else:
            self._on_stop_signal()

    async def _be_lame_duck(self, scope: anyio.CancelScope) -> None:
        """Go on while load balancers learn to look elsewhere; then stop."""
        seconds = self.plan.lame_duck
        self.log.info("stopping in %g seconds: until then it serves, and is not ready any more (--lame-duck)", seconds)
        self._systemd.ask_for_time(seconds + self.plan.settings.drain_timeout + LEEWAY_SECONDS)
        scope.deadline = anyio.current_time() + seconds
        self.changes.announce()
        with scope:
            await anyio.sleep_forever()
        if not self.is_stopping:
            self._on_stop_signal()

    @property
    def is_lame_duck(self) -> bool:
        return self.lame_duck is not None and not self.is_stopping

    def _on_stop_signal(self) -> None:
        assert self._signals is not None
        # Also once the former handlers are back: one more on the way out must not change the status.
        self._signals.keep_ignoring((signal.SIGTERM, signal.SIGINT))
        self._stop_signals += 1
        if self._stop_signals > 1:
            self.log.warning("told to stop again: the deadline of the drain is now")
            self._hurry()
        self.stop()

    def _hurry(self) -> None:
        for worker in self.crew:
            worker.line.tell(FromAnchor.HURRY, {})
        if self._stop_deadline is not None:
            self._stop_deadline.deadline = min(self._stop_deadline.deadline, anyio.current_time() + HURRY_SECONDS)

    def stop(self) -> None:
        """Stop the service: workers accept no more, drain, and end; then this process does."""
        if self.is_stopping:
            return
        seconds = self.plan.settings.drain_timeout
        self.log.info("stopping: connections get %g seconds to end, and a second signal hurries them", seconds)
        self.is_stopping = True
        self._stopped.set()
        if self.roll_out is not None:
            self.roll_out.stop()
        for handover in self.fillings.values():
            handover.post(PredecessorEvent.STOP)
        self.changes.announce()

    def _on_reopen_signal(self) -> None:
        self.begin(self.reopen_logs)

    def _on_restart_signal(self) -> None:
        self.begin(self._restart_by_signal)

    async def _restart_by_signal(self) -> None:
        try:
            self.log.info("%s", await self.see_through(self.restart(), "settled"))
        except RestartWhileDraining as error:
            self.log.info("%s", error)
        except RestartError as error:
            self.log.error("the restart that a signal asked for failed: %s", error)  # noqa: TRY400 - it says it all

    def resize(self, step: int) -> None:
        """Change the number of workers."""
        self.crew.target = max(1, self.crew.target + step)
        self.log.info("%d workers from now on", self.crew.target)
        self.changes.announce()

    async def reopen_logs(self) -> int:
        """Let every process open its log files anew, where they were moved; return how many there were."""
        count = await run_in_thread(reopen_logs)
        number = next(self._numbers)
        asked = [worker for worker in self.crew if worker.state is not WorkerState.STARTING]
        for worker in asked:
            worker.line.tell(FromAnchor.REOPEN_LOGS, {"number": number})
        with anyio.move_on_after(REOPEN_SECONDS):
            await wait_until(
                self.changes, lambda: all(not worker.is_alive or worker.reopened[0] >= number for worker in asked)
            )
        count += sum(worker.reopened[1] for worker in asked if worker.reopened[0] >= number)
        self.log.info("reopened %s", counted(count, "log file"))
        return count

    @contextlib.contextmanager
    def spawning(self) -> Iterator[None]:
        """Let nobody else reap the processes that are started meanwhile."""
        self._spawning += 1
        try:
            yield
        finally:
            self._spawning -= 1
            # What was put off.
            if self._reaps_others:
                self._reap_orphans()

    @property
    def is_spawning(self) -> bool:
        """Whether a process is being started."""
        return self._spawning > 0

    @property
    def is_bound(self) -> bool:
        """Whether the service ends with this process, by systemd's will or a container's."""
        return self._systemd.is_there or os.getpid() == 1

    def _reap_orphans(self) -> None:
        """Reap those whose parent has died, and what the former code of this process has started."""
        while not self._spawning:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            if (process := find_process(found.si_pid)) is not None and process.returncode is None:
                process.reap()
            else:
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PID, found.si_pid, os.WEXITED | os.WNOHANG)

    # What it tells

    def _controlled(self) -> ControlHandlers:
        return ControlHandlers(
            status=lambda: account.describe_status(self),
            waiting_for=lambda: account.describe_wait(self),
            begin_restart=self._restart,
            find_report=self._find_report,
            stop=self.stop,
            reopen_logs=self.reopen_logs,
            check=self._check,
            compare=self._compare,
            workers=lambda: account.describe_waits(self),
            upgrade=self.renewal.upgrade,
            pass_all_on=self.renewal.pass_all_on,
            changes=self.changes,
        )

    def _restart(self) -> Restart:
        roll_out = self.restart(is_told=True)
        return Restart(roll_out.report, functools.partial(self.see_through, roll_out))

    @property
    def environment(self) -> Mapping[str, str]:
        """What the workers were started with, of which one stands for all."""
        worker = next((worker for worker in self.crew if worker.serves), None)
        return worker.environment if worker is not None else os.environ

    async def _check(self) -> dict[str, Any]:
        return await check_release(self.plan.settings, (), self.registry.entries, self.environment)

    def _compare(self, release: dict[str, Any]) -> dict[str, Any]:
        return compare(release, self.registry.entries, self.environment)

    def _find_report(self, id: str) -> RestartReport | None:
        return self.last_report if self.last_report is not None and self.last_report.id == id else None
