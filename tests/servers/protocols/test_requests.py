"""What one pass finds of a server in the very turn of leaving: requests of every kind, that nobody took note of."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import anyio
import pytest
import uvicorn
from uvicorn.server import ServerState

from ecdysis_async._accepting.asyncio_connections import ServerConnection
from ecdysis_async._accepting.asyncio_servers import GatedServer, create_server
from ecdysis_async._accepting.data_plane import DataPlane, activate, deactivate
from ecdysis_async._connections import tracker
from ecdysis_async._connections.connection import Connection, current_connection
from ecdysis_async.report import DrainCount
from ecdysis_async.servers._common.asgi import Application
from ecdysis_async.servers._common.goodbye import DRAINING
from ecdysis_async.servers._protocols.requests import RequestsUnderWay, RequestUnderWay
from ecdysis_async.servers._protocols.uvicorn import UvicornRequests, UvicornTransfer, expects_more
from tests.accepting.serving import LOCALHOST, a_client, an_open_plane, until
from tests.planes import read, turn

pytestmark = pytest.mark.backends("asyncio", "uvloop")

GET = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

BOTH = pytest.mark.parametrize("http", ["httptools", "h11"])


@dataclass
class Leaving:
    """Stands for an Ecdysis, as far as an application asks it."""

    draining: anyio.Event
    settled: anyio.Event = field(default_factory=anyio.Event)


@dataclass
class Farewell:
    """Stands for a Goodbye, as far as an application asks it."""

    ecdysis: Leaving
    late: anyio.Event = field(default_factory=anyio.Event)


class Service:
    """An application whose requests begin and go on when a test says so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go_on = anyio.Event()
        self.handlers: list[object] = []
        self.is_cancelled = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        connection = current_connection.get()
        self.handlers.append(connection.handler if isinstance(connection, ServerConnection) else connection)
        assert DRAINING in scope["state"]
        what = scope["path"][1:]
        self.begun.append(what)
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
        try:
            match what:
                case "stream":
                    await send({**start, "headers": []})
                    await send({"type": "http.response.body", "body": b"ok", "more_body": True})
                    await self.go_on.wait()
                    await send({"type": "http.response.body", "body": b""})
                case "work":
                    await send(start)
                    await send({"type": "http.response.body", "body": b"ok"})
                    await self.go_on.wait()
                case "upload":
                    while (await receive())["more_body"]:
                        pass
                    await send(start)
                    await send({"type": "http.response.body", "body": b"ok"})
                case _:
                    if what == "wait":
                        await self.go_on.wait()
                    await send(start)
                    await send({"type": "http.response.body", "body": b"ok"})
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise


@dataclass
class Stage:
    """A service of uvicorn's, with everything that a test may look at."""

    plane: DataPlane
    server: GatedServer
    service: Service
    farewell: Farewell

    @property
    def connection(self) -> ServerConnection:
        (connection,) = self.plane.tracker.connections()
        assert isinstance(connection, ServerConnection)
        return connection


@contextlib.asynccontextmanager
async def a_stage(http: str, under_way: RequestsUnderWay | None = None, **options: Any) -> AsyncIterator[Stage]:
    """Serve as the adapter does, and make the first request, behind which the server is left alone."""
    service = Service()
    async with an_open_plane() as plane:
        activate(plane)
        try:
            state = ServerState()
            config = uvicorn.Config(service, http=http, lifespan="off", log_config=None, **options)
            config.load()
            farewell = Farewell(Leaving(plane.tracker.draining))
            application = Application(config.loaded_app, cast("Any", farewell), expects_more)
            application.rest(under_way or UvicornRequests(state))
            config.loaded_app = application

            def make() -> asyncio.BaseProtocol:
                kind: Any = config.http_protocol_class
                app_state = {DRAINING: plane.tracker.draining}
                return kind(config=config, server_state=state, app_state=app_state)  # type: ignore[no-any-return]

            server = await create_server(plane, make, LOCALHOST, 0)
            server.adapt(transfer=UvicornTransfer(make), keeps_context=True)
            with a_client(server) as client:
                assert b"close" not in await ask(client, b"first")
            await until(lambda: not plane.tracker.connections())
            yield Stage(plane, server, service, farewell)
        finally:
            deactivate()


