"""What a service that has no anchor, or no workers, answers to the commands that are for those that have."""

from __future__ import annotations

import socket

import pytest

from ecdysis_async._management.changes import Changes
from ecdysis_async._system.process import Child
from ecdysis_async.errors import RestartUnsupported
from tests.management.handlers import handlers


async def spawn(channel: socket.socket, stderr: int) -> Child:
    raise AssertionError("nobody is started")


HANDLERS = handlers(Changes())


async def test_each_refusal_names_what_would_do(backend: str) -> None:
    with pytest.raises(RestartUnsupported, match="ecdysis run --takeover"):
        HANDLERS.begin_takeover(spawn, "a takeover")
    with pytest.raises(RestartUnsupported, match="without --anchor"):
        await HANDLERS.upgrade()
    with socket.socket() as channel, pytest.raises(RestartUnsupported, match=r"Ecdysis\(takeover"):
        await HANDLERS.pass_all_on(channel, lambda: None)
    assert HANDLERS.workers() == []
