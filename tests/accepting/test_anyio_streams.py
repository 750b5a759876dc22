"""The data plane of anyio: under load, over TLS, with datagrams, and with handlers that fail."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import trustme
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.tls import TLSListener

from ecdysis_async._accepting.anyio_streams import AnyioListener, DatagramListener, serve
from ecdysis_async._accepting.gated_socket import AcceptedConnection
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import Kind
from ecdysis_async.errors import DrainInterrupt
from tests.planes import a_plane, connect, read, run_clients, turn, wait_for_end


async def echo(stream: ByteStream) -> None:
    async for chunk in stream:
        await stream.send(chunk)


async def test_pausing_under_load_loses_nothing_and_accepts_nothing() -> None:
    connections, cycles = 2000, 50
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        step = anyio.Event()
        answered = 0

        async def answer(stream: SocketStream) -> None:
            nonlocal answered
            assert await stream.receive() == b"ping"
            await stream.send(b"pong")
            answered += 1
            if answered % (connections // cycles - 1) == 0:
                step.set()

        async def swap() -> None:
            nonlocal step
            for _ in range(cycles):
                await step.wait()
                step = anyio.Event()
                await plane.gate.pause()
                opened = plane.tracker.opened
                while not entry.is_waited_for():
                    await turn()
                await turn()
                assert plane.tracker.opened == opened
                await plane.gate.open()

        async def serve_to_the_end() -> None:
            await serve(answer, entry, plane=plane)

        task_group.start_soon(serve_to_the_end)
        task_group.start_soon(swap)
        assert await anyio.to_thread.run_sync(run_clients, entry.sock.getsockname(), connections) == []
        assert answered == plane.tracker.opened == connections
        await plane.gate.end()


async def test_serving_ends_with_the_accepting_and_its_handlers_go_on() -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        with connect(entry) as client:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(lambda: serve(echo, entry, plane=plane))
                client.send(b"one")
                assert await read(client) == b"one"
                await plane.gate.end()
            assert plane.gate.acceptors == ()
            client.send(b"two")
            assert await read(client) == b"two"
        await wait_for_end(plane)


async def test_cancelling_serve_ends_the_accepting_only() -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        with connect(entry) as client:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(lambda: serve(echo, entry, plane=plane))
                client.send(b"one")
                assert await read(client) == b"one"
                task_group.cancel_scope.cancel()
            assert plane.gate.acceptors == ()
            client.send(b"two")
            assert await read(client) == b"two"
            with connect(entry) as other:
                async with anyio.create_task_group() as task_group:
                    task_group.start_soon(lambda: serve(echo, entry, plane=plane))
                    other.send(b"three")
                    assert await read(other) == b"three"
                    task_group.cancel_scope.cancel()


async def test_without_a_task_group_of_the_plane_handlers_are_waited_for() -> None:
    async with a_plane(runs_handlers=False) as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        served = anyio.Event()

        async def serve_to_the_end() -> None:
            await serve(echo, entry, plane=plane)
            served.set()

        async with anyio.create_task_group() as task_group:
            with connect(entry) as client:
                task_group.start_soon(serve_to_the_end)
                client.send(b"one")
                assert await read(client) == b"one"
                await plane.gate.end()
                await turn(20)
                assert not served.is_set()
            with anyio.fail_after(60):
                await served.wait()


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_a_listener_has_the_interface_of_anyio(family: str, tmp_path: Path) -> None:
    async with a_plane() as plane:
        registry = plane.registry
        entry = (
            registry.obtain(Internet("127.0.0.1", 0))
            if family == "tcp"
            else registry.obtain(Unix(str(tmp_path / "socket")))
        )
        await plane.gate.open()
        entry.start_listening()
        listener = AnyioListener(entry, plane=plane)
        assert listener.extra(SocketAttribute.local_address) == entry.sock.getsockname()
        assert listener.extra(SocketAttribute.raw_socket) is entry.sock
        assert listener.extra(SocketAttribute.family) == entry.sock.family
        assert listener.extra(SocketAttribute.local_port, None) == (
            entry.sock.getsockname()[1] if family == "tcp" else None
        )
        async with anyio.create_task_group() as task_group, listener:
            task_group.start_soon(listener.serve, echo)
            with connect(entry) as client:
                client.send(b"hello")
                assert await read(client) == b"hello"
        assert entry.sock.fileno() == -1


async def test_a_handler_runs_as_its_connection_in_its_own_scope() -> None:
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        seen: list[object] = []

        async def handle(stream: SocketStream) -> None:
            seen.append(current_connection.get())
            await stream.send(b"hello")
            await anyio.sleep_forever()

        task_group.start_soon(lambda: serve(handle, entry, plane=plane))
        with connect(entry) as one, connect(entry) as two:
            assert [await read(one), await read(two)] == [b"hello", b"hello"]
            assert set(seen) == set(plane.tracker.connections())
            assert len(seen) == 2
            assert isinstance(seen[0], AcceptedConnection)
            seen[0].cancel()
            assert await read(one) == b""
            await turn()
            assert len(plane.tracker) == 1
            assert isinstance(seen[1], AcceptedConnection)
            seen[1].cancel()
            assert await read(two) == b""
        await plane.gate.end()


async def fail(_: object) -> None:
    raise RuntimeError("this handler is broken")


async def be_interrupted(_: object) -> None:
    raise DrainInterrupt("leave")


async def be_interrupted_in_a_group(_: object) -> None:
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(be_interrupted, None)


async def fail_in_a_group(_: object) -> None:
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(be_interrupted, None)
        task_group.start_soon(fail, None)


@pytest.mark.parametrize(
    ("handler", "logged"), [(fail, 1), (fail_in_a_group, 1), (be_interrupted, 0), (be_interrupted_in_a_group, 0)]
)
async def test_a_failing_handler_ends_its_own_connection_only(
    handler: Callable[[object], Awaitable[None]], logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()

        async def dispatch(stream: SocketStream) -> None:
            if await stream.receive() == b"fail":
                await handler(stream)
            await echo(stream)

        task_group.start_soon(lambda: serve(dispatch, entry, plane=plane))
        with connect(entry) as other, connect(entry) as failing:
            other.send(b"echo")
            failing.send(b"fail")
            assert await read(failing) == b""
            other.send(b"still here")
            assert await read(other) == b"still here"
        await wait_for_end(plane)
        await plane.gate.end()
    assert len(caplog.records) == caplog.text.count("RuntimeError: this handler is broken") == logged


async def await_a_cancelled_task(_: object) -> None:
    task = asyncio.create_task(asyncio.sleep(3600))
    task.cancel()
    await task


async def cancel_itself(_: object) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@pytest.mark.backends("asyncio", "uvloop")
@pytest.mark.parametrize("runs_handlers", [True, False])
@pytest.mark.parametrize("handler", [await_a_cancelled_task, cancel_itself])
async def test_a_handler_that_ends_cancelled_ends_its_own_connection_only(
    handler: Callable[[object], Awaitable[None]], runs_handlers: bool
) -> None:
    served_on = False
    async with a_plane(runs_handlers=runs_handlers) as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()

        async def dispatch(stream: SocketStream) -> None:
            if await stream.receive() == b"end":
                await handler(stream)
            await echo(stream)

        task_group.start_soon(lambda: serve(dispatch, entry, plane=plane))
        with connect(entry) as other, connect(entry) as ending:
            other.send(b"echo")
            ending.send(b"end")
            with anyio.fail_after(60):
                assert await read(ending) == b""
                other.send(b"still here")
                assert await read(other) == b"still here"
        await wait_for_end(plane)
        await plane.gate.end()
        served_on = True
    # A plane whose task group was cancelled leaves its block without an error.
    assert served_on


async def test_a_cancelled_plane_cancels_its_handlers() -> None:
    ended = False

    async def handle(stream: SocketStream) -> None:
        nonlocal ended
        try:
            await stream.send(b"welcome")
            await anyio.sleep_forever()
        except BaseException:
            ended = True
            raise

    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        entry.start_listening()
        await plane.gate.open()
        with connect(entry) as client:
            with anyio.fail_after(60):
                async with anyio.create_task_group() as task_group:
                    task_group.start_soon(lambda: AnyioListener(entry, plane=plane).serve(handle))
                    assert await read(client) == b"welcome"
                    task_group.cancel_scope.cancel()
            assert ended


async def test_a_client_that_reset_its_connection_in_the_queue_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        entry.start_listening()
        with connect(entry) as hasty:
            hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await plane.gate.open()
        with connect(entry) as client:
            task_group.start_soon(lambda: serve(echo, entry, plane=plane))
            client.send(b"hello")
            assert await read(client) == b"hello"
        await wait_for_end(plane)
        assert plane.tracker.opened == 2
        await plane.gate.end()
    assert caplog.records == []


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_tls_is_tracked_from_the_handshake_to_the_end(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        listener = TLSListener(AnyioListener(entry, plane=plane), server_context, standard_compatible=False)
        task_group.start_soon(lambda: serve(echo, listener, plane=plane))
        host, port = entry.sock.getsockname()
        with anyio.fail_after(60):
            async with await anyio.connect_tcp(
                host, port, tls_hostname="localhost", ssl_context=client_context, tls_standard_compatible=False
            ) as stream:
                await stream.send(b"secret")
                assert await stream.receive() == b"secret"
                assert len(plane.tracker) == 1
            await wait_for_end(plane)
            assert caplog.records == []
            with connect(entry) as silent:
                while plane.tracker.opened < 2:
                    await turn()
                assert len(plane.tracker) == 1
                silent.send(b"GET / HTTP/1.1\r\n\r\n")
                await read(silent)
            await wait_for_end(plane)
        assert [record.name for record in caplog.records] == ["anyio.streams.tls"]
        await plane.gate.end()


async def test_what_cannot_be_paused_is_not_served(tmp_path: Path) -> None:
    async with a_plane() as plane:
        with pytest.raises(TypeError, match="nothing to serve"):
            await serve(echo, plane=plane)
        with socket.socket() as stranger, pytest.raises(ValueError, match="not registered"):
            await serve(echo, stranger, plane=plane)
        with pytest.raises(TypeError, match="DatagramListener"):
            await serve(echo, plane.registry.obtain(Internet("127.0.0.1", 0, is_datagram=True)), plane=plane)
        foreign = await anyio.create_unix_listener(tmp_path / "foreign")
        async with foreign:
            with pytest.raises(TypeError, match="AnyioListener"):
                await serve(echo, foreign, plane=plane)
            with pytest.raises(TypeError, match="TLSListener"):
                await serve(echo, TLSListener(foreign, ssl.create_default_context()), plane=plane)
        assert plane.gate.acceptors == ()


async def test_a_pause_loses_no_datagram_and_reads_none() -> None:
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0, is_datagram=True))
        received: list[int] = []

        async def receive() -> None:
            async for data, _ in DatagramListener(entry, plane=plane):
                received.append(int(data))

        task_group.start_soon(receive)
        with connect(entry) as client, anyio.fail_after(60):
            for cycle in range(50):
                await plane.gate.open()
                for number in range(20):
                    client.send(b"%d" % (cycle * 40 + number))
                await turn(cycle % 5)
                await plane.gate.pause()
                taken = len(received)
                for number in range(20, 40):
                    client.send(b"%d" % (cycle * 40 + number))
                await turn()
                # One that was taken before the pause may still be on its way to the list.
                assert len(received) <= taken + 1
                await plane.gate.open()
                while len(received) < (cycle + 1) * 40:
                    await turn()
        assert received == list(range(2000))
        await plane.gate.end()


@pytest.mark.parametrize("turns", range(4))
async def test_cancelling_a_receive_loses_no_datagram(turns: int) -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0, is_datagram=True))
        await plane.gate.open()
        listener = DatagramListener(entry, plane=plane)
        received: list[bytes] = []

        async def receive(scope: anyio.CancelScope) -> None:
            with scope:
                received.append((await listener.receive())[0])

        with connect(entry) as client:
            for number in range(30):
                async with anyio.create_task_group() as task_group:
                    scope = anyio.CancelScope()
                    task_group.start_soon(receive, scope)
                    await turn()
                    client.send(b"%d" % number)
                    await turn(turns)
                    scope.cancel()
            with anyio.fail_after(60):
                while len(received) < 30:
                    received.append((await listener.receive())[0])
        assert received == [b"%d" % number for number in range(30)]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_datagrams_are_answered_also_after_receiving_has_ended(host: str) -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet(host, 0, is_datagram=True))
        await plane.gate.open()
        listener = DatagramListener(entry, plane=plane)
        assert listener.extra(SocketAttribute.local_port) == entry.sock.getsockname()[1]
        with connect(entry) as client:
            client.send(b"question")
            data, address = await listener.receive()
            assert (data, address) == (b"question", client.getsockname()[:2])
            await plane.gate.end()
            with pytest.raises(anyio.EndOfStream):
                await listener.receive()
            assert [packet async for packet in listener] == []
            await listener.send((b"answer", address))
            assert await read(client) == b"answer"
            await listener.sendto(b"again", *address)
            assert await read(client) == b"again"


async def test_a_closed_datagram_socket_says_so() -> None:
    async with a_plane() as plane:
        await plane.gate.open()
        listener = DatagramListener(plane.registry.obtain(Internet("127.0.0.1", 0, is_datagram=True)), plane=plane)
        with pytest.raises(ValueError, match="resolve it first"):
            await listener.sendto(b"data", "localhost", 9)
        with pytest.raises(OSError, match=re.escape("Message too long")):
            await listener.sendto(bytes(70000), "127.0.0.1", 9)
        closed = False

        async def receive() -> None:
            nonlocal closed
            with pytest.raises(anyio.ClosedResourceError):
                await listener.receive()
            closed = True

        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(receive)
                await turn()
                await listener.aclose()
        assert closed
        with pytest.raises(anyio.ClosedResourceError):
            await listener.sendto(b"data", "127.0.0.1", 9)
        with pytest.raises(TypeError, match="no datagram socket"):
            DatagramListener(plane.registry.obtain(Internet("127.0.0.1", 0)), plane=plane)


async def test_a_long_unix_datagram_is_received_whole(tmp_path: Path) -> None:
    datagram = bytes(150_000)  # more than an IP datagram holds, less than a socket's default buffer
    async with a_plane() as plane:
        await plane.gate.open()
        listener = DatagramListener(
            plane.registry.obtain(Unix(str(tmp_path / "ours"), Kind.UNIX_DATAGRAM)), plane=plane
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.sendto(datagram, str(tmp_path / "ours"))
            with anyio.fail_after(60):
                received, _ = await listener.receive()
        assert received == datagram


async def test_a_full_receiver_of_unix_datagrams_is_waited_for(tmp_path: Path) -> None:
    count = 1000  # more than net.unix.max_dgram_qlen lets wait
    async with a_plane() as plane:
        entry = plane.registry.obtain(Unix(str(tmp_path / "ours"), Kind.UNIX_DATAGRAM))
        listener = DatagramListener(entry, plane=plane)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.bind(str(tmp_path / "theirs"))
            peer.setblocking(False)
            sent = 0

            async def send() -> None:
                nonlocal sent
                for number in range(count):
                    await listener.sendto(b"%d" % number, str(tmp_path / "theirs"))
                    sent += 1

            with anyio.fail_after(60):
                async with anyio.create_task_group() as task_group:
                    task_group.start_soon(send)
                    before = -1
                    while sent > before:
                        before = sent
                        await turn(10)
                    assert sent < count
                    received = [await read(peer) for _ in range(count)]
            assert received == [b"%d" % number for number in range(count)]
            await plane.gate.open()
            peer.sendto(b"question", str(tmp_path / "ours"))
            assert await listener.receive() == (b"question", str(tmp_path / "theirs"))
