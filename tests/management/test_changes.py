"""No change is missed by who asks for the next one before looking."""

from __future__ import annotations

import anyio

from ecdysis_async._management.changes import Changes


async def test_all_who_wait_hear_of_the_next_change_and_of_no_former_one(backend: str) -> None:
    changes = Changes()
    changes.announce()
    heard: list[int] = []

    async def wait(number: int) -> None:
        await changes.next().wait()
        heard.append(number)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            for number in range(3):
                task_group.start_soon(wait, number)
            await anyio.wait_all_tasks_blocked()
            assert heard == []
            changes.announce()
    assert sorted(heard) == [0, 1, 2]


async def test_a_change_between_asking_and_waiting_is_not_missed(backend: str) -> None:
    changes = Changes()
    change = changes.next()
    changes.announce()
    with anyio.fail_after(60):
        await change.wait()
    assert not changes.next().is_set()
