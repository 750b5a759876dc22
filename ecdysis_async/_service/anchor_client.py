"""A worker is managed by its anchor: it tells how it is, takes orders, and has its successor started and ended.

This is the worker's end of the link between them (``_ipc/worker_link.py``). Nothing is decided here: the generation
carries out what it is told.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import GateState
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._handoff.predecessor import PredecessorSide
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
from ecdysis_async._management.ledger import count_closed
from ecdysis_async._management.management import Management
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._system.descriptors import duplicate_all
from ecdysis_async._system.memory import resident_bytes
from ecdysis_async._system.process import UNKNOWN_STATUS, Child
from ecdysis_async._system.release import describe_release
from ecdysis_async._system.trace_context import trace_contexts
from ecdysis_async.errors import ChannelError, RestartError, SpawnFailed
from ecdysis_async.report import RestartReport

from .anchor_watch import DEATH_SECONDS, AnchorWatch
from .worker_exit import WorkerExit, tell_application

__all__ = ["AnchorClient", "WorkerCommands"]

logger = logging.getLogger("ecdysis_async")

# How often a worker tells of itself until its anchor has said how often it shall, seconds.
BEAT_SECONDS = 1.0

# How many requests of a worker that drains its anchor is told of.
MAX_TOLD = 10

# How often it is looked whether the anchor whose link has ended is dead, seconds; that is a matter of milliseconds.
DEATH_POLL_SECONDS = 0.005

# How long the connections of a worker may last whose anchor has died, where systemd starts the service anew once all
# workers have gone, seconds. Clients wait until then.
LAST_SECONDS = 1.0

GONE = "the anchor of this worker is gone, and nobody can restart or stop the service: this worker drains and ends"


@dataclass(frozen=True, slots=True)
class WorkerCommands:
    """What an anchor can order of a generation, and learn of it.

    Attributes:
        begin_restart: begins to replace this worker by one of the generation that is given, for a restart of the
            service whose id is given, where the anchor has told it; raises a ``RestartError``.
        stop: lets this worker leave.
        leave_place: lets this worker leave, because another one has its place already, and accepts.
        abandon: lets this worker leave, and leave its addresses at once: nobody else goes on with them.
        note_death: takes note that the anchor has died, in a thread: the loop may not turn.
        reopen_logs: opens log files anew that were moved, for a request of an id; tells how many.
        note_report: takes note of the last restart of the service.
        state: tells where it stands.
        take_stderr: is given the anchor's stderr, which is the service's, and owns it.
        ends_in: tells within how many seconds its drain ends; None while none is under way.
        exclusives: tells what it holds, or waits for, that one process of the service holds at a time.
    """

    begin_restart: Callable[[int, str | None], PredecessorSide]
    stop: Callable[[], None]
    leave_place: Callable[[], None]
    abandon: Callable[[], None]
    note_death: Callable[[], None]
    reopen_logs: Callable[[str], Awaitable[int]]
    note_report: Callable[[RestartReport], None]
    state: Callable[[], str]
    take_stderr: Callable[[int], None] = os.close
    ends_in: Callable[[], float | None] = lambda: None
    exclusives: Callable[[], list[dict[str, Any]]] = list


@dataclass(slots=True)
class _Answer:
    """An answer of the anchor's that somebody waits for: a frame, or None if none will come."""

    come: anyio.Event = field(default_factory=anyio.Event)
    frame: Frame | None = None

    def give(self, frame: Frame | None) -> None:
        self.frame = frame
        self.come.set()


