"""Servers of asyncio and uvloop behind the gate: nothing is lost by a pause, and everything accepted is tracked."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import gc
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme

from ecdysis_async._accepting.asyncio_connections import ServerConnection, track_protocol
from ecdysis_async._accepting.asyncio_servers import (
    GatedServer,
    create_server,
    create_unix_server,
    start_server,
    start_unix_server,
)
from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import GateState
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.errors import DrainInterrupt
from tests.planes import a_plane, read, turn

pytestmark = pytest.mark.backends("asyncio", "uvloop")

LOCALHOST = "127.0.0.1"

# Bytes: the buffers of both ends of a TCP connection grow, to some 10 MB by default.
MORE_THAN_THE_KERNEL_HOLDS = 32_000_000


class Echo(asyncio.Protocol):
    """Sends back what it receives."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class EchoOnce(Echo):
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that no event tells."""
    with anyio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - as its docstring says
            await asyncio.sleep(0.001)


@contextlib.contextmanager
def a_client(server: GatedServer) -> Iterator[socket.socket]:
    """Connect a client; the kernel does that at once on the loopback, whether anybody accepts or not."""
    address = server.sockets[0].getsockname()
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.connect(address)
        client.setblocking(False)
        yield client


@contextlib.asynccontextmanager
async def an_open_plane() -> AsyncIterator[DataPlane]:
    """Make a plane whose gate stands open, and see all its connections end."""
    async with a_plane() as plane:
        await plane.gate.open()
        yield plane
        # Those that no prune has seen yet are asked.
        await until(lambda: not plane.tracker.connections())
        # uvloop closes descriptors in the turn after.
        await turn()


async def answers(client: socket.socket, question: bytes = b"?") -> bool:
    """Ask, and say whether the answer is the question."""
    client.send(question)
    with anyio.fail_after(60):
        return await read(client) == question


@pytest.fixture
def reports() -> Iterator[list[dict[str, Any]]]:
    """Collect what the loop's exception handler is told; filled by `collect`."""
    contexts: list[dict[str, Any]] = []
    yield contexts
    contexts.clear()


def collect(reports: list[dict[str, Any]]) -> None:
    """Send what the loop reports to a list instead of the log."""
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))


# The pause.


async def test_pauses_under_load_lose_nothing() -> None:
    """Two thousand connections, and a pause after each fortieth."""
    total, per_pause = 2000, 40
    async with an_open_plane() as plane:
        server = await create_server(plane, EchoOnce, LOCALHOST, 0)
        address = server.sockets[0].getsockname()
        failures: list[object] = []

        def be_clients() -> None:
            for _ in range(total // 4):
                try:
                    with socket.create_connection(address, timeout=60) as client:
                        client.sendall(b"?")
                        answer = client.recv(1)
                    if answer != b"?":
                        failures.append(answer)
                except OSError as error:
                    failures.append(error)

        threads = [threading.Thread(target=be_clients) for _ in range(4)]
        for thread in threads:
            thread.start()
        for accepted in range(per_pause, total + 1, per_pause):
            await until(lambda: plane.tracker.opened >= accepted or failures)  # noqa: B023 - it is called in this turn
            await plane.gate.pause()
            opened = plane.tracker.opened
            await turn()
            assert plane.tracker.opened == opened
            await plane.gate.open()
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)
        assert failures == []
        assert plane.tracker.opened == total


@pytest.mark.parametrize("turns", range(6))
async def test_a_pause_in_any_turn_after_the_connect_loses_nothing(turns: int) -> None:
    """Trap 1. In one of these turns asyncio has accepted the connection, and has not attached it."""
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        with a_client(server) as client:
            await turn(turns)
            await plane.gate.pause()
            await plane.gate.open()
            assert await answers(client)


async def test_what_waits_in_the_queue_waits_through_a_pause() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        await plane.gate.pause()
        assert not server.is_serving()
        with a_client(server) as client:
            await turn()
            assert plane.tracker.opened == 0
            await plane.gate.open()
            assert server.is_serving()
            assert await answers(client)


async def test_an_accepted_connection_is_served_during_the_pause_and_after_the_end() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        with a_client(server) as client:
            assert await answers(client)
            await plane.gate.pause()
            assert await answers(client)
            await plane.gate.end()
            assert plane.gate.state is GateState.ENDED
            assert await answers(client)


