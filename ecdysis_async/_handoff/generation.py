"""What the supervisor of a generation and the two sides of its handoffs share: data, and the log they write."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio

from ecdysis_async._system.lock_file import LockFile
from ecdysis_async._system.log_files import reopen_logs, reopen_logs_of_application
from ecdysis_async._system.own_log import Speaker, let_speak, logger
from ecdysis_async._system.shared_memory import LastWord
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.settings import Settings

from .ancestors import Ancestors
from .host import Host
from .stash import InheritedStash, Stashes

__all__ = ["Generation", "GenerationLog"]


class GenerationLog(logging.LoggerAdapter[logging.Logger]):
    """Puts generation, pid and restart before each line: in a restart's log several processes speak.

    Args:
        number: of the generation.
        restart: the id of the restart that the lines belong to; empty where they belong to none.
        name: of the process; None: its generation.
    """

    def __init__(self, number: int, restart: str = "", name: str | None = None) -> None:
        super().__init__(logger, {})
        self._number = number
        self._speaker = Speaker(f"generation {number}" if name is None else name, restart)

    @property
    def restart(self) -> str:
        """The id of the restart that the lines belong to; empty where they belong to none."""
        return self._speaker.restart

    @restart.setter
    def restart(self, id: str) -> None:
        self._speaker.restart = id

    def of(self, restart: str) -> GenerationLog:
        """Return the same log for the lines of one restart."""
        return GenerationLog(self._number, restart, self._speaker.name)

    def speak(self) -> None:
        """Let it speak for this process, also in lines that are written past it."""
        let_speak(self._speaker)

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        kwargs["extra"] = {**self._speaker.facts, **(kwargs.get("extra") or {})}
        return self._speaker.prefix + str(msg), kwargs


@dataclass(slots=True)
class Reopening:
    """Log files are being opened anew, or were: for whose request, and how many there were."""

    request: str
    is_done: anyio.Event = field(default_factory=anyio.Event)
    count: int = 0


@dataclass(slots=True)
class Generation:
    """What the two sides of a handoff share with their supervisor."""

    number: int
    settings: Settings
    # What is paused, resumed and handed over.
    host: Host
    log: GenerationLog
    # Keys that this generation's environment got from the env file: forgotten before it is read afresh.
    env_file_keys: tuple[str, ...] = ()
    # Whether systemd watches over the service: then a successor has to become its child.
    is_supervised: bool = False
    # What this generation leaves to its successors, and what was left to it.
    stashes: Stashes = field(default_factory=Stashes)
    inherited_stash: InheritedStash = field(default_factory=InheritedStash)
    # The file of the service's locks, which each process of the service has open.
    lock_file: LockFile | None = None
    # Where the predecessor has it open, in a successor.
    lock_file_place: tuple[int, ...] = ()
    lineage: Ancestors = field(default_factory=Ancestors)
    # Returns what is counted of the service, for a successor; and takes what the predecessor, of a pid, has counted.
    count: Callable[[], dict[str, Any]] = dict
    inherit_counts: Callable[[int, object], None] = lambda pid, body: None
    # Keeps what is counted for a successor that starts, in case this process is killed before it can say so.
    last_word: LastWord | None = None
    # Pausing and resuming may be asked for at the same time; they must not interleave within the gate.
    gate_lock: anyio.Lock = field(default_factory=anyio.Lock)
    # The last one that has an id.
    reopening: Reopening | None = None

    def keep_counts(self) -> None:
        """Let a successor that starts know what is counted here, even if this process is killed in the next moment."""
        if self.last_word is None:
            return
        try:
            self.last_word.write(json.dumps(self.count()).encode())
        except OSError as error:
            self.log.warning("what is counted is lost if this process is killed now: %s", error)

    async def reopen_logs(self, request: str = "") -> int:
        """Open log files anew that were moved away; return how many. The older generations do so as well.

        Args:
            request: its id. An older generation is told of one request by its anchor and by its successor, in whichever
                order: its files are opened once, and counted as often as it is asked. Empty: a request of its own.
        """
        former = self.reopening
        if request and former is not None and former.request == request:
            await former.is_done.wait()
            return former.count
        reopening = Reopening(request)
        if request:
            self.reopening = reopening
        try:
            reopening.count = await self._reopen_logs()
        finally:
            reopening.is_done.set()
        await self.lineage.reopen_logs(request)
        return reopening.count

    async def _reopen_logs(self) -> int:
        count = 0
        try:
            count = await run_in_thread(reopen_logs)
        except Exception:
            # An application may hang whatever it likes at its loggers; that must not end a service that logs on.
            self.log.exception(
                "not all log files were opened anew, and no connection was harmed: mend what the traceback names"
            )
        count += await reopen_logs_of_application()
        self.log.info("reopened %s", "1 log file" if count == 1 else f"{count} log files")
        return count