class _AnchorsChild:
    """A successor whose parent is the anchor."""

    def __init__(self, client: AnchorClient, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._client = client
        self._exited = anyio.Event()
        self._status = UNKNOWN_STATUS

    async def wait(self) -> int:
        await self._exited.wait()
        return self._status

    async def end(self, grace: float) -> int:
        if not self._exited.is_set():
            self._client.tell(FromWorker.END, {"pid": self.pid, "grace": grace})
        return await self.wait()

    async def let_go(self) -> None:
        """Nothing: systemd knows the anchor, and not the worker."""

    def close(self) -> None:
        self._client.forget(self)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def note_exit(self, status: int) -> None:
        """Take note of how it ended; ``UNKNOWN_STATUS`` where nobody will tell any more."""
        if not self._exited.is_set():
            self._status = status
            self._exited.set()


class AnchorClient(Management):
    """A worker, of which the anchor speaks for the service: it is told, and asked, over a link. Owns the link.

    What there is one of in a service is the anchor's business: pid file, control socket, systemd, most signals.

    Args:
        sock: the link.
        plane: the sockets and connections of this generation.
        commands: what the anchor can order.
        log: of this generation.
        signals: what is to be done at which signal, of those that are left to a worker.

    Attributes:
        spawner: the anchor starts the successors of its workers.
        level: the anchor tells once what each of its workers does.
        probation: it says when all workers have been on probation for long enough.
        owns_process: a worker is nothing but its generation.
        keeps_sockets: the other workers, and the anchor, have the sockets as well, until the anchor dies; systemd may
            have them after that.
    """

    level = logging.DEBUG
    probation = math.inf
    owns_process = True
    keeps_sockets = True

    def __init__(
        self,
        sock: socket.socket,
        plane: DataPlane,
        commands: WorkerCommands,
        log: GenerationLog,
        signals: Mapping[signal.Signals, Callable[[], None]],
    ) -> None:
        super().__init__(log, signals)
        self.spawner = self.spawn
        self._link = WorkerLink(sock)
        # Whether the sockets outlive the anchor: systemd has them in its store, and clients wait for the next start.
        self._are_sockets_kept = False
        self._watch = AnchorWatch(sock, self._find_unkept, commands.note_death)
        self._resources.callback(self._link.close)
        # First, while the link is open: its end means something.
        self._resources.callback(self._watch.close)
        self._anchor_pid = self._link.peer_pid
        self._watch.watch(self._anchor_pid)
        self._plane = plane
        self._commands = commands
        self._numbers = itertools.count(1)
        self._answers: dict[int, _Answer] = {}
        self._children: dict[int, _AnchorsChild] = {}
        self._handover: PredecessorSide | None = None
        # Sockets that other workers have made. This worker passes them on, and does not accept there.
        self._passed_on: list[Entry] = []
        self._due = anyio.Event()
        self._beat_seconds = BEAT_SECONDS
        self._has_lost_anchor = False

    # What a generation tells its management

    def start(self, task_group: TaskGroup) -> None:
        super().start(task_group)
        task_group.start_soon(self.run)

    async def finish(self) -> None:
        # The last word of this worker tells all that it has counted.
        self.tell(FromWorker.BEAT, self._describe())
        await self._link.flush()

    def is_anchor(self, pid: int) -> bool:
        return pid == self._anchor_pid

    async def prepare(self, describe: Callable[[], str]) -> None:
        self._share_created()
        # What a worker has made is its own until then: where it fails, nobody else removes the path.
        self._plane.registry.owns_paths = False
        # It is sent before this worker serves, so that the anchor has it by then, which says it once for all workers.
        self.tell(FromWorker.DESCRIPTION, {"text": describe()})

    def announce(self, description: str) -> None:
        self._log.debug("%s", description)

    def changed(self) -> None:
        self._due.set()

    def restart_changed(self, handover: PredecessorSide) -> None:
        if handover is self._handover:
            self._tell_handover(handover)

    # What it tells

    def tell(self, message: FromWorker, body: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Let ``run`` send a message, after those before it; the descriptors are taken over."""
        self._link.tell(message, body, descriptors)

    def _tell_handover(self, handover: PredecessorSide) -> None:
        self.tell(
            FromWorker.HANDOVER,
            {
                "state": handover.state.value,
                "is_over": handover.over.is_set(),
                "report": handover.report.to_json(),
                "error": error_to_json(handover.error) if handover.error is not None else None,
            },
        )

    def _share_created(self) -> None:
        """Let the anchor have what this generation has created, so that the other workers, and later ones, get it."""
        created = [entry for entry in self._plane.registry.entries if not entry.inherited]
        if created:
            descriptions, descriptors = self._plane.registry.describe(created)
            self.tell(FromWorker.CREATED, {"sockets": descriptions}, duplicate_all(descriptors))

    # What it asks

    async def restart(self, until: str, here: Callable[[str], Awaitable[RestartReport]]) -> RestartReport:
        """Ask the anchor to restart the service, and wait for what becomes of it.

        Cancelling it calls the restart off, as far as the anchor can still do so.

        Raises:
            RestartError: what the anchor says, or that there is none any more.
        """
        number = next(self._numbers)
        try:
            trace = trace_contexts.find_current()
            facts = {"until": until} if trace is None else {"until": until, "trace": trace}
            frame = await self._ask(number, FromWorker.RESTART, facts)
        except anyio.get_cancelled_exc_class():
            self.tell(FromWorker.CANCEL, {"number": number})
            raise
        if frame is None:
            raise RestartError(GONE)
        frame.close()
        if frame.body.get("error") is not None:
            raise error_from_json(frame.body["error"])
        report = RestartReport.from_json(frame.body["report"])
        self._commands.note_report(report)
        return report

    def stop(self, here: Callable[[], None]) -> None:
        """Ask the anchor to stop the service, and with it this worker."""
        self.tell(FromWorker.STOP, {})

    async def spawn(self, channel: socket.socket, stderr: int) -> Child:
        """Have the anchor start a successor.

        Raises:
            SpawnFailed: it could not.
        """
        number = next(self._numbers)
        descriptors = duplicate_all((channel.fileno(), stderr))
        trace = trace_contexts.find(self._handover.log.restart) if self._handover is not None else None
        frame = await self._ask(number, FromWorker.SPAWN, {"trace": trace} if trace is not None else {}, descriptors)
        if frame is None:
            raise SpawnFailed(GONE)
        if frame.type == FromAnchor.SPAWN_FAILED:
            frame.close()
            raise error_from_json(frame.body["error"])
        child = _AnchorsChild(self, int(frame.body["pid"]), *frame.descriptors)
        self._children[child.pid] = child
        return child

    def forget(self, child: _AnchorsChild) -> None:
        """Expect no word of a child any more."""
        if self._children.get(child.pid) is child:
            del self._children[child.pid]

    # What it does

    async def run(self) -> None:
        """Serve the anchor until it is gone; then let this worker leave."""
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._link.run)
            self._tasks.start_soon(self._beat)
            try:
                while True:
                    for frame in self._take_back([await self._link.receive(), *self._receive_rest()]):
                        self._hear(frame)
            except ChannelError as error:
                logger.warning("%s (%s)", GONE, error)
            # A link may also be given up by an anchor that lives, and serves on with the other workers.
            with anyio.move_on_after(DEATH_SECONDS):
                while not self._watch.is_proven:  # noqa: ASYNC110 - it may not be known which process that is
                    await anyio.sleep(DEATH_POLL_SECONDS)
            self._has_lost_anchor = True
            self._link.give_up()
            for answer in self._answers.values():
                answer.give(None)
            for child in tuple(self._children.values()):
                child.note_exit(UNKNOWN_STATUS)
            if self._watch.is_proven:
                # Workers that served on could not be restarted, stopped or asked, nor be replaced when they crash: all
                # of that was the anchor's. So the next start gets the addresses at once. Where systemd keeps them, they
                # stay as they are, paths included: who comes until the next start waits for it.
                self.is_orphaned, self.keeps_sockets = True, self._are_sockets_kept
                self._plane.registry.owns_paths &= not self._are_sockets_kept
                self._commands.abandon()
            else:
                self._commands.stop()
            if self.is_orphaned and self._are_sockets_kept:
                await anyio.sleep(LAST_SECONDS)
                self._plane.tracker.hurry()
            self._tasks.cancel_scope.cancel()

    def _find_unkept(self) -> Collection[Entry]:
        """Return the sockets on which nobody may queue once the anchor is dead."""
        return () if self._are_sockets_kept else self._plane.registry.entries

    async def _beat(self) -> None:
        while True:
            # Changes in one turn of the loop are told together.
            self._due = anyio.Event()
            self.tell(FromWorker.BEAT, self._describe())
            with anyio.move_on_after(self._beat_seconds) as waiting:
                await self._due.wait()
            if waiting.cancelled_caught:
                await self._plane.tracker.prune_all()

    def _describe(self) -> dict[str, Any]:
        gate = self._plane.gate
        return {
            "pid": os.getpid(),
            "state": self._commands.state(),
            # That includes "exit" listeners, whose queues are answered last (Backlogs.answer).
            "is_done_accepting": gate.state is GateState.ENDED and not gate.acceptors,
            "connections": len(self._plane.tracker),
            "requests": self._plane.tracker.requests,
            "closed": count_closed(self._plane.tracker),
            "rss": resident_bytes(),
            "ends_in": self._commands.ends_in(),
            "exclusive": self._commands.exclusives(),
            "jobs": self._plane.tracker.jobs,
            "release": describe_release(),
            **self._describe_drain(self._plane.tracker),
        }

    @staticmethod
    def _describe_drain(tracker: Tracker) -> dict[str, Any]:
        if not tracker.draining.is_set():
            return {"serving": []}
        return {
            "serving": tracker.describe(MAX_TOLD),
            "drain": asdict(tracker.count),
            "cut_requests": tracker.describe_cut(),
        }

    def _receive_rest(self) -> Iterator[Frame]:
        """Return what has come behind the last message. What is wrong with the link, the next one that waits learns."""
        with contextlib.suppress(ChannelError):
            while (frame := self._link.receive_nowait()) is not None:
                yield frame

    def _take_back(self, frames: list[Frame]) -> list[Frame]:
        """Leave out an order to make a successor that was taken back before it could be obeyed.

        That is so where this loop was blocked, and the anchor has not waited for it.
        """
        kept = []
        is_taken_back = False
        for frame in reversed(frames):
            if frame.type == FromAnchor.RESTART and is_taken_back:
                frame.close()
                continue
            is_taken_back |= frame.type in (FromAnchor.REVERT, FromAnchor.STOP)
            kept.append(frame)
        return kept[::-1]

    def _hear(self, frame: Frame) -> None:
        try:
            if frame.lost_descriptors and frame.type != FromAnchor.WELCOME:
                self._miss(frame)
            else:
                self._obey(frame)
        except Exception as error:
            # The anchor is of another release, or no descriptor is left. That costs what was ordered, and no client.
            logger.exception("the anchor's %r could not be carried out", frame.type)
            if frame.type == FromAnchor.RESTART:
                self._refuse(RestartError(f"the worker (pid {os.getpid()}) could not do it: {error!r}"))

    def _miss(self, frame: Frame) -> None:
        """Say that this process has no room for the descriptors of an order."""
        loss = describe_loss(frame)
        logger.error("the anchor cannot be obeyed: %s", loss)
        if frame.type == FromAnchor.RESTART:
            self._refuse(RestartError(loss))
        elif frame.type == FromAnchor.SPAWNED and (answer := self._answers.get(frame.body["number"])) is not None:
            # Without its pidfd nobody could watch the successor.
            self._discard(frame)
            answer.give(Frame(FromAnchor.SPAWN_FAILED, {"error": error_to_json(SpawnFailed(loss))}))

    def _obey(self, frame: Frame) -> None:
        body = frame.body
        match frame.type:
            case FromAnchor.WELCOME:
                for descriptor in frame.descriptors:
                    self._commands.take_stderr(os.dup(descriptor))
                self._beat_seconds = float(body["beat_seconds"])
                self._are_sockets_kept = bool(body.get("keeps_sockets", False))
                # Another process than the one that has made the link may be the anchor by now.
                if (pid := int(body.get("pid", self._anchor_pid))) != self._anchor_pid:
                    self._anchor_pid = pid
                    self._watch.watch(pid)
                self.changed()
            case FromAnchor.RESTART:
                self._pass_on(body["sockets"], frame.descriptors)
                # An anchor of an earlier release does not say which restart that is.
                restart = body.get("restart")
                trace_contexts.note(str(restart), body.get("trace"))
                self._restart(int(body["generation"]), str(restart) if restart is not None else None)
                return
            case FromAnchor.SETTLE if self._handover is not None:
                self._handover.post(PredecessorEvent.SETTLE)
            case FromAnchor.REVERT if self._handover is not None:
                self._revert(self._handover, error_from_json(body["error"]))
            case FromAnchor.STOP if body.get("replaced"):
                self._commands.leave_place()
            case FromAnchor.STOP:
                self._commands.stop()
            case FromAnchor.HURRY:
                self._plane.tracker.hurry()
            case FromAnchor.REOPEN_LOGS:
                self._tasks.start_soon(self._reopen_logs, body["number"], str(body.get("request", "")))
            case FromAnchor.WORKER_EXITED:
                self._tasks.start_soon(tell_application, WorkerExit.from_json(body))
            case FromAnchor.EXITED if (child := self._children.get(body["pid"])) is not None:
                child.note_exit(int(body["status"]))
            case FromAnchor.SPAWNED | FromAnchor.SPAWN_FAILED | FromAnchor.VERDICT:
                answer = self._answers.get(body["number"])
                if answer is not None:
                    answer.give(frame)
                else:
                    self._discard(frame)
                return
            case _:
                # An anchor of another release may say more than this release knows.
                logger.debug("the anchor says %r", frame.type)
        frame.close()

    def _restart(self, generation: int, restart: str | None) -> None:
        try:
            handover = self._commands.begin_restart(generation, restart)
        except RestartError as error:
            self._refuse(error)
            return
        self._handover = handover
        self._tasks.start_soon(self._tell_end, handover)

    def _refuse(self, error: RestartError) -> None:
        self.tell(FromWorker.HANDOVER, {"state": None, "is_over": True, "report": None, "error": error_to_json(error)})

    async def _tell_end(self, handover: PredecessorSide) -> None:
        await handover.over.wait()
        if handover.error is not None:
            while self._passed_on:
                self._plane.registry.release(self._passed_on.pop())
        self._tell_handover(handover)
        self.changed()

    async def _reopen_logs(self, number: int, request: str) -> None:
        self.tell(FromWorker.REOPENED, {"number": number, "handlers": await self._commands.reopen_logs(request)})

    def _revert(self, handover: PredecessorSide, error: RestartError) -> None:
        if handover.state is PredecessorState.PROBATION:
            # It is called back and not killed: clients are being served there.
            handover.post(PredecessorEvent.RECALL, error)
        else:
            handover.post(PredecessorEvent.CANCELLED, error)

    def _pass_on(self, descriptions: list[dict[str, Any]], descriptors: Sequence[int]) -> None:
        registry = self._plane.registry
        known = {_identity(entry.sock.fileno()) for entry in registry.entries}
        fresh = []
        for description, descriptor in zip(descriptions, descriptors, strict=True):
            if _identity(descriptor) in known:
                os.close(descriptor)
            else:
                fresh.append((description, descriptor))
        before = set(registry.entries)
        registry.inherit([description for description, _ in fresh], [descriptor for _, descriptor in fresh])
        self._passed_on += [entry for entry in registry.entries if entry not in before]

    async def _ask(
        self, number: int, message: FromWorker, body: dict[str, Any], descriptors: Sequence[int] = ()
    ) -> Frame | None:
        answer = self._answers[number] = _Answer()
        try:
            if self._has_lost_anchor:
                for descriptor in descriptors:
                    os.close(descriptor)
                return None
            self.tell(message, {"number": number, **body}, descriptors)
            await answer.come.wait()
        except BaseException:
            if answer.frame is not None:
                self._discard(answer.frame)
            raise
        finally:
            del self._answers[number]
        return answer.frame

    def _discard(self, frame: Frame) -> None:
        """Undo what nobody waits for any more."""
        if frame.type == FromAnchor.SPAWNED:
            self.tell(FromWorker.END, {"pid": frame.body["pid"], "grace": 0})
        frame.close()


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino
