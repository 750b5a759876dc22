# ruff: noqa: B027 - what does nothing in the base class is for those kinds that have somebody to tell
"""How a service speaks to the outside, and is spoken to: signals, control socket, systemd, pid file.

A generation, and an anchor, tell their management of each change, and do what it asks. Neither asks which kind it is.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._handoff.ancestors import Ancestor
from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import DrainMessage
from ecdysis_async._handoff.stash import InheritedStash, Stashes
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.claims import take_activation
from ecdysis_async._system.exit_deadline import describe_main_thread
from ecdysis_async._system.process import Spawner
from ecdysis_async._system.signals import SignalReceiver, can_handle_signals, handled_signals
from ecdysis_async._system.terminal import is_terminal_gone
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import ChannelError, RestartUnsupported
from ecdysis_async.report import RestartReport

from .control_access import ControlAccess
from .control_server import NAME as CONTROL_NAME
from .control_server import ControlServer
from .controlled import ControlHandlers
from .descriptor_store import DescriptorStore
from .pid_file import PidFile
from .systemd import Systemd
from .systemd_unit import check_unit, find_shortcoming, forbid_restart

__all__ = ["LEEWAY_SECONDS", "Management", "OwnManagement"]

# What a restart may take at most besides ready_timeout and probation, and a stop besides drain_timeout, seconds.
LEEWAY_SECONDS = 60.0

# How often systemd is told how the service is, seconds.
STATUS_SECONDS = 5.0

# How long a successor waits until its predecessor has made it the main process, seconds.
MAIN_SECONDS = 10.0

# How long the predecessor waits for the word that the successor's pid file is in place, seconds.
PUBLISH_SECONDS = 5.0

# How often a process that serves the control socket for good looks whether it is still there, seconds.
CONTROL_SECONDS = 1.0


# How long after its SIGHUP a terminal may still be there, seconds.
HANG_UP_SECONDS = 0.1


class Management(abc.ABC):
    """Speaks for the service of one generation to the outside, and is spoken to.

    A method that does nothing here is for those kinds that have somebody to tell.

    Args:
        log: of the generation.
        signals: what is to be done at which signal.

    Attributes:
        spawner: who starts a successor; None: this process does.
        level: at which level the log has the steps that somebody at the service's log wants to read.
        probation: how long a successor is on probation, where that is not the generation's to say, seconds.
        is_supervised: whether systemd ends what is left of the service when its last process ends, and starts it anew.
        owns_process: whether this process is nothing but its generation, and is to end with it.
        keeps_sockets: whether somebody holds the sockets open after the last generation, so that clients wait there.
        is_orphaned: whether the process that held the service together has died, so that the next start is to have
            the addresses at once.
        control_path: where commands reach the service through this process, if they do.
    """

    spawner: Spawner | None = None
    level = logging.INFO
    probation: float | None = None
    is_supervised = False
    owns_process = False
    keeps_sockets: bool = False
    is_orphaned: bool = False
    control_path: str | None = None

    def __init__(self, log: GenerationLog, signals: Mapping[signal.Signals, Callable[[], None]]) -> None:
        self._log = log
        self._handlers = signals
        self._signals: SignalReceiver | None = None
        self._resources = ExitStack()

    # From its start to its end

    async def open(self, *, has_predecessor: bool) -> None:
        """Claim what there is one of in a service, before the application prepares itself.

        Args:
            has_predecessor: whether the sockets come from a predecessor.

        Raises:
            OSError: another service has the control socket, or its directory is not safe.
        """

    def handle_signals(self) -> None:
        """Act upon signals, once :meth:`start` was called; those that come earlier are kept until then."""
        if not self._handlers:
            return
        if not can_handle_signals():
            self._log.warning(
                "off the main thread, and off POSIX, no signals can be handled: call restart() and stop() instead"
            )
            return
        self._signals = self._resources.enter_context(handled_signals(self._handlers, self._tell_delay))

    def _tell_delay(self, signals: Collection[str], seconds: float) -> None:
        """Say that the loop is blocked: called in a thread. A restart, or a stop, has to wait for it."""
        self._log.warning(
            "the event loop has not turned for %.0f s, and %s waits for it: the main thread stands %s",
            seconds,
            ", ".join(signals) or "a signal",
            describe_main_thread(),
        )

    def start(self, task_group: TaskGroup) -> None:
        """Begin to listen, in tasks of this group."""
        if self._signals is not None:
            task_group.start_soon(self._signals.run)

    def begin(self, limit: float) -> None:
        """Note that nobody has started this process as a successor: it speaks from its start on.

        Args:
            limit: how long its start may take, seconds.
        """

    async def finish(self) -> None:
        """Return when all that was told is sent, or nobody takes it: this process is about to end."""

    def close(self) -> None:
        """Let go of what was opened; former handlers of signals come back. Harmless if done already."""
        self._resources.close()

    def ignore_on_the_way_out(self, *signals: signal.Signals) -> None:
        """Let signals be ignored from the end of this block on: one more must not change the exit status."""
        if self._signals is not None:
            self._signals.keep_ignoring(signals)

    # What the application of this process asks for

    @abc.abstractmethod
    async def restart(self, until: str, here: Callable[[str], Awaitable[RestartReport]]) -> RestartReport:
        """Have the service restarted: by this generation, or by the anchor of all workers.

        Args:
            until: how far to wait: "serving", "settled" or "drained".
            here: restarts this generation.

        Raises:
            RestartError: why it failed.
        """

    @abc.abstractmethod
    def stop(self, here: Callable[[], None]) -> None:
        """Have the service stopped.

        Args:
            here: stops this generation.
        """

    def check_restart(self) -> None:
        """See whether a restart is possible.

        Raises:
            RestartUnsupported: it would end the service.
        """

    def check_takeover(self) -> None:
        """See whether a process that was not started from here may be the successor.

        Raises:
            RestartUnsupported: it would end the service.
        """

    def is_anchor(self, pid: int) -> bool:
        """Say whether a process is the anchor of this one, which neither serves nor drains."""
        return False

    # What it is told

    async def prepare(self, describe: Callable[[], str]) -> None:
        """Do what can fail before the generation is ready.

        Args:
            describe: says what is about to be served.

        Raises:
            OSError: the pid file cannot be written.
        """

    async def publish(self) -> None:
        """Let this process be the one that the pid file names.

        Raises:
            OSError: it cannot be written any more.
        """

    async def succeed(self, predecessor: Ancestor) -> None:
        """Let what names the service name this process, because the restart it came from is final."""

    def announce(self, description: str) -> None:
        """Say in the log what is served, for the first time."""
        self._log.info("%s", description)

    def serving(self) -> None:
        """Say that the service serves, also where it does so again after a restart that has failed."""

    def changed(self) -> None:
        """Wake those who look on: the state of the generation, of its restart or its drain is another one."""

    def park(self) -> None:
        """See that the sockets on which clients can wait now are the ones that are kept in case of a crash."""

    def restart_asked(self) -> None:
        """Answer a signal at once that asks for a restart, also where it is going to be refused."""

    def restart_refused(self) -> None:
        """Say that the restart which a signal has asked for has come to nothing."""

    def restart_begins(self) -> None:
        """Take note of a restart that is about to begin."""

    async def announce_restart(self, limit: float, *, is_told: bool) -> None:
        """Say that a restart begins.

        Args:
            limit: how long it may take, seconds.
            is_told: the service manager may know of it, because it has asked for it.
        """

    def restart_changed(self, handover: PredecessorSide) -> None:
        """Take note of where a restart of this generation stands."""

    async def hand_main_process_to(self, handover: PredecessorSide) -> None:
        """Make the successor the service's main process, once and for good."""

    async def main_process_named(self) -> None:
        """Return when the successor of the last restart is the service's main process for everybody outside."""

    def become_main(self) -> None:
        """Take over from the predecessor, which has made this process the main one, or is dead."""

    def failed(self, why: str, error: BaseException | None, status: int = 1) -> None:
        """Say why this generation ends.

        Args:
            why: in one line.
            error: what was raised, if anything was.
            status: the exit status, where the error does not tell it.
        """

    def leaving(self, limit: float, *, is_partial: bool = False) -> None:
        """Say that the service stops; nobody goes on with it.

        Args:
            limit: how long that may take, seconds.
            is_partial: whether the application itself says that it stops.
        """

    async def outlive(self, others: Callable[[], Awaitable[None]]) -> None:
        """Wait for the other processes of the service, where the end of this one is taken for the end of all."""

    async def withdraw(self, *, has_successor: bool) -> None:
        """Take back what names this process.

        Args:
            has_successor: whether what is published is another generation's by now.
        """

    def leave_to_next_start(self, *, is_orderly: bool) -> None:
        """Let only what the next start of the service has a use for be kept.

        Args:
            is_orderly: whether the application's state is of no use then.
        """


