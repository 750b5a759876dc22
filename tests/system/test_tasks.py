"""Tasks that nobody waits for are found, and told from those of task groups, of awaits and of libraries."""

from __future__ import annotations

import asyncio
import contextlib

import anyio
import pytest

from ecdysis_async._system.tasks import abandoned_tasks, all_tasks, describe_task
from tests.planes import turn


async def forget() -> None:
    await asyncio.sleep(3600)


@pytest.mark.backends("asyncio", "uvloop")
async def test_only_what_nobody_waits_for_is_abandoned() -> None:
    known, kept = all_tasks(), set[asyncio.Task[None]]()

    async def wait_for(awaited: asyncio.Task[None]) -> None:
        await awaited

    async with asyncio.TaskGroup() as task_group, anyio.create_task_group() as another:
        structured = [task_group.create_task(forget())]
        another.start_soon(forget)
        structured.append(task_group.create_task(wait_for(asyncio.create_task(forget()))))
        structured.append(task_group.create_task(_gather(asyncio.create_task(forget()))))
        await turn()
        assert abandoned_tasks(known) == []
        lost = asyncio.create_task(forget(), name="lost")
        kept.add(lost)
        lost.add_done_callback(kept.discard)
        await turn()
        assert abandoned_tasks(known) == [lost]
        assert abandoned_tasks([*known, lost]) == []
        assert describe_task(lost.get_coro()).startswith(f"forget at {__file__}:")
        for task in [*structured, lost]:
            task.cancel()
        another.cancel_scope.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await lost


async def _gather(*tasks: asyncio.Task[None]) -> None:
    await asyncio.gather(*tasks)


@pytest.mark.backends("trio")
async def test_on_trio_there_are_none() -> None:
    assert all_tasks() == []
    assert abandoned_tasks(()) == []
