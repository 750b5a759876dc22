"""Servers of asyncio and uvloop behind the gate: nothing is lost by a pause, and everything accepted is tracked."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import socket
from pathlib import Path
from typing import Any

import anyio
import pytest

from ecdysis_async._accepting.asyncio_connections import ServerConnection
from ecdysis_async._accepting.asyncio_servers import (
    create_server,
    create_unix_server,
    start_server,
    start_unix_server,
)
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.errors import DrainInterrupt
from tests.accepting.serving import LOCALHOST, Echo, a_client, an_open_plane, answers, collect, until
from tests.planes import a_plane, read, turn

pytestmark = pytest.mark.backends("asyncio", "uvloop")


async def test_each_address_has_a_socket() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, [LOCALHOST, "127.0.0.2", LOCALHOST], 0)
        assert [sock.getsockname()[0] for sock in server.sockets] == [LOCALHOST, "127.0.0.2"]
        assert [entry.name for entry in plane.registry.entries] == ["tcp:127.0.0.1:0", "tcp:127.0.0.2:0"]


async def test_a_name_is_resolved() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, "localhost", 0, family=socket.AF_INET)
        with a_client(server) as client:
            assert await answers(client)


async def test_of_several_addresses_all_are_bound_or_none() -> None:
    with socket.create_server(("127.0.0.2", 0)) as other:
        async with a_plane() as plane:
            with pytest.raises(OSError, match=r"127\.0\.0\.2"):
                await create_server(plane, Echo, [LOCALHOST, "127.0.0.2"], other.getsockname()[1])
            assert plane.registry.entries == ()
            assert plane.gate.acceptors == ()


async def test_contradictions_are_told_at_once() -> None:
    async with a_plane() as plane:
        with socket.socket() as sock:
            with pytest.raises(ValueError, match="at the same time"):
                await create_server(plane, Echo, LOCALHOST, 0, sock=sock)
            with pytest.raises(ValueError, match="UNIX"):
                await create_unix_server(plane, Echo, sock=sock)
        with socket.socket(type=socket.SOCK_DGRAM) as sock, pytest.raises(ValueError, match="Stream"):
            await create_server(plane, Echo, sock=sock)
        with pytest.raises(ValueError, match="Neither"):
            await create_server(plane, Echo)
        with pytest.raises(ValueError, match="path"):
            await create_unix_server(plane, Echo)
        with pytest.raises(TypeError, match="SSLContext"):
            await create_server(plane, Echo, LOCALHOST, 0, ssl=True)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="ssl_handshake_timeout"):
            await create_server(plane, Echo, LOCALHOST, 0, ssl_handshake_timeout=1)
        assert plane.registry.entries == ()


async def test_a_duplicate_of_a_registered_socket_is_that_socket() -> None:
    """A server that is given a descriptor makes a duplicate of it."""
    async with an_open_plane() as plane:
        entry = plane.registry.obtain(Internet(LOCALHOST, 0), name="web")
        duplicate = socket.fromfd(entry.sock.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)
        server = await create_server(plane, Echo, sock=duplicate)
        assert plane.registry.entries == (entry,)
        with a_client(server) as client:
            assert await answers(client)
        server.close()
        assert duplicate.fileno() == -1


async def test_a_socket_that_is_passed_in_is_registered_by_its_address() -> None:
    async with an_open_plane() as plane:
        listener = socket.create_server((LOCALHOST, 0))
        host, port = listener.getsockname()
        await create_server(plane, Echo, sock=listener)
        assert [entry.name for entry in plane.registry.entries] == [f"tcp:{host}:{port}"]


async def test_the_protocol_runs_in_the_context_of_who_asked_for_the_server() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen: list[str | None] = []

    class Looking(Echo):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            seen.append(variable.get(None))

    async with a_plane() as plane:
        variable.set("the application's")
        server = await create_server(plane, Looking, LOCALHOST, 0)
        await asyncio.create_task(plane.gate.open(), context=contextvars.Context())
        with a_client(server) as client:
            assert await answers(client)
        await until(lambda: not len(plane.tracker))
        await turn()
    assert seen == ["the application's"]


async def test_start_serving_false_waits_for_start_serving() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0, start_serving=False)
        assert plane.gate.acceptors == ()
        await server.start_serving()
        await server.start_serving()
        assert len(plane.gate.acceptors) == 1
        assert server.is_serving()


async def test_close_frees_the_address_and_leaves_the_connections() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        address = server.sockets[0].getsockname()
        with a_client(server) as client:
            assert await answers(client)
            server.close()
            server.close()
            await server.wait_closed()
            assert (server.sockets, server.is_serving()) == ((), False)
            assert (plane.gate.acceptors, plane.registry.entries) == ((), ())
            assert await answers(client)
            with socket.socket() as late:
                assert late.connect_ex(address) == errno.ECONNREFUSED
            # As a rollback does.
            await plane.gate.pause()
            await plane.gate.open()


async def test_once_the_generation_is_leaving_close_leaves_the_socket_to_the_supervisor(tmp_path: Path) -> None:
    async with a_plane() as plane:
        server = await create_unix_server(plane, Echo, tmp_path / "socket")
        await plane.gate.open()
        await plane.gate.end()
        server.close()
        await server.wait_closed()
        assert len(plane.registry.entries) == 1
    assert not (tmp_path / "socket").exists()


async def test_a_server_that_is_closed_while_the_drain_begins_leaves_the_socket_to_the_supervisor(
    tmp_path: Path,
) -> None:
    async with an_open_plane() as plane:
        async with await create_unix_server(plane, Echo, tmp_path / "socket"):
            # A turn before the gate ends, `serve_forever` returns.
            plane.tracker.draining.set()
        assert len(plane.registry.entries) == 1
    assert not (tmp_path / "socket").exists()


async def test_serve_forever_ends_with_close_and_closes_when_cancelled() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        serving = asyncio.ensure_future(server.serve_forever())
        await turn()
        with pytest.raises(RuntimeError, match="already"):
            await server.serve_forever()
        server.close()
        with pytest.raises(asyncio.CancelledError):
            await serving
        with pytest.raises(RuntimeError, match="closed"):
            await server.serve_forever()

        server = await create_server(plane, Echo, LOCALHOST, 0)
        serving = asyncio.ensure_future(server.serve_forever())
        await turn()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert server.sockets == ()


async def test_a_server_is_a_context_manager() -> None:
    async with an_open_plane() as plane:
        async with await create_server(plane, Echo, LOCALHOST, 0) as server:
            assert server.get_loop() is asyncio.get_running_loop()
            assert "tcp:127.0.0.1:0" in repr(server)
        assert plane.registry.entries == ()


@pytest.mark.parametrize("way", ["close_clients", "abort_clients"])
async def test_the_clients_of_a_server_can_be_ended(way: str) -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        other = await create_server(plane, Echo, LOCALHOST, 0, name="other")
        with a_client(server) as client, a_client(other) as other_client:
            assert await answers(client)
            assert await answers(other_client)
            getattr(server, way)()
            assert await read(client) == b""
            assert await answers(other_client)


async def test_a_handler_knows_its_connection_and_is_waited_for_after_the_client_has_gone() -> None:
    async with an_open_plane() as plane:
        finish = asyncio.Event()
        connections: list[Any] = []

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(current_connection.get())
            writer.write(await reader.read(1))
            await reader.read()
            writer.close()
            await finish.wait()

        server = await start_server(plane, handle, LOCALHOST, 0)
        with a_client(server) as client, a_client(server) as other:
            assert await answers(client)
            assert await answers(other)
        assert len({id(connection) for connection in connections}) == 2
        assert all(isinstance(connection, ServerConnection) for connection in connections)
        await until(lambda: all(connection.transport.is_closing() for connection in connections))
        await turn()
        assert len(plane.tracker.connections()) == 2
        finish.set()
        await until(lambda: not len(plane.tracker))


async def test_streams_on_a_unix_socket(tmp_path: Path) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(1))
        writer.close()

    async with an_open_plane() as plane:
        server = await start_unix_server(plane, handle, tmp_path / "socket")
        with a_client(server) as client:
            assert await answers(client)


async def test_a_plain_callback_may_start_tasks_of_its_own() -> None:
    async with an_open_plane() as plane:
        tasks: list[asyncio.Task[None]] = []
        connections: list[object] = []

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(current_connection.get())
            writer.write(await reader.read(1))
            writer.close()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.append(asyncio.ensure_future(handle(reader, writer)))

        server = await start_server(plane, connected, LOCALHOST, 0)
        with a_client(server) as client:
            assert await answers(client)
        assert isinstance(connections[0], ServerConnection)


async def test_a_handler_at_a_safe_point_says_goodbye_before_the_deadline(reports: list[dict[str, Any]]) -> None:
    collect(reports)
    async with an_open_plane() as plane:

        async def say_goodbye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while line := await plane.tracker.until_draining(reader.readline()):
                    writer.write(line)
            except DrainInterrupt:
                writer.write(b"bye\n")
            finally:
                writer.close()

        async def just_leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await plane.tracker.until_draining(reader.readline()):
                writer.write(line)

        for handler, goodbye in ((say_goodbye, b"bye\n"), (just_leave, b"")):
            server = await start_server(plane, handler, LOCALHOST, 0)
            with a_client(server) as client:
                assert await answers(client, b"hello\n")
                plane.tracker.hurry()
                async with anyio.create_task_group() as task_group:
                    task_group.start_soon(plane.tracker.drain, 30.0)
                    assert await read(client) == goodbye
            server.close()
            await server.wait_closed()
        assert (plane.tracker.count.silent, plane.tracker.count.cut) == (2, 0)
    assert reports == []


async def test_a_handler_that_does_not_end_is_cancelled_quietly(reports: list[dict[str, Any]]) -> None:
    collect(reports)
    async with an_open_plane() as plane:
        cancelled: list[bool] = []

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.read(1))
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        server = await start_server(plane, handle, LOCALHOST, 0)
        with a_client(server) as client:
            assert await answers(client)
            plane.tracker.hurry()
            await plane.tracker.drain(30)
            assert (cancelled, plane.tracker.count.cut) == ([True], 1)
            assert await read(client) == b""
    assert reports == []


async def test_an_exception_of_a_handler_is_reported_also_after_the_client_has_gone(
    reports: list[dict[str, Any]],
) -> None:
    collect(reports)
    async with an_open_plane() as plane:

        async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if await reader.read(1) == b"":
                writer.close()
                await writer.wait_closed()
            raise RuntimeError("today is no good day")

        server = await start_server(plane, fail, LOCALHOST, 0)
        with a_client(server) as client:
            client.send(b"?")
            assert await read(client) == b""
        with a_client(server):
            await until(lambda: len(plane.tracker) == 1)
        await until(lambda: len(reports) == 2)
    for report in reports:
        assert isinstance(report["exception"], RuntimeError)
        assert "client_connected_cb" in report["message"]


async def test_a_handler_may_return_and_leave_its_connection_until_the_drain() -> None:
    async with an_open_plane() as plane:
        writers: list[asyncio.StreamWriter] = []

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            writer.write(await reader.read(1))

        server = await start_server(plane, handle, LOCALHOST, 0)
        with a_client(server) as client, a_client(server) as late:
            assert await answers(client)
            await turn()
            assert not writers[0].is_closing()
            await until(lambda: len(plane.tracker) == 2)
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(plane.tracker.drain, 30.0)
                await turn()
                assert await answers(late)
                assert await read(late) == b""
                plane.tracker.hurry()
                assert await read(client) == b""
        assert (plane.tracker.count.drained, plane.tracker.count.silent) == (1, 1)


# Runs short of descriptors, so in a process of its own.
