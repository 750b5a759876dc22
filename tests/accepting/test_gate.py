"""The gate keeps its word whatever is opened, closed and paused at the same time."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from ecdysis_async._accepting.gate import Acceptor, Gate, GateState
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry
from tests.planes import turn


class Slow(Acceptor):
    """One that takes its time to open."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.may_open = anyio.Event()
        self.events: list[str] = []

    async def open(self) -> None:
        self.events.append("opening")
        await self.may_open.wait()
        self.events.append("open")

    async def pause(self) -> None:
        self.events.append("paused")

    async def end(self) -> None:
        self.events.append("ended")


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry()
    yield registry
    registry.close(unlink=True)


async def test_a_pause_waits_for_what_is_being_opened(registry: Registry) -> None:
    gate, slow = Gate(), Slow(registry.obtain(Internet("127.0.0.1", 0)))
    await gate.open()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(gate.add, slow)
            await turn()
            task_group.start_soon(gate.pause)
            await turn()
            assert slow.events == ["opening"]
            slow.may_open.set()
    assert slow.events == ["opening", "open", "paused"]
    assert gate.state is GateState.CLOSED


async def test_what_is_being_opened_and_spared_stays_open_until_it_is_paused_itself(registry: Registry) -> None:
    gate, slow = Gate(), Slow(registry.obtain(Internet("127.0.0.1", 0)))
    await gate.open()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(gate.add, slow)
            await turn()
            task_group.start_soon(lambda: gate.end(spare=lambda _: True))
            await turn()
            slow.may_open.set()
    assert slow.events == ["opening", "open"]
    await gate.end()
    assert slow.events == ["opening", "open", "paused", "ended"]
    assert gate.acceptors == ()


async def test_nothing_is_opened_twice(registry: Registry) -> None:
    gate, slow = Gate(), Slow(registry.obtain(Internet("127.0.0.1", 0)))
    await gate.open()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(gate.add, slow)
            await turn()
            task_group.start_soon(gate.open)
            await turn()
            slow.may_open.set()
    assert slow.events == ["opening", "open"]


async def test_a_pause_while_the_gate_opens_holds(registry: Registry) -> None:
    gate = Gate()
    first, second = (Slow(registry.obtain(Internet("127.0.0.1", 0), name=name)) for name in ("first", "second"))
    await gate.add(first)
    await gate.add(second)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(gate.open)
            await turn()
            task_group.start_soon(gate.pause)
            await turn()
            first.may_open.set()
            second.may_open.set()
    assert first.events == ["opening", "open", "paused"]
    assert second.events == []


async def test_an_opening_that_was_cancelled_is_not_waited_for(registry: Registry) -> None:
    gate, slow = Gate(), Slow(registry.obtain(Internet("127.0.0.1", 0)))
    await gate.open()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(gate.add, slow)
            await turn()
            task_group.cancel_scope.cancel()
        await gate.pause()
        slow.may_open.set()
        await gate.open()
    assert slow.events == ["opening", "opening", "open"]


async def test_accepting_that_is_over_stays_over(registry: Registry) -> None:
    gate, late = Gate(), Slow(registry.obtain(Internet("127.0.0.1", 0)))
    await gate.end()
    await gate.open()
    await gate.pause()
    assert gate.state is GateState.ENDED
    await gate.add(late)
    assert late.events == ["ended"]
