"""A worker and its anchor, of which the test plays one: what is told, what is ordered, and what an end means."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import PredecessorEvent, PredecessorState
from ecdysis_async._ipc.channel import Channel, Frame
from ecdysis_async._ipc.worker_link import FromAnchor, FromWorker, error_to_json
from ecdysis_async._service.anchor_client import AnchorClient, WorkerCommands
from ecdysis_async._service.life import Life
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.errors import NotReady, RestartError, SpawnFailed
from ecdysis_async.report import RestartReport, State
from tests.service.lives import a_life


@dataclass
class Pair:
    """A worker's client, and the anchor's end of the link."""

    anchor: Channel
    life: Life
    client: AnchorClient = field(init=False)
    stops: list[str] = field(default_factory=list)
    reports: list[RestartReport] = field(default_factory=list)
    refusal: RestartError | None = None

    async def hear(self, message: FromWorker) -> Frame:
        """Return the next message of that kind; others may come in between."""
        while True:
            frame = await self.anchor.receive()
            if frame.type == message:
                return frame
            frame.close()

    def begin(self, generation: int, restart: str | None) -> PredecessorSide:
        if self.refusal is not None:
            raise self.refusal
        handover = PredecessorSide(self.life.generation, lambda handover: None, number=generation, restart=restart)
        self.life.handover = handover
        return handover


async def reopen_logs(request: str) -> int:
    return 2


async def nothing_here(until: str) -> RestartReport:
    raise AssertionError("a worker does not restart itself")


@contextlib.asynccontextmanager
async def a_pair() -> AsyncIterator[Pair]:
    ours, theirs = socket.socketpair()
    async with a_life() as (life, _):
        pair = Pair(Channel(theirs), life)
        commands = WorkerCommands(
            begin_restart=pair.begin,
            stop=lambda: pair.stops.append("stop"),
            leave_place=lambda: pair.stops.append("leave place"),
            abandon=lambda: pair.stops.append("abandon"),
            note_death=lambda: pair.stops.append("death"),
            reopen_logs=reopen_logs,
            note_report=pair.reports.append,
            state=lambda: life.state.value,
        )
        client = pair.client = AnchorClient(ours, life.plane, commands, life.generation.log, {})
        try:
            with anyio.fail_after(60):
                async with anyio.create_task_group() as task_group:
                    client.start(task_group)
                    yield pair
                    task_group.cancel_scope.cancel()
        finally:
            client.close()
            pair.anchor.close()


async def test_it_beats_at_once_and_at_each_change(backend: str) -> None:
    async with a_pair() as pair:
        first = await pair.hear(FromWorker.BEAT)
        assert first.body == {
            "pid": os.getpid(),
            "state": "starting",
            "is_done_accepting": False,
            "connections": 0,
            "requests": 0,
            "closed": {"ended": 0, "drained": 0, "silent": 0, "transferred": 0, "cut": 0},
            "rss": first.body["rss"],
            "ends_in": None,
            "exclusive": [],
            "jobs": 0,
            "release": first.body["release"],
            "serving": [],
        }
        assert first.body["rss"] > 0
        pair.life.state = State.SERVING
        pair.client.changed()
        assert (await pair.hear(FromWorker.BEAT)).body["state"] == "serving"


async def test_what_it_opened_and_what_it_serves_is_told_before_it_serves(backend: str) -> None:
    async with a_pair() as pair:
        entry = pair.life.plane.registry.obtain(Internet("127.0.0.1", 0))
        await pair.client.prepare(lambda: "serving on everything")
        with contextlib.closing(await pair.hear(FromWorker.CREATED)) as created:
            assert [each["address"] for each in created.body["sockets"]] == [entry.address]
            assert len(created.descriptors) == 1
        assert (await pair.hear(FromWorker.DESCRIPTION)).body == {"text": "serving on everything"}


async def test_a_restart_is_the_whole_services(backend: str) -> None:
    async with a_pair() as pair:
        reports: list[RestartReport] = []

        async def restart() -> None:
            reports.append(await pair.client.restart("settled", nothing_here))

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(restart)
            request = await pair.hear(FromWorker.RESTART)
            assert request.body["until"] == "settled"
            report = RestartReport("abc", 2, os.getpid())
            await pair.anchor.send(
                FromAnchor.VERDICT, {"number": request.body["number"], "report": report.to_json(), "error": None}
            )
        assert reports == pair.reports == [report]


async def test_a_restart_that_fails_raises_what_the_anchor_says(backend: str) -> None:
    async with a_pair() as pair:

        async def restart() -> None:
            with pytest.raises(NotReady, match="starting"):
                await pair.client.restart("serving", nothing_here)

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(restart)
            number = (await pair.hear(FromWorker.RESTART)).body["number"]
            error = error_to_json(NotReady("the service is starting"))
            await pair.anchor.send(FromAnchor.VERDICT, {"number": number, "error": error})
        assert pair.reports == []


async def test_who_waits_no_more_calls_it_off(backend: str) -> None:
    async with a_pair() as pair:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(pair.client.restart, "serving", nothing_here)
            number = (await pair.hear(FromWorker.RESTART)).body["number"]
            task_group.cancel_scope.cancel()
        assert (await pair.hear(FromWorker.CANCEL)).body == {"number": number}


async def test_a_stop_is_the_whole_services(backend: str) -> None:
    async with a_pair() as pair:
        pair.client.stop(lambda: pair.stops.append("here"))
        await pair.hear(FromWorker.STOP)
        assert pair.stops == []


async def test_a_successor_is_started_watched_and_ended_by_the_anchor(backend: str) -> None:
    async with a_pair() as pair:
        assert pair.client.spawner is not None
        ours, theirs = socket.socketpair()
        children: list[Any] = []

        async def spawn(spawner: Callable[[socket.socket, int], Awaitable[Any]]) -> None:
            children.append(await spawner(theirs, 2))

        with ours, theirs, subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(spawn, pair.client.spawner)
                with contextlib.closing(await pair.hear(FromWorker.SPAWN)) as request:
                    assert len(request.descriptors) == 2
                pidfd = os.pidfd_open(process.pid)
                await pair.anchor.send(
                    FromAnchor.SPAWNED, {"number": request.body["number"], "pid": process.pid}, [pidfd]
                )
                os.close(pidfd)
            [child] = children
            assert child.pid == process.pid
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(child.end, 3.0)
                assert (await pair.hear(FromWorker.END)).body == {"pid": process.pid, "grace": 3.0}
                await pair.anchor.send(FromAnchor.EXITED, {"pid": process.pid, "status": -signal.SIGTERM})
            assert await child.wait() == -signal.SIGTERM
            child.close()
            process.communicate(b"\n")


async def test_a_successor_that_cannot_be_started(backend: str) -> None:
    async with a_pair() as pair:
        ours, theirs = socket.socketpair()

        async def spawn() -> None:
            with pytest.raises(SpawnFailed, match="no such command"):
                await pair.client.spawn(theirs, 2)

        with ours, theirs:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(spawn)
                with contextlib.closing(await pair.hear(FromWorker.SPAWN)) as request:
                    error = error_to_json(SpawnFailed("there is no such command"))
                await pair.anchor.send(FromAnchor.SPAWN_FAILED, {"number": request.body["number"], "error": error})


async def order_restart(pair: Pair, generation: int, registry: Registry | None = None) -> None:
    described, descriptors = registry.describe() if registry is not None else ([], [])
    await pair.anchor.send(FromAnchor.RESTART, {"generation": generation, "sockets": described}, descriptors)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await anyio.wait_all_tasks_blocked()


async def test_a_restart_of_its_slot_with_what_other_workers_have_opened(backend: str) -> None:
    theirs = Registry()
    theirs.obtain(Internet("127.0.0.1", 0), name="of another worker")
    async with a_pair() as pair:
        await order_restart(pair, 7, theirs)
        await until(lambda: pair.life.handover)
        handover = pair.life.handover
        assert handover is not None
        assert handover.report.generation == 7
        assert [entry.name for entry in pair.life.plane.registry.entries] == ["of another worker"]
        await pair.anchor.send(FromAnchor.SETTLE)
        await until(lambda: (PredecessorEvent.SETTLE, None) in handover._events)
        # A restart that fails leaves the worker with what it had.
        handover.error = SpawnFailed("there is no such command")
        handover.over.set()
        told = await pair.hear(FromWorker.HANDOVER)
        assert (told.body["is_over"], told.body["error"]["error"]) == (True, "SpawnFailed")
        assert pair.life.plane.registry.entries == ()
    theirs.close(unlink=True)


@pytest.mark.parametrize("state", [PredecessorState.PROBATION, PredecessorState.INITIALISING])
async def test_a_restart_of_its_slot_is_taken_back(backend: str, state: PredecessorState) -> None:
    async with a_pair() as pair:
        await order_restart(pair, 2)
        await until(lambda: pair.life.handover)
        handover = pair.life.handover
        assert handover is not None
        handover.state = state
        await pair.anchor.send(FromAnchor.REVERT, {"error": error_to_json(RestartError("another worker failed"))})
        await until(lambda: handover._events)
        [(event, cause)] = handover._events
        # Clients are being served by a successor on probation, which is not to be killed.
        is_serving = state is PredecessorState.PROBATION
        assert event is (PredecessorEvent.RECALL if is_serving else PredecessorEvent.CANCELLED)
        assert str(cause) == "another worker failed"


async def test_a_restart_that_cannot_begin_is_refused(backend: str) -> None:
    async with a_pair() as pair:
        pair.refusal = NotReady("this generation does not serve yet")
        await order_restart(pair, 2)
        told = await pair.hear(FromWorker.HANDOVER)
        assert (told.body["state"], told.body["error"]["error"]) == (None, "NotReady")


async def test_the_anchor_says_when_a_probation_is_over(backend: str) -> None:
    async with a_pair() as pair:
        assert pair.client.probation == math.inf


async def test_orders_without_an_answer(backend: str) -> None:
    async with a_pair() as pair:
        await pair.anchor.send(FromAnchor.HURRY)
        await until(lambda: pair.life.plane.tracker.is_hurried)
        await pair.anchor.send("an order of a later release")
        await pair.anchor.send(FromAnchor.STOP)
        await until(lambda: pair.stops)
        await pair.anchor.send(FromAnchor.REOPEN_LOGS, {"number": 3})
        assert (await pair.hear(FromWorker.REOPENED)).body == {"number": 3, "handlers": 2}


async def test_what_cannot_be_read_costs_one_order(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    async with a_pair() as pair:
        await pair.anchor.send(FromAnchor.RESTART, {"generation": "x", "sockets": []})
        told = await pair.hear(FromWorker.HANDOVER)
        assert "ValueError" in told.body["error"]["message"]
        await pair.anchor.send(FromAnchor.STOP)
        await until(lambda: pair.stops)
    assert "could not be carried out" in caplog.text


async def test_without_an_anchor_it_leaves_and_nobody_waits_for_ever(backend: str) -> None:
    async with a_pair() as pair:
        ours, theirs = socket.socketpair()

        async def spawn() -> None:
            with pytest.raises(SpawnFailed, match="anchor of this worker is gone"):
                await pair.client.spawn(theirs, 2)

        async def restart() -> None:
            with pytest.raises(RestartError, match="anchor of this worker is gone"):
                await pair.client.restart("serving", nothing_here)

        with ours, theirs:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(spawn)
                task_group.start_soon(restart)
                (await pair.hear(FromWorker.SPAWN)).close()
                pair.anchor.close()
            await restart()
            await spawn()
        await until(lambda: pair.stops)
        await pair.client.finish()
