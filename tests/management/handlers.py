"""What a service answers to commands where a test asks for nothing."""

from __future__ import annotations

from typing import Any

from ecdysis_async._management.changes import Changes
from ecdysis_async._management.controlled import ControlHandlers, Restart
from ecdysis_async.errors import NotReady


def refuse(asked_by: str) -> Restart:
    raise NotReady("this generation does not serve yet")


async def count() -> int:
    return 0


async def check() -> dict[str, Any]:
    return {}


def handlers(changes: Changes) -> ControlHandlers:
    return ControlHandlers(
        status=lambda: {"state": "serving"},
        waiting_for=lambda: None,
        begin_restart=refuse,
        find_report=lambda id: None,
        stop=lambda: None,
        changes=changes,
        reopen_logs=count,
        check=check,
        compare=lambda release: release,
    )
