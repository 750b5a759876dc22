"""The drain waits for everyone, tells the idle ones shortly before the deadline, and cuts the rest; real streams."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

import anyio
import pytest
from anyio.abc import SocketStream, TaskGroup

from ecdysis_async._accepting.anyio_streams import serve
from ecdysis_async._connections import tracker as drain
from ecdysis_async._connections.connection import Connection, current_connection
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.entry import Until
from ecdysis_async.errors import DrainInterrupt
from ecdysis_async.report import DrainCount
from tests.planes import a_plane, connect, read, turn

Handler = Callable[[SocketStream], Awaitable[None]]
Service = tuple[Tracker, Callable[[], socket.socket], TaskGroup]


@contextlib.asynccontextmanager
async def a_service(make_handler: Callable[[Tracker], Handler]) -> AsyncIterator[Service]:
    """Run a service; yield its tracker, what connects a client to it, and a task group."""
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        entry.start_listening()
        await plane.gate.open()
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(lambda: serve(make_handler(plane.tracker), entry, plane=plane))
            yield plane.tracker, lambda: connect(entry), task_group
            await plane.gate.end()


async def reached(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(60):
        while not condition():
            await turn()


@pytest.fixture
def early_farewell(monkeypatch: pytest.MonkeyPatch) -> float:
    """Make nearly all of a drain its farewell, so that a slow machine misses no deadline; return seconds for a drain.

    The farewell of such a drain begins after a tenth of a second.
    """
    monkeypatch.setattr(drain, "FAREWELL_SECONDS", 10.0)
    monkeypatch.setattr(drain, "FAREWELL_SHARE", 0.99)
    return 10.0


def echo_until_draining(tracker: Tracker) -> Handler:
    async def handle(stream: SocketStream) -> None:
        try:
            while True:
                await stream.send(await tracker.until_draining(stream.receive()))
        except DrainInterrupt:
            await stream.send(b"bye")
        except anyio.EndOfStream:
            pass

    return handle


async def test_connections_that_end_by_themselves_are_drained() -> None:
    async with a_service(echo_until_draining) as (tracker, connect, task_group):
        with connect() as client:
            client.send(b"hello")
            assert await read(client) == b"hello"
            ended = anyio.Event()

            async def drain() -> None:
                await tracker.drain(30)
                ended.set()

            task_group.start_soon(drain)
            await tracker.draining.wait()
            client.send(b"still served")
            assert await read(client) == b"still served"
            assert not ended.is_set()
        with anyio.fail_after(60):
            await ended.wait()
        assert tracker.count == DrainCount(drained=1)
        assert len(tracker) == 0


async def test_a_silent_connection_is_told_shortly_before_the_deadline(early_farewell: float) -> None:
    async with a_service(echo_until_draining) as (tracker, connect, _):
        with connect() as client:
            client.send(b"hello")
            assert await read(client) == b"hello"
            begun = anyio.current_time()
            with anyio.fail_after(60):
                await tracker.drain(early_farewell)
            # Half of the tenth of a second: uvloop's clock counts milliseconds, and a difference of floats is rounded.
            assert 0.05 < anyio.current_time() - begun < early_farewell
            assert await read(client) == b"bye"
            assert await read(client) == b""
        assert tracker.count == DrainCount(silent=1)


async def test_a_connection_that_moves_while_it_is_told_to_close_is_counted_once(
    early_farewell: float,
) -> None:
    tracker = Tracker()

    class OnItsWay(Connection):
        def interrupt(self) -> None:
            super().interrupt()
            self.silent = True
            # The successor's answer comes only now.
            tracker.note_moved(self)
            tracker.close(self)

    tracker.open(OnItsWay())
    await tracker.drain(early_farewell)
    assert tracker.count == DrainCount(transferred=1)


async def test_a_busy_connection_is_cancelled_at_the_deadline() -> None:
    seen: list[str] = []

    def make_handler(_: Tracker) -> Handler:
        async def handle(stream: SocketStream) -> None:
            seen.append("begun")
            try:
                await anyio.sleep_forever()
            finally:
                seen.append("ended")

        return handle

    async with a_service(make_handler) as (tracker, connect, _):
        with connect() as client:
            await reached(lambda: seen)
            with anyio.fail_after(60):
                await tracker.drain(0.05)
            assert await read(client) == b""
        assert seen == ["begun", "ended"]
        assert tracker.count == DrainCount(cut=1)
        assert len(tracker) == 0


async def test_who_ignores_the_cancellation_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "CANCEL_GRACE_SECONDS", 0.02)

    def make_handler(_: Tracker) -> Handler:
        async def handle(stream: SocketStream) -> None:
            with anyio.CancelScope(shield=True), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                await stream.receive()

        return handle

    async with a_service(make_handler) as (tracker, connect, _):
        with connect() as client:
            await reached(lambda: len(tracker))
            with anyio.fail_after(60):
                await tracker.drain(0.02)
            assert await read(client) == b""
        assert tracker.count == DrainCount(cut=1)


async def test_who_ignores_even_the_abort_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "CANCEL_GRACE_SECONDS", 0.02)
    release = anyio.Event()

    def make_handler(_: Tracker) -> Handler:
        async def handle(_: SocketStream) -> None:
            with anyio.CancelScope(shield=True):
                await release.wait()

        return handle

    async with a_service(make_handler) as (tracker, connect, _):
        with connect():
            await reached(lambda: len(tracker))
            with anyio.fail_after(60):
                await tracker.drain(0.02)
            assert len(tracker) == 0
            release.set()
        assert tracker.count == DrainCount(cut=1)


async def test_hurry_moves_the_deadline_of_a_running_drain() -> None:
    async with a_service(echo_until_draining) as (tracker, connect, task_group):
        with connect() as client:
            client.send(b"hello")
            assert await read(client) == b"hello"
            task_group.start_soon(tracker.drain, 3600)
            await turn()
            with anyio.fail_after(60):
                tracker.hurry()
                assert await read(client) == b"bye"
                await reached(lambda: tracker.count == DrainCount(silent=1))


@pytest.mark.usefixtures("early_farewell")
async def test_hurry_before_the_drain_shortens_it() -> None:
    async with a_service(echo_until_draining) as (tracker, connect, _):
        with connect() as client:
            client.send(b"hello")
            assert await read(client) == b"hello"
            tracker.hurry()
            with anyio.fail_after(60):
                await tracker.drain(3600)
            assert await read(client) == b"bye"


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_callback_of_the_loop_may_hurry_a_drain_and_open_connections() -> None:
    # No task runs there, so that anyio knows no time and starts no task.
    tracker, late = Tracker(), EndsWhenTold()

    def open_and_hurry() -> None:
        tracker.open(late)
        tracker.hurry()

    tracker.open(EndsWhenTold())
    asyncio.get_running_loop().call_soon(open_and_hurry)
    with anyio.fail_after(60):
        await tracker.drain(3600)
    assert late.interrupted
    assert tracker.count == DrainCount(drained=2)


def test_hurry_may_be_asked_before_there_is_a_loop() -> None:
    Tracker().hurry()


async def test_one_that_is_accepted_while_draining_is_waited_for() -> None:
    async with a_service(echo_until_draining) as (tracker, connect, task_group):
        with connect() as first:
            await reached(lambda: len(tracker) == 1)
            task_group.start_soon(tracker.drain, 30)
            await tracker.draining.wait()
            with connect() as second:
                await reached(lambda: len(tracker) == 2)
                first.close()
                await reached(lambda: tracker.count == DrainCount(drained=1))
                second.send(b"hello")
                assert await read(second) == b"hello"
            await reached(lambda: tracker.count == DrainCount(drained=2))


async def test_each_kind_can_be_drained_on_its_own() -> None:
    tracker = Tracker()
    drained, served = Connection(Until.DRAIN), Connection(Until.EXIT)
    tracker.open(drained)
    tracker.open(served)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(lambda: tracker.drain(30, kinds=[Until.DRAIN]))
            await tracker.draining.wait()
            await turn()
            tracker.close(drained)
        assert tracker.connections() == (served,)
        assert not served.interrupted
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(tracker.drain, 30)
            await turn()
            tracker.close(served)
    assert tracker.count == DrainCount(drained=2)


async def test_cancelling_a_drain_leaves_the_connections_as_they_are(early_farewell: float) -> None:
    async with a_service(echo_until_draining) as (tracker, connect, _):
        with connect() as client:
            client.send(b"hello")
            assert await read(client) == b"hello"
            with anyio.move_on_after(0.05) as scope:
                await tracker.drain(30)
            assert scope.cancelled_caught
            client.send(b"still served")
            assert await read(client) == b"still served"
            assert tracker.count == DrainCount()
            with anyio.fail_after(60):
                await tracker.drain(early_farewell)
            assert tracker.count == DrainCount(silent=1)


async def test_work_may_begin_in_the_very_turn_in_which_a_drain_ends() -> None:
    # The drain's task group is closed to new tasks a moment before the drain knows that it is.
    async def begin_late(tracker: Tracker, last: Connection, turns: int) -> None:
        await tracker.draining.wait()
        await turn()
        tracker.close(last)
        await turn(turns)
        async with tracker.track():
            await turn()

    for turns in range(10):
        tracker = Tracker()
        last = Connection()
        tracker.open(last)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(begin_late, tracker, last, turns)
                await tracker.drain(30)
        assert len(tracker) == 0


class Untold(Connection):
    """One that ends without telling."""

    __slots__ = ("ended",)

    def __init__(self) -> None:
        super().__init__()
        self.ended = False

    def is_over(self) -> bool:
        return self.ended


class EndsWhenTold(Untold):
    __slots__ = ()

    def interrupt(self) -> None:
        super().interrupt()
        self.ended = True


async def test_connections_that_end_without_telling_are_noticed() -> None:
    tracker = Tracker()
    connection = Untold()
    tracker.open(connection)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(tracker.drain, 30)
            await turn()
            connection.ended = True
    assert tracker.count == DrainCount(drained=1)


class CannotBeCancelled(Untold):
    __slots__ = ()

    def cancel(self) -> None:
        raise AttributeError("its transport has forgotten it")


async def test_a_connection_that_cannot_be_ended_costs_no_other_one_its_drain(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker()
    tracker.open(CannotBeCancelled())
    tracker.open(EndsWhenTold())
    with anyio.fail_after(60):
        await tracker.drain(0.1)
    assert (tracker.count, len(tracker)) == (DrainCount(drained=1, cut=1), 0)
    assert "could not be ended" in caplog.text


async def test_who_ends_while_others_move_has_drained() -> None:
    tracker = Tracker()
    before, meanwhile = Untold(), Untold()
    for connection in (before, meanwhile):
        tracker.open(connection)
    before.ended = True

    async def move(on_swept: Callable[[], None]) -> None:
        meanwhile.ended = True
        on_swept()
        await anyio.sleep_forever()

    await tracker.drain(30, move=move)
    assert tracker.count == DrainCount(drained=1)


async def test_one_that_ended_just_before_the_deadline_is_not_counted_as_cut() -> None:
    tracker = Tracker()
    tracker.open(EndsWhenTold())
    with anyio.fail_after(60):
        await tracker.drain(0.01)
    assert tracker.count == DrainCount(drained=1)
    assert len(tracker) == 0


class Ended(Untold):
    """One that has ended, and tells it only to those who ask."""

    __slots__ = ()
    asked: ClassVar[int] = 0

    def is_over(self) -> bool:
        Ended.asked += 1
        return True


async def test_those_that_ended_without_telling_are_found_by_newcomers_a_few_by_each() -> None:
    # One of 10,000 newcomers would stall the loop for milliseconds, if it asked all that were there before it.
    tracker = Tracker()
    most = 0
    for _ in range(5000):
        before = Ended.asked
        tracker.open(Ended())
        most = max(most, Ended.asked - before)
    assert most <= drain.ASKED_PER_NEWCOMER
    assert len(tracker) < 600
    for _ in range(1000):
        tracker.open(Connection())
    before = Ended.asked
    assert 1000 <= len(tracker.connections()) < 1600
    assert Ended.asked - before <= drain.ASKED_PER_TURN
    await tracker.prune_all()
    assert len(tracker) == 1000


async def test_a_task_without_a_connection_is_interrupted_at_the_farewell() -> None:
    tracker = Tracker()
    interrupted = anyio.Event()

    async def wait_for_work() -> None:
        with pytest.raises(DrainInterrupt):
            await tracker.until_draining(anyio.sleep_forever())
        interrupted.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(wait_for_work)
            await turn()
            connection = Connection()
            tracker.open(connection)
            task_group.start_soon(tracker.drain, 0.1)
            await interrupted.wait()
            tracker.close(connection)


@pytest.mark.parametrize("is_waiting", [True, False], ids=["waits already", "waits later"])
async def test_a_task_that_outlives_its_connection_is_interrupted_at_the_farewell(*, is_waiting: bool) -> None:
    tracker = Tracker()
    interrupted, has_ended = anyio.Event(), anyio.Event()
    request, rest = Connection(), Connection()

    async def work_behind_an_answer() -> None:
        current_connection.set(request)
        if not is_waiting:
            await has_ended.wait()
        with pytest.raises(DrainInterrupt):
            await tracker.until_draining(anyio.sleep_forever())
        interrupted.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            tracker.open(request)
            tracker.open(rest)
            task_group.start_soon(work_behind_an_answer)
            await turn()
            tracker.close(request)
            has_ended.set()
            await turn()
            task_group.start_soon(tracker.drain, 0.1)
            await interrupted.wait()
            tracker.close(rest)


async def test_tracked_work_is_waited_for() -> None:
    tracker = Tracker()
    finish = anyio.Event()
    seen: list[str] = []

    async def work() -> None:
        async with tracker.track():
            assert len(tracker) == 1
            await finish.wait()
        seen.append("worked")

    async def drain() -> None:
        await tracker.drain(30)
        seen.append("drained")

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(work)
            await turn()
            task_group.start_soon(drain)
            await turn(20)
            assert seen == []
            finish.set()
    assert seen == ["worked", "drained"]
    assert tracker.count == DrainCount(jobs_done=1)


async def test_tracked_work_is_cancelled_at_the_deadline() -> None:
    tracker = Tracker()

    async def work() -> None:
        with pytest.raises(DrainInterrupt):
            async with tracker.track():
                await anyio.sleep_forever()
        assert current_connection.get() is None

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(work)
            await turn()
            await tracker.drain(0.02)
    assert tracker.count == DrainCount(jobs_cut=1)


async def test_tracked_work_may_wait_at_a_safe_point(early_farewell: float) -> None:
    tracker = Tracker()

    async def work() -> None:
        with pytest.raises(DrainInterrupt):
            async with tracker.track():
                await tracker.until_draining(anyio.sleep_forever())

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(work)
            await turn()
            await tracker.drain(early_farewell)
    assert tracker.count == DrainCount(jobs_done=1)


async def test_the_counters_can_be_shared() -> None:
    tracker = Tracker()
    first, second = Connection(), Connection()
    tracker.open(first)
    cells = memoryview(bytearray(16)).cast("Q")
    tracker.share(cells)
    tracker.open(second)
    tracker.close(first)
    tracker.close(first)
    assert cells.tolist() == [2, 1]
    assert tracker.opened == 2
    # There is no room for it in memory of a release before this.
    tracker.note_told(70)
    assert cells.tolist() == [2, 1]
    cells = memoryview(bytearray(24)).cast("Q")
    tracker.share(cells)
    tracker.note_told(70)
    assert cells.tolist() == [2, 1, 70]


async def test_only_connections_count_and_not_the_work_of_the_application() -> None:
    tracker = Tracker()
    cells = memoryview(bytearray(16)).cast("Q")
    tracker.share(cells)
    async with tracker.track():
        assert len(tracker) == 1
        assert cells.tolist() == [0, 0]
    assert cells.tolist() == [0, 0]
    assert tracker.opened == 0


async def test_a_drain_does_not_ask_all_connections_in_one_turn_of_the_loop() -> None:
    asked = 0

    class Asked(Connection):
        __slots__ = ()

        def is_over(self) -> bool:
            nonlocal asked
            asked += 1
            return False

    tracker = Tracker()
    connections = [Asked() for _ in range(2000)]
    for connection in connections:
        tracker.open(connection)
    seen = [asked]

    async def watch() -> None:
        # To the end of the second look: the first one is that of the drain's beginning.
        while seen[-1] < seen[0] + 2 * len(connections):
            await turn(1)
            seen.append(asked)
        for connection in connections:
            tracker.close(connection)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(watch)
            await tracker.drain(60)
    assert max(after - before for before, after in itertools.pairwise(seen)) <= len(connections) / 2


async def test_a_drain_does_not_list_all_connections_in_one_turn_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "LISTED_PER_TURN", 100)
    looked_at = 0

    class Counting(tuple[Until, ...]):
        __slots__ = ()

        def __contains__(self, kind: object) -> bool:
            nonlocal looked_at
            looked_at += 1
            return super().__contains__(kind)

    tracker = Tracker()
    connections = [Connection() for _ in range(1000)]
    for connection in connections:
        tracker.open(connection)
    seen = [0]

    async def watch() -> None:
        while seen[-1] < len(connections):
            await turn(1)
            seen.append(looked_at)
        # This one lists itself.
        connections.append(Connection())
        tracker.open(connections[-1])
        for connection in connections:
            tracker.close(connection)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(watch)
            await tracker.drain(60, kinds=Counting(Until))
    assert max(after - before for before, after in itertools.pairwise(seen)) <= len(connections) / 2
    assert tracker.count == DrainCount(drained=1001)


async def test_the_drain_of_many_does_not_begin_in_one_turn_of_the_loop() -> None:
    tracker = Tracker()
    connections = [Connection() for _ in range(2000)]
    for connection in connections:
        tracker.open(connection)
    begun = [0]

    async def watch() -> None:
        while begun[-1] < len(connections):
            await turn(1)
            begun.append(sum(connection.news is not None for connection in connections))
        for connection in connections:
            tracker.close(connection)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(watch)
            await tracker.drain(60)
    # A turn of this task is one or a few of the loop.
    assert max(after - before for before, after in itertools.pairwise(begun)) <= len(connections) / 2
    assert tracker.count == DrainCount(drained=2000)


async def test_the_goodbyes_and_the_end_of_many_do_not_come_in_one_turn_of_the_loop(
    early_farewell: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Closing 5,000 at once stood in the way of the others' requests for a second.
    told, cut = 0, 0

    class Stubborn(Untold):
        __slots__ = ()

        def interrupt(self) -> None:
            nonlocal told
            told += 1
            super().interrupt()

        def cancel(self) -> None:
            nonlocal cut
            cut += 1
            tracker.close(self)

    tracker = Tracker()
    for _ in range(600):
        tracker.open(Stubborn())
    seen = [(0, 0)]

    async def watch() -> None:
        while cut < 600:
            await turn(1)
            seen.append((told, cut))
            if told == 600 and not tracker.is_hurried:
                # The deadline comes only now: otherwise a slow machine would miss it before the last goodbye.
                monkeypatch.setattr(drain, "FAREWELL_SECONDS", 0.1)
                tracker.hurry()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(watch)
            await tracker.drain(early_farewell)
    for (told_before, cut_before), (told_after, cut_after) in itertools.pairwise(seen):
        assert max(told_after - told_before, cut_after - cut_before) <= 300
    assert tracker.count == DrainCount(cut=600)
