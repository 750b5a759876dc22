"""What an anchor does about a worker that does not answer, with puppets that keep silent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import anyio
import pytest

from ecdysis_async._anchor import hanging
from ecdysis_async._anchor.hanging import abort, wait_for_answer
from ecdysis_async._ipc.worker_link import FromAnchor
from ecdysis_async.errors import SuccessorFailed
from ecdysis_async.report import State
from ecdysis_async.settings import Settings
from tests.anchor.puppets import Puppet, Stage, sleeping_process, stage

pytestmark = pytest.mark.backends("asyncio")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(hanging, "NO_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(hanging, "TICK_SECONDS", 0.1)
    with stage(settings=Settings(probation=0, drain_timeout=0.1, exit_timeout=0.1)) as found:
        yield found


def add(here: Stage) -> Puppet:
    puppet = here.add_slot()
    assert puppet is not None
    return puppet


async def test_a_worker_is_waited_for_as_long_as_it_says_anything(here: Stage) -> None:
    puppet, changes = add(here), here.state.changes
    is_done = False

    async def speak() -> None:
        nonlocal is_done
        for _ in range(10):
            await anyio.sleep(0.05)
            puppet.worker.heard += 1
        is_done = True
        changes.announce()

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(speak)
        assert await wait_for_answer(changes, puppet.worker, lambda: is_done)
    assert not await wait_for_answer(changes, puppet.worker, lambda: False)


async def test_a_worker_that_does_not_answer_is_followed_by_one_that_it_has_not_started(here: Stage) -> None:
    puppet = add(here)
    (slot,) = here.state.pool.slots
    assert await here.hung_workers.bypass(slot, puppet.worker, 2) is None
    # Should it wake up, it shall not make the successor that it was asked for.
    assert (await puppet.hear()).type == FromAnchor.REVERT
    assert here.filled == [(0, 2)]
    assert puppet.worker.is_bypassed
    assert puppet.worker.has_ended_handoff
    assert puppet.worker.handoff is not None
    assert puppet.worker.handoff.report is not None
    (what,) = puppet.worker.handoff.report.unanswered
    assert what.startswith("worker 0 (pid ")
    assert what.endswith("was replaced without a handoff")
    assert slot.bypassed is None
    assert here.begun.names == ["end"]


async def test_where_the_new_code_fails_the_hung_worker_keeps_its_place(here: Stage) -> None:
    puppet = add(here)
    (slot,) = here.state.pool.slots
    here.failure = SuccessorFailed("a broken release")
    assert await here.hung_workers.bypass(slot, puppet.worker, 2) is here.failure
    assert not puppet.worker.is_bypassed
    assert not puppet.worker.has_ended_handoff
    assert here.begun.names == []


async def test_one_that_hangs_after_it_has_handed_over_needs_no_other_successor(here: Stage) -> None:
    puppet = add(here)
    (slot,) = here.state.pool.slots
    puppet.worker.state = State.PAUSED
    here.add_worker(slot).worker.starter = puppet.worker
    assert await here.hung_workers.bypass(slot, puppet.worker, 2) is None
    assert here.filled == []


async def test_a_successor_that_does_not_serve_yet_is_ended_first(here: Stage) -> None:
    puppet = add(here)
    (slot,) = here.state.pool.slots
    with sleeping_process() as process:
        here.add_worker(slot, state=State.WAITING, process=process).worker.starter = puppet.worker
        assert await here.hung_workers.bypass(slot, puppet.worker, 2) is None
        assert process.returncode == -signal.SIGTERM
    assert here.filled == [(0, 2)]


async def test_one_that_goes_on_hanging_is_ended(here: Stage) -> None:
    with sleeping_process() as process:
        puppet = here.add_slot(process=process)
        assert puppet is not None
        here.hung_workers.expect_end(puppet.worker)
        await here.begun.run()
        assert process.returncode in (-signal.SIGABRT, None)
        assert await process.wait() == -signal.SIGABRT


async def test_one_that_ignores_it_is_killed() -> None:
    with sleeping_process() as process, stage() as here:
        puppet = here.add_slot(process=process)
        assert puppet is not None
        # A stopped process does not act upon any other signal.
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PIDFD, process.pidfd, os.WSTOPPED | os.WNOWAIT)
        await abort(puppet.worker)
        assert await process.wait() == -signal.SIGKILL
