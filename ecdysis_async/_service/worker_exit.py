"""What an application is told of workers of its service that have ended: by which it tidies up what they leave behind.

The anchor learns of each end, and runs no code of the application. So it lets a worker call it that serves.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

__all__ = ["WorkerExit", "on_worker_exit", "tell_application"]

logger = logging.getLogger("ecdysis_async")


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """The end of a worker.

    Attributes:
        pid: of its process.
        worker: its place among the workers, from 0 on.
        generation: its generation.
        returncode: its exit status; negative where a signal has killed it, as in :mod:`subprocess`.
        was_expected: whether it was told to leave, or another one had taken its place. Otherwise it has crashed, has
            not started, or was ended because it hung.
    """

    pid: int
    worker: int
    generation: int
    returncode: int
    was_expected: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as it travels."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> WorkerExit:
        """Read it.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        numbers = {name: int(body[name]) for name in ("pid", "worker", "generation", "returncode")}
        return cls(**numbers, was_expected=bool(body["was_expected"]))


Hook: TypeAlias = Callable[[WorkerExit], object]
H = TypeVar("H", bound=Hook)

# Of this process: also before its Ecdysis is there, and under another server.
_hooks: list[Hook] = []


def on_worker_exit(hook: H) -> H:
    """Have a function called whenever a worker of ``ecdysis run`` has ended; return it.

    It may stand as a decorator, and may be async. It is called for each end once, on the loop of one worker that
    serves. Where no worker serves at that time, the next one that does is told. If the worker that is told dies at that
    moment, that end is told to nobody. At a stop of the whole service nobody is left, and it is not called; neither is
    it without ``ecdysis run``. An error is logged, and changes nothing.

    Args:
        hook: is called with the :class:`WorkerExit`.
    """
    _hooks.append(hook)
    return hook


async def tell_application(ended: WorkerExit) -> None:
    """Call what the application wants to be called."""
    for hook in tuple(_hooks):
        try:
            done = hook(ended)
            if inspect.isawaitable(done):
                await done
        except Exception:
            logger.exception("the application's on_worker_exit has failed for pid %d", ended.pid)
