"""A slot that nobody serves gets a worker: a real one, or the reason why there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from ecdysis_async._anchor.dispatch import Dispatcher
from ecdysis_async._anchor.filling import Filler
from ecdysis_async._anchor.pool import SlotActivity
from ecdysis_async._anchor.reaping import Reaper
from ecdysis_async._anchor.state import Filled, Life, wait_until
from ecdysis_async._ipc.worker_link import FromAnchor
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.report import Outcome
from ecdysis_async.settings import Settings
from tests.anchor.puppets import Stage, stage

pytestmark = pytest.mark.backends("asyncio")

SERVES = """
import ecdysis_async

async def main():
    async with ecdysis_async.Ecdysis() as ecdysis:
        listener = ecdysis.listen_tcp("127.0.0.1", 0, name="web")
        await ecdysis.ready()
        await ecdysis.serve_forever()

ecdysis_async.run(main)
"""


async def fill(here: Stage, program: str) -> Filled:
    """Fill a slot with a worker that runs a program, and end that."""

    def begin(function: Callable[..., Any], /, *arguments: object) -> None:
        task_group.start_soon(function, *arguments)

    def refuse(*arguments: object) -> Any:
        raise AssertionError(arguments)

    state = here.state
    settings = Settings(command=(sys.executable, "-c", program), ready_timeout=60)
    state.config = type(state.config)({}, settings=settings)
    dispatcher = Dispatcher(
        state,
        here.sockets,
        Reaper(reaps_orphans=False),
        here.log,
        begin=begin,
        beat_seconds=60,
        restart=refuse,
        see_through=refuse,
        stop=refuse,
    )
    slot = state.pool.enlarge()
    commits: list[int] = []

    async def note() -> None:
        assert not any(worker.serves for worker in slot.workers)
        commits.append(slot.index)

    filler = Filler(state, here.sockets.service, here.log, dispatcher.make_spawner, note)
    with anyio.fail_after(120):
        async with anyio.create_task_group() as task_group:
            filled = await filler.fill(slot, 3)
            assert slot.activity is SlotActivity.NONE
            assert state.fillings == {}
            serves = filled.report.outcome is Outcome.SETTLED
            assert any(worker.serves for worker in slot.workers) == serves
            assert commits == ([slot.index] if serves else [])
            for worker in slot.workers:
                assert worker.generation == 3
                worker.link.tell(FromAnchor.STOP, {})
            await wait_until(state.changes, lambda: not slot.workers)
    return filled


async def test_it_serves_on_what_the_anchor_holds() -> None:
    with stage() as here:
        here.sockets.service.obtain(Internet("127.0.0.1", 0), name="web")
        filled = await fill(here, SERVES)
        assert filled.error is None
        assert (filled.report.outcome, filled.report.generation) == (Outcome.SETTLED, 3)
        assert (filled.report.inherited, filled.report.created) == (["web"], [])


async def test_it_fails_and_says_why() -> None:
    with stage() as here:
        filled = await fill(here, "raise SystemExit('not today')")
        assert filled.error is not None
        assert "before it entered" in str(filled.error)
        assert "not today" in filled.error.stderr


async def test_it_begins_no_more_where_the_service_stops() -> None:
    with stage() as here:
        here.state.life = Life.STOPPING
        filled = await fill(here, SERVES)
        assert filled.report.outcome is Outcome.STOPPED
