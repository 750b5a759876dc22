"""What an application, its server and its clients see of the Application in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import anyio
import pytest

from ecdysis_async._accepting.data_plane import DataPlane, activate, deactivate
from ecdysis_async.servers._common.asgi import Application
from ecdysis_async.servers._common.goodbye import DRAINING, RESTARTING, Goodbye
from tests.planes import a_plane

pytestmark = pytest.mark.backends("trio")


class Leaving:
    """Stands for an Ecdysis, as far as an application and a goodbye ask it."""

    drain_timeout = 10.0

    def __init__(self) -> None:
        self.draining = anyio.Event()
        self.settled = anyio.Event()


@contextlib.contextmanager
def activated(plane: DataPlane) -> Iterator[Leaving]:
    activate(plane)
    try:
        yield Leaving()
    finally:
        deactivate()


async def ask(application: Application, **scope: Any) -> list[dict[str, Any]]:
    """Make a request, and return the messages of its response."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup" if scope["type"] == "lifespan" else "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    await application(scope, receive, send)
    return sent


async def respond(scope: Any, receive: Any, send: Any) -> None:
    assert DRAINING in scope["state"]
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"Connection", b"keep-alive"), (b"a", b"b")]}
    )


@pytest.mark.parametrize("version", ["1.0", "1.1", "2"])
async def test_responses_say_goodbye_once_the_generation_leaves(version: str) -> None:
    async with a_plane() as plane:
        with activated(plane) as ecdysis:
            application = Application(respond, Goodbye(cast("Any", ecdysis)))
            (before,) = await ask(application, type="http", http_version=version)
            ecdysis.draining.set()
            (after,) = await ask(application, type="http", http_version=version)
        assert plane.tracker.requests == 2
    assert before["headers"] == [(b"Connection", b"keep-alive"), (b"a", b"b")]
    if version == "2":
        assert after == before
    else:
        assert after["headers"] == [(b"a", b"b"), (b"connection", b"close")]


async def test_an_application_without_lifespan_is_served_and_one_whose_startup_fails_is_not() -> None:
    async def ignorant(scope: Any, receive: Any, send: Any) -> None:
        raise NotImplementedError(scope["type"])

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise LookupError("the configuration")

    async with a_plane() as plane:
        with activated(plane) as ecdysis:
            goodbye = Goodbye(cast("Any", ecdysis))
            application = Application(ignorant, goodbye)
            with pytest.raises(NotImplementedError):
                await ask(application, type="lifespan")
            assert application.failure is None
            application = Application(broken, goodbye)
            # The server is told so, without a text: the adapter raises the reason itself.
            assert await ask(application, type="lifespan") == [{"type": "lifespan.startup.failed", "message": ""}]
            assert isinstance(application.failure, LookupError)


async def test_a_websocket_is_closed_without_its_application() -> None:
    """The application's next message fails as where its client has gone."""
    closed, failed = anyio.Event(), anyio.Event()
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await closed.wait()
        try:
            await send({"type": "websocket.send", "text": "more"})
        except OSError:
            failed.set()
            raise

    async def receive() -> dict[str, Any]:
        await failed.wait()
        return {"type": "websocket.disconnect", "code": RESTARTING}

    async def send(message: Any) -> None:
        sent.append(message)

    class Remembers(Goodbye):
        def add_websocket(self, close: Any, is_in_message: Any = lambda: False) -> None:
            super().add_websocket(close, is_in_message)
            task_group.start_soon(self.close_it, close)

        async def close_it(self, close: Any) -> None:
            await close()
            closed.set()

    async with a_plane() as plane:
        with activated(plane) as ecdysis:
            application = Application(app, Remembers(cast("Any", ecdysis)))
            with anyio.fail_after(60):
                async with anyio.create_task_group() as task_group:
                    await application({"type": "websocket", "http_version": "1.1"}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.close"]
    assert sent[-1]["code"] == RESTARTING
