"""The predecessor's side of a restart, with a successor whose words the test says: what is sent, and what is undone."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import anyio
import pytest

from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import PredecessorEvent, PredecessorState
from ecdysis_async.errors import ReadyTimeout, RolledBack, SuccessorFailed
from ecdysis_async.report import Outcome, Phase
from ecdysis_async.settings import Settings
from tests.handoff.scripted import Host, Successor, a_generation


@dataclass(frozen=True)
class Restart:
    """A restart that runs, and the states that it has come to."""

    side: PredecessorSide
    successor: Successor
    host: Host
    states: list[str]


@contextlib.asynccontextmanager
async def a_restart(settings: Settings | None = None, probation: float | None = None) -> AsyncIterator[Restart]:
    """Run a restart until the test leaves."""
    states: list[str] = []
    successor = Successor()
    with a_generation(settings) as (generation, host), anyio.fail_after(60):
        side = PredecessorSide(
            generation, lambda side: states.append(side.state.value), spawner=successor.spawn, probation=probation
        )
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(side.run)
            while successor.channel is None:
                await anyio.wait_all_tasks_blocked()
            try:
                yield Restart(side, successor, host, states)
            finally:
                if successor.process is not None:
                    successor.process.send_signal(signal.SIGKILL)
                    await successor.process.wait()
                successor.close()
                task_group.cancel_scope.cancel()


async def come_to_serve(successor: Successor) -> None:
    await successor.say_hello(opened=5, closed=3)
    assert successor.channel is not None
    listeners = await successor.expect("listeners")
    sockets = listeners["sockets"]
    assert isinstance(sockets, list)
    assert [each["name"] for each in sockets] == ["kept", "unwanted"]
    assert (listeners["generation"], listeners["connections"]) == (2, 3)
    await successor.channel.send("ready", {"claimed": [0], "created": ["new"]})
    await successor.expect("commit")
    await successor.channel.send("serving", {"opened_at": time.monotonic()})


async def test_a_restart_settles_after_its_probation(backend: str) -> None:
    async with a_restart(Settings(probation=0.05)) as restart:
        await come_to_serve(restart.successor)
        settled = await restart.successor.expect("settled")
        assert settled["ancestors"] == []
        await restart.side.over.wait()
        report = restart.side.report
        assert restart.states == ["initialising", "pausing", "committing", "probation", "settled"]
        assert restart.host.asked == ["pause, but not unwanted"]
        assert (report.outcome, report.error, restart.side.error) == (Outcome.SETTLED, None, None)
        assert (report.inherited, report.created, report.unclaimed) == (["kept"], ["new"], ["unwanted"])
        assert list(report.phases) == [Phase.START, Phase.INITIALISE, Phase.PAUSE, Phase.COMMIT, Phase.PROBATION]


async def test_a_probation_without_an_end_waits_for_the_word(backend: str) -> None:
    async with a_restart(Settings(probation=0), probation=math.inf) as restart:
        await come_to_serve(restart.successor)
        await restart.side.serving.wait()
        await anyio.wait_all_tasks_blocked()
        assert restart.states[-1] == "probation"
        restart.side.post(PredecessorEvent.SETTLE)
        await restart.successor.expect("settled")
        await restart.side.over.wait()
        assert restart.side.state is PredecessorState.SETTLED


async def test_a_successor_that_dies_on_probation_is_followed_by_its_predecessor(backend: str) -> None:
    async with a_restart() as restart:
        await come_to_serve(restart.successor)
        await restart.side.serving.wait()
        assert restart.successor.process is not None
        restart.successor.process.send_signal(signal.SIGKILL)
        await restart.side.over.wait()
        assert (type(restart.side.error), restart.side.successor_is_dead) == (RolledBack, True)
        assert "was killed by SIGKILL while on probation" in str(restart.side.error)
        assert (restart.side.report.outcome, restart.side.report.lost) == (Outcome.ROLLED_BACK, 2)
        assert restart.host.asked == ["pause, but not unwanted", "resume"]


async def test_a_successor_that_fails_changes_nothing(backend: str) -> None:
    async with a_restart() as restart:
        await restart.successor.say_hello()
        await restart.successor.expect("listeners")
        assert restart.successor.channel is not None and restart.successor.process is not None
        await restart.successor.channel.send("failed", {"error": "no such table"})
        # It leaves by itself, and is not signalled.
        restart.successor.process.send_signal(signal.SIGTERM)
        await restart.side.over.wait()
        assert type(restart.side.error) is SuccessorFailed
        assert "no such table" in str(restart.side.error)
        assert (restart.side.report.outcome, restart.host.asked) == (Outcome.FAILED, [])


@pytest.mark.backends("asyncio")
async def test_a_message_with_what_does_not_belong_to_it_fails_the_restart(backend: str) -> None:
    """Its descriptors are closed once: the number may be another file's by then."""
    async with a_restart() as restart:
        await restart.successor.say_hello()
        await restart.successor.expect("listeners")
        assert restart.successor.channel is not None
        await restart.successor.channel.send("ready", {"claimed": [], "created": []}, [0])
        await restart.side.over.wait()
        assert type(restart.side.error) is SuccessorFailed
        assert "'ready' came with descriptors" in str(restart.side.error)
        assert (restart.side.report.outcome, restart.host.asked) == (Outcome.FAILED, [])


async def test_a_successor_that_says_nothing_is_ended(backend: str) -> None:
    async with a_restart(Settings(ready_timeout=0.05)) as restart:
        await restart.side.over.wait()
        assert type(restart.side.error) is ReadyTimeout
        assert "it never entered `async with Ecdysis()`" in str(restart.side.error)
        assert restart.side.successor_is_dead
