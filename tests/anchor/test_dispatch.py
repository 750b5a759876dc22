"""What workers say over their links, and what an anchor does about it."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.abc
import pytest

from ecdysis_async._anchor.dispatch import Dispatcher
from ecdysis_async._anchor.pool import HandoffStatus, Slot
from ecdysis_async._anchor.reaping import Reaper
from ecdysis_async._anchor.rollout import make_roll_out
from ecdysis_async._anchor.state import Life, RollOut, Turn, TurnState, wait_until
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._ipc.worker_link import FromAnchor, FromWorker, error_to_json
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.process import Process
from ecdysis_async.errors import NotReady, RestartError
from ecdysis_async.report import Outcome, RestartReport, State
from ecdysis_async.settings import Settings
from tests.anchor.puppets import Puppet, Stage, make_report, sleeping_process, stage

pytestmark = pytest.mark.backends("asyncio")

PATIENCE_SECONDS = 60
SLEEP = ("/bin/sleep", "600")


class Office:
    """A dispatcher at work, with what it asks of the rest of the anchor.

    Attributes:
        here: the stage.
        dispatcher: the dispatcher.
        roll_out: the roll-out that is asked for.
        refusal: why none is begun.
        stops: how often the service was stopped.
    """

    def __init__(self, here: Stage) -> None:
        self.here = here
        self.roll_out = make_roll_out(2, "a test", is_told=False, before=None)
        self.refusal: RestartError | None = None
        self.outcome: RestartError | None = None
        self.may_end = anyio.Event()
        self.stops = 0
        self._tasks: anyio.abc.TaskGroup | None = None
        self.dispatcher = Dispatcher(
            here.state,
            here.sockets,
            Reaper(reaps_orphans=False),
            here.log,
            begin=self.begin,
            beat_seconds=0.5,
            restart=self.restart,
            see_through=self.see_through,
            stop=self.stop,
        )

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Let it work meanwhile; what it has begun has to end, or is cancelled."""
        with anyio.fail_after(PATIENCE_SECONDS):
            async with anyio.create_task_group() as self._tasks:
                yield
                self._tasks.cancel_scope.cancel()

    def begin(self, function: Callable[..., Any], /, *arguments: object) -> None:
        assert self._tasks is not None
        self._tasks.start_soon(function, *arguments)

    def restart(self, asked_by: str) -> RollOut:
        if self.refusal is not None:
            raise self.refusal
        return self.roll_out

    async def see_through(self, roll_out: RollOut, until: str) -> RestartReport:
        assert until == "drained"
        await self.may_end.wait()
        if self.outcome is not None:
            raise self.outcome
        return roll_out.report

    def stop(self) -> None:
        self.stops += 1

    async def until(self, is_so: Callable[[], bool]) -> None:
        await wait_until(self.here.state.changes, is_so)


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage(settings=Settings(command=SLEEP)) as found:
        yield found


@pytest.fixture
def process() -> Iterator[Process]:
    with sleeping_process() as found:
        yield found


@pytest.fixture
def puppet(here: Stage, process: Process) -> Puppet:
    found = here.add_slot(state=State.STARTING, process=process)
    assert found is not None
    return found


def make_beat(state: State = State.SERVING, **more: object) -> dict[str, object]:
    return {"pid": 77, "state": state.value, "connections": 3, "requests": 4, "rss": 5, **more}


@contextlib.asynccontextmanager
async def working(here: Stage, puppet: Puppet) -> AsyncIterator[Office]:
    """Let a dispatcher look after a worker, which hears its welcome."""
    office = Office(here)
    (slot,) = here.state.pool.slots
    async with office.open():
        office.dispatcher.employ(slot, puppet.worker)
        welcome = await puppet.link.receive()
        # The service's stderr comes with it.
        (stderr,) = welcome.descriptors
        assert os.path.sameopenfile(stderr, 2)
        welcome.close()
        assert (welcome.type, welcome.body) == (
            FromAnchor.WELCOME,
            {"beat_seconds": 0.5, "pid": os.getpid(), "keeps_sockets": False},
        )
        yield office


async def test_a_beat_tells_where_a_worker_stands(here: Stage, puppet: Puppet) -> None:
    async with working(here, puppet) as office:
        worker = puppet.worker
        await puppet.say(FromWorker.BEAT, make_beat())
        await office.until(lambda: worker.serves)
        assert (worker.pid, worker.connections, worker.requests, worker.rss) == (77, 3, 4, 5)
        assert not worker.is_done_accepting
        since = worker.served_since
        assert not math.isnan(since)
        worker.silence = 9
        await puppet.say(FromWorker.BEAT, make_beat(rss=None, is_done_accepting=True))
        await office.until(lambda: worker.is_done_accepting)
        assert (worker.rss, worker.served_since, worker.silence) == (None, since, 0)


