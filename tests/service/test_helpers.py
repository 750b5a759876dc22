"""What applications call whether or not an ``Ecdysis`` runs: it does what the ``Ecdysis`` does, or nothing."""

from __future__ import annotations

import anyio
import pytest

import ecdysis_async
from ecdysis_async import Ecdysis, draining, settled, track, until_draining


async def test_without_an_ecdysis_they_do_nothing() -> None:
    with pytest.raises(LookupError):
        ecdysis_async.current()
    async with track():
        pass

    async def answer() -> str:
        return "answer"

    assert await until_draining(answer()) == "answer"
    assert not draining.is_set()
    with anyio.move_on_after(0.01) as scope:
        await draining.wait()
    assert scope.cancelled_caught
    assert settled.is_set()
    await settled.wait()


async def test_with_an_ecdysis_they_are_its_own() -> None:
    async with Ecdysis(systemd=False, drain_timeout=1) as ecdysis:
        assert not settled.is_set()
        await ecdysis.ready()
        await settled.wait()
        assert ecdysis.settled.is_set()
        async with track():
            assert ecdysis.connections == 1
        assert not draining.is_set()
        ecdysis.stop()
        await draining.wait()
        assert ecdysis.draining.is_set()
