"""What is counted of a service without workers, over all of its generations.

A generation hands on what was counted before it, and its own part. While it drains it goes on telling its own part, so
that what the newest generation shows never falls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._management.ledger import Closed, Ledger, Reason, count_closed, find_reason, read_closed
from ecdysis_async.errors import RestartError
from ecdysis_async.report import RestartReport

__all__ = ["Counting", "Part"]

logger = logging.getLogger("ecdysis_async")

# A service without workers has one place where one generation follows another.
SLOT = 0


@dataclass(frozen=True, slots=True)
class Part:
    """What one generation has counted since its start.

    Attributes:
        requests: how many requests it has served.
        closed: how its connections have ended.
    """

    requests: int = 0
    closed: Mapping[Closed, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as it travels."""
        return {"requests": self.requests, "closed": dict(self.closed)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Part:
        """Read what another release may have written.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(int(body["requests"]), read_closed(body["closed"]))


class Counting:
    """What this generation knows of all that was counted.

    Args:
        tracker: of this generation.

    Attributes:
        ledger: what is counted of the service, without the generations that are still there.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.ledger = Ledger()
        self._tracker = tracker
        # What the older generations have said last, by their processes.
        self._older: dict[int, Part] = {}

    @property
    def own(self) -> Part:
        """The part of this generation."""
        requests = self._tracker.requests
        # Should this generation be rolled back, its predecessor finds the number there.
        self._tracker.note_told(requests)
        return Part(requests, count_closed(self._tracker))

    @property
    def requests(self) -> int:
        """How many requests the service has served."""
        return self.ledger.requests.get(SLOT, 0) + sum(part.requests for part in (self.own, *self._older.values()))

    @property
    def closed(self) -> dict[Closed, int]:
        """How connections have ended that the ledger does not know of yet."""
        parts = (self.own, *self._older.values())
        return {kind: sum(part.closed.get(kind, 0) for part in parts) for kind in Closed}

    def hand_on(self, alive: Collection[int]) -> dict[str, Any]:
        """Return what the successor has to know.

        Args:
            alive: the processes of older generations that are still there.
        """
        for pid in [pid for pid in self._older if pid not in alive]:
            part = self._older.pop(pid)
            self.ledger.note_end(SLOT, part.requests, part.closed)
        older = [[pid, part.to_json()] for pid, part in self._older.items()]
        return {"ledger": self.ledger.to_json(), "older": older, "own": self.own.to_json()}

    def inherit(self, pid: int, body: object) -> None:
        """Go on with what a predecessor has counted; one of a release before this counts nothing.

        Args:
            pid: the predecessor's process.
            body: what it has handed on.
        """
        if not isinstance(body, Mapping):
            return
        try:
            ledger = Ledger.from_json(body["ledger"])
            older = {int(each): Part.from_json(part) for each, part in body["older"]}
            own = Part.from_json(body["own"])
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            logger.warning("what the predecessor has counted cannot be read: %r", error)
            return
        self.ledger, self._older = ledger, {**older, pid: own}

    def note_older(self, pid: int, body: object) -> None:
        """Take note of the part of an older generation, which goes on draining."""
        try:
            if isinstance(body, Mapping) and pid in self._older:
                self._older[pid] = Part.from_json(body)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            logger.warning("what generation of pid %d has counted cannot be read: %r", pid, error)

    def note_rolled_back(self, requests: int, closed: int) -> None:
        """Count what a successor has done that is no more."""
        self.ledger.note_end(SLOT, requests, {Closed.ENDED: closed})

    def note_restart(self, report: RestartReport, error: RestartError | None, *, is_called_off: bool = False) -> None:
        """Count a restart that is over: the generation does so that goes on serving."""
        reason: Reason = find_reason(report.outcome, error, is_called_off=is_called_off)
        self.ledger.note_restart(report, reason, time.time())
