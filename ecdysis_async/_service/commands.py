"""What a generation does when it is told to from outside: by a signal, by a command, or by its anchor."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ecdysis_async._handoff import preflight
from ecdysis_async._management.changes import Changes
from ecdysis_async._management.controlled import ControlHandlers, Restart
from ecdysis_async._management.management import Management, OwnManagement
from ecdysis_async._management.systemd import Systemd
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._system.claims import take_line
from ecdysis_async._system.process import Spawner
from ecdysis_async._system.signals import can_handle_signals, is_handled
from ecdysis_async._system.terminal import is_in_foreground
from ecdysis_async.errors import RestartError, RestartWhileDraining
from ecdysis_async.report import RestartReport

from .anchor_client import AnchorClient, WorkerCommands
from .description import Description
from .leaving import Leaving
from .life import Life, Stop
from .restarts import Restarts

__all__ = ["Commands"]


class Commands:
    """What can be asked of a generation.

    Args:
        life: of this generation.
        restarts: what it is asked for most.
        leaving: its way out.
    """

    def __init__(self, life: Life, restarts: Restarts, leaving: Leaving) -> None:
        self._life = life
        self._restarts = restarts
        self._leaving = leaving
        self._description = Description(life)
        self._control_path: str | None = None
        # Whether a restart follows the one that is in progress, because a signal has asked for it.
        self._has_follower = False

    def find_management(
        self, systemd: Systemd, *, takes_activation: bool, control_path: str | None, pid_file: Path | None
    ) -> Management:
        """Return who speaks for this service: the anchor that has started this process, or else the process itself.

        Args:
            systemd: the way to it.
            takes_activation: whether what systemd has passed to this process is taken.
            control_path: where the control socket is, if there shall be one.
            pid_file: where the pid file is, if there shall be one.

        Raises:
            ChannelError: the anchor is gone.
        """
        life, generation = self._life, self._life.generation
        if (line := take_line()) is not None:
            # The other signals are caught since the first import (worker_link.py): they are the anchor's business.
            generation.settings = dataclasses.replace(
                generation.settings, restart_signals=(), stop_signals=(signal.SIGTERM,)
            )
            orders = WorkerCommands(
                begin_restart=lambda number, restart: self._restarts.begin(number=number, restart=restart),
                stop=functools.partial(self._leaving.stop, Stop.TOLD),
                leave_place=self._leaving.leave_place,
                abandon=self._leaving.abandon,
                note_death=self._leaving.expect_end,
                reopen_logs=generation.reopen_logs,
                note_report=self._note_report,
                state=lambda: life.state.value,
                take_stderr=self._take_stderr,
                ends_in=lambda: life.ends_in,
                exclusives=lambda: life.exclusives.describe() if life.exclusives is not None else [],
            )
            return AnchorClient(line, life.plane, orders, generation.log, self._signal_handlers())
        self._control_path = control_path
        return OwnManagement(
            generation.log,
            systemd,
            life.plane.registry,
            control=self._control_handlers(Changes()),
            signals=self._signal_handlers(),
            describe=self._description.line,
            is_accepting=lambda: life.is_accepting,
            plane=life.plane,
            control_path=control_path,
            pid_file=pid_file,
            hung_up=self._on_hang_up if self._ends_with_terminal() else None,
            takes_activation=takes_activation,
            stashes=generation.stashes,
            inherited_stash=generation.inherited_stash,
        )

    def _take_stderr(self, descriptor: int) -> None:
        if self._life.inheritance is not None:
            self._life.inheritance.take_stderr(descriptor)
        else:
            os.close(descriptor)

    def _note_report(self, report: RestartReport) -> None:
        self._life.last_report = report

    # Signals

    def _signal_handlers(self) -> Mapping[signal.Signals, Callable[[], None]]:
        settings = self._life.generation.settings
        handlers: dict[signal.Signals, Callable[[], None]] = {
            number: functools.partial(self._on_restart_signal, number) for number in settings.restart_signals
        }
        handlers |= dict.fromkeys(settings.stop_signals, self._on_stop_signal)
        # The application may have another use for it. Without anybody's, it would end the process.
        if handlers and can_handle_signals() and signal.SIGUSR1 not in handlers and not is_handled(signal.SIGUSR1):
            handlers[signal.SIGUSR1] = self._on_reopen_signal
        return handlers

    def _on_stop_signal(self) -> None:
        life = self._life
        # One more on the way out, once this block has put the former handlers back, must not change the exit status.
        life.management.ignore_on_the_way_out(*life.generation.settings.stop_signals)
        life.stop_signals += 1
        if life.stop_signals > 1:
            life.generation.log.warning("told to stop again: the deadline of the drain is now")
            self._leaving.hurry_all()
        self._leaving.hurry_if_nobody_listens()
        self._leaving.stop(Stop.TOLD)

    def _ends_with_terminal(self) -> bool:
        # With the exit of the first generation the shell has its terminal back, and nobody watches the others.
        return (
            self._life.inheritance is None
            and is_in_foreground()
            and signal.SIGHUP in self._life.generation.settings.restart_signals
        )

    def _on_hang_up(self) -> None:
        if self._life.is_leaving:
            return
        self._life.generation.log.info("the terminal is gone: stopping")
        self._life.management.ignore_on_the_way_out(signal.SIGHUP)
        self._leaving.stop(Stop.TOLD)

    def _on_reopen_signal(self) -> None:
        self._life.task_group.start_soon(self._life.generation.reopen_logs)

    def _on_restart_signal(self, number: signal.Signals) -> None:
        self._life.task_group.start_soon(self._restart_by_signal, number)

    async def _restart_by_signal(self, number: signal.Signals) -> None:
        """Restart because a signal asks for it; the log tells what becomes of it.

        A signal that comes during a restart is remembered, and another restart follows. It is done by the generation
        that serves then. However many come meanwhile, one restart follows.
        """
        name = number.name
        life = self._life
        management, log = life.management, life.generation.log
        if self._has_follower:
            return
        management.restart_asked()
        try:
            if life.handover is not None and not life.handover.over.is_set():
                self._has_follower = True
                log.info("%s asks for a restart while %s is in progress", name, life.handover.report.id)
                await life.handover.over.wait()
                self._has_follower = False
                if life.has_successor and life.handover.pass_signal_on(number):
                    return
            await management.restart("settled", functools.partial(self._restarts.restart, asked_by=name))
        except RestartWhileDraining as error:
            if not self._life.has_successor:
                # Where there is one, the word that makes it the main process is the answer.
                management.restart_refused()
            log.info("%s", error)
        except RestartError as error:
            management.restart_refused()
            # One that has begun has told its end itself.
            if life.handover is None or life.handover.error is not error:
                # Without a traceback: the message says what happened.
                log.error("the restart that %s asked for is refused: %s", name, error)  # noqa: TRY400

    # The control socket

    def _control_handlers(self, changes: Changes) -> ControlHandlers:
        return ControlHandlers(
            status=self._description.status,
            look_up=self._description.look_up,
            waiting_for=self._description.waiting_for,
            begin_restart=lambda asked_by: self._begin_restart(asked_by, is_told=True),
            find_report=self._description.find_report,
            stop=functools.partial(self._leaving.stop, Stop.TOLD),
            changes=changes,
            reopen_logs=self._life.generation.reopen_logs,
            begin_takeover=self._begin_takeover,
            check=self._check,
            compare=self._compare,
        )

    def _begin_restart(self, asked_by: str, spawner: Spawner | None = None, *, is_told: bool = False) -> Restart:
        handover = self._restarts.begin(spawner, is_told=is_told, asked_by=asked_by)
        return Restart(handover.report, functools.partial(self._restarts.see_through, handover))

    def _begin_takeover(self, spawner: Spawner, asked_by: str) -> Restart:
        self._life.management.check_takeover()
        return self._begin_restart(asked_by, spawner)

    async def _check(self) -> dict[str, Any]:
        generation = self._life.generation
        return await preflight.check_release(
            generation.settings, generation.env_file_keys, self._public_entries(), os.environ
        )

    def _compare(self, release: dict[str, Any]) -> dict[str, Any]:
        return preflight.compare(release, self._public_entries(), os.environ)

    def _public_entries(self) -> list[Entry]:
        return [entry for entry in self._life.plane.registry.entries if entry.address != self._control_path]
