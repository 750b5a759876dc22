"""How a generation leaves: it accepts no more, its connections drain, and what it has opened is brought to its end."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import weakref
from collections.abc import Callable

import anyio

from ecdysis_async._connections.sender import Sender, socketpair
from ecdysis_async._handoff.protocol import (
    DrainMessage,
    PredecessorEvent,
    PredecessorState,
    SuccessorEvent,
    SuccessorState,
)
from ecdysis_async._ipc.channel import encode
from ecdysis_async._ipc.peer import wait_for_death
from ecdysis_async._management.management import LEEWAY_SECONDS
from ecdysis_async._sockets.entry import Until
from ecdysis_async._system.exit_deadline import ExitDeadline
from ecdysis_async._system.forking import withhold_from_children
from ecdysis_async._system.history import Note, history
from ecdysis_async._system.tasks import abandoned_tasks, all_tasks, describe_task
from ecdysis_async._system.wording import name_setting
from ecdysis_async.errors import RestartError
from ecdysis_async.report import Phase, State

from .arriving import tell_of_unread
from .backlogs import Backlogs
from .life import Life, Stop

__all__ = ["EXIT_SECONDS", "Leaving", "first_of"]

# How often a draining generation tells the newest one how many connections are left, seconds.
PROGRESS_SECONDS = 1.0

# How long the connections of "exit" listeners get once everything else has drained, seconds.
EXIT_SECONDS = 1.0

# When it is written down for the first time whom a drain waits for, seconds; each later time comes twice as late.
FIRST_WAIT_SECONDS = 0.25
# A stop whose drain takes so long may have to be explained, seconds.
LONG_SECONDS = 4.0

# How long an older generation may take besides its drain and its exit_timeout, seconds (see ancestors.py).
GRACE_SECONDS = 6.0

# How many tasks and connections are named at the most, where they are lost.
NAMED_AT_MOST = 10


class Leaving:
    """The way of one generation out: :meth:`begin`, :meth:`stop_accepting`, :meth:`drain`, :meth:`finish`.

    Args:
        life: of this generation.
    """

    def __init__(self, life: Life) -> None:
        self._life = life
        # Whether this generation was ever to accept, as it was when it began to leave.
        self._has_served = False
        self._exit = ExitDeadline(self._tell_what_kept)
        # A duplicate of the channel to the successor: the last word is said after everything else is closed.
        self._last_word: socket.socket | None = None
        # The tasks that were there before the block: what becomes of them is none of its business.
        self._former_tasks = weakref.WeakSet(all_tasks())

    @property
    def _backlogs(self) -> Backlogs:
        life = self._life
        limit = life.generation.settings.drain_timeout
        management = life.management
        # Where the anchor has died, nothing serves to the exit either.
        kinds = tuple(Until) if management.is_orphaned else (Until.DRAIN,)
        return Backlogs(life.plane, life.generation.log, limit, is_shared=management.keeps_sockets, kinds=kinds)

    def stop(self, how: Stop = Stop.ASKED) -> None:
        """Stop this generation, and call off a restart that is under way, or stop its successor as well."""
        life = self._life
        self._tell("stopping%s", " (partially)" if how is Stop.PARTIAL else "")
        if life.is_leaving:
            if how is Stop.TOLD and life.stop is not Stop.TOLD:
                # The application has stopped its service by itself, and now the process is to end as well.
                life.stop = how
                self._expect_exit()
            return
        life.stop = how
        if life.inheritance is not None and not life.inheritance.state.final:
            life.inheritance.post(SuccessorEvent.STOP_HERE)
        elif life.handover is not None and not life.handover.state.final:
            life.handover.post(PredecessorEvent.STOP)
        else:
            if life.state is State.STARTING:
                # The start is cut short: no client is served yet, and the stop would have to wait for its end.
                life.body.cancel()
            self.begin()

    def _tell(self, message: str, *arguments: object) -> None:
        """Tell a step of the way out, which is all that there is to read at a stop; a restart has its own two lines."""
        life = self._life
        level = logging.DEBUG if life.has_successor else life.management.level
        life.generation.log.log(level, message, *arguments)

    def leave_place(self) -> None:
        """Accept no more, at once: another process does so already, since this one did not answer."""
        life = self._life
        life.is_superseded = True
        life.stop = Stop.TOLD
        # A restart of its own that is called off would accept again.
        life.plane.gate.forbid()
        if life.handover is not None and not life.handover.state.final:
            life.handover.post(PredecessorEvent.CANCELLED, RestartError("this worker has been replaced without it"))
        life.generation.log.warning("this worker did not answer, and was replaced: it answers what it has accepted")
        self.begin()

    def abandon(self) -> None:
        """Stop, and keep no address: nobody goes on with them, and the next start has to have them at once."""
        was_leaving = self._life.is_leaving
        self.stop(Stop.TOLD)
        if was_leaving:
            self._life.task_group.start_soon(self._close_listeners)

    def expect_end(self) -> None:
        """See that this process ends, though its loop may not turn, and cannot begin to leave. Called in any thread."""
        settings = self._life.generation.settings
        limit = settings.drain_timeout + EXIT_SECONDS + settings.exit_timeout
        self._set_exit_deadline(limit + (settings.exit_timeout + GRACE_SECONDS if self._has_others else 0))

    def _expect_exit(self) -> None:
        """The same, once its connections have ended, and those of the older generations that it waits for."""
        if self._life.drained.is_set() and not self._has_others:
            self._set_exit_deadline(self._life.generation.settings.exit_timeout)
        else:
            self.expect_end()

    def begin(self) -> None:
        """Accept no more, and begin to drain; there is no way back. It may be called where no task can be started."""
        life = self._life
        if life.is_leaving:
            return
        # A successor may be stopped when it was told to accept, and could not note yet that it does.
        is_committed = life.inheritance is not None and life.inheritance.state is SuccessorState.STOPPED
        self._has_served = life.is_accepting or is_committed
        life.state = State.DRAINING
        # Everybody who learns that this generation leaves knows by then whether connections move: none is to be sent
        # away that could.
        life.plane.tracker.moves = life.has_successor
        life.plane.tracker.leave()
        if not life.has_successor:
            limit = life.generation.settings.drain_timeout + LEEWAY_SECONDS
            life.management.leaving(limit, is_partial=life.stop is Stop.PARTIAL)
        self.expect_end()
        life.leaving.set()

    def _set_exit_deadline(self, seconds: float) -> None:
        """See that this process ends, where it is to, whatever its application has left behind (G10)."""
        if self._life.is_process_to_end:
            # A program may have more to do than to serve. Where nothing took the service's place, that is its business.
            is_replaced = self._life.has_successor or self._life.management.owns_process
            self._exit.set(seconds, unconditionally=is_replaced)

    def note_left(self) -> None:
        """Take note that the block is left: what still runs is none of this generation's business."""
        self._exit.note_left()

    def _tell_what_kept(self, kept: list[str]) -> None:
        """Say what has kept this process from ending: in the log, and to the successor, for the report.

        This is called in a thread, at the very end. The loop may be blocked, or closed.
        """
        life = self._life
        life.generation.log.error(
            "this process has not ended %g s after its drain, and is ended by force (%s); it was kept by %s",
            life.generation.settings.exit_timeout,
            name_setting("exit_timeout"),
            "; ".join(kept) or "nothing that can be seen from here",
        )
        if self._last_word is not None:
            with contextlib.suppress(OSError), self._last_word:
                self._last_word.send(encode(DrainMessage.FORCED, {"kept": kept}, 0))

    async def run(self) -> None:
        """Wait until this generation leaves, and see its connections to their end."""
        life = self._life
        # The block waits for the drain, also where it is cancelled from outside; so this task must not be.
        with anyio.CancelScope(shield=True):
            await life.leaving.wait()
            try:
                try:
                    await self.stop_accepting()
                finally:
                    # The application hears of it last: it may close its servers then, and those who queue there are to
                    # be answered first.
                    life.finished.set()
                await self.drain()
            except Exception:
                # What has drained has, and the rest ends with this process.
                life.generation.log.exception("the drain broke down")
            finally:
                life.drained.set()
                self._expect_exit()

    async def stop_accepting(self) -> None:
        """Accept no more, for good; what waits in a queue that nobody goes on with is answered first."""
        life, gate = self._life, self._life.plane.gate
        if life.handover is not None and life.handover.state is PredecessorState.STOPPING:
            # The successor is being ended; where the commit had failed, it may accept until it is dead.
            await life.handover.over.wait()
        async with life.generation.gate_lock:
            if life.has_successor or not self._is_last():
                await self._backlogs.finish(
                    life.handover.unclaimed if life.handover is not None and not life.is_superseded else ()
                )
            else:
                await self._backlogs.answer()
            is_final = life.has_successor or life.management.is_orphaned
            await gate.end(spare=lambda entry: entry.until is Until.EXIT and not is_final)
        if life.management.is_orphaned:
            await self._close_listeners()

    async def _close_listeners(self) -> None:
        """Close every socket that is listened on, while connections drain."""
        life = self._life
        async with life.generation.gate_lock:
            await life.plane.gate.end()
            life.plane.registry.close(unlink=not life.has_successor)

    def _is_last(self) -> bool:
        """Say whether no generation of this slot will accept after this one; where in doubt, another one will (G2).

        A successor that died after it had settled may have had a successor of its own, which cannot be asked any more.
        So where there was none, nobody answers who waits on the sockets: they are reset when this generation ends.
        """
        if not self._has_served or self._life.is_superseded:
            return False
        inheritance, handover = self._life.inheritance, self._life.handover
        if inheritance is not None and inheritance.state not in (SuccessorState.SETTLED, SuccessorState.STOPPED):
            return False
        # A successor that has stopped by itself during its probation answers for as long as it lives. One that was
        # called back accepts no more.
        return handover is None or handover.state is PredecessorState.ROLLED_BACK or handover.successor_is_dead

    async def drain(self) -> None:
        """Wait for the connections, or pass them on, until the deadline; then cut those that are left."""
        life, tracker, gate = self._life, self._life.plane.tracker, self._life.plane.gate
        # By the system's clock it is told how long this has taken: uvloop's counts whole milliseconds.
        begun, started = anyio.current_time(), time.monotonic()
        log, timeout = life.generation.log, life.generation.settings.drain_timeout
        life.drain_deadline = begun + timeout
        life.management.changed()
        self._tell("draining %d connections, for %g seconds at the most", len(tracker), timeout)
        restart = life.handover.report.id if life.handover is not None and life.has_successor else None
        history.note(Note.DRAIN, restart=restart, connections=len(tracker), seconds=timeout)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self._tell_progress)
            task_group.start_soon(self._note_waits, restart)
            if life.has_successor:
                await tracker.drain(timeout, move=self._move_connections)
            else:
                await tracker.drain(timeout, kinds=(Until.DRAIN,))
            task_group.cancel_scope.cancel()
        async with life.generation.gate_lock:
            if self._is_last():
                await self._backlogs.empty([each for each in gate.acceptors if each.entry.has_queue])
            await gate.end()
        await tracker.drain(min(EXIT_SECONDS, timeout))
        count = tracker.count
        self._tell("the drain has ended: %s", count)
        life.management.changed()
        cut = tracker.describe_cut()
        for each in cut:
            log.warning("cut at the deadline: %s", each)
        if life.handover is not None and life.has_successor:
            report = life.handover.report
            report.drain, report.cut_requests = count, cut
            report.phases[Phase.DRAIN] = time.monotonic() - started
            history.note(Note.DRAINED, restart=restart, report=report.to_json())
            life.management.restart_changed(life.handover)
            await life.handover.tell(
                DrainMessage.DRAINED, {"report": report.to_json(), "counts": life.counting.own.to_json()}
            )
            with contextlib.suppress(OSError):  # no descriptor is left: then the log alone tells
                self._last_word = life.handover.duplicate_channel()
                if self._last_word is not None:
                    withhold_from_children(self._last_word)

    async def _note_waits(self, restart: str | None) -> None:
        """Write down whom the drain waits for, more and more seldom, and a few of them by name."""
        tracker, seconds = self._life.plane.tracker, FIRST_WAIT_SECONDS
        while history.path is not None:
            await anyio.sleep(seconds)
            if seconds >= LONG_SECONDS:
                history.write_from_now_on()
            seconds *= 2
            connections = tracker.connections()
            requests = [what for each in connections[:NAMED_AT_MOST] for what in each.describe()][:NAMED_AT_MOST]
            history.note(Note.WAITS, restart=restart, connections=len(connections), requests=requests)

    async def _move_connections(self, on_swept: Callable[[], None]) -> None:
        """Pass on to the successor what can go on there."""
        handover, tracker, log = self._life.handover, self._life.plane.tracker, self._life.generation.log
        assert handover is not None
        # The successor is told first that the restart has settled.
        await handover.over.wait()
        try:
            ours, theirs = socketpair()
        except OSError as error:
            tracker.moves = False
            log.warning("no connection can be passed on: %s", error)
            return
        # Both ends are closed also where the goodbyes begin, which cancels this, before the successor could be told.
        with ours:
            with theirs:
                await handover.tell(DrainMessage.TRANSFER, {}, [theirs.fileno()])
            try:
                await Sender(ours, tracker, log).run(handover.successor_died, on_swept)
            except Exception:
                # A defect of this library, or no memory: it may cost the transfer, never the drain.
                log.exception("the transfer broke down; what is left drains here")

    async def _tell_progress(self) -> None:
        while self._life.has_successor and self._life.handover is not None:
            life = self._life
            counts = life.counting.own.to_json()
            tracker = life.plane.tracker
            progress = {
                "connections": len(tracker) - tracker.jobs,
                "jobs": tracker.jobs,
                "ends_in": life.ends_in,
                "counts": counts,
                "serving": tracker.describe(NAMED_AT_MOST),
            }
            await self._life.handover.tell(DrainMessage.PROGRESS, progress)
            await anyio.sleep(PROGRESS_SECONDS)

    def hurry(self) -> None:
        """Let the deadline of the drain be now."""
        self._life.plane.tracker.hurry()

    def hurry_all(self) -> None:
        """Let the deadline be now, that of the older generations too."""
        self.hurry()
        self._life.task_group.start_soon(self._life.generation.lineage.hurry)

    def hurry_if_nobody_listens(self) -> None:
        """Let the deadline be now where systemd waits for the end of this process to start the service anew.

        That is so where the successor, which is the main process, has died, and the service was told to stop. Nobody
        listens until then, which costs more than what drains here.
        """
        life = self._life
        if life.management.is_supervised and life.stop_signals and life.has_successor and life.handed_over.is_set():
            life.generation.log.warning("the successor is dead, and the service is stopped: the deadline is now")
            self.hurry()

    # The end of the block

    async def finish(self, error: BaseException | None) -> BaseException | None:
        """Bring everything to its end that the block has begun, and be cut short by no cancellation.

        Args:
            error: what the body has raised, if it has.

        Returns:
            The last cancellation that came meanwhile, which is still to be raised.
        """
        left = anyio.Event()

        async def leave() -> None:
            try:
                with anyio.CancelScope(shield=True):
                    await self._finish(error)
            finally:
                left.set()

        cancelled: BaseException | None = None
        self._life.task_group.start_soon(leave)
        while not left.is_set():
            try:
                with anyio.CancelScope(shield=True):
                    await left.wait()
            except anyio.get_cancelled_exc_class() as cancellation:
                # asyncio's own cancellation knows no shield, and means that there is no time for the whole drain.
                cancelled = cancellation
                self.hurry()
        return cancelled

    async def _finish(self, error: BaseException | None) -> None:
        life = self._life
        log, management = life.generation.log, life.management
        tell_of_unread(life)
        is_orderly = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        if not is_orderly:
            management.failed(f"generation {life.generation.number} has failed: {error!r}", error)
        has_begun = life.has_begun
        # A caller that was called off has no say in it.
        if not has_begun and is_orderly and not life.is_aborted:
            log.warning("the block is left without ready(): nothing was ever accepted")
        if life.inheritance is not None and not life.inheritance.state.final:
            life.inheritance.post(SuccessorEvent.STOP_HERE if is_orderly else SuccessorEvent.FAILED, error)
            await life.inheritance.over.wait()
        if not is_orderly and (life.is_aborted or not isinstance(error, Exception)):
            # Cancelled, interrupted, or failed on probation: then the predecessor waits for this process' death.
            self.hurry()
        await self._let_handover_end()
        self.begin()
        await life.drained.wait()
        if life.handover is not None:
            await life.handover.over.wait()
        if life.has_successor:
            await management.main_process_named()
        else:
            await management.outlive(self._wait_for_others)
            self._set_exit_deadline(life.generation.settings.exit_timeout)
        await management.withdraw(has_successor=life.is_aborted or life.has_successor)
        self._close_sockets(has_served=has_begun and not life.is_aborted, is_orderly=is_orderly)
        await management.finish()
        history.note(Note.ENDED, generation=life.generation.number)
        self._tell("this generation ends")

    def tell_what_is_abandoned(self) -> None:
        """Name the application's own tasks that nobody waits for: they are lost when its loop ends."""
        tasks = abandoned_tasks(self._former_tasks)
        if not tasks or not self._has_served:
            return
        self._life.generation.log.warning(
            "left behind at the end of this generation, and lost when its loop ends: %s%s; "
            "what is done within `async with ecdysis_async.track()` is waited for",
            "; ".join(f"task {task.get_name()}: {describe_task(task.get_coro())}" for task in tasks[:NAMED_AT_MOST]),
            f"; and {len(tasks) - NAMED_AT_MOST} more" if len(tasks) > NAMED_AT_MOST else "",
        )

    async def _let_handover_end(self) -> None:
        """See a restart through that is under way while the body leaves: call it off, or let it settle."""
        handover = self._life.handover
        if handover is None or handover.state.final or self._life.state is State.DRAINING:
            return
        if not handover.committed:
            handover.post(PredecessorEvent.CANCELLED)
        else:
            await first_of(handover.serving, handover.over)
            handover.post(PredecessorEvent.SETTLE)
        await handover.over.wait()

    @property
    def _has_others(self) -> bool:
        """Whether other generations of the service may be there, for whose end this one waits."""
        life = self._life
        if life.has_successor or life.is_aborted or life.management.owns_process:
            return False
        return bool(life.older_generations) or not (life.handover is None or life.handed_over.is_set())

    async def _wait_for_others(self) -> None:
        """Wait for all other generations of the service: one that has stopped leaves nobody behind.

        They have as long to drain as this one, and as long to end.
        """
        life, settings = self._life, self._life.generation.settings
        if not self._has_others:
            return
        older = life.older_generations
        if older:
            life.generation.log.info(
                "waiting for older generations to end: %s", ", ".join(each.describe() for each in older)
            )
        life.management.changed()
        with anyio.move_on_after(settings.drain_timeout + EXIT_SECONDS + settings.exit_timeout + GRACE_SECONDS):
            if life.handover is not None and life.management.is_supervised:
                await life.handed_over.wait()
            if life.settled.is_set():
                await life.generation.lineage.outlive()
            elif not life.management.is_supervised:
                # Their words are the predecessor's business, and so is the predecessor: this process hears neither.
                for each in older:
                    await wait_for_death(each.peer.pidfd)

    def _close_sockets(self, *, has_served: bool, is_orderly: bool) -> None:
        life, registry = self._life, self._life.plane.registry
        if not has_served:
            # The predecessor serves on what it handed down, or the next start on what a crash has left. What was made
            # here goes.
            for entry in registry.entries:
                registry.release(entry, unlink=not entry.inherited)
            return
        if not life.has_successor:
            life.management.leave_to_next_start(is_orderly=is_orderly)
        registry.close(unlink=not life.has_successor)


async def first_of(*events: anyio.Event) -> None:
    """Wait until one of several events has happened."""

    async def wait(event: anyio.Event) -> None:
        await event.wait()
        task_group.cancel_scope.cancel()

    async with anyio.create_task_group() as task_group:
        for event in events:
            task_group.start_soon(wait, event)