class OwnManagement(Management):
    """A process that speaks for its service itself: it has the signals, the control socket, the pid file and systemd.

    Args:
        log: of the generation, or the anchor.
        systemd: the way there.
        registry: the sockets of the service.
        control: what commands can ask for.
        signals: what is to be done at which signal.
        describe: says in one line what `systemctl status` shows.
        is_accepting: says whether clients can wait on the sockets. Before that, what a crash has left is not claimed
            yet; afterwards, what is closed is a successor's, or the next start's.
        plane: where the control socket is registered, if there is one.
        control_path: where the control socket is.
        control_access: who may use it; None: this user and root.
        pid_file: where the pid file is.
        hung_up: is called instead of the handler of SIGHUP where that came because the terminal is gone, of a service
            in its foreground; None: SIGHUP is an operator's.
        takes_activation: whether what systemd has passed to this process is taken.
        stashes: what is kept in case of a crash.
        inherited_stash: where that is found again.

    Attributes:
        systemd: the way there.
        store: what systemd keeps for the service in case of a crash.
    """

    def __init__(
        self,
        log: GenerationLog,
        systemd: Systemd,
        registry: Registry,
        *,
        control: ControlHandlers,
        signals: Mapping[signal.Signals, Callable[[], None]],
        describe: Callable[[], str],
        is_accepting: Callable[[], bool],
        plane: DataPlane | None = None,
        control_path: str | None = None,
        control_access: ControlAccess | None = None,
        pid_file: Path | None = None,
        hung_up: Callable[[], None] | None = None,
        takes_activation: bool = True,
        stashes: Stashes | None = None,
        inherited_stash: InheritedStash | None = None,
    ) -> None:
        super().__init__(log, signals)
        if hung_up is not None and (handler := signals.get(signal.SIGHUP)) is not None:
            self._handlers = {**signals, signal.SIGHUP: functools.partial(self._begin_hang_up, handler, hung_up)}
        self.systemd = systemd
        self.store = DescriptorStore(systemd, os.environ.get("FDSTORE", ""))
        self.is_supervised = systemd.is_there
        self.keeps_sockets = self.store.is_there
        self.control_path = control_path
        self._resources.callback(systemd.close)
        self._resources.callback(self.store.close)
        self._registry = registry
        self._changes = control.changes
        self._describe = describe
        self._is_accepting = is_accepting
        self._takes_activation = takes_activation
        self._stashes = stashes if stashes is not None else Stashes()
        self._stashes.keep = self.store.keep
        self._inherited_stash = inherited_stash if inherited_stash is not None else InheritedStash()
        self._pid_file = PidFile(pid_file) if pid_file is not None else None
        # The server of the control socket, and the same once its socket is open.
        self._control_server: ControlServer | None = None
        self._control: ControlServer | None = None
        # The same at the path that former code had, as long as the path of this one cannot be served.
        self._former_control: ControlServer | None = None
        if control_path is not None and plane is not None:
            self._make_control_server = functools.partial(
                ControlServer, plane=plane, controlled=control, access=control_access
            )
            self._control_plane = plane
            self._control_server = self._make_control_server(control_path)
            self._resources.callback(self._control_server.close)
        self._has_predecessor = False
        # Why a restart would end the systemd unit that this process is in, if it would.
        self._unit_end: str | None = None
        # Why this generation ends, once it has failed.
        self._failure: str | None = None
        self._main_named = anyio.Event()
        self._is_leaving = False

    # From its start to its end

    async def open(self, *, has_predecessor: bool) -> None:
        self.claim(has_predecessor=has_predecessor)
        await self.open_control()

    def claim(self, *, has_predecessor: bool) -> None:
        """Take what was passed to this process, or kept for it; see :meth:`open`."""
        self._has_predecessor = has_predecessor
        if has_predecessor:
            self.store.inherit(self._registry.entries)
        elif self._takes_activation:
            self._registry.activate(self.store.recover(take_activation(), self._registry))
            self.store.read_state(self._inherited_stash)
            self._unit_end = forbid_restart()
            if (complaint := check_unit()) is not None:
                self._log.warning("%s", complaint)

    async def open_control(self) -> None:
        """Open the control socket, if there shall be one; it may be tried again where it has failed.

        Raises:
            OSError: another service has the control socket, or its directory is not safe.
        """
        if self._control_server is not None:
            await self._control_server.open()
            self._control = self._control_server

    async def open_former_control(self) -> None:
        """Open the control socket where former code had it, until this one's can be opened.

        Raises:
            OSError: it cannot be opened either.
        """
        if self._former_control is not None:
            return
        for entry in self._control_plane.registry.entries:
            if entry.name == CONTROL_NAME and entry.address != self.control_path and entry.is_at_its_path():
                former = self._make_control_server(entry.address)
                self._resources.callback(former.close)
                await former.open()
                self._former_control = former
                self._task_group.start_soon(former.run)
                return

    async def close_former_control(self) -> None:
        """Serve no more where former code has had its control socket: commands reach this one at its own."""
        if self._former_control is not None:
            former, self._former_control = self._former_control, None
            await former.retire()

    async def serve_control(self) -> None:
        """Answer on a control socket that was opened after :meth:`start`."""
        if self._control is not None:
            await self._control.run()

    def start(self, task_group: TaskGroup) -> None:
        super().start(task_group)
        self._task_group = task_group
        if self.systemd.is_there:
            task_group.start_soon(self.systemd.run)
            task_group.start_soon(self._tell_status)
            if not self._has_predecessor:
                task_group.start_soon(self._check_systemd)
        if self._control is not None:
            task_group.start_soon(self._control.run)

    def _begin_hang_up(self, handler: Callable[[], None], hung_up: Callable[[], None]) -> None:
        self._task_group.start_soon(self._hang_up, handler, hung_up)

    async def _hang_up(self, handler: Callable[[], None], hung_up: Callable[[], None]) -> None:
        """Find out what a SIGHUP means to a service in the foreground of a terminal."""
        # At the end of a shell the signal comes a moment before the terminal is taken away (exit(2)).
        with anyio.move_on_after(HANG_UP_SECONDS):
            while not is_terminal_gone():  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(HANG_UP_SECONDS / 10)
            hung_up()
            return
        handler()

    def begin(self, limit: float) -> None:
        self.systemd.begin()
        self.systemd.ask_for_time(limit)
        # If this start cannot cope with what a crash has left, the next one does without.
        self.store.drop()

    async def keep_control(self) -> None:
        """See that commands find the service, also after somebody has cleared the directory of its control socket.

        It is for a process that serves the socket as long as the service lives; others renew it with each restart.
        """
        while self._control is not None and not self._is_leaving:
            await self._control.renew()
            await anyio.sleep(CONTROL_SECONDS)

    async def finish(self) -> None:
        if self._control is not None:
            await self._control.finish()
        await self.systemd.synchronize()

    def fileno(self) -> int:
        """Return the pipe of the signals that were not acted upon yet, for the code that this process executes next."""
        assert self._signals is not None
        return self._signals.fileno()

    # What the application of this process asks for

    async def restart(self, until: str, here: Callable[[str], Awaitable[RestartReport]]) -> RestartReport:
        return await here(until)

    def stop(self, here: Callable[[], None]) -> None:
        here()

    def check_restart(self) -> None:
        if self._unit_end is not None:
            raise RestartUnsupported(self._unit_end)

    def check_takeover(self) -> None:
        if self.is_supervised:
            raise RestartUnsupported(
                "this service belongs to a unit of systemd, which ends it, and starts it again, when its main process "
                "is another unit's: restart it by systemctl reload or ecdysis restart, or stop it"
            )

    # What it is told

    async def prepare(self, describe: Callable[[], str]) -> None:
        if self._pid_file is not None:
            await run_in_thread(self._pid_file.prepare)

    async def publish(self) -> None:
        if self._pid_file is not None:
            await run_in_thread(self._pid_file.publish)

    async def succeed(self, predecessor: Ancestor) -> None:
        try:
            await self.publish()
        except OSError as error:
            self._log.error("the pid file still names the former generation: %s", error)
        if self.systemd.is_there:
            with contextlib.suppress(ChannelError):  # it has left
                await predecessor.peer.channel.send(DrainMessage.PUBLISHED, timeout=2)

    def serving(self) -> None:
        self.tell_status()
        self.systemd.tell("READY=1")

    def tell_status(self) -> None:
        """Say how the service is; `systemctl status` shows it."""
        self.systemd.tell_status(self._failure or self._describe())

    def changed(self) -> None:
        self._changes.announce()

    def park(self) -> None:
        if self._is_accepting():
            self.store.park(self._registry.entries)
            self.store.release_state(self._stashes.is_kept)

    def restart_asked(self) -> None:
        # systemd waits for an answer to its signal (Type=notify-reload).
        self.systemd.tell_reloading(LEEWAY_SECONDS)

    def restart_refused(self) -> None:
        self.systemd.tell("READY=1")

    def restart_begins(self) -> None:
        self._main_named = anyio.Event()

    async def announce_restart(self, limit: float, *, is_told: bool) -> None:
        # A process has to be the main one to make another process so. The predecessor is about to say that this one is.
        # systemd may have sent its signal here before that.
        with anyio.move_on_after(MAIN_SECONDS):
            await self.systemd.wait_until_main()
        self.tell_restart(limit, is_told=is_told)

    def tell_restart(self, limit: float, *, is_told: bool) -> None:
        """Say that a restart begins, in the main process of the service; see :meth:`announce_restart`."""
        # Where ExecReload= has asked for it, systemd knows of it. If it heard RELOADING=1 as well, systemd 254 would
        # wait for READY=1 once ExecReload= has ended, even if the main process has died meanwhile (seen).
        tell = self.systemd.ask_for_time if is_told else self.systemd.tell_reloading
        tell(limit)

    async def hand_main_process_to(self, handover: PredecessorSide) -> None:
        try:
            # systemd reads PIDFile= again when a reload has ended. A pid file that is behind MAINPID would point it
            # back to this process, and nothing could ever correct that.
            if self.systemd.is_there:
                with anyio.move_on_after(PUBLISH_SECONDS):
                    await handover.published.wait()
            if self.systemd.is_main:
                await handover.let_go()
                await self.systemd.name_main(handover.report.successor_pid or 0, "READY=1")
                await handover.tell(DrainMessage.MAIN, {})
        finally:
            self._main_named.set()

    async def main_process_named(self) -> None:
        await self._main_named.wait()

    def become_main(self) -> None:
        self.systemd.begin()
        versions = self._inherited_stash.versions()
        self.store.inherit_state(versions)
        for name in versions:
            if not self._stashes.is_kept(name):
                self.store.drop(name)
        self.park()
        self.tell_status()

    def failed(self, why: str, error: BaseException | None, status: int = 1) -> None:
        self._failure = why
        self.tell_status()
        if error is not None:
            self.systemd.tell_failure(error, status)

    def leaving(self, limit: float, *, is_partial: bool = False) -> None:
        self._is_leaving = True
        self.systemd.ask_for_time(limit)
        if not is_partial:
            self.systemd.tell("STOPPING=1")

    async def outlive(self, others: Callable[[], Awaitable[None]]) -> None:
        # With the exit of the main process systemd ends the other ones, drained or not. Elsewhere the service is taken
        # for stopped then.
        if self.systemd.is_main or not self.is_supervised:
            await others()

    async def withdraw(self, *, has_successor: bool) -> None:
        if self._pid_file is not None:
            await run_in_thread(self._pid_file.discard if has_successor else self._pid_file.remove)

    def leave_to_next_start(self, *, is_orderly: bool) -> None:
        if is_orderly:
            self.store.drop()
        # The paths of the other sockets go: no client can come to them, whatever systemd does next.
        self.store.park(entry for entry in self._registry.entries if entry.inode is None)

    # What it tells by itself

    async def _tell_status(self) -> None:
        while True:
            self.tell_status()
            # Sockets may have begun to listen since then.
            self.park()
            await anyio.sleep(STATUS_SECONDS)

    async def _check_systemd(self) -> None:
        has_socket_unit = any(entry.number is not None for entry in self._registry.entries)
        if (complaint := await find_shortcoming(has_socket_unit=has_socket_unit)) is not None:
            self._log.warning("%s", complaint)
