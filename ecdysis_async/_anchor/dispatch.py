"""What workers say to their anchor, and what is done about it, from the birth of a worker to its death."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import random
import socket
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._ipc.channel import Frame
from ecdysis_async._ipc.worker_link import (
    FromAnchor,
    FromWorker,
    WorkerLink,
    describe_loss,
    error_from_json,
    error_to_json,
)
from ecdysis_async._management.ledger import read_closed
from ecdysis_async._system.history import Note, history
from ecdysis_async._system.launch import Launch, describe_launch
from ecdysis_async._system.lock_file import LockFile
from ecdysis_async._system.process import Child, Process, Spawner, describe_exit, spawn
from ecdysis_async._system.stderr import duplicate_stderr
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async._system.trace_context import add_resource, trace_contexts
from ecdysis_async.errors import ChannelClosed, ChannelError, RestartError, SpawnFailed
from ecdysis_async.report import RestartReport, State, read_drain

from .metrics import note_end
from .metrics_files import MetricsFile, claim_file, drop_gauges, find_removed
from .pool import HandoffStatus, Slot, Worker
from .reaping import Reaper
from .rollout import call_off
from .sockets import HeldSockets
from .state import AnchorState, Begin, RollOut

__all__ = ["Dispatcher"]

# How many ends of workers wait until one serves that is told of them.
MAX_UNTOLD = 100

# How long a worker that has hung up may take to be dead, seconds.
HUNG_UP_SECONDS = 1.0

# How many descriptors come with a request for a process: a channel and a stderr.
SPAWN_DESCRIPTORS = 2

# Variables that systemd has meant for the anchor, and not for its workers.
ANCHORS_KEYS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class _PoolChild:
    """A worker as its handoff sees it: the handoff waits for the process and may end it, but the pool owns it."""

    def __init__(self, process: Process) -> None:
        self.pid = process.pid
        self.pidfd = process.pidfd
        self.wait = process.wait
        self.end = process.end
        self.let_go = process.let_go

    def close(self) -> None:
        """Do nothing: the pool closes the process."""


class Dispatcher:
    """What brings workers into the pool, hears them, and does what they ask for.

    Args:
        state: what the anchor knows.
        sockets: what the anchor holds; what workers create is added.
        reaper: what must not reap a process that is being started.
        log: the anchor's log.
        begin: runs something beside everything else.
        beat_seconds: how often a worker is to tell of itself.
        restart: begins a roll-out, of which it is said in words who asks for it; raises a ``RestartError``.
        see_through: waits until a roll-out is "serving", "settled" or "drained"; raises a ``RestartError``.
        stop: stops the service.
        lock_file: the file of the service's locks, which workers are passed; None for none.
        are_sockets_kept: says whether the service manager holds the sockets for the next start, should this process
            die.
    """

    def __init__(
        self,
        state: AnchorState,
        sockets: HeldSockets,
        reaper: Reaper,
        log: GenerationLog,
        *,
        begin: Begin,
        beat_seconds: float,
        restart: Callable[[str], RollOut],
        see_through: Callable[[RollOut, str], Awaitable[RestartReport]],
        stop: Callable[[], None],
        lock_file: LockFile | None = None,
        are_sockets_kept: Callable[[], bool] = lambda: False,
    ) -> None:
        self._state = state
        self._sockets = sockets
        self._reaper = reaper
        self.log = log
        self._lock_file = lock_file
        self._begin = begin
        self._beat_seconds = beat_seconds
        self._restart = restart
        self._see_through = see_through
        self._stop = stop
        self._are_sockets_kept = are_sockets_kept
        # The worker and the number of each request for a restart of the service that is not answered yet.
        self._askers: dict[tuple[Worker, int], RollOut] = {}
        # The ends of workers that no worker was told of yet.
        self._untold: deque[dict[str, Any]] = deque(maxlen=MAX_UNTOLD)

    # Birth

    def make_spawner(self, slot: Slot, generation: int, restart: str = "", starter: Worker | None = None) -> Spawner:
        """Return what starts a worker of a generation in a slot.

        Args:
            slot: the slot.
            generation: the generation.
            restart: the id of the restart that it is started for; empty where it is none.
            starter: the worker that asks for it, if one does.
        """
        return functools.partial(self._spawn, slot, generation, restart, starter)

    async def _spawn(
        self, slot: Slot, generation: int, restart: str, starter: Worker | None, channel: socket.socket, stderr: int
    ) -> Child:
        settings, former = self._state.config.settings, self._state.former_release
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise SpawnFailed(f"no line to a worker: {error}; is the limit of open files reached?") from error

        started: Launch | None = None
        environment: Mapping[str, str] = {}
        metrics_file: MetricsFile | None = None
        taken = {worker.metrics_file.id for worker in slot.workers if worker.metrics_file is not None}
        lock_file = self._lock_file.fileno() if self._lock_file is not None else -1

        def start() -> Process:
            nonlocal started, environment, metrics_file
            if former is not None:
                launch = dataclasses.replace(former, environment=dict(former.environment))
            else:
                launch, _ = describe_launch(
                    settings.command, settings.environment, settings.env_file, is_bound_to_directory=True
                )
            for key in ANCHORS_KEYS:
                launch.environment.pop(key, None)
            started, environment = launch.pin(), launch.environment
            metrics_file = claim_file(launch.environment, launch.directory, self._state.metrics_dir, slot.index, taken)
            if metrics_file is not None:
                launch = dataclasses.replace(launch, environment={**environment, **metrics_file.variables})
            if trace_contexts.is_wanted:
                launch.environment.update(
                    add_resource(
                        launch.environment,
                        service__instance__id=uuid.uuid4(),
                        ecdysis__slot=slot.index,
                        ecdysis__generation=generation,
                    )
                )
            trace = starter.trace if starter is not None else None
            return spawn(launch, channel, stderr, line=theirs, lock_file=lock_file, restart=restart, trace=trace)

        try:
            with self._reaper.spawning():
                process = await run_in_thread(start)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = Worker(generation, process, WorkerLink(ours), anyio.current_time(), starter, pid=process.pid)
        worker.launch = started
        worker.environment = environment
        worker.metrics_file = metrics_file
        config = self._state.config
        if config.max_requests is not None:
            jitter = random.randint(0, config.max_requests_jitter)  # noqa: S311 - no secret
            worker.request_limit = config.max_requests + jitter
        slot.workers.append(worker)
        history.note(Note.WORKER, slot=slot.index, child=process.pid, generation=generation)
        self.employ(slot, worker)
        return _PoolChild(process)

    def employ(self, slot: Slot, worker: Worker) -> None:
        """Welcome a worker of the pool, and look after it from now on."""
        worker.heard_at = anyio.current_time()
        stderr: list[int] = []
        # Without a descriptor for it, the worker writes where its predecessor did.
        with contextlib.suppress(OSError):
            stderr.append(duplicate_stderr())
        facts = {"beat_seconds": self._beat_seconds, "pid": os.getpid(), "keeps_sockets": self._are_sockets_kept()}
        worker.link.tell(FromAnchor.WELCOME, facts, stderr)
        if self._state.is_stopping:
            worker.is_told_to_leave = True
            worker.link.tell(FromAnchor.STOP, {})
        self._begin(self._attend, slot, worker)
        self._state.changes.announce()

    # Life and death

    async def _attend(self, slot: Slot, worker: Worker) -> None:
        """Hear a worker until it has died, and reap it."""
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(worker.link.run)
            task_group.start_soon(self._listen, slot, worker)
            status = await worker.process.wait()
            task_group.cancel_scope.cancel()
        if worker.metrics_file is not None:
            # While it has its place, no other worker is given its files.
            await run_in_thread(functools.partial(drop_gauges, worker.metrics_file))
        self._hear_rest(slot, worker)
        worker.exit_status = status
        if self._state.has_served and not worker.is_told_to_leave:
            history.write_from_now_on()
        history.note(Note.DIED, slot=slot.index, child=worker.pid, status=status, state=worker.state.value)
        worker.link.close()
        worker.process.close()
        slot.note_end(worker, anyio.current_time())
        note_end(self._state, slot, worker)
        if worker.state in (State.SERVING, State.PAUSED) and not worker.is_told_to_leave:
            self.log.warning("worker %d (pid %d) has died: %s", slot.index, worker.pid, describe_exit(status))
        elif worker.left_unasked and not worker.is_told_to_leave:
            self.log.warning(
                "worker %d (pid %d) has left, and nobody has told it to: %s",
                slot.index,
                worker.pid,
                describe_exit(status),
            )
        self._untold.append(
            {
                "pid": worker.pid,
                "worker": slot.index,
                "generation": worker.generation,
                "returncode": status,
                "was_expected": worker.is_told_to_leave or (worker.state is State.DRAINING and not worker.left_unasked),
            }
        )
        self._tell_application()
        for other in self._state.pool:
            if other is worker.starter:
                other.link.tell(FromAnchor.EXITED, {"pid": worker.process.pid, "status": status})
            if other.starter is worker:
                other.starter = None
        # Each worker would keep the one before it, and so all that there have ever been.
        worker.starter = None
        for asker in [asker for asker in self._askers if asker[0] is worker]:
            del self._askers[asker]
        self._state.changes.announce()

    def _tell_application(self) -> None:
        """Tell a worker that serves which others have ended: the application's code runs there, and not here."""
        worker = next((each for each in reversed(list(self._state.pool)) if each.serves), None)
        if worker is not None and not self._state.is_stopping:
            while self._untold:
                worker.link.tell(FromAnchor.WORKER_EXITED, self._untold.popleft())

    async def _listen(self, slot: Slot, worker: Worker) -> None:
        try:
            while True:
                self._hear(slot, worker, await worker.link.receive())
        except ChannelClosed as ended:
            error: ChannelError = ended
            # The worker has died, as will be known in a moment, or it leaves, and has said so.
            await anyio.sleep(HUNG_UP_SECONDS)
        except ChannelError as broken:
            error = broken
        # Without a link a worker leaves, if it lives. Its place is free from now on.
        worker.link.close()
        if not worker.is_told_to_leave and not worker.is_leaving:
            self.log.error("worker pid %d can be told nothing any more, and has to leave: %s", worker.pid, error)
            worker.state = State.DRAINING
            self._state.changes.announce()

    # What it says

    def hear_all(self) -> None:
        """Hear what the workers have said until now."""
        for slot in self._state.pool.slots:
            for worker in slot.workers:
                self._hear_rest(slot, worker)

    def _hear_rest(self, slot: Slot, worker: Worker) -> None:
        """Hear what a worker has said until now."""
        with contextlib.suppress(ChannelError):
            while (frame := worker.link.receive_nowait()) is not None:
                self._hear(slot, worker, frame)

    def _hear(self, slot: Slot, worker: Worker, frame: Frame) -> None:
        worker.silence = 0.0
        worker.heard += 1
        worker.heard_at = anyio.current_time()
        try:
            if frame.lost_descriptors:
                self._miss(worker, frame)
            else:
                self._obey(slot, worker, frame)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            # The worker is of another release, or broken.
            self.log.warning("worker pid %d says %r, which cannot be read: %r", worker.pid, frame.type, error)
            frame.close()

    def _miss(self, worker: Worker, frame: Frame) -> None:
        """Do without the descriptors that a worker has sent and this process has no room for."""
        loss = describe_loss(frame)
        self.log.error("worker pid %d cannot be obeyed: %s", worker.pid, loss)
        if frame.type == FromWorker.SPAWN:
            error = error_to_json(SpawnFailed(loss))
            worker.link.tell(FromAnchor.SPAWN_FAILED, {"number": int(frame.body["number"]), "error": error})

    def _obey(self, slot: Slot, worker: Worker, frame: Frame) -> None:
        """Do what a worker says; its descriptors are taken over, or closed.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it says something else than this release understands.
        """
        body = frame.body
        match frame.type:
            case FromWorker.SPAWN:
                if len(frame.descriptors) != SPAWN_DESCRIPTORS:
                    raise ValueError(f"it came with {len(frame.descriptors)} descriptors")
                self._begin(self._spawn_for, slot, worker, int(body["number"]), frame)
                return
            case FromWorker.CREATED:
                self._sockets.take(body["sockets"], frame.descriptors)
                return
            case FromWorker.BEAT:
                self._note_beat(slot, worker, body)
            case FromWorker.HANDOVER if worker.is_bypassed:
                # It has woken up, and speaks of a restart that is none of its business any more.
                pass
            case FromWorker.HANDOVER:
                worker.handoff = HandoffStatus(
                    PredecessorState(body["state"]) if body["state"] is not None else None,
                    bool(body["is_over"]),
                    RestartReport.from_json(body["report"]) if body["report"] is not None else None,
                    error_from_json(body["error"]) if body["error"] is not None else None,
                )
                self._state.changes.announce()
            case FromWorker.END:
                for other in slot.workers:
                    if other.process.pid == body["pid"]:
                        self._begin(other.process.end, float(body["grace"]))
            case FromWorker.RESTART:
                self._restart_for(slot, worker, int(body["number"]), str(body["until"]), body.get("trace"))
            case FromWorker.DESCRIPTION:
                self._state.description = str(body["text"])
            case FromWorker.REOPENED:
                worker.reopened = int(body["number"]), int(body["handlers"])
                self._state.changes.announce()
            case FromWorker.CANCEL:
                roll_out = self._askers.pop((worker, int(body["number"])), None)
                if roll_out is not None:
                    call_off(roll_out, self._state)
            case FromWorker.STOP:
                self._stop()
            case other:
                self.log.debug("worker pid %d says %r", worker.pid, other)
        frame.close()

    def _note_beat(self, slot: Slot, worker: Worker, body: dict[str, Any]) -> None:
        before, was_done = worker.state, worker.is_done_accepting
        worker.pid = int(body["pid"])
        worker.state = State(body["state"])
        # A worker of an earlier release does not say it.
        worker.is_done_accepting = bool(body.get("is_done_accepting", False))
        worker.connections = int(body["connections"])
        worker.requests = int(body["requests"])
        worker.rss = int(body["rss"]) if body["rss"] is not None else None
        worker.closed = read_closed(body.get("closed", {}))
        worker.exclusive = [
            (str(each["name"]), bool(each["is_held"]), anyio.current_time() - float(each["seconds"]))
            for each in body.get("exclusive") or ()
        ]
        worker.jobs = int(body.get("jobs", 0))
        worker.release = str(body.get("release", ""))
        worker.serving = [str(each) for each in body.get("serving", ())]
        # A worker of an earlier release counts what becomes of its connections only for its successor.
        worker.drain = read_drain(body.get("drain", {}))
        worker.cut_requests = [str(each) for each in body.get("cut_requests", ())]
        ends_in = body.get("ends_in")
        worker.ends_at = anyio.current_time() + float(ends_in) if ends_in is not None else None
        if worker.serves and math.isnan(worker.served_since):
            worker.served_since = anyio.current_time()
            if worker.metrics_file is not None and worker.metrics_file.found:
                self._begin(self._look_for_removed, slot, worker.metrics_file)
        if worker.state is State.SERVING and before is not State.SERVING:
            self._tell_application()
        if worker.state is State.DRAINING and before is not State.DRAINING:
            slot.note_leaving(worker, anyio.current_time())
        has_changed = (worker.state, worker.is_done_accepting) != (before, was_done)
        if has_changed or worker.find_replace_reason(self._state.config.max_rss) is not None:
            self._state.changes.announce()

    async def _look_for_removed(self, slot: Slot, file: MetricsFile) -> None:
        """Say so where a worker has removed what the others count."""
        if removed := await run_in_thread(functools.partial(find_removed, file)):
            self.log.warning(
                "while worker %d started, %d files of metrics of all workers were removed from %s: does the "
                "application remove them when it is imported? Leave that to --metrics-dir, which does so once",
                slot.index,
                len(removed),
                file.directory,
            )

    # What it asks for

    async def _spawn_for(self, slot: Slot, worker: Worker, number: int, frame: Frame) -> None:
        """Start the successor of a worker, which has asked for it."""
        end, stderr = frame.descriptors
        worker.trace = frame.body.get("trace")
        child: Child | None = None
        try:
            if worker.is_bypassed:
                os.close(end)
                raise SpawnFailed("this worker has not answered, and the anchor has started its successor")
            with socket.socket(fileno=end) as channel:
                spawner = self.make_spawner(slot, worker.successor_generation, worker.successor_restart, worker)
                child = await spawner(channel, stderr)
            descriptor = os.dup(child.pidfd)
        except (OSError, RestartError) as error:
            if child is not None:
                await child.end(0)
            failure = (
                error if isinstance(error, RestartError) else SpawnFailed(f"the worker cannot be watched: {error}")
            )
            worker.link.tell(FromAnchor.SPAWN_FAILED, {"number": number, "error": error_to_json(failure)})
        else:
            worker.link.tell(FromAnchor.SPAWNED, {"number": number, "pid": child.pid}, [descriptor])
        finally:
            os.close(stderr)

    def _restart_for(self, slot: Slot, worker: Worker, number: int, until: str, trace: str | None) -> None:
        """Restart the service because a worker's application asks for it.

        The request is decided at once. In the moment of an upgrade it must be refused, or be known to
        `dismiss_askers`, before the anchor is executed anew; and a worker that calls it off must find it.
        """
        try:
            roll_out = self._restart(f"the application, in worker {slot.index} (pid {worker.pid})")
        except RestartError as error:
            worker.link.tell(FromAnchor.VERDICT, {"number": number, "error": error_to_json(error)})
            return
        roll_out.caller = trace
        self._askers[worker, number] = roll_out
        self._begin(self._tell_verdict, worker, number, roll_out, until)

    async def _tell_verdict(self, worker: Worker, number: int, roll_out: RollOut, until: str) -> None:
        try:
            report = await self._see_through(roll_out, until)
        except RestartError as error:
            verdict = {"number": number, "error": error_to_json(error)}
        else:
            verdict = {"number": number, "report": report.to_json()}
        if self._askers.pop((worker, number), None) is not None:
            worker.link.tell(FromAnchor.VERDICT, verdict)

    def dismiss_askers(self) -> None:
        """Tell the workers that wait for a drain what there is to tell: the code that follows knows nothing of them."""
        for worker, number in tuple(self._askers):
            roll_out = self._askers.pop((worker, number))
            worker.link.tell(FromAnchor.VERDICT, {"number": number, "report": roll_out.report.to_json()})
