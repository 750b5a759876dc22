"""Connections of asyncio and uvloop: how each is tracked, from its acceptance to its last byte."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from ecdysis_async._accepting.asyncio_connections import ServerConnection, track_protocol
from ecdysis_async._accepting.asyncio_servers import (
    GatedServer,
    create_server,
    start_server,
)
from ecdysis_async._connections.connection import current_connection
from tests.accepting.serving import LOCALHOST, Echo, a_client, an_open_plane, answers, collect, open_tls, until
from tests.planes import a_plane, read, turn

pytestmark = pytest.mark.backends("asyncio", "uvloop")

# Bytes: the buffers of both ends of a TCP connection grow, to some 10 MB by default.
MORE_THAN_THE_KERNEL_HOLDS = 32_000_000


class Slotted(asyncio.Protocol):
    """As aiohttp's: no place for attributes, and no weak references."""

    __slots__ = ("lost", "transport")

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Buffered(asyncio.BufferedProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.buffer = bytearray(100)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(bytes(self.buffer[:nbytes]))


class DuckTyped:
    """Derived from nothing, and short of what it does not need."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        pass


@pytest.mark.parametrize("protocol", [Echo, Slotted, Buffered, DuckTyped])
async def test_protocols_of_every_kind_are_tracked_to_their_end(protocol: Callable[[], asyncio.BaseProtocol]) -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, protocol, LOCALHOST, 0)
        with a_client(server) as client:
            assert await answers(client)
            assert len(plane.tracker) == 1
        # Without a prune: the protocol's own end is heard.
        await until(lambda: not len(plane.tracker))


class OneAtATime(Echo):
    """Has enough with what it gets, until it is told to read on."""

    def __init__(self) -> None:
        self.received = b""
        self.got_behind_its_pause = False

    def data_received(self, data: bytes) -> None:
        self.got_behind_its_pause |= bool(self.received) and not self.transport.is_reading()
        self.received += data
        self.transport.pause_reading()


class OneBufferAtATime(OneAtATime, asyncio.BufferedProtocol):
    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(100)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))


@pytest.mark.parametrize("kind", [OneAtATime, OneBufferAtATime])
async def test_nothing_comes_behind_the_pause_of_a_protocol_that_goes_on_with_what_was_unread(
    kind: type[OneAtATime],
) -> None:
    loop = asyncio.get_running_loop()
    async with a_plane() as plane:
        acceptor = (await create_server(plane, Echo, LOCALHOST, 0))._acceptors[0]
        connection = ServerConnection(acceptor.hooks, acceptor.entry, None)
        ours, theirs = socket.socketpair()
        with ours:
            # There before the protocol is: uvloop reads it before anything else is called.
            ours.send(b"more")
            theirs.setblocking(False)
            plane.tracker.open(connection)
            protocol = kind()
            tracked = track_protocol(connection, protocol, b"some")
            transport, _ = await loop.connect_accepted_socket(lambda: tracked, theirs)
            await until(lambda: bool(protocol.received))
            await turn()
            assert protocol.received in (b"some", b"somemore")
            transport.resume_reading()
            await until(lambda: protocol.received == b"somemore")
            assert not protocol.got_behind_its_pause
            transport.resume_reading()
            ours.send(b"!")
            await until(lambda: protocol.received == b"somemore!")
            transport.abort()
        await until(lambda: not len(plane.tracker))


async def test_flow_control_and_the_end_of_file_reach_the_protocol() -> None:
    calls: list[str] = []

    class Listening(Echo):
        def pause_writing(self) -> None:
            calls.append("pause")

        def resume_writing(self) -> None:
            calls.append("resume")
            self.transport.close()

        def data_received(self, data: bytes) -> None:
            self.transport.write(bytes(MORE_THAN_THE_KERNEL_HOLDS))

        def eof_received(self) -> bool:
            calls.append("eof")
            return True

        def connection_lost(self, exc: Exception | None) -> None:
            calls.append("lost")

    async with an_open_plane() as plane:
        server = await create_server(plane, Listening, LOCALHOST, 0)
        with a_client(server) as client:
            client.send(b"?")
            client.shutdown(socket.SHUT_WR)
            while await read(client):
                pass
    assert calls == ["pause", "eof", "resume", "lost"]


# asyncio leaves the socket of such a connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_connection_counts_from_the_factory_and_not_if_that_fails(reports: list[dict[str, Any]]) -> None:
    counts: list[int] = []
    collect(reports)
    async with an_open_plane() as plane:

        def fail() -> asyncio.BaseProtocol:
            counts.append(len(plane.tracker))
            raise RuntimeError("no protocol today")

        server = await create_server(plane, fail, LOCALHOST, 0)
        with a_client(server):
            await until(lambda: counts)
        assert counts == [1]


async def test_a_protocol_that_is_replaced_is_tracked_to_the_last_byte() -> None:
    """As uvicorn does at the upgrade to a WebSocket: nobody is told of the loss of the connection."""

    class Upgrading(Echo):
        def data_received(self, data: bytes) -> None:
            self.transport.set_protocol(asyncio.Protocol())
            self.transport.write(bytes(MORE_THAN_THE_KERNEL_HOLDS))
            self.transport.close()

    async with an_open_plane() as plane:
        server = await create_server(plane, Upgrading, LOCALHOST, 0)
        with a_client(server) as client:
            client.send(b"?")
            await anyio.wait_readable(client)
            await turn()
            gc.collect()
            assert len(plane.tracker.connections()) == 1
            received = 0
            while data := await read(client):
                received += len(data)
            assert received == MORE_THAN_THE_KERNEL_HOLDS


async def test_an_idle_protocol_is_closed_shortly_before_the_deadline() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        with a_client(server) as client, a_client(server) as idle:
            assert await answers(client)
            assert await answers(idle)
            plane.tracker.hurry()
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(plane.tracker.drain, 30.0)
                assert await read(client) == b""
                assert await read(idle) == b""
                client.close()
                idle.close()
        assert (plane.tracker.count.silent, plane.tracker.count.cut) == (2, 0)


async def test_an_idle_protocol_that_ends_by_itself_is_left_to_do_so() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        asked: list[Any] = []

        def say_goodbye(protocol: Echo) -> bool:
            asked.append(protocol)
            return True

        server.adapt(say_goodbye=say_goodbye)
        with a_client(server) as client:
            assert await answers(client)
            plane.tracker.hurry()
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(plane.tracker.drain, 30.0)
                while not asked:
                    await turn()
                # Within the second that a hurried drain has.
                assert await answers(client)
                client.close()
        assert asked == [asked[0]]
        assert (plane.tracker.count.drained, plane.tracker.count.silent, plane.tracker.count.cut) == (1, 0, 0)


async def test_a_connection_with_a_full_buffer_is_cut_at_the_deadline() -> None:
    class Flooding(Echo):
        def data_received(self, data: bytes) -> None:
            self.transport.write(bytes(MORE_THAN_THE_KERNEL_HOLDS))

    async with an_open_plane() as plane:
        server = await create_server(plane, Flooding, LOCALHOST, 0)
        with a_client(server) as client:
            client.send(b"?")
            await anyio.wait_readable(client)
            plane.tracker.hurry()
            with anyio.fail_after(60):
                await plane.tracker.drain(30)
            assert (plane.tracker.count.silent, plane.tracker.count.cut) == (0, 1)


async def test_a_protocol_is_never_taken_for_the_connection_of_another_one() -> None:
    """The connections of a server of uvloop share one context."""
    seen: list[object] = []

    class Looking(Echo):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.connection = current_connection.get()

        def data_received(self, data: bytes) -> None:
            seen.append(current_connection.get() in (None, self.connection))
            super().data_received(data)

    async with an_open_plane() as plane:
        server = await create_server(plane, Looking, LOCALHOST, 0)
        with a_client(server) as client, a_client(server) as other:
            await until(lambda: len(plane.tracker) == 2)
            assert await answers(client)
            assert await answers(other)
    assert seen == [True, True]


@pytest.mark.parametrize("protocol", [Echo, Slotted, Buffered])
async def test_tls(
    protocol: Callable[[], asyncio.BaseProtocol], server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, protocol, LOCALHOST, 0, ssl=server_context, ssl_handshake_timeout=10)
        reader, writer = await open_tls(server, client_context)
        writer.write(b"?")
        assert await reader.read(1) == b"?"
        assert len(plane.tracker) == 1
        writer.close()
        await writer.wait_closed()
        await until(lambda: not len(plane.tracker))


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Collect no garbage while the test runs."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("first_words", [b"", b"this is no hello\r\n\r\n"])
async def test_a_handshake_that_fails_leaves_nothing(
    server_context: ssl.SSLContext, first_words: bytes, reports: list[dict[str, Any]]
) -> None:
    """Trap 20: the protocol is never told of such a connection."""
    collect(reports)
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0, ssl=server_context)
        for _ in range(20):
            with a_client(server) as client:
                if first_words:
                    client.send(first_words)
                    await anyio.wait_readable(client)
                else:
                    await turn()
        await until(lambda: plane.tracker.opened == 20)
        await until(lambda: not plane.tracker.connections())


class RecordsItsThread(ServerConnection):
    """Says in which thread it was lost."""

    __slots__ = ("threads",)

    def __init__(self, server: GatedServer) -> None:
        acceptor = server._acceptors[0]
        super().__init__(acceptor.hooks, acceptor.entry, None)
        self.threads: list[int] = []

    def lose(self) -> None:
        self.threads.append(threading.get_ident())
        super().lose()


async def test_a_handshake_that_another_thread_collects_is_lost_in_that_of_the_loop(
    server_context: ssl.SSLContext,
) -> None:
    async with an_open_plane() as plane:
        connection = RecordsItsThread(await create_server(plane, Echo, LOCALHOST, 0, ssl=server_context))
        plane.tracker.open(connection)
        garbage = [track_protocol(connection, Echo())]
        await anyio.to_thread.run_sync(garbage.clear)
        await until(lambda: connection.threads)
        assert connection.threads == [threading.get_ident()]
        assert len(plane.tracker) == 0


async def test_what_the_loop_could_not_attach_is_let_go_when_it_is_asked() -> None:
    async with an_open_plane() as plane:
        acceptor = (await create_server(plane, Echo, LOCALHOST, 0))._acceptors[0]
        plane.tracker.open(ServerConnection(acceptor.hooks, acceptor.entry, None))
        await until(lambda: not plane.tracker.connections())
        assert plane.tracker.closed == 1


def test_what_is_collected_after_the_loop_was_closed_is_let_go(server_context: ssl.SSLContext) -> None:
    async def make() -> list[object]:
        async with a_plane() as plane:
            server = await create_server(plane, Echo, LOCALHOST, 0, ssl=server_context)
            acceptor = server._acceptors[0]
            return [track_protocol(ServerConnection(acceptor.hooks, acceptor.entry, None), Echo())]

    # An exception of its `__del__` would be a warning, and that an error.
    asyncio.run(make()).clear()


async def test_a_handshake_that_takes_for_ever_is_given_up_at_the_deadline(server_context: ssl.SSLContext) -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0, ssl=server_context)
        with a_client(server):
            await until(lambda: len(plane.tracker) == 1)
            plane.tracker.hurry()
            with anyio.fail_after(60):
                await plane.tracker.drain(30)
            assert plane.tracker.count.cut == 1


async def test_a_tls_protocol_that_is_replaced_is_tracked_to_the_last_byte(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    class Upgrading(Echo):
        def data_received(self, data: bytes) -> None:
            self.transport.set_protocol(asyncio.Protocol())
            self.transport.write(bytes(MORE_THAN_THE_KERNEL_HOLDS))
            self.transport.close()

    async with an_open_plane() as plane:
        server = await create_server(plane, Upgrading, LOCALHOST, 0, ssl=server_context)
        reader, writer = await open_tls(server, client_context)
        writer.write(b"?")
        assert await reader.readexactly(1) == b"\0"
        assert len(plane.tracker.connections()) == 1
        assert len(await reader.read()) == MORE_THAN_THE_KERNEL_HOLDS - 1
        writer.close()
        await writer.wait_closed()
        await until(lambda: not plane.tracker.connections())


async def test_a_tls_connection_that_was_closed_twice_is_cut_at_the_deadline(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    class ClosesTwice(Echo):
        def data_received(self, data: bytes) -> None:
            self.transport.write(bytes(MORE_THAN_THE_KERNEL_HOLDS))
            self.transport.close()
            self.transport.close()

    async with an_open_plane() as plane:
        server = await create_server(plane, ClosesTwice, LOCALHOST, 0, ssl=server_context)
        reader, writer = await open_tls(server, client_context)
        writer.write(b"?")
        assert await reader.readexactly(1) == b"\0"
        plane.tracker.hurry()
        with anyio.fail_after(60):
            await plane.tracker.drain(30)
        (cut,) = plane.tracker.cut
        assert cut.startswith("a connection to tcp:127.0.0.1:0 from ")
        writer.transport.abort()
        await writer.wait_closed()


async def test_a_stream_that_starts_tls_is_tracked_to_its_end(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))
        await writer.start_tls(server_context)
        writer.write(await reader.readexactly(1))
        await reader.read()
        writer.close()

    async with an_open_plane() as plane:
        server = await start_server(plane, handle, LOCALHOST, 0)
        host, port = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"1")
        assert await reader.readexactly(1) == b"1"
        await writer.start_tls(client_context, server_hostname="localhost")
        writer.write(b"2")
        assert await reader.readexactly(1) == b"2"
        assert len(plane.tracker.connections()) == 1
        writer.close()
        await writer.wait_closed()
        await until(lambda: not plane.tracker.connections())