async def test_nothing_is_accepted_before_the_gate_opens() -> None:
    async with a_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        assert not server.is_serving()
        assert server.sockets[0].getsockname()[1] > 0
        with pytest.raises(ConnectionRefusedError), a_client(server):
            pass


@pytest.mark.parametrize("turns", range(6))
async def test_a_server_that_is_started_in_the_turn_of_a_pause_is_paused(turns: int) -> None:
    """G2: one that the pause overlooks accepts next to the successor."""
    async with an_open_plane() as plane:
        entry = plane.registry.obtain(Internet(LOCALHOST, 0))
        starting = asyncio.ensure_future(create_server(plane, Echo, sock=entry.sock))
        # Each turn of ours is one of the loop.
        for _ in range(turns):
            await asyncio.sleep(0)
        await plane.gate.pause()
        server = await starting
        assert not server.is_serving()
        await plane.gate.open()
        assert server.is_serving()
        with a_client(server) as client:
            assert await answers(client)


@pytest.mark.parametrize("turns", range(1, 4))
async def test_a_server_whose_start_is_cancelled_does_not_accept(turns: int) -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0, start_serving=False)
        starting = asyncio.ensure_future(server.start_serving())
        # Each turn of ours is one of the loop.
        for _ in range(turns):
            await asyncio.sleep(0)
        if starting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await starting
            assert not server.is_serving()
        await plane.gate.pause()
        assert not server.is_serving()
        await plane.gate.open()
        assert server.is_serving() == (plane.gate.acceptors != ())
        with a_client(server) as client:
            assert await answers(client)


async def test_accepted_sockets_have_nodelay_whatever_the_listener_was_made_with() -> None:
    """Trap 19: `socket.socket()` has the protocol 0, and asyncio looks for IPPROTO_TCP."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
    listener.bind((LOCALHOST, 0))
    async with an_open_plane() as plane:
        made: list[asyncio.BaseTransport] = []

        class Kept(Echo):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                made.append(transport)

        server = await create_server(plane, Kept, sock=listener)
        with a_client(server) as client:
            assert await answers(client)
            sock = made.pop().get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_the_path_of_a_unix_socket_keeps_its_inode(tmp_path: Path) -> None:
    """Trap 4."""
    path = tmp_path / "socket"
    async with an_open_plane() as plane:
        server = await create_unix_server(plane, Echo, path)
        inode = path.stat().st_ino
        for _ in range(2):
            with a_client(server) as client:
                assert await answers(client)
            await plane.gate.pause()
            await plane.gate.open()
        assert path.stat().st_ino == inode
        server.close()
        await server.wait_closed()
        assert path.stat().st_ino == inode


# The server.


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


@pytest.mark.parametrize("turns", range(6))
async def test_a_server_may_be_closed_while_the_gate_opens(turns: int) -> None:
    async with a_plane() as plane:
        servers = [await create_server(plane, Echo, LOCALHOST, 0, name=name) for name in ("first", "second", "third")]
        opening = asyncio.ensure_future(plane.gate.open())
        await turn(turns)
        servers[0].close()
        servers[1].close()
        await opening
        assert [entry.name for entry in plane.registry.entries] == ["third"]
        assert [server.is_serving() for server in servers] == [False, False, True]
        with a_client(servers[2]) as client:
            assert await answers(client)
        await until(lambda: not len(plane.tracker))
        await turn()


async def test_a_server_of_several_sockets_may_be_closed_while_it_starts() -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, [LOCALHOST, "127.0.0.2"], 0, start_serving=False)
        starting = asyncio.ensure_future(server.start_serving())
        await asyncio.sleep(0)
        server.close()
        await starting
        assert (plane.gate.acceptors, plane.registry.entries) == ((), ())
        assert not server.is_serving()


async def test_a_server_may_be_closed_while_the_loop_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops' own methods do not wait for anything; that of an application's loop may."""
    loop = asyncio.get_running_loop()
    make, closed = loop.create_server, asyncio.Event()

    async def make_late(*args: Any, **options: Any) -> asyncio.AbstractServer:
        await closed.wait()
        return await make(*args, **options)

    monkeypatch.setattr(loop, "ungated_create_server", make_late, raising=False)
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0, start_serving=False)
        address = server.sockets[0].getsockname()
        starting = asyncio.ensure_future(server.start_serving())
        await turn()
        server.close()
        closed.set()
        await starting
        assert not server.is_serving()
        await turn()
        with socket.socket() as client:
            assert client.connect_ex(address) == errno.ECONNREFUSED


