"""The settings of one service, checked where they are given rather than in the middle of a restart."""

from __future__ import annotations

import enum
import math
import os
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MAX_DRAINING", "Settings", "StrPath", "WebSocketClose", "read_signals", "read_websocket_close"]

StrPath = str | os.PathLike[str]

MAX_DRAINING = 8
"""How many generations may drain at once, where nothing else is said.

A request that was promised ``drain_timeout`` keeps it. With the default probation of 5 s and the default drain of 30 s,
deploys that wait for each other have no more than 7 generations drain at once. Memory is bounded by the drain's
deadline already. The limit is for what that does not bound: deploys in a loop, and drains of hours.
"""


class WebSocketClose(enum.StrEnum):
    """When the WebSockets of an old generation are closed that cannot move."""

    SPREAD = "spread"  # one after the other over the drain, so that their clients do not come back all at once
    TOGETHER = "together"  # at its beginning, so that those who belong together meet in the new generation


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``Ecdysis(...)`` was given; see there for the meaning. Times are in seconds.

    Raises:
        ValueError, TypeError: a setting that could not work, with what would.
    """

    ready_timeout: float = 60
    drain_timeout: float = 30
    probation: float = 5
    max_draining: int = MAX_DRAINING
    exit_timeout: float = 10
    restart_signals: tuple[signal.Signals, ...] = (signal.SIGHUP, signal.SIGUSR2) if os.name == "posix" else ()
    stop_signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
    pid_file: Path | None = None
    command: tuple[str, ...] | None = None
    environment: Mapping[str, str] | None = None
    env_file: Path | None = None
    websocket_close: WebSocketClose = WebSocketClose.SPREAD

    def __post_init__(self) -> None:
        for name in ("ready_timeout", "drain_timeout", "probation", "exit_timeout"):
            seconds = getattr(self, name)
            if not isinstance(seconds, int | float) or math.isnan(seconds) or seconds < 0:
                raise ValueError(f"{name} is a number of seconds, 0 or more, not {seconds!r}")
        if self.ready_timeout == 0:
            raise ValueError("ready_timeout=0 gives the successor no time at all; give it at least its start-up time")
        if self.max_draining < 1:
            raise ValueError(f"max_draining is a number of generations, 1 or more, not {self.max_draining!r}")
        if both := set(self.restart_signals) & set(self.stop_signals):
            names = ", ".join(sorted(each.name for each in both))
            raise ValueError(f"{names} cannot both restart and stop: leave it out of one of the two")
        for each in (*self.restart_signals, *self.stop_signals):
            # By name: not every platform that can import this has them.
            if each.name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(f"{each.name} cannot be handled by any process")
        if isinstance(self.command, str):
            raise TypeError(f"command is a list of arguments, not one string: write {self.command.split()!r}")
        if self.command is not None and not self.command:
            raise ValueError("command is empty; leave it out to run the same command line again")
        for argument in self.command or ():
            _check_text("an argument of command", argument)
        for name, value in (self.environment or {}).items():
            _check_text("the name of a variable in environment", name)
            if not name or "=" in name:
                raise ValueError(f"{name!r} cannot name a variable of environment: it is empty, or contains a '='")
            # Named, but not shown: it may be a secret.
            _check_text(f"the variable {name} of environment", value)


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} is text, not {type(text).__name__}: write str(...) around it")
    if "\0" in text:
        raise ValueError(f"{what} contains a NUL character, at which the kernel would end it")


def read_signals(signals: Collection[int]) -> tuple[signal.Signals, ...]:
    """Return numbers or names of signals as such.

    Raises:
        ValueError: there is no such signal.
    """
    return tuple(signal.Signals(each) for each in signals)


def read_websocket_close(name: str) -> WebSocketClose:
    """Return the manner of closing WebSockets that has a name.

    Raises:
        ValueError: there is none of this name.
    """
    try:
        return WebSocketClose(name)
    except ValueError:
        raise ValueError(f'websocket_close is "spread" or "together", not {name!r}') from None
