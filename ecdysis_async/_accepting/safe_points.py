"""Safe points of asyncio's tasks, without a cancel scope for each: one would cost half as much as a small request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from ecdysis_async._connections.connection import Connection

__all__ = ["TaskSafePoints"]

T = TypeVar("T")


class TaskSafePoints(Connection):
    """A connection of asyncio or uvloop, whose handler is woken at its safe point by the cancelling of its task."""

    # The task that waits at a safe point without a scope, and whether it was cancelled for that.
    _idle_task: asyncio.Task[Any] | None = None
    _is_woken: bool = False

    async def at_safe_point(self, awaitable: Awaitable[T]) -> T:
        task = asyncio.current_task()
        if self.interrupted or self.invited or self._idle_task is not None or task is None:
            return await super().at_safe_point(awaitable)
        self._idle_task = task
        requests = task.cancelling()
        try:
            return await awaitable
        except asyncio.CancelledError:
            # asyncio makes one error of two cancellations in one turn. Another caller's cancellation must not be lost.
            if not self._is_woken or task.cancelling() > requests + 1:
                raise
        finally:
            self._idle_task = None
            if self._is_woken:
                self._is_woken = False
                task.uncancel()
        raise self._leave_safe_point()

    @property
    def is_at_safe_point(self) -> bool:
        """Whether a task of it waits at a safe point."""
        return self._idle_task is not None or bool(self._idle_scopes)

    def invite(self) -> None:
        super().invite()
        self._wake()

    def interrupt(self) -> None:
        super().interrupt()
        self._wake()

    def _wake(self) -> None:
        """Cancel the task that waits at a safe point without a scope, unless what it waits for has come."""
        task = self._idle_task
        if task is None or self._is_woken:
            return
        # A task that is cancelled between the event and its turn would lose what it waited for: anyio asks this, too.
        waiter: asyncio.Future[Any] | None = task._fut_waiter  # type: ignore[attr-defined]  # noqa: SLF001 - asyncio's
        if waiter is not None and waiter.done():
            # The task may go on to wait for something else.
            task.get_loop().call_soon(self._wake)
            return
        self._is_woken = True
        task.cancel()
