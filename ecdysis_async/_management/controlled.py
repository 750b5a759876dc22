"""What a command can ask of a service, as functions: the control server calls them, and knows nothing else of it."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ecdysis_async._system.process import Spawner
from ecdysis_async.errors import RestartUnsupported
from ecdysis_async.report import RestartReport

from .changes import Changes

__all__ = ["ControlHandlers", "ReadyUpgrade", "Restart"]


@dataclass(frozen=True, slots=True)
class Restart:
    """A restart that has begun.

    Attributes:
        report: what stands so far; it grows.
        wait: waits until it is "serving", "settled" or "drained", and returns the report or raises a ``RestartError``;
            cancelling the wait does not call the restart off.
    """

    report: RestartReport
    wait: Callable[[str], Awaitable[RestartReport]]


@dataclass(frozen=True, slots=True)
class ReadyUpgrade:
    """An upgrade of an anchor whose new code was tried.

    Attributes:
        begin: makes the new code take over, as soon as nothing is under way.
        control_path: where commands will reach the new code; None where they will not, or it has not said.
    """

    begin: Callable[[], None]
    control_path: str | None


async def _refuse_anchor(channel: socket.socket, accept: Callable[[], None]) -> None:
    raise RestartUnsupported(
        "this service has no anchor that another one (`ecdysis run --takeover`) could take the place of: take it over "
        "by Ecdysis(takeover=...), or stop it"
    )


def _refuse_takeover(spawner: Spawner, asked_by: str) -> Restart:
    raise RestartUnsupported(
        "a service of `ecdysis run` can be taken over by `ecdysis run --takeover` alone: both have an anchor, which "
        "Ecdysis(takeover=...) has not"
    )


async def _find_nothing() -> dict[str, Any]:
    return {}


async def _refuse_upgrade() -> ReadyUpgrade:
    raise RestartUnsupported(
        "this service has no anchor, which only `ecdysis run` has: restart it without --anchor, and the new generation "
        "runs the new code"
    )


@dataclass(frozen=True, slots=True)
class ControlHandlers:
    """What can be asked of a generation.

    Attributes:
        status: tells where it stands, as an object of JSON.
        look_up: tells what else of its status stands in the file system, which may take its time.
        waiting_for: tells what it waits for, in words; None if for nothing.
        begin_restart: begins a restart, of which it is said in words who asks for it, or raises a ``RestartError``.
        find_report: returns the report of a restart by its id, where it is known here.
        stop: stops the service.
        changes: announces each change of the status.
        reopen_logs: lets log files that were moved be opened anew; returns how many.
        begin_takeover: begins a restart whose successor runs already, and is given the channel by what is passed, and
            of which it is said who asks for it; or raises a ``RestartError``.
        check: starts what a restart would start, to tell what that would change; or raises a ``RestartError``.
        compare: tells what a restart into a release would change, of which another process has told.
        workers: returns an object for each worker, where there are several. It has "slot", and "waiting_for": what the
            restart or the drain of the worker waits for at this moment.
        pass_all_on: hands everything over to another anchor and does not return; or raises a ``RestartError``. It is
            given the channel to the other anchor, and what is called before the channel is used.
        upgrade: checks that the new code of the anchor can take over, and returns what makes it do so; or raises a
            ``RestartError``.
    """

    status: Callable[[], dict[str, Any]]
    waiting_for: Callable[[], str | None]
    begin_restart: Callable[[str], Restart]
    find_report: Callable[[str], RestartReport | None]
    stop: Callable[[], None]
    changes: Changes
    reopen_logs: Callable[[], Awaitable[int]]
    check: Callable[[], Awaitable[dict[str, Any]]]
    compare: Callable[[dict[str, Any]], dict[str, Any]]
    look_up: Callable[[], Awaitable[dict[str, Any]]] = _find_nothing
    begin_takeover: Callable[[Spawner, str], Restart] = _refuse_takeover
    workers: Callable[[], list[dict[str, Any]]] = list
    upgrade: Callable[[], Awaitable[ReadyUpgrade]] = _refuse_upgrade
    pass_all_on: Callable[[socket.socket, Callable[[], None]], Awaitable[None]] = _refuse_anchor
