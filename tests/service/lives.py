"""What the tests of this wing share: the life of a generation without a block, and a management that remembers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio

from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.host import AcceptingHost
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._management.management import Management
from ecdysis_async._service.life import Life
from ecdysis_async.report import RestartReport
from ecdysis_async.settings import Settings
from tests.planes import a_plane


class Remembering(Management):
    """Remembers what it was told, in words."""

    def __init__(self) -> None:
        super().__init__(GenerationLog(1), {})
        self.told: list[str] = []
        self.is_unit_ending = False

    async def restart(self, until: str, here: Callable[[str], Awaitable[RestartReport]]) -> RestartReport:
        return await here(until)

    def stop(self, here: Callable[[], None]) -> None:
        here()

    async def prepare(self, describe: Callable[[], str]) -> None:
        self.told.append(f"prepare: {describe()}")

    async def publish(self) -> None:
        self.told.append("publish")

    def announce(self, description: str) -> None:
        self.told.append(f"announce: {description}")

    def serving(self) -> None:
        self.told.append("serving")

    def park(self) -> None:
        self.told.append("park")

    def restart_changed(self, handover: PredecessorSide) -> None:
        self.told.append(f"restart {handover.state.value}")

    def leaving(self, limit: float, *, is_partial: bool = False) -> None:
        self.told.append("leaving partially" if is_partial else "leaving")

    def failed(self, why: str, error: BaseException | None, status: int = 1) -> None:
        self.told.append(f"failed: {why}")

    async def outlive(self, others: Callable[[], Awaitable[None]]) -> None:
        await others()
        self.told.append("outlived the others")

    async def withdraw(self, *, has_successor: bool) -> None:
        self.told.append("withdraw for a successor" if has_successor else "withdraw")

    def leave_to_next_start(self, *, is_orderly: bool) -> None:
        self.told.append("leave to the next start" if is_orderly else "leave to the start after a failure")

    async def finish(self) -> None:
        self.told.append("finish")


@contextlib.asynccontextmanager
async def a_life(**settings: Any) -> AsyncIterator[tuple[Life, Remembering]]:
    """Make the life of a first generation, whose block nobody has entered."""
    async with a_plane() as plane:
        assert plane.task_group is not None
        # This process, which is the test's, is not to end with a generation.
        settings.setdefault("exit_timeout", math.inf)
        generation = Generation(1, Settings(**settings), AcceptingHost(plane), GenerationLog(1))
        life = Life(generation, plane, plane.task_group, anyio.CancelScope())
        life.management = management = Remembering()
        plane.tracker.draining = anyio.Event()
        try:
            yield life, management
        finally:
            life.reserve.give_up()
