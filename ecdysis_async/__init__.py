"""Async services that restart without losing a connection.

One generation of a service hands its sockets to the next one, which says when it is ready; only then the old one stops
accepting, and finishes what it has. Enter :class:`Ecdysis` and await :meth:`Ecdysis.restart`.
"""

from __future__ import annotations

import importlib
import os
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
from .report import DrainCount, Outcome, Phase, RestartReport, State

if TYPE_CHECKING:
    from ecdysis_async._accepting.loops import run
    from ecdysis_async._handoff.stash import InheritedStash
    from ecdysis_async._service.ecdysis import Ecdysis, current, track, until_draining


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


# Not before they are asked for: the supervisor costs `ecdysis restart`, which has no need of it, half of its start, and
# asyncio a service on trio 40 ms.
_MODULES = {
    "Ecdysis": "_service.ecdysis",
    "InheritedStash": "_handoff.stash",
    "current": "_service.ecdysis",
    "run": "_accepting.loops",
    "track": "_service.ecdysis",
    "until_draining": "_service.ecdysis",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# What was passed to this process it claims with the first import, before the application can start another one, which
# would find the marker, or hold the descriptors, as well (DESIGN.md, trap 7). Commands are passed nothing.
if os.environ.keys() & {"ECDYSIS_CHANNEL", "ECDYSIS_LINE", "LISTEN_PID"}:
    importlib.import_module("._service.ecdysis", __name__)
