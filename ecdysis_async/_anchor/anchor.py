"""The anchor: the process with a stable pid that holds the sockets and runs the workers of a service.

It accepts nothing and imports no server. It starts workers and reaps them, replaces those that crash, hang or grow, and
rolls a new release out over them one after the other. Signals, commands, the pid file and systemd have to do with it.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any

import anyio

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import Gate
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._handoff.preflight import check_release, compare
from ecdysis_async._handoff.protocol import PredecessorEvent
from ecdysis_async._handoff.verdict import summarize
from ecdysis_async._ipc.worker_link import FromAnchor
from ecdysis_async._management.control_path import make_lock_file
from ecdysis_async._management.controlled import ControlHandlers
from ecdysis_async._management.management import LEEWAY_SECONDS, OwnManagement
from ecdysis_async._management.status import counted
from ecdysis_async._management.systemd import find_systemd
from ecdysis_async._management.tracing import Tracing
from ecdysis_async._system.history import SUFFIX, Note, history
from ecdysis_async._system.launch import UNFOLLOWED, find_unfollowed_link
from ecdysis_async._system.lock_file import LockFile
from ecdysis_async._system.log_files import reopen_logs
from ecdysis_async._system.signals import unblock_all_signals
from ecdysis_async._system.stacks import hear_questions, stop_hearing
from ecdysis_async._system.stderr import say
from ecdysis_async._system.terminal import is_in_foreground
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import RestartError
from ecdysis_async.report import State

from . import reexec, status
from .config import AnchorConfig
from .dispatch import Dispatcher
from .filling import Filler
from .hanging import HungWorkers
from .needs import OPENING_ERRORS, explain_failure
from .opening import Opener
from .pool import Slot
from .reaping import Reaper
from .reconcile import Reconciler, find_beat_seconds
from .reload import watch_files
from .restarts import Restarts
from .sockets import HeldSockets
from .state import AnchorState, Filled, Life, wait_until
from .upgrade import Upgrade

__all__ = ["STARTUP_FAILED", "Anchor"]

# The exit status where the service does not start.
STARTUP_FAILED = 3
USAGE = 2

# How long a worker may take to open its log files anew, seconds.
REOPEN_SECONDS = 5.0
# How long workers have at a stop besides the drain and the exit_timeout, seconds.
EXIT_SECONDS = 7.0
# How long they have once they were told to hurry, seconds.
HURRY_SECONDS = 5.0


class _AnchorLog(GenerationLog):
    """Puts the anchor's pid before each line."""

    def __init__(self) -> None:
        super().__init__(0, name="anchor")
        self.speak()


