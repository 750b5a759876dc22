"""Reloads that stand still in a phase of the restart, for as long as a test wants: no luck of time is needed."""

from __future__ import annotations

import contextlib
import re
import signal
from typing import Self

from tests.scenarios.systemd.harness import NAME, Client, Unit
from tests.scenarios.systemd.load import Load

PHASES = ("spawning", "initialising", "pausing", "committing", "probation", "draining")


class Standstill:
    """A restart that stands still once it has come to a phase.

    Make it before the service starts; its block ends what it has begun.
    """

    def __init__(self, unit: Unit, phase: str) -> None:
        self.phase = phase
        self._unit = unit
        self._resources = contextlib.ExitStack()
        unit.configure(
            # No test waits for the deadline of a drain.
            ecdysis={"probation": 600 if phase == "probation" else 0.05, "drain_timeout": 600},
            # What is made at the commit is made when the gate is shut, and before the successor is told.
            hold="commit" if phase in ("pausing", "committing") else "",
        )

    def reach(self, load: Load) -> None:
        """Begin a reload, and return when it stands still; from then on the settings are for whoever comes next."""
        unit = self._unit
        # It answers before systemd has heard that it does, and until then there is nothing to reload.
        unit.wait_until(lambda: unit.show("ActiveState") == "active")
        match self.phase:
            case "spawning":
                # It hangs, so that nothing but a signal that cannot be caught ends it.
                unit.configure(at_start="import signal; print('held', flush=True); signal.pause()")
            case "initialising":
                unit.configure(hold="ready")
        if self.phase == "draining":
            # Whom the former generation waits for.
            self._resources.enter_context(Client(unit.addresses[0])).say("hold")
            unit.wait_until(lambda: "held\n" in unit.log)
        self.reload = unit.machine.begin("systemctl", "reload", NAME)
        self._resources.callback(self.reload.wait)
        self._resources.callback(self.reload.kill)
        match self.phase:
            case "spawning" | "initialising" | "pausing":
                unit.wait_until(lambda: "held\n" in unit.log)
            case "committing":
                unit.wait_until(lambda: "held\n" in unit.log)
                unit.machine.kill(self._successor, signal.SIGSTOP)
                unit.release()
            case "draining":
                assert self.reload.wait() == 0
                unit.wait_until(lambda: "generation 1 drains" in unit.show("StatusText"))
        if self.phase in ("initialising", "pausing", "committing", "probation"):
            unit.wait_until(lambda: re.findall(r"the restart: (\w+) \(pid", unit.log)[-1:] == [self.phase])
        if self.phase in ("probation", "draining"):
            load.wait_for(2)
        unit.configure(hold="", at_start="")

    def go_on(self) -> None:
        """Let whoever stands still go on."""
        if self.phase == "committing":
            self._unit.machine.kill(self._successor, signal.SIGCONT)
        self._unit.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    @property
    def _successor(self) -> int:
        match = re.search(r"the restart: \w+ \(pid (\d+)\)", self._unit.log)
        assert match is not None
        return int(match[1])