async def ask(client: Any, path: bytes) -> bytes:
    client.send(GET % path)
    return await read_answer(client)


async def read_answer(client: Any) -> bytes:
    """Read an answer to its end, which is ``ok`` or the last chunk."""
    answer = b""
    with anyio.fail_after(60):
        while not answer.endswith((b"\r\n\r\nok", LAST_CHUNK)):
            received = await read(client)
            assert received, answer
            answer += received
    return answer


async def begin(stage: Stage, client: Any, message: bytes, count: int = 2) -> None:
    client.send(message)
    await until(lambda: len(stage.service.begun) == count)
    await turn()


@BOTH
async def test_the_first_request_is_noted_and_proves_that_others_need_not_be(http: str) -> None:
    async with a_stage(http) as stage:
        with a_client(stage.server) as client:
            assert await ask(client, b"second")
            assert await ask(client, b"third")
        assert stage.plane.tracker.requests == 3
        first, *others = stage.service.handlers
        assert isinstance(first, asyncio.Task)
        assert others == [None, None]


@BOTH
@pytest.mark.parametrize("resets", [False, True])
async def test_a_request_without_a_response_is_answered_with_a_goodbye(http: str, *, resets: bool) -> None:
    """Its connection is busy from the turn of leaving on, also where the server gives its task another context."""
    async with a_stage(http, reset_contextvars=resets) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, GET % b"wait")
            assert stage.connection.handler is None
            stage.plane.tracker.leave()
            assert stage.connection.handler is not None
            stage.service.go_on.set()
            assert (await read_answer(client)).count(b"connection: close") == 1
            assert await read(client) == b""
        await until(lambda: not stage.plane.tracker.connections())
        assert stage.plane.tracker.requests == 2


@BOTH
async def test_a_stream_goes_on_and_its_connection_is_at_a_safe_point_behind_it(http: str) -> None:
    seen: list[Connection] = []
    async with a_stage(http) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, GET % b"stream")
            connection = stage.connection
            stage.plane.tracker.on_safe_point = seen.append
            stage.plane.tracker.leave()
            assert connection.handler is not None
            assert connection.pack() is None
            stage.service.go_on.set()
            await read_answer(client)
            await until(lambda: connection.handler is None)
            assert seen == [connection]
            assert connection.pack() is not None
            connection.keep()
            # Told of the drain with the next answer.
            assert b"connection: close" in await ask(client, b"next")


@BOTH
async def test_a_response_that_ends_behind_the_farewell_is_none_that_was_cut(
    http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nearly all of the drain is its farewell.
    monkeypatch.setattr(tracker, "FAREWELL_SECONDS", 60.0)
    monkeypatch.setattr(tracker, "FAREWELL_SHARE", 0.99)
    async with a_stage(http, timeout_keep_alive=600) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, GET % b"stream")
            connection = stage.connection
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(stage.plane.tracker.drain, 30)
                await until(lambda: connection.interrupted)
                stage.service.go_on.set()
                await read_answer(client)
                assert await read(client) == b""
        assert stage.plane.tracker.count == DrainCount(drained=1)


@BOTH
async def test_an_upload_is_read_to_its_end(http: str) -> None:
    async with a_stage(http) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, POST % b"upload" + b"abc")
            stage.plane.tracker.leave()
            assert stage.connection.handler is not None
            assert stage.connection.pack() is None
            client.send(b"def")
            assert b"connection: close" in await read_answer(client)
            assert await read(client) == b""


@pytest.mark.parametrize("http", ["httptools", "h11", "zttp"])
async def test_who_is_answered_in_the_middle_of_an_upload_is_read_to_its_end(http: str) -> None:
    """An application that refuses an upload reads nothing of it; a close would break what the client still sends."""
    async with a_stage(http) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, POST % b"wait" + b"abc")
            stage.plane.tracker.leave()
            stage.service.go_on.set()
            assert b"close" not in await read_answer(client)
            client.send(b"def")
            assert b"connection: close" in await ask(client, b"next")