class Anchor:
    """The anchor of one service.

    Args:
        config: what it runs.
        body: what the former code has left (``AnchorState.describe``), of this process or of another anchor.
        former_pid: the pid of that other anchor.
    """

    def __init__(
        self, config: AnchorConfig, body: Mapping[str, Any] | None = None, former_pid: int | None = None
    ) -> None:
        self.log = _AnchorLog()
        self._config = config
        self._former_pid = former_pid
        self._held_sockets = HeldSockets(self.log)
        # Former code of this process has had its handlers, which hide what the process was started with.
        is_same_process = body is not None and former_pid is None
        self._is_in_foreground = bool(body and body.get("foreground")) if is_same_process else is_in_foreground()
        # The pipe of signals that the former code has not acted upon; -1 for none.
        self._signals_before = -1
        if body is None:
            lock_file = -1
            self._state = AnchorState.fresh(config)
        else:
            self._held_sockets.restore(body["sockets"])
            lock_file = int(body.get("lock_file", -1))
            self._state = AnchorState.restore(config, body)
            self._signals_before = int(body["signals"])
            os.set_inheritable(self._signals_before, False)
        if lock_file >= 0:
            os.set_inheritable(lock_file, False)
        # Former code of an earlier release has none.
        self._lock_file = LockFile(lock_file) if lock_file >= 0 else make_lock_file(config.control_path)
        systemd = find_systemd(config.systemd)
        # As PID 1 it is the parent of every orphan, and new code is the parent of what the former code has started.
        self._reaper = Reaper(reaps_orphans=os.getpid() == 1 or self._state.is_follower)
        self._hung_workers = HungWorkers(self._state, self.log, begin=self._begin, fill=self._fill)
        self._restarts = Restarts(
            self._state,
            self._held_sockets,
            self.log,
            begin=self._begin,
            fill=self._fill,
            hung_workers=self._hung_workers,
            tell_restart=self._tell_restart,
            tell_end=self._tell_that_it_serves,
        )
        self._dispatcher = Dispatcher(
            self._state,
            self._held_sockets,
            self._reaper,
            self.log,
            lock_file=self._lock_file,
            begin=self._begin,
            beat_seconds=find_beat_seconds(config, systemd.watchdog),
            restart=self._restarts.begin,
            see_through=self._restarts.see_through,
            stop=self._stop,
            are_sockets_kept=lambda: self._management.keeps_sockets,
        )
        self._reconciler = Reconciler(
            self._state,
            self._held_sockets,
            self.log,
            begin=self._begin,
            fill=self._fill,
            bypass=self._hung_workers.bypass,
            watchdog=systemd.watchdog,
        )
        systemd.is_sound = self._reconciler.has_sound_worker
        self._upgrade = Upgrade(
            self._state,
            self._dispatcher,
            self._reaper,
            self.log,
            begin=self._begin,
            describe=self._describe,
            is_bound=systemd.is_there or os.getpid() == 1,
        )
        # Behind the gate of the control socket is the server of commands. The workers' sockets have no gate here.
        self._control_plane = DataPlane(self._held_sockets.control, Gate(), Tracker())
        self._management = OwnManagement(
            self.log,
            systemd,
            self._held_sockets.service,
            control=self._handle_commands(),
            signals=self._handle_signals(),
            describe=functools.partial(status.describe, self._state),
            is_accepting=self._keeps_what_is_open,
            plane=self._control_plane,
            control_path=config.control_path,
            control_access=config.control_access,
            pid_file=config.settings.pid_file,
            hung_up=self._on_hang_up if self._is_in_foreground else None,
            takes_activation=config.systemd is not False,
        )
        self._opener = Opener(self._state, self._held_sockets, self._management, self.log, self._begin)
        self._filler = Filler(
            self._state,
            self._held_sockets.service,
            self.log,
            self._dispatcher.make_spawner,
            self._opener.publish_before_first,
        )
        # The number of each request to open log files anew.
        self._numbers = itertools.count(1)
        self._stop_signals = 0
        # How long the workers get to end, once they were told to.
        self._stop_deadline: anyio.CancelScope | None = None

    # From its start to its end

    async def run(self) -> int:
        """Serve until the service is stopped, and return the exit status."""
        management = self._management
        self._stopped = anyio.Event()
        # Ends the time as a lame duck.
        self._lame_duck = anyio.CancelScope()
        async with AsyncExitStack() as resources:
            # What a crash has left is the next start's, where this start has failed.
            resources.callback(lambda: self._held_sockets.close(unlink=self._state.has_served))
            resources.callback(self._opener.remove_metrics_dir)
            resources.callback(self._close_lock_file)
            resources.callback(management.close)
            management.handle_signals()
            self._begin_history(resources)
            if self._signals_before >= 0:
                reexec.repeat_signals(self._signals_before)
            unblock_all_signals()
            async with anyio.create_task_group() as self._tasks:
                exit_status = await self._open_and_run(resources)
                self._tasks.cancel_scope.cancel()
        return exit_status

    def _begin_history(self, resources: AsyncExitStack) -> None:
        """Write down from now on what happens, for those who ask: all processes of the service do, in one file."""
        if self._config.traces:
            tracing = Tracing()
            tracing.begin()
            resources.callback(tracing.end)
        if self._config.control_path is None:
            return
        history.open(self._config.control_path + SUFFIX)
        hear_questions()
        resources.callback(history.close)
        resources.callback(stop_hearing)
        facts = {"generation": self._state.generation, "upgrades": self._state.upgrades}
        history.note(Note.BEGUN, role="anchor", workers=len(self._state.pool.slots), **facts)

    def _close_lock_file(self) -> None:
        # The file of a service that has not come up may be another one's, which runs.
        if self._state.has_served or self._lock_file.is_new:
            self._lock_file.remove(self._config.control_path)
        self._lock_file.close()

    async def _open_and_run(self, resources: AsyncExitStack) -> int:
        try:
            await self._open(resources)
        except OPENING_ERRORS as error:
            say(explain_failure(error))
            self._management.systemd.begin()
            await self._tell_failure(error)
            return STARTUP_FAILED
        return await self._run()

    async def _open(self, resources: AsyncExitStack) -> None:
        """Open what the service needs, before the first worker.

        Raises:
            OSError, LookupError, ValueError: something cannot be opened, and no worker serves; the text says what to
                do.
        """
        management = self._management
        try:
            management.claim(has_predecessor=self._state.is_follower)
        finally:
            management.start(self._tasks)
        await self._control_plane.gate.open()
        resources.push_async_callback(self._withdraw)
        await self._opener.open()

    async def _run(self) -> int:
        state, management = self._state, self._management
        self._tasks.start_soon(self._reconciler.watch)
        if self._config.reload is not None and self._config.control_path is not None:
            # The watching begins before the workers load what is watched, so that nothing saved meanwhile is missed.
            self._begin(watch_files, self._config.control_path, self._config.reload)
        error = None
        if self._state.is_follower:
            management.become_main()
            for slot in state.pool.slots:
                for worker in slot.workers:
                    self._dispatcher.employ(slot, worker)
        else:
            management.begin(self._config.settings.ready_timeout + LEEWAY_SECONDS)
            self._held_sockets.note_start()
            error = await self._start_first()
        if error is None and not state.is_stopping:
            await self._announce_serving()
            self._tasks.start_soon(self._reconciler.manage)
            await self._stopped.wait()
        elif error is not None:
            await self._tell_failure(error)
            state.life = Life.STOPPING
        if self._refuses_newcomers:
            # Workers answer the clients that queue by now.
            self._held_sockets.refuse_newcomers()
        await self._end_all()
        if state.has_served:
            management.leave_to_next_start(is_orderly=False)
        await management.finish()
        history.note(Note.ENDED, generation=state.generation)
        if error is not None and not self._stopped.is_set():
            if error.is_usage:
                # The worker has said which option, in the words of all others.
                return USAGE
            # What else the worker has written stands above.
            say(f"the service does not start: {error.args[0]}")
            return STARTUP_FAILED
        self.log.info("the service has ended")
        return 0

    async def _withdraw(self) -> None:
        """Remove the pid file, however this process ends."""
        with anyio.CancelScope(shield=True):
            await self._management.withdraw(has_successor=False)

    async def _tell_failure(self, error: Exception) -> None:
        # The unit's status is one line; all of it stands in the journal.
        why = summarize(error) if isinstance(error, RestartError) else str(error)
        is_usage = isinstance(error, RestartError) and error.is_usage
        self._management.failed(f"the start has failed: {why}", error, USAGE if is_usage else STARTUP_FAILED)
        await self._management.systemd.synchronize()

    def _keeps_what_is_open(self) -> bool:
        """Say whether systemd shall keep the sockets of the workers for the case of a crash.

        It is not told of them while a release is rolled out, which may have opened some and may be taken back.
        """
        state = self._state
        return state.has_served and not state.is_stopping and not state.is_rolling

    async def _fill(self, slot: Slot, generation: int) -> Filled:
        return await self._filler.fill(slot, generation)

    async def _start_first(self) -> RestartError | None:
        """Start all workers: one alone, which may show that none can, then the others."""
        state = self._state
        first = await self._fill(state.pool.enlarge(), state.generation)
        if first.error is not None or state.is_stopping:
            return first.error
        self._held_sockets.drop_unclaimed([first.report])
        others = [state.pool.enlarge() for _ in range(state.pool.target - len(state.pool.slots))]
        errors = []

        async def fill(slot: Slot) -> None:
            errors.append((await self._fill(slot, state.generation)).error)

        async with anyio.create_task_group() as task_group:
            for slot in others:
                task_group.start_soon(fill, slot)
        return next((error for error in errors if error is not None), None)

    async def _announce_serving(self) -> None:
        state = self._state
        if state.life is Life.STARTING:
            state.life = Life.SERVING
        state.has_served = True
        await self._opener.publish()
        control = f", control socket {self._config.control_path}" if self._config.control_path is not None else ""
        verb = f"upgraded (pid {os.getpid()} as before): " if self._state.is_follower else ""
        if self._former_pid is not None:
            verb = f"taken over from pid {self._former_pid}: "
            # So far the workers are the former anchor's: of its command line, its environment and its code.
            self._restarts.begin_by_signal(f"the takeover from pid {self._former_pid}")
        self.log.info("%s%s %s%s", verb, counted(len(state.pool.slots), "worker"), state.description, control)
        if (link := await run_in_thread(find_unfollowed_link)) is not None:
            self.log.warning(UNFOLLOWED, link)
        self._tell_that_it_serves()
        state.changes.announce()

    def _tell_restart(self, limit: float, *, is_told: bool) -> None:
        self._management.tell_restart(limit, is_told=is_told)

    def _tell_that_it_serves(self) -> None:
        """Tell systemd that the service serves, and which sockets to keep in case of a crash."""
        try:
            self._management.park()
        finally:
            self._management.serving()

    @property
    def _refuses_newcomers(self) -> bool:
        """Whether nobody comes after this service, with whom clients could wait."""
        return self._state.has_served and not self._management.keeps_sockets

    async def _end_all(self) -> None:
        """Let every worker leave, and end those that do not; nobody queues where none accepts any more."""
        state = self._state
        drain_timeout = self._config.settings.drain_timeout

        def are_gone() -> bool:
            return not any(state.pool) and not state.fillings

        def are_done_accepting() -> bool:
            return not state.fillings and all(worker.is_done_accepting for worker in state.pool)

        self._management.leaving(drain_timeout + LEEWAY_SECONDS)
        self._call_fillings_off()
        for worker in state.pool:
            worker.is_told_to_leave = True
            worker.link.tell(FromAnchor.STOP, {})
        exit_timeout = self._config.settings.exit_timeout
        with anyio.move_on_after(drain_timeout + exit_timeout + EXIT_SECONDS) as self._stop_deadline:
            if self._stop_signals > 1:
                self._hurry()
            if self._refuses_newcomers:
                await wait_until(state.changes, are_done_accepting)
                self._held_sockets.stop_listening()
            await wait_until(state.changes, are_gone)
        for worker in tuple(state.pool):
            self.log.error("worker pid %d has not ended in time: it is killed", worker.pid)
            worker.process.send_signal(signal.SIGKILL)
        await wait_until(state.changes, are_gone)

    def _call_fillings_off(self) -> None:
        for handoff in self._state.fillings.values():
            handoff.post(PredecessorEvent.STOP)

    def _begin(self, function: Callable[..., Coroutine[Any, Any, object]], /, *arguments: object) -> None:
        """Run something beside everything else. A defect in it ends that, and never the service."""

        async def run() -> None:
            try:
                await function(*arguments)
            except Exception:
                self.log.exception("%s broke down", function.__name__.strip("_"))
                self._state.changes.announce()

        self._tasks.start_soon(run)

    def _describe(self) -> tuple[dict[str, Any], list[int]]:
        """Return what the next code has to know, and the descriptors that it names."""
        body, descriptors = self._state.describe()
        sockets, numbers = self._held_sockets.describe()
        signals, lock_file = self._management.fileno(), self._lock_file.fileno()
        facts = {
            "sockets": sockets,
            "signals": signals,
            "lock_file": lock_file,
            "foreground": self._is_in_foreground,
        }
        return {**body, **facts}, [*descriptors, *numbers, signals, lock_file]

    # What it is told

    def _handle_signals(self) -> dict[signal.Signals, Callable[[], None]]:
        handlers: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self._on_term_signal,
            signal.SIGINT: self._on_stop_signal,
            signal.SIGHUP: functools.partial(self._restarts.begin_by_signal, signal.SIGHUP.name),
            signal.SIGUSR2: functools.partial(self._restarts.begin_by_signal, signal.SIGUSR2.name),
            signal.SIGUSR1: self._begin_reopening,
            signal.SIGTTIN: functools.partial(self._resize, 1),
            signal.SIGTTOU: functools.partial(self._resize, -1),
        }
        if self._reaper.reaps_orphans:
            handlers[signal.SIGCHLD] = self._reaper.reap
        return handlers

    def _on_term_signal(self) -> None:
        state = self._state
        if state.life is Life.LAME_DUCK:
            self._lame_duck.cancel()
        elif self._config.lame_duck and state.life in (Life.SERVING, Life.UPGRADING):
            state.life = Life.LAME_DUCK
            state.lame_duck_ends = self._lame_duck.deadline = anyio.current_time() + self._config.lame_duck
            self._begin(self._be_lame_duck)
        else:
            self._on_stop_signal()

    async def _be_lame_duck(self) -> None:
        """Go on while load balancers learn to look elsewhere; then stop."""
        seconds = self._config.lame_duck
        self.log.info("stopping in %g seconds: until then it serves, and is not ready any more (--lame-duck)", seconds)
        self._management.systemd.ask_for_time(seconds + self._config.settings.drain_timeout + LEEWAY_SECONDS)
        self._state.changes.announce()
        with self._lame_duck:
            await anyio.sleep_forever()
        if not self._state.is_stopping:
            self._on_stop_signal()

    def _on_stop_signal(self) -> None:
        # This holds also once the former handlers are back: one more on the way out must not change the exit status.
        self._management.ignore_on_the_way_out(signal.SIGTERM, signal.SIGINT)
        self._stop_signals += 1
        if self._stop_signals > 1:
            self.log.warning("told to stop again: the deadline of the drain is now")
            self._hurry()
        self._stop()

    def _on_hang_up(self) -> None:
        if self._state.is_stopping:
            return
        self.log.info("the terminal is gone")
        self._management.ignore_on_the_way_out(signal.SIGHUP)
        self._lame_duck.cancel()
        self._stop()

    def _hurry(self) -> None:
        for worker in self._state.pool:
            worker.link.tell(FromAnchor.HURRY, {})
        if self._stop_deadline is not None:
            self._stop_deadline.deadline = min(self._stop_deadline.deadline, anyio.current_time() + HURRY_SECONDS)

    def _stop(self) -> None:
        """Stop the service: workers accept no more, drain, and end; then this process does."""
        if self._state.is_stopping:
            return
        seconds = self._config.settings.drain_timeout
        self.log.info("stopping: connections get %g seconds to end, and a second signal hurries them", seconds)
        self._state.life = Life.STOPPING
        self._stopped.set()
        self._call_fillings_off()
        self._state.changes.announce()

    def _resize(self, step: int) -> None:
        """Change the number of workers."""
        pool = self._state.pool
        pool.target = max(1, pool.target + step)
        self.log.info("%d workers from now on", pool.target)
        self._state.changes.announce()

    def _begin_reopening(self) -> None:
        self._begin(self._reopen_logs)

    async def _reopen_logs(self) -> int:
        """Let every process open its log files anew, where they were moved; return how many there were."""
        count = await run_in_thread(reopen_logs)
        # Numbers begin anew with each anchor; a worker that drains may have heard of one before.
        number, request = next(self._numbers), os.urandom(8).hex()
        # One that starts may have opened files already. It reads this once its application is imported.
        for worker in self._state.pool:
            worker.link.tell(FromAnchor.REOPEN_LOGS, {"number": number, "request": request})
        asked = [worker for worker in self._state.pool if worker.state is not State.STARTING]
        with anyio.move_on_after(REOPEN_SECONDS):
            await wait_until(
                self._state.changes,
                lambda: all(not worker.is_alive or worker.reopened[0] >= number for worker in asked),
            )
        count += sum(worker.reopened[1] for worker in asked if worker.reopened[0] >= number)
        self.log.info("reopened %s", counted(count, "log file"))
        return count

    # What it answers

    def _handle_commands(self) -> ControlHandlers:
        state, sockets = self._state, self._held_sockets
        return ControlHandlers(
            status=lambda: status.describe_status(state, sockets.service.entries),
            look_up=lambda: status.look_up_status(state),
            waiting_for=lambda: status.describe_wait(state),
            begin_restart=self._restarts.begin_by_command,
            find_report=self._restarts.find_report,
            stop=self._stop,
            reopen_logs=self._reopen_logs,
            check=self._check,
            compare=self._compare,
            workers=lambda: status.describe_waits(state),
            upgrade=self._upgrade.upgrade,
            pass_all_on=self._upgrade.pass_all_on,
            changes=state.changes,
        )

    async def _check(self) -> dict[str, Any]:
        entries, pool = self._held_sockets.service.entries, self._state.pool
        place = status.describe_workers_place(pool)
        settings = self._config.settings
        return await check_release(settings, (), entries, pool.environment, place, is_bound_to_directory=True)

    def _compare(self, release: dict[str, Any]) -> dict[str, Any]:
        entries, pool = self._held_sockets.service.entries, self._state.pool
        return compare(release, entries, pool.environment, status.describe_workers_place(pool))