@pytest.mark.parametrize("turns", range(1, 6))
async def test_what_is_accepted_in_the_turn_of_the_close_is_served(turns: int) -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0)
        with a_client(server) as client:
            await turn(turns)
            server.close()
            await server.wait_closed()
            if plane.tracker.opened:
                assert await answers(client)
            else:
                with pytest.raises(ConnectionResetError):
                    await read(client)


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


# Tracking.


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


# Streams.


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


# TLS.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def open_tls(server: GatedServer, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.sockets[0].getsockname()
    return await asyncio.open_connection(host, port, ssl=context, server_hostname="localhost")


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


async def test_what_another_thread_collects_is_lost_in_that_of_the_loop() -> None:
    async with an_open_plane() as plane:
        connection = RecordsItsThread(await create_server(plane, Echo, LOCALHOST, 0))
        plane.tracker.open(connection)
        garbage = [track_protocol(connection, Echo())]
        await anyio.to_thread.run_sync(garbage.clear)
        await until(lambda: connection.threads)
        assert connection.threads == [threading.get_ident()]
        assert len(plane.tracker) == 0


def test_what_is_collected_after_the_loop_was_closed_is_let_go() -> None:
    async def make() -> list[object]:
        async with a_plane() as plane:
            server = await create_server(plane, Echo, LOCALHOST, 0)
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


async def test_a_pause_during_a_handshake_loses_nothing(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with an_open_plane() as plane:
        server = await create_server(plane, Echo, LOCALHOST, 0, ssl=server_context)
        for turns in range(12):
            connecting = asyncio.ensure_future(open_tls(server, client_context))
            await turn(turns)
            await plane.gate.pause()
            await plane.gate.open()
            with anyio.fail_after(60):
                reader, writer = await connecting
                writer.write(b"?")
                assert await reader.read(1) == b"?"
            writer.close()
            await writer.wait_closed()


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


# Shortage of descriptors, in a process of its own.

SHORTAGE = """
import asyncio, os, resource, socket, sys
import uvloop
from ecdysis_async._accepting.asyncio_servers import create_server
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._accepting.gate import Gate
from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._sockets.registry import Registry

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        self.transport.write(data)

async def ask(client):
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, b"?")
    return await asyncio.wait_for(loop.sock_recv(client, 1), 60)

async def main():
    reports = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reports.append(context))
    plane = DataPlane(Registry(), Gate(), Tracker())
    server = await create_server(plane, Echo, "127.0.0.1", 0)
    await plane.gate.open()
    client = socket.socket()
    client.setblocking(False)
    await loop.getaddrinfo("127.0.0.1", 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    hoard = []
    def hoard_descriptors():
        try:
            while True:
                hoard.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
    hoard_descriptors()
    # libuv accepts and closes what it has no descriptor for: with uvloop nobody may knock meanwhile.
    if not isinstance(loop, uvloop.Loop):
        await loop.sock_connect(client, server.sockets[0].getsockname())
        while not reports:
            await asyncio.sleep(0)
    await plane.gate.pause()
    hoard_descriptors()
    for _ in range(10):
        await asyncio.sleep(0)
    assert plane.tracker.opened == 0
    assert not server.is_serving()
    await plane.gate.open()
    for descriptor in hoard:
        os.close(descriptor)
    if isinstance(loop, uvloop.Loop):
        await loop.sock_connect(client, server.sockets[0].getsockname())
    assert await ask(client) == b"?"
    assert plane.tracker.opened == 1
    client.close()
    while len(plane.tracker):
        await asyncio.sleep(0)
    await plane.gate.end()
    plane.registry.close(unlink=True)
    print([str(context.get("exception")) for context in reports])

loop_factory = uvloop.new_event_loop if sys.argv[1] == "uvloop" else asyncio.SelectorEventLoop
with asyncio.Runner(loop_factory=loop_factory) as runner:
    runner.run(main())
"""


def test_without_descriptors_a_pause_holds_and_accepting_again_works(backend: str) -> None:
    """Trap 5, and the rollback of a process that is out of descriptors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHORTAGE, backend],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    # asyncio has logged it once for the burst, and once more for each second that the shortage lasted.
    reports = done.stdout.count("Too many open files")
    assert done.stdout.count("'") == 2 * reports
    # Far fewer than there were connections to accept in that burst, however long it lasted on a busy machine.
    assert (reports == 0) if backend == "uvloop" else (1 <= reports < 30)