@pytest.mark.backends("asyncio")
@pytest.mark.main_python_only
@BOTH
async def test_a_request_that_begins_while_it_is_read_is_told_goodbye(http: str) -> None:
    loop = asyncio.get_running_loop()
    async with a_stage(http) as stage:
        with a_client(stage.server) as client:
            stage.plane.tracker.leave()
            loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined] # 3.12 and later
            try:
                assert b"connection: close" in await ask(client, b"eager")
            finally:
                loop.set_task_factory(None)


@BOTH
async def test_a_pipeline_is_answered_where_its_connection_moves_behind_it(http: str) -> None:
    seen: list[Connection] = []
    async with a_stage(http) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, GET % b"wait" + GET % b"next")
            connection = stage.connection
            stage.plane.tracker.moves = True
            stage.plane.tracker.on_safe_point = seen.append
            stage.plane.tracker.leave()
            stage.service.go_on.set()
            answers = b""
            while answers.count(b"\r\n\r\nok") < 2:
                answers += await read(client)
            assert b"close" not in answers
            await until(lambda: connection.handler is None)
            assert connection in seen
            assert connection.pack() is not None
            connection.keep()
        assert stage.plane.tracker.requests == 3


@BOTH
async def test_work_behind_an_answer_is_waited_for_and_cut_at_the_deadline(http: str) -> None:
    async with a_stage(http) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, GET % b"work")
            await read_answer(client)
            stage.plane.tracker.leave()
            assert stage.connection.handler is not None
            await stage.plane.tracker.drain(0.2)
            assert stage.service.is_cancelled
            assert stage.plane.tracker.count.cut == 1
            (cut,) = stage.plane.tracker.cut
            assert "GET /work, more than " in cut


@BOTH
async def test_a_request_whose_client_has_gone_is_work_that_the_drain_waits_for(http: str) -> None:
    async with a_stage(http) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, GET % b"wait")
        await until(lambda: not stage.plane.tracker.connections())
        opened = stage.plane.tracker.opened
        stage.plane.tracker.leave()
        assert len(stage.plane.tracker) == 1
        await stage.plane.tracker.drain(0.2)
        assert stage.service.is_cancelled
        assert (stage.plane.tracker.count.cut, stage.plane.tracker.count.jobs_cut) == (0, 1)
        (cut,) = stage.plane.tracker.cut
        assert "GET /wait" in cut
        # It is no connection more.
        assert stage.plane.tracker.opened == opened


@BOTH
async def test_a_goodbye_is_said_where_a_connection_that_was_to_move_stays(http: str) -> None:
    async with a_stage(http) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, GET % b"wait")
            stage.plane.tracker.moves = True
            stage.plane.tracker.leave()
            stage.plane.tracker.moves = False
            stage.service.go_on.set()
            assert b"connection: close" in await read_answer(client)


class Changed(RequestsUnderWay):
    """A server that has changed: it shows its requests as it did only for the first ``shown`` ones."""

    def __init__(self, shown: int) -> None:
        self._shown = shown
        self._tasks: set[asyncio.Task[None]] = set()

    def tasks(self) -> list[asyncio.Task[None]]:
        return [task for task in asyncio.all_tasks() if "run_asgi" in repr(task)]

    def find(self, task: asyncio.Task[None]) -> RequestUnderWay | None:
        if self._shown:
            self._shown -= 1
            return UvicornRequests(ServerState()).find(task)
        raise AttributeError("no cycle any more")


async def test_a_server_that_has_changed_is_served_as_before_and_a_warning_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_stage("httptools", Changed(0)) as stage:
        with a_client(stage.server) as client:
            assert await ask(client, b"second")
            await begin(stage, client, GET % b"wait", 3)
            assert stage.connection.handler is not None
            stage.plane.tracker.leave()
            stage.service.go_on.set()
            assert b"connection: close" in await read_answer(client)
    (said,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert said.startswith(
        "this release of the server does not show its requests (AttributeError('no cycle any more'))"
    )


async def test_a_request_that_is_not_shown_at_the_leaving_is_waited_for_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_stage("httptools", Changed(1)) as stage:
        with a_client(stage.server) as client:
            await begin(stage, client, GET % b"wait")
            stage.plane.tracker.leave()
            assert len(stage.plane.tracker) == 2
            stage.service.go_on.set()
            assert b"ok" in await read_answer(client)
            await until(lambda: len(stage.plane.tracker) == 1)
    assert "the server does not show a request" in caplog.text
