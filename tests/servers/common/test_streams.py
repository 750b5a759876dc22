"""Streams of other libraries are told that their generation leaves, and nothing else is touched."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, MutableMapping
from types import ModuleType
from typing import Any

import pytest
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.background import BackgroundTask

from ecdysis_async.servers._common.streams import SEAMS, end_streams

pytestmark = pytest.mark.backends("asyncio")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what a process does to sse-starlette that leaves."""
    monkeypatch.setattr(EventSourceResponse, "__call__", EventSourceResponse.__call__)


@pytest.mark.parametrize("name", SEAMS)
def test_what_is_used_is_there(name: str) -> None:
    module, _, class_name = name.partition(":")
    kind = getattr(importlib.import_module(module), class_name)
    for attribute in SEAMS[name]:
        makers = [vars(each).get("__init__") for each in kind.__mro__[:-1]]
        assigned = {name for each in makers if each is not None for name in each.__code__.co_names}
        assert hasattr(kind, attribute) or attribute in assigned, f"there is no {attribute} in {name} any more"


async def test_event_streams_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)
    event = asyncio.Event()
    monkeypatch.setattr(AppStatus, "should_exit_event", event, raising=False)
    end_streams()
    assert AppStatus.should_exit
    assert event.is_set()


async def count() -> AsyncIterator[dict[str, str]]:
    yield {"data": "0"}
    await asyncio.Event().wait()


class Client:
    """Asks for a stream, and takes note of what it is sent."""

    def __init__(self) -> None:
        self.sent: list[MutableMapping[str, Any]] = []
        self.has_begun = asyncio.Event()
        self.has_gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.has_gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.has_begun.set()

    async def ask(self, response: EventSourceResponse) -> None:
        await response({"type": "http", "method": "GET"}, self.receive, self.send)

    @property
    def is_answered(self) -> bool:
        bodies = [each for each in self.sent if each["type"] == "http.response.body"]
        return [each["more_body"] for each in bodies] == [True] * (len(bodies) - 1) + [False]


async def test_an_event_stream_that_is_ended_is_a_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)
    client, behind = Client(), asyncio.Event()
    response = EventSourceResponse(count(), background=BackgroundTask(behind.set))
    stream = asyncio.create_task(client.ask(response))
    await client.has_begun.wait()
    # Two servers of one process say so one after the other.
    end_streams()
    end_streams()
    await stream
    assert client.is_answered
    assert behind.is_set()


async def test_a_client_that_has_gone_is_sent_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)
    client = Client()
    stream = asyncio.create_task(client.ask(EventSourceResponse(count())))
    await client.has_begun.wait()
    client.has_gone.set()
    await stream
    end_streams()
    assert not client.is_answered


async def test_an_event_stream_that_is_asked_for_late_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)
    end_streams()
    client = Client()
    await client.ask(EventSourceResponse(count()))
    assert [each["type"] for each in client.sent] == ["http.response.start", "http.response.body"]
    assert client.is_answered


async def test_a_process_that_goes_on_has_its_event_streams_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests of an application run one service after another in one process.
    monkeypatch.setattr(AppStatus, "should_exit", False)
    end_streams()
    AppStatus.should_exit = False
    client = Client()
    stream = asyncio.create_task(client.ask(EventSourceResponse(count())))
    await client.has_begun.wait()
    client.has_gone.set()
    await stream
    assert not client.is_answered


async def test_an_application_that_ends_its_streams_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)
    monkeypatch.setattr(AppStatus, "enable_automatic_graceful_drain", False)
    end_streams()
    assert not AppStatus.should_exit


async def test_a_long_poll_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)
    engineio = importlib.import_module("engineio")
    socket = importlib.import_module("engineio.async_socket").AsyncSocket(
        engineio.AsyncServer(async_mode="asgi"), "session"
    )
    poll = asyncio.create_task(socket.poll())
    await asyncio.sleep(0)
    end_streams()
    [packet] = await poll
    assert packet.encode() == "6"
    # A session that nobody polls for has nothing to read later.
    end_streams()
    assert socket.queue.empty()


async def test_what_is_built_otherwise_costs_no_drain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sse_starlette.sse", ModuleType("sse_starlette.sse"))
    end_streams()
    assert "streams of the application are not told" in caplog.text


async def test_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sse_starlette.sse", "engineio.async_socket", "engineio.packet"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    end_streams()
    assert not {"sse_starlette.sse", "engineio.async_socket"} & sys.modules.keys()
