"""Readiness: the last of several servers decides, a server that fails or hangs is not passed over in silence."""

from __future__ import annotations

import logging

import anyio
import pytest

from ecdysis_async._accepting import readiness as module
from ecdysis_async._accepting.readiness import Readiness
from tests.planes import turn


async def test_one_server_is_ready_at_once() -> None:
    with Readiness().expect("one") as startup:
        await startup.ready()


async def test_all_wait_for_the_last_one() -> None:
    readiness, go, ready = Readiness(), anyio.Event(), list[str]()

    async def start(name: str, event: anyio.Event | None = None) -> None:
        with readiness.expect(name) as startup:
            if event is not None:
                await event.wait()
                ready.append("last")
            await startup.ready()
            ready.append(name)

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(start, "one")
        await turn()
        task_group.start_soon(start, "two", go)
        await turn(30)
        assert ready == []
        assert readiness.is_awaited
        go.set()
    assert ready[0] == "last"
    assert sorted(ready[1:]) == ["one", "two"]


async def test_the_failure_of_one_gives_its_task_group_time_to_end_the_others() -> None:
    readiness, ready = Readiness(), list[str]()

    async def start() -> None:
        with readiness.expect("one") as startup:
            await startup.ready()
            ready.append("one")

    async def fail() -> None:
        with readiness.expect("two"):
            await turn(20)
            raise LookupError

    async def run() -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(start)
            task_group.start_soon(fail)

    with pytest.raises(BaseExceptionGroup):
        await run()
    assert ready == []


async def test_a_failure_that_the_program_bears_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAILURE_SECONDS", 0.01)
    readiness = Readiness()
    with pytest.raises(LookupError), readiness.expect("optional"):
        raise LookupError
    with readiness.expect("one") as startup:
        await startup.ready()


async def test_who_is_not_ready_in_time_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    readiness = Readiness(0.1)
    in_time = pytest.raises(TimeoutError, match=r"^slow on \[::1\]:80 did not get ready within 0.08 s")
    with readiness.expect("slow on [::1]:80"), readiness.expect("quick") as startup, in_time:
        await startup.ready()
    assert caplog.messages == ["not ready yet: waiting for slow on [::1]:80"]


async def test_nobody_is_waited_for_once_readiness_was_announced_by_the_program() -> None:
    readiness = Readiness()
    with readiness.expect("slow"), readiness.expect("quick") as startup:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(startup.ready)
            await turn(30)
            readiness.note_announced()
