"""What an anchor needs open: each thing by itself, and again where the service goes on without it.

A first start fails with the first thing that cannot be opened. An anchor whose workers serve goes on, says what is
missing, and tries again until it is there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio

from ecdysis_async._handoff.generation import GenerationLog

from .state import AnchorState, Begin

__all__ = ["OPENING_ERRORS", "Need", "Needs", "explain_failure"]

# How often it is tried again to open what is missing, seconds.
RETRY_SECONDS = 3.0

# What is raised where something cannot be opened.
OPENING_ERRORS = (OSError, LookupError, ValueError)


def explain_failure(error: Exception) -> str:
    """Return in words why something could not be opened."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return str(error)


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """Something that an anchor opens for itself or its workers.

    Attributes:
        name: what it is, for people, such as "the pid file /run/app.pid".
        open: opens it, or raises an OSError, a LookupError or a ValueError that says what to do, and leaves nothing.
    """

    name: str
    open: Callable[[], Awaitable[None]]


class Needs:
    """Everything that an anchor needs open.

    Args:
        needs: in the order in which they are opened.
        state: what the anchor knows; it learns what is missing.
        log: the anchor's log.
        begin: runs something beside everything else.
    """

    def __init__(self, needs: Sequence[Need], state: AnchorState, log: GenerationLog, begin: Begin) -> None:
        self._needs = needs
        self._state = state
        self._log = log
        self._begin = begin
        self._missing: list[Need] = []

    async def open_all(self) -> None:
        """Open everything, up to the first that cannot be opened.

        Raises:
            OSError, LookupError, ValueError: it cannot be; the text says what to do.
        """
        for need in self._needs:
            await need.open()

    async def open_each(self) -> None:
        """Open what can be opened; the rest is missing, and is tried again."""
        for need in self._needs:
            await self.open(need)

    async def open(self, need: Need) -> None:
        """Open one thing; where it cannot be opened, it is missing, and is tried again."""
        if need in self._missing:
            return
        try:
            await need.open()
        except OPENING_ERRORS as error:
            self._log.error(
                "the service goes on without %s, which is tried again every %g s: %s",
                need.name,
                RETRY_SECONDS,
                explain_failure(error),
            )
            self._state.missing[need.name] = explain_failure(error)
            self._missing.append(need)
            if len(self._missing) == 1:
                self._begin(self._heal)
            self._state.changes.announce()

    async def _heal(self) -> None:
        """Try again, until nothing is missing."""
        state = self._state
        while self._missing and not state.is_stopping:
            await anyio.sleep(RETRY_SECONDS)
            # A release that is taken back closes what was opened meanwhile.
            for need in [] if state.is_rolling else tuple(self._missing):
                try:
                    await need.open()
                except OPENING_ERRORS as error:
                    state.missing[need.name] = explain_failure(error)
                    continue
                self._missing.remove(need)
                del state.missing[need.name]
                self._log.info("%s could be opened, and is there again", need.name)
                state.changes.announce()
