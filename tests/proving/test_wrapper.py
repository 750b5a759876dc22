"""What the wrapper adds to the answers of an application, and what it leaves as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from ecdysis_async._proving import settings, wrapper

pytestmark = pytest.mark.backends("asyncio")

MODULE = "tests.scenarios.proving.apps"
PID = (settings.PID_HEADER.encode(), str(os.getpid()).encode())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    broken = tmp_path / "broken"
    monkeypatch.setenv(settings.TARGET_VARIABLE, f"{MODULE}:good")
    monkeypatch.setenv(settings.APP_DIR_VARIABLE, ".")
    monkeypatch.setenv(settings.BROKEN_VARIABLE, str(broken))
    return broken


async def call(app: Any, scope: dict[str, Any], *received: dict[str, Any]) -> list[dict[str, Any]]:
    messages, sent = list(received), []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def test_an_answer_names_its_process_and_its_request() -> None:
    app = await wrapper.release()
    request = [(settings.REQUEST_HEADER.encode(), b"17")]
    start, body = await call(app, {"type": "http", "headers": request})
    assert start["headers"] == [(b"content-length", b"2"), PID, (settings.REQUEST_HEADER.encode(), b"17")]
    assert body["body"] == b"ok"
    start, _ = await call(app, {"type": "http", "headers": []})
    assert start["headers"] == [(b"content-length", b"2"), PID]


async def test_a_websocket_names_its_process() -> None:
    app = await wrapper.release()
    messages = (
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "a"},
        {"type": "websocket.disconnect"},
    )
    accept, echo = await call(app, {"type": "websocket", "headers": []}, *messages)
    assert accept["headers"] == [PID]
    assert echo == {"type": "websocket.send", "text": "a"}


async def test_the_lifespan_is_left_alone() -> None:
    app = await wrapper.release()
    events = {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}
    sent = await call(app, {"type": "lifespan"}, *events)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_response_of_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.TARGET_VARIABLE, "tests.scenarios.run.apps:make_aiohttp")
    monkeypatch.setenv(settings.FACTORY_VARIABLE, "1")
    app = await wrapper.release()
    assert app.on_response_prepare == [wrapper.name_response]
    response = web.Response()
    await wrapper.name_response(make_mocked_request("GET", "/", headers={settings.REQUEST_HEADER: "4"}), response)
    assert response.headers[settings.PID_HEADER] == str(os.getpid())
    assert response.headers[settings.REQUEST_HEADER] == "4"


async def test_what_cannot_be_wrapped_is_served_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.scenarios.proving import apps

    monkeypatch.setenv(settings.TARGET_VARIABLE, f"{MODULE}:hasty")
    assert await wrapper.release() is apps.hasty
    monkeypatch.setenv(settings.TARGET_VARIABLE, f"{MODULE}:good")
    monkeypatch.setenv(settings.PLAIN_VARIABLE, "1")
    assert await wrapper.release() is apps.good


async def test_a_release_that_is_broken_on_purpose(environment: Path) -> None:
    environment.touch()
    with pytest.raises(wrapper.BrokenOnPurpose, match="broken on purpose"):
        await wrapper.release()