async def test_a_worker_that_leaves_of_its_own_accord_is_to_be_followed(here: Stage, puppet: Puppet) -> None:
    async with working(here, puppet) as office:
        (slot,) = here.state.pool.slots
        await puppet.say(FromWorker.BEAT, make_beat())
        await puppet.say(FromWorker.BEAT, make_beat(State.DRAINING))
        await office.until(lambda: puppet.worker.left_unasked)
        assert (slot.is_vacant, slot.failures) == (True, 1)


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (FromWorker.BEAT, {"pid": 1}),
        (FromWorker.BEAT, make_beat() | {"state": "dancing"}),
        (FromWorker.SPAWN, {"number": 1}),
        (FromWorker.RESTART, {"number": "many", "until": "settled"}),
        (FromWorker.HANDOVER, {"state": None, "is_over": True, "report": "none", "error": None}),
    ],
)
async def test_what_cannot_be_read_is_told_and_costs_nothing(
    message: FromWorker, body: dict[str, object], here: Stage, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(here, puppet) as office:
        await puppet.say(message, body)
        await puppet.say("gossip", {})
        await puppet.say(FromWorker.BEAT, make_beat())
        await office.until(lambda: puppet.worker.serves)
    assert f"says {message.value!r}, which cannot be read" in caplog.text


async def test_where_a_handoff_stands_is_noted(here: Stage, puppet: Puppet) -> None:
    async with working(here, puppet) as office:
        body: dict[str, Any] = {"is_over": False, "report": make_report().to_json(), "error": None}
        await puppet.say(FromWorker.HANDOVER, body | {"state": PredecessorState.PROBATION.value})
        await office.until(lambda: puppet.worker.handoff is not None)
        assert puppet.worker.handoff == HandoffStatus(PredecessorState.PROBATION, False, make_report(), None)
        error = error_to_json(NotReady("not yet"))
        await puppet.say(FromWorker.HANDOVER, {"state": None, "is_over": True, "report": None, "error": error})
        await office.until(lambda: puppet.worker.has_ended_handoff)
        handoff = puppet.worker.handoff
        assert isinstance(handoff.error, NotReady)
        assert (handoff.state, handoff.report) == (None, None)


async def test_a_description_and_log_files_and_a_stop(here: Stage, puppet: Puppet) -> None:
    async with working(here, puppet) as office:
        await puppet.say(FromWorker.DESCRIPTION, {"text": "an app"})
        await puppet.say(FromWorker.STOP, {})
        await puppet.say(FromWorker.REOPENED, {"number": 3, "handlers": 2})
        await office.until(lambda: puppet.worker.reopened == (3, 2))
        assert here.state.description == "an app"
        assert office.stops == 1


async def test_what_a_worker_creates_is_held(here: Stage, puppet: Puppet) -> None:
    theirs = Registry()
    async with working(here, puppet) as office:
        theirs.obtain(Internet("127.0.0.1", 0), name="web")
        descriptions, descriptors = theirs.describe()
        await puppet.say(FromWorker.CREATED, {"sockets": descriptions}, [os.dup(each) for each in descriptors])
        await puppet.say(FromWorker.BEAT, make_beat())
        await office.until(lambda: puppet.worker.serves)
        assert [entry.name for entry in here.sockets.service.entries] == ["web"]
        theirs.close(unlink=True)


async def test_a_restart_that_is_refused(here: Stage, puppet: Puppet) -> None:
    async with working(here, puppet) as office:
        office.refusal = NotReady("not yet")
        await puppet.say(FromWorker.RESTART, {"number": 5, "until": "drained"})
        verdict = await puppet.link.receive()
        assert (verdict.type, verdict.body["number"]) == (FromAnchor.VERDICT, 5)
        assert verdict.body["error"] == error_to_json(office.refusal)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_restart_that_is_seen_through(fails: bool, here: Stage, puppet: Puppet) -> None:
    async with working(here, puppet) as office:
        office.outcome = RestartError("a broken release") if fails else None
        await puppet.say(FromWorker.RESTART, {"number": 5, "until": "drained"})
        office.may_end.set()
        verdict = await puppet.link.receive()
        assert verdict.body["number"] == 5
        if fails:
            assert verdict.body["error"]["message"] == "a broken release"
        else:
            assert verdict.body["report"] == office.roll_out.report.to_json()


async def test_a_restart_that_is_called_off(here: Stage, puppet: Puppet) -> None:
    async with working(here, puppet) as office:
        office.roll_out.turns = [Turn(Slot(9), TurnState.UNDER_WAY)]
        await puppet.say(FromWorker.RESTART, {"number": 5, "until": "drained"})
        await puppet.say(FromWorker.CANCEL, {"number": 4})
        await puppet.say(FromWorker.CANCEL, {"number": 5})
        await office.until(lambda: office.roll_out.called_off is not None)
        # It waits for no verdict any more.
        office.may_end.set()
        await anyio.wait_all_tasks_blocked()
        office.dispatcher.dismiss_askers()
        assert puppet.worker.link.is_idle


async def test_who_waits_for_a_drain_is_told_before_the_code_that_follows_knows_nothing_of_that(
    here: Stage, puppet: Puppet
) -> None:
    async with working(here, puppet) as office:
        await puppet.say(FromWorker.RESTART, {"number": 5, "until": "drained"})
        office.roll_out.report.outcome = Outcome.SETTLED
        office.dispatcher.hear_all()
        office.dispatcher.dismiss_askers()
        verdict = await puppet.link.receive()
        assert verdict.body == {"number": 5, "report": office.roll_out.report.to_json()}


async def test_a_worker_is_started_for_the_one_that_asks_for_it(here: Stage, puppet: Puppet) -> None:
    async with working(here, puppet):
        (slot,) = here.state.pool.slots
        puppet.worker.successor_generation = 2
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        with ours:
            await puppet.say(FromWorker.SPAWN, {"number": 8}, [theirs.detach(), write_end])
            answer = await puppet.link.receive()
            os.close(read_end)
            assert (answer.type, answer.body["number"]) == (FromAnchor.SPAWNED, 8)
            (pidfd,) = answer.descriptors
            _, new = slot.workers
            assert (new.generation, new.starter, new.process.pid) == (2, puppet.worker, answer.body["pid"])
            assert "NOTIFY_SOCKET" not in new.environment
            # It may end its successor, and hears how that ended.
            await puppet.say(FromWorker.END, {"pid": new.process.pid, "grace": 60})
            exited = await puppet.link.receive()
            assert (exited.type, exited.body) == (
                FromAnchor.EXITED,
                {"pid": answer.body["pid"], "status": -signal.SIGTERM},
            )
            assert select.select([pidfd], [], [], 0)[0]
            os.close(pidfd)
            assert slot.workers == [puppet.worker]
            # No worker keeps those that there were before it.
            assert new.starter is None


async def test_a_worker_that_cannot_be_started(puppet: Puppet, here: Stage) -> None:
    here.state.config = type(here.state.config)({}, settings=Settings(command=("/no/such/program",)))
    async with working(here, puppet):
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        with ours:
            await puppet.say(FromWorker.SPAWN, {"number": 8}, [theirs.detach(), write_end])
            answer = await puppet.link.receive()
            os.close(read_end)
        assert (answer.type, answer.body["number"]) == (FromAnchor.SPAWN_FAILED, 8)
        assert "/no/such/program" in answer.body["error"]["message"]


async def test_a_worker_that_dies_is_reaped_and_its_slot_waits(
    here: Stage, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(here, puppet) as office:
        (slot,) = here.state.pool.slots
        await puppet.say(FromWorker.BEAT, make_beat())
        await puppet.say(FromWorker.RESTART, {"number": 5, "until": "drained"})
        await office.until(lambda: puppet.worker.serves)
        puppet.worker.process.send_signal(signal.SIGKILL)
        await office.until(lambda: puppet.worker.exit_status is not None)
        assert (puppet.worker.exit_status, slot.workers, slot.failures) == (-signal.SIGKILL, [], 1)
        assert puppet.worker.link.fileno() == puppet.worker.process.pidfd == -1
    assert "worker 0 (pid 77) has died: killed by SIGKILL" in caplog.text


async def test_its_last_words_are_heard(here: Stage, process: Process) -> None:
    puppet = here.add_slot(state=State.STARTING, process=process)
    assert puppet is not None
    await puppet.say(FromWorker.BEAT, make_beat(connections=8))
    process.send_signal(signal.SIGKILL)
    async with working(here, puppet) as office:
        await office.until(lambda: puppet.worker.exit_status is not None)
        assert puppet.worker.connections == 8


async def test_the_place_of_a_worker_with_a_broken_link_is_free(
    here: Stage, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(here, puppet) as office:
        await puppet.say(FromWorker.BEAT, make_beat())
        await office.until(lambda: puppet.worker.serves)
        os.write(puppet.link.fileno(), b"no frame at all, and long enough to be seen to be none")
        await office.until(lambda: puppet.worker.state is State.DRAINING)
        assert here.state.pool.slots[0].is_vacant
    assert "can be told nothing any more, and has to leave" in caplog.text


async def test_a_worker_that_comes_while_the_service_stops_is_told_so(here: Stage, puppet: Puppet) -> None:
    here.state.life = Life.STOPPING
    async with working(here, puppet):
        assert (await puppet.link.receive()).type == FromAnchor.STOP
        assert puppet.worker.is_told_to_leave


async def test_a_limit_of_requests_differs_from_worker_to_worker(here: Stage) -> None:
    here.state.config = type(here.state.config)(
        {},
        settings=Settings(command=(sys.executable, "-c", "")),
        max_requests=100,
        max_requests_jitter=10,
    )
    office = Office(here)
    slot = here.state.pool.enlarge()
    async with office.open():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            child = await office.dispatcher.make_spawner(slot, 1)(theirs, 2)
            (worker,) = slot.workers
            assert 100 <= worker.request_limit <= 110
            assert (child.pid, worker.starter) == (worker.process.pid, None)
            # The pool's process is not the handoff's to close.
            child.close()
            await office.until(lambda: not slot.workers)
