"""Async services that restart without losing a connection.

One generation of a service hands its sockets to the next one, which says when it is ready; only then the old one stops
accepting, and finishes what it has. Enter :class:`Ecdysis` and await :meth:`Ecdysis.restart`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    DrainInterrupt,
    EcdysisError,
    HandoffAborted,
    NotReady,
    ReadyTimeout,
    RestartError,
    RestartInProgress,
    RestartUnsupported,
    RestartWhileDraining,
    RolledBack,
    SpawnFailed,
    StashFailed,
    SuccessorFailed,
    TakeoverFailed,
)
from .report import DrainCount, Outcome, Phase, RestartReport
from .stash import InheritedStash
from .supervisor import Ecdysis, State, current, track, until_draining

if TYPE_CHECKING:
    from .loops import run

__all__ = [
    "DrainCount",
    "DrainInterrupt",
    "Ecdysis",
    "EcdysisError",
    "HandoffAborted",
    "InheritedStash",
    "NotReady",
    "Outcome",
    "Phase",
    "ReadyTimeout",
    "RestartError",
    "RestartInProgress",
    "RestartReport",
    "RestartUnsupported",
    "RestartWhileDraining",
    "RolledBack",
    "SpawnFailed",
    "StashFailed",
    "State",
    "SuccessorFailed",
    "TakeoverFailed",
    "current",
    "run",
    "track",
    "until_draining",
]


def __getattr__(name: str) -> Any:
    # Not before it is asked for: asyncio costs a service on trio 40 ms of each start.
    if name == "run":
        from .loops import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
