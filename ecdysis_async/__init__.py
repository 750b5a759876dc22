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

if TYPE_CHECKING:
    from ecdysis_async._accepting.loops import run
    from ecdysis_async._handoff.stash import InheritedStash
    from ecdysis_async._service.ecdysis import Ecdysis, current
    from ecdysis_async._service.helpers import draining, exclusive, settled, track, until_draining
    from ecdysis_async._service.worker_exit import WorkerExit, on_worker_exit
    from ecdysis_async._system.log_files import on_reopen_logs
    from ecdysis_async.report import DrainCount, Outcome, Phase, RestartReport, State


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
    "WorkerExit",
    "current",
    "draining",
    "exclusive",
    "on_reopen_logs",
    "on_worker_exit",
    "run",
    "settled",
    "track",
    "until_draining",
]

# The one place where the version stands: packaging reads it from here.
__version__ = "0.1.0"

# The names of these modules are loaded when they are asked for, as are those of `_service.ecdysis`, which has the rest.
# `Ecdysis` costs `ecdysis restart`, which has no need of it, half of its start; asyncio costs a service on trio 40 ms;
# and reports, which are dataclasses, cost more than everything else that stands here.
_MODULES = {
    "InheritedStash": "_handoff.stash",
    "on_reopen_logs": "_system.log_files",
    "run": "_accepting.loops",
    **dict.fromkeys(("DrainCount", "Outcome", "Phase", "RestartReport", "State"), "report"),
    **dict.fromkeys(("WorkerExit", "on_worker_exit"), "_service.worker_exit"),
    **dict.fromkeys(("draining", "exclusive", "settled", "track", "until_draining"), "_service.helpers"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_MODULES.get(name, '_service.ecdysis')}", __name__)
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# What was passed to this process is taken with the first import, before the application can start another process. That
# would find the marker, or hold the descriptors, as well. Commands are passed nothing.
if os.environ.keys() & {"ECDYSIS_CHANNEL", "ECDYSIS_LINE", "LISTEN_PID"}:
    importlib.import_module("._system.claims", __name__)
