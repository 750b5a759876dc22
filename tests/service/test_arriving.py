"""The way in of a generation that follows nobody; one with a predecessor is in tests/scenarios/handoff."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import anyio

from ecdysis_async._service.arriving import Arriving
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.report import State
from tests.service.lives import a_life


async def test_a_first_generation_accepts_before_it_says_so(backend: str) -> None:
    async with a_life() as (life, management):
        entry = life.plane.registry.obtain(Internet("127.0.0.1", 0))

        def describe() -> str:
            listens = entry.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            return f"{life.state.value}, {'listens' if listens else 'does not listen'}"

        publish = management.publish

        async def publish_and_tell() -> None:
            await publish()
            management.told.append(f"published: {describe()}")

        # A client that has an answer may look for the pid file, and one that finds the file may connect.
        management.publish = publish_and_tell  # type: ignore[method-assign]
        with anyio.fail_after(60):
            await Arriving(life).serve(describe)
        assert management.told == [
            "prepare: starting, does not listen",
            "publish",
            "published: starting, listens",
            "announce: serving, listens",
            "park",
            "serving",
        ]


async def test_a_stop_while_it_begins_to_serve_is_not_forgotten(backend: str) -> None:
    async with a_life() as (life, _):
        life.state = State.DRAINING
        with anyio.fail_after(60):
            await Arriving(life).serve(lambda: "")
        assert life.state is State.DRAINING


async def test_nobody_has_started_this_process(backend: str) -> None:
    async with a_life() as (life, _):
        with ExitStack() as resources:
            assert not await Arriving(life).inherit(None, lambda inheritance: None, resources)
        assert life.inheritance is None
