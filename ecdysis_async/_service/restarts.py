"""The restarts of one generation: how one begins, how long somebody waits for it, and what each change of it means.

The handoff itself is carried out in ``_handoff/predecessor.py``, and on the other side in ``_handoff/successor.py``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import anyio

from ecdysis_async._connections.receiver import Receiver
from ecdysis_async._handoff.ancestors import Ancestor
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import PredecessorEvent, PredecessorState, SuccessorEvent, SuccessorState
from ecdysis_async._handoff.successor import SuccessorSide
from ecdysis_async._handoff.verdict import describe_drain
from ecdysis_async._management.management import LEEWAY_SECONDS
from ecdysis_async._management.status import report_of
from ecdysis_async._system.process import Spawner, find_missing
from ecdysis_async._system.wording import name_setting
from ecdysis_async.errors import NotReady, RestartError, RestartInProgress, RestartUnsupported, RestartWhileDraining
from ecdysis_async.report import Outcome, RestartReport, State

from .leaving import EXIT_SECONDS, Leaving, first_of
from .life import Life, Stop

__all__ = ["Restarts"]

# What a restart asked for during probation waits for the predecessor's word that it will never accept again, seconds.
SETTLE_SECONDS = 10.0


class Restarts:
    """The restarts that one generation is asked for, and the one that it came from.

    Args:
        life: of this generation.
        leaving: its way out, which begins when a restart has settled.
    """

    def __init__(self, life: Life, leaving: Leaving) -> None:
        self._life = life
        self._leaving = leaving

    # As the predecessor

    async def restart(self, until: str, *, asked_by: str = "the application") -> RestartReport:
        """Restart, and wait; cancelling it calls the restart off, as long as the successor was not told to accept."""
        handover = self.begin(asked_by=asked_by)
        try:
            return await self.see_through(handover, until)
        except BaseException:
            handover.post(PredecessorEvent.CANCELLED)
            raise

    def begin(
        self,
        spawner: Spawner | None = None,
        *,
        number: int | None = None,
        is_told: bool = False,
        restart: str | None = None,
        asked_by: str = "",
    ) -> PredecessorSide:
        """Begin a restart, unless that is not possible now.

        Args:
            spawner: starts the successor; None: the management's, or else this process.
            number: of the successor; None: the next one.
            is_told: whether systemd may know of it, because ExecReload= has asked for it.
            restart: the id of the service's restart that it is a part of; None: it is one of its own.
            asked_by: who has asked for it, in words.

        Raises:
            RestartError: why it is not possible.
        """
        life = self._life
        if life.is_leaving:
            raise RestartWhileDraining("this generation is leaving; ask the newest one")
        if life.handover is not None and not life.handover.over.is_set():
            raise RestartInProgress(
                f"restart {life.handover.report.id} is in progress ({life.handover.state.value}); await that one"
            )
        if not life.has_begun:
            raise NotReady("this generation does not serve yet: a restart is possible after ready()")
        if (missing := find_missing()) is not None:
            raise RestartUnsupported(
                f"a restart needs pidfds and descriptors passed over Unix sockets, and {missing}: stop and start the "
                "service instead"
            )
        if os.getpid() == 1:
            raise RestartUnsupported(
                "this process is PID 1 and must not leave: a restart would end the container. "
                "Run the service by `ecdysis run`, which keeps one process in front of all generations"
            )
        life.management.check_restart()
        handover = PredecessorSide(
            life.generation,
            self._on_handover,
            spawner=spawner or life.management.spawner,
            number=number,
            probation=life.management.probation,
            restart=restart,
            asked_by=asked_by,
        )
        life.handover, life.last_report = handover, handover.report
        life.handed_over = anyio.Event()
        life.management.restart_begins()
        life.note_change()
        life.task_group.start_soon(self._hand_over, handover, life.handed_over, is_told)
        return handover

    async def see_through(self, handover: PredecessorSide, until: str) -> RestartReport:
        """Wait until a restart is "serving", "settled" or "drained".

        Raises:
            RestartError: why it failed.

        Cancelled, it only stops waiting.
        """
        await first_of(*((handover.serving, handover.over) if until == "serving" else (handover.over,)))
        if handover.error is None and until == "drained":
            await self._life.drained.wait()
        if handover.error is not None:
            raise handover.error
        if until != "serving" and self._life.has_successor:
            # Once this is known, ExecReload= may end, and systemd looks at the pid file again.
            await self._life.management.main_process_named()
        if handover.over.is_set() and handover.report.outcome is Outcome.STOPPED:
            raise RestartWhileDraining("the service was stopped while it restarted")
        return handover.report

    async def _hand_over(
        self,
        handover: PredecessorSide,
        handed_over: anyio.Event,
        is_told: bool,  # noqa: FBT001 - start_soon has no keywords
    ) -> None:
        life = self._life
        try:
            await self._carry_out(handover, is_told=is_told)
        finally:
            handed_over.set()
        if handover.error is not None:
            life.counting.note_restart(handover.report, handover.error, is_called_off=handover.is_called_off)
        if life.handover is not handover:
            # The next restart has begun by now: it may do so as soon as this one is over, and what follows is its own.
            return
        self._leaving.hurry_if_nobody_listens()
        if handover.error is not None:
            life.reserve.fill()
            life.management.serving()
        if life.stop is not Stop.NOT_ASKED:
            self._leaving.begin()

    async def _carry_out(self, handover: PredecessorSide, *, is_told: bool) -> None:
        life = self._life
        if life.inheritance is not None and not life.settled.is_set():
            # A second restart during probation: so that no more than two generations can ever accept in turn, the
            # predecessor gives up its right to come back first.
            life.inheritance.post(SuccessorEvent.SETTLE)
            with anyio.move_on_after(SETTLE_SECONDS):
                await life.settled.wait()
            if not life.settled.is_set():
                former = life.inheritance.predecessor
                handover.refuse(
                    RestartError(
                        "the restart before this one is not settled, and the predecessor "
                        f"(pid {former.pid if former is not None else None}) does not answer: is it stopped "
                        "(SIGSTOP, a debugger)? Continue or kill it, and try again"
                    )
                )
                return
        settings = life.generation.settings
        limit = settings.ready_timeout + settings.probation + LEEWAY_SECONDS
        await life.management.announce_restart(limit, is_told=is_told)
        life.reserve.give_up()
        await handover.run()

    def _on_handover(self, handover: PredecessorSide) -> None:
        life = self._life
        if handover.state is PredecessorState.ROLLED_BACK:
            # Before this generation accepts again, and is asked what was counted.
            life.counting.note_rolled_back(*handover.successor_work)
            handover.successor_work = (0, 0)
        match handover.state:
            case _ if life.is_leaving:
                # It does not come back, whatever becomes of its restart: another process has its place.
                pass
            case PredecessorState.STOPPING | PredecessorState.SETTLED | PredecessorState.STOPPED:
                self._leaving.begin()
            case (
                PredecessorState.PAUSING
                | PredecessorState.COMMITTING
                | PredecessorState.PROBATION
                | PredecessorState.RECALLING
                | PredecessorState.REVERTING
            ):
                life.state = State.PAUSED
            case _:
                life.state = State.SERVING
        if life.stop is not Stop.NOT_ASKED and handover.state.final:
            # The restart was over before it could hear of the stop, and may now wait until this side accepts again.
            self._leaving.begin()
        life.management.restart_changed(handover)
        life.note_change()
        if life.has_successor:
            life.generation.log.restart = handover.log.restart
            life.task_group.start_soon(life.management.hand_main_process_to, handover)

    # As the successor

    async def follow(self, inheritance: SuccessorSide) -> None:
        """See the handoff through that this generation came from; then listen to the older ones until each is dead."""
        await inheritance.run()
        # What comes from here on is this generation's own.
        self._life.generation.log.restart = ""
        if inheritance.state is not SuccessorState.SETTLED:
            return
        life, lineage = self._life, self._life.generation.lineage
        if life.stop is not Stop.NOT_ASKED:
            self._leaving.begin()
        predecessor = inheritance.predecessor
        assert predecessor is not None
        if life.management.is_anchor(predecessor.pid):
            # It began this slot, and neither serves nor drains.
            inheritance.close()
        else:
            lineage.ancestors.append(predecessor)
        lineage.on_drained = self._note_drained
        lineage.on_counted = lambda ancestor, body: life.counting.note_older(ancestor.pid, body)
        lineage.on_forced = self._note_forced
        lineage.on_transfer = self._receive_transfers
        lineage.on_main = self._become_main
        for item in inheritance.farewells:
            lineage.deliver(predecessor, item)
        inheritance.farewells.clear()
        life.settled.set()
        if life.last_report is None:
            life.last_report = inheritance.report
        life.counting.note_restart(report_of(inheritance), None)
        await life.management.succeed(predecessor)
        settings = life.generation.settings
        await lineage.follow(settings.max_draining, settings.drain_timeout + EXIT_SECONDS, settings.exit_timeout)

    def on_inheritance(self, inheritance: SuccessorSide) -> None:
        """Take note of where the handoff stands that this generation comes from."""
        life = self._life
        match inheritance.state:
            case SuccessorState.PROBATION | SuccessorState.SETTLED if life.state is State.WAITING:
                life.state = State.SERVING
            case SuccessorState.ABORTED:
                # The predecessor, who may be the reason, sends SIGTERM as well, perhaps on the way out.
                life.management.ignore_on_the_way_out(*life.generation.settings.stop_signals)
                life.body.cancel()
            case SuccessorState.STOPPED | SuccessorState.RETURNED:
                self._leaving.begin()
        life.management.changed()

    def _note_drained(self, ancestor: Ancestor, body: Mapping[str, Any]) -> None:
        life, report = self._life, RestartReport.from_json(body["report"])
        life.counting.ledger.note_drain(report)
        if life.last_report is not None and life.last_report.id == report.id:
            life.last_report = report
        log = life.generation.log.of(report.id)
        log.log(
            life.management.level,
            "%s",
            describe_drain(report, f"generation {ancestor.generation} (pid {ancestor.pid}) has"),
        )
        if ancestor.is_hurried and report.drain.cut:
            log.warning(
                "%d of the connections of generation %d (pid %d) were cut before their deadline, because more than %d "
                "generations drained (%s): %s",
                report.drain.cut,
                ancestor.generation,
                ancestor.pid,
                life.generation.settings.max_draining,
                name_setting("max_draining"),
                "; ".join(report.cut_requests),
            )

    def _note_forced(self, ancestor: Ancestor, kept: list[str]) -> None:
        life = self._life
        if life.last_report is not None and life.last_report.predecessor_pid == ancestor.pid:
            life.last_report.left_behind = kept
        life.generation.log.warning(
            "generation %d (pid %d) was ended by force; it was kept by %s",
            ancestor.generation,
            ancestor.pid,
            "; ".join(kept) or "nothing that it could see",
        )
        life.management.changed()

    def _become_main(self, ancestor: Ancestor) -> None:
        # The predecessor's own predecessor may still drain, and die, while the predecessor has yet to hand its role on.
        if self._life.inheritance is not None and ancestor is self._life.inheritance.predecessor:
            self._life.management.become_main()

    def _receive_transfers(self, sock: socket.socket) -> None:
        receiver = Receiver(sock, self._life.plane.gate.find_resumer, self._life.generation.log)
        self._life.task_group.start_soon(self._run_receiver, receiver)

    async def _run_receiver(self, receiver: Receiver) -> None:
        """Take the predecessor's connections over, until this generation leaves itself."""

        async def end() -> None:
            await self._life.leaving.wait()
            task_group.cancel_scope.cancel()

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(end)
            try:
                await receiver.run()
            except Exception:
                # The predecessor keeps what was not taken.
                self._life.generation.log.exception("the transfer broke down")
            task_group.cancel_scope.cancel()
