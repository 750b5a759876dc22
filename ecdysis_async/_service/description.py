"""What a generation says of itself: as an object of JSON to commands, in one line to `systemctl status`."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from typing import Any

import anyio

from ecdysis_async._handoff.protocol import SuccessorState
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
from ecdysis_async._system.launch import Launch, find_following, look_up_links
from ecdysis_async._system.release import describe_release
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import RestartError
from ecdysis_async.report import RestartReport, State

from .life import Life

__all__ = ["Description"]


class Description:
    """One generation in words. Nothing here changes anything, or waits.

    Args:
        life: of this generation.
    """

    def __init__(self, life: Life) -> None:
        self._life = life
        self._begun = time.monotonic()
        self._command = life.generation.settings.command
        # What cannot be run again is told by a restart, or a check.
        self._runs: Launch | None = None
        with contextlib.suppress(RestartError):
            self._runs = find_following(self._command)

    def line(self) -> str:
        """Say in one line what `systemctl status` shows."""
        life = self._life
        number, lineage = life.generation.number, life.generation.lineage
        parts = [f"generation {number} is {life.state.value}, {counted(self._connections, 'connection')}"]
        parts += [
            f"generation {each.generation} drains, {counted(each.connections, 'connection')}"
            for each in lineage.ancestors
            if each.connections is not None
        ]
        if life.handover is not None and (error := life.handover.error) is not None:
            parts.append(describe_failed_restart(error))
        return "; ".join(parts)

    def waiting_for(self) -> str | None:
        """Say what is waited for at this moment; None if for nothing."""
        life, now = self._life, anyio.current_time()
        if life.drained.is_set() and not life.has_successor and (older := life.older_generations):
            return ", ".join(each.describe() for each in older)
        return describe_wait(
            life.handover,
            life.inheritance,
            phase_seconds=now - life.phase_begun,
            connections=self._connections,
            jobs=life.plane.tracker.jobs,
            deadline_seconds=life.drain_deadline - now if life.drain_deadline is not None else None,
        )

    def status(self) -> dict[str, Any]:
        """Return where this generation stands, as an object of JSON."""
        life = self._life
        return {
            "generation": life.generation.number,
            "pid": os.getpid(),
            "state": life.state.value,
            "stopping": self._stopping(),
            "uptime": time.monotonic() - self._begun,
            "connections": self._connections,
            "jobs": life.plane.tracker.jobs,
            "release": describe_release(),
            "listeners": describe_listeners(life.plane.registry.entries),
            "waiting_for": self.waiting_for(),
            "restart": describe_restart(life.handover, phase_seconds=anyio.current_time() - life.phase_begun),
            "last_report": life.last_report.to_json() if life.last_report is not None else None,
            "draining": [*self._paused(), *describe_ancestors(life.generation.lineage.ancestors)],
            "process": describe_process(),
            "exclusive": life.exclusives.describe() if life.exclusives is not None else [],
        }

    async def look_up(self) -> dict[str, Any]:
        """Return what of the status stands in the file system."""
        return await run_in_thread(functools.partial(look_up_links, self._runs, self._command), abandon_on_cancel=True)

    def find_report(self, id: str) -> RestartReport | None:
        """Return the report of a restart by its id, where it is known here."""
        life = self._life
        if life.last_report is not None and life.last_report.id == id:
            return life.last_report
        if life.inheritance is not None and life.inheritance.restart_id == id:
            return report_of(life.inheritance)
        return None

    @property
    def _connections(self) -> int:
        tracker = self._life.plane.tracker
        return len(tracker.connections()) - tracker.jobs

    def _stopping(self) -> dict[str, Any] | None:
        """Say for how long a generation drains that nobody follows; None where it does not."""
        life = self._life
        if life.state is not State.DRAINING or life.has_successor:
            return None
        return {"phase": "draining", "ends_in": life.ends_in}

    def _paused(self) -> list[dict[str, Any]]:
        """Return the predecessor while it can still take over again: it neither accepts nor drains."""
        inheritance = self._life.inheritance
        if inheritance is None or inheritance.state is not SuccessorState.PROBATION or inheritance.predecessor is None:
            return []
        former = inheritance.predecessor
        return [
            {
                "generation": former.generation,
                "pid": former.pid,
                "state": State.PAUSED.value,
                "connections": former.connections,
                "jobs": former.jobs,
                "ends_in": None,
                "serving": [],
            }
        ]
