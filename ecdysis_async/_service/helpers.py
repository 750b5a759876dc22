"""What applications call without an ``Ecdysis`` at hand, and whether or not one runs.

An application that runs under ``ecdysis run`` runs under pytest and plain servers as well: there, these do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

from ecdysis_async._connections.connection import current_connection
from ecdysis_async._system.claims import is_awaited

from .ecdysis import Ecdysis, current
from .exclusive import check_name

__all__ = ["draining", "exclusive", "settled", "track", "until_draining"]

T = TypeVar("T")


class _ProcessEvent:
    """An event of this process' ``Ecdysis``, to ask and to await.

    Args:
        choose: returns the event of an ``Ecdysis``.
        is_set_without: whether it counts as set where no ``Ecdysis`` runs, and none will.
    """

    def __init__(self, choose: Callable[[Ecdysis], anyio.Event], *, is_set_without: bool) -> None:
        self._choose = choose
        self._is_set_without = is_set_without

    def is_set(self) -> bool:
        """Say whether it has happened."""
        ecdysis = _find()
        return self._is_set_now_without() if ecdysis is None else self._choose(ecdysis).is_set()

    async def wait(self) -> None:
        """Return when it has happened."""
        ecdysis = _find()
        if ecdysis is not None:
            await self._choose(ecdysis).wait()
        elif self._is_set_now_without():
            await anyio.lowlevel.checkpoint()
        else:
            await anyio.sleep_forever()

    def _is_set_now_without(self) -> bool:
        return self._is_set_without and not is_awaited()


draining = _ProcessEvent(lambda ecdysis: ecdysis.draining, is_set_without=False)
"""This process' generation leaves; see :attr:`Ecdysis.draining`. It never does where no ``Ecdysis`` runs."""

settled = _ProcessEvent(lambda ecdysis: ecdysis.settled, is_set_without=True)
"""This process' generation is final; see :attr:`Ecdysis.settled`. It always is where no ``Ecdysis`` runs."""


def until_draining(awaitable: Awaitable[T]) -> Coroutine[Any, Any, T]:
    """Await something at a safe point of this process' :class:`Ecdysis`; see :meth:`Ecdysis.until_draining`.

    Where no ``Ecdysis`` runs, it is awaited, and nothing more.
    """
    connection = current_connection.get()
    if connection is not None and not connection.is_closed:
        # Each request comes through here. A connection has an `Ecdysis`; in a child that was forked, nothing wakes it.
        return connection.at_safe_point(awaitable)
    ecdysis = _find()
    return _await(awaitable) if ecdysis is None else ecdysis.until_draining(awaitable)


def track() -> AbstractAsyncContextManager[None]:
    """Let the drain of this process' :class:`Ecdysis` wait for work; see :meth:`Ecdysis.track`.

    Where no ``Ecdysis`` runs, it does nothing.
    """
    ecdysis = _find()
    return contextlib.nullcontext() if ecdysis is None else ecdysis.track()


def exclusive(name: str) -> AbstractAsyncContextManager[None]:
    """Hold what one process of the whole service holds at a time; see :meth:`Ecdysis.exclusive`.

    Where no ``Ecdysis`` runs, it is held at once.
    """
    check_name(name)
    ecdysis = _find()
    return contextlib.nullcontext() if ecdysis is None else ecdysis.exclusive(name)


def _find() -> Ecdysis | None:
    try:
        return current()
    except LookupError:
        return None


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable
