"""The logger of this library: each line says which process speaks, and no configuration silences it by mistake."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from .claims import restart_id

__all__ = ["Speaker", "let_speak", "logger"]


class Speaker:
    """Who speaks in the log of a service: which process, and for which restart.

    Args:
        name: of the process, in words.
        restart: the id of the restart that the lines belong to; empty where they belong to none.
    """

    def __init__(self, name: str, restart: str = "") -> None:
        self.name = name
        self.restart = restart
        self.pid = os.getpid()

    @property
    def prefix(self) -> str:
        """What stands before each line."""
        restart = f", restart {self.restart}" if self.restart else ""
        return f"[{self.name}, pid {self.pid}{restart}] "

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same as attributes of the record, for logs of JSON."""
        return {"restart_id": self.restart}


class _OwnLogger(logging.Logger):
    """A logger that says who speaks.

    `logging.config.dictConfig` disables every logger that it does not name, unless it is told not to. An application
    that configures its own lines so does not mean the verdict of a restart. Whoever does not want to read these lines
    sets the logger's level.
    """

    speaker: Speaker | None = None

    @property
    def disabled(self) -> bool:
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        """Stay as it is."""

    def makeRecord(  # noqa: N802 - logging's own name
        self,
        name: str,
        level: int,
        fn: str,
        lno: int,
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,
        extra: Mapping[str, object] | None = None,
        sinfo: str | None = None,
    ) -> logging.LogRecord:
        # A line that was written past a log with a speaker of its own.
        if extra is None and self.speaker is not None:
            msg, extra = f"{self.speaker.prefix}{msg}", self.speaker.facts
        return super().makeRecord(name, level, fn, lno, msg, args, exc_info, func, extra, sinfo)


def _own(found: logging.Logger) -> logging.Logger:
    # A class that the application has chosen for all loggers stays.
    if type(found) is logging.Logger:
        found.__class__ = _OwnLogger
    return found


logger = _own(logging.getLogger("ecdysis_async"))


def let_speak(speaker: Speaker | None) -> None:
    """Let the lines of this process that name no speaker be somebody's; None: nobody's any more."""
    if isinstance(logger, _OwnLogger):
        logger.speaker = speaker


if restart_id():
    # What this process writes before it is told its generation belongs to that restart as well.
    let_speak(Speaker("new process", restart_id()))
