"""The data plane of native trio: the same promises, by trio's own interface and in trio's own nurseries."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import trio
import trustme

from ecdysis_async._accepting.anyio_streams import serve
from ecdysis_async._accepting.trio_streams import TrioAcceptingEnded, TrioListener
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async.errors import DrainInterrupt
from tests.planes import a_plane, connect, read, run_clients, turn, wait_for_end

pytestmark = pytest.mark.backends("trio")


async def echo(stream: trio.abc.Stream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


async def test_pausing_under_load_loses_nothing_and_accepts_nothing() -> None:
    connections, cycles = 2000, 50
    async with a_plane() as plane, trio.open_nursery() as nursery:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        step = trio.Event()
        answered = 0

        async def answer(stream: trio.SocketStream) -> None:
            nonlocal answered
            assert await stream.receive_some() == b"ping"
            await stream.send_all(b"pong")
            answered += 1
            if answered % (connections // cycles - 1) == 0:
                step.set()

        async def swap() -> None:
            nonlocal step
            for _ in range(cycles):
                await step.wait()
                step = trio.Event()
                await plane.gate.pause()
                opened = plane.tracker.opened
                while not entry.is_waited_for():
                    await turn()
                await turn()
                assert plane.tracker.opened == opened
                await plane.gate.open()

        listener = TrioListener(entry, plane=plane)
        nursery.start_soon(lambda: serve(answer, listener, plane=plane))
        nursery.start_soon(swap)
        assert await anyio.to_thread.run_sync(run_clients, entry.sock.getsockname(), connections) == []
        assert answered == plane.tracker.opened == connections
        await plane.gate.end()
    assert len(plane.tracker) == 0


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_a_listener_has_the_interface_of_trio(family: str, tmp_path: Path) -> None:
    async with a_plane() as plane:
        registry = plane.registry
        entry = (
            registry.obtain(Internet("127.0.0.1", 0))
            if family == "tcp"
            else registry.obtain(Unix(str(tmp_path / "socket")))
        )
        await plane.gate.open()
        entry.start_listening()
        async with TrioListener(entry, plane=plane) as listener:
            with connect(entry) as client:
                async with await listener.accept() as stream:
                    await stream.send_all(b"hello")
                    assert await read(client) == b"hello"
                    assert len(plane.tracker.connections()) == 1
                assert plane.tracker.connections() == ()
        with pytest.raises(TrioAcceptingEnded):
            await listener.accept()
        assert issubclass(TrioAcceptingEnded, trio.ClosedResourceError)
        assert entry.sock.fileno() == -1


async def test_tasks_started_from_the_accepting_one_serve_its_connection() -> None:
    """A nursery of the user's own: ``until_draining`` in its tasks is about the connection they were started for."""
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        seen: list[object] = []

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.send_all(b"hello")
                seen.append(current_connection.get())
                with pytest.raises(DrainInterrupt):
                    await plane.tracker.until_draining(stream.receive_some())

        with connect(entry) as one, connect(entry) as two:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    listener = TrioListener(entry, plane=plane)
                    for _ in range(2):
                        nursery.start_soon(handle, await listener.accept())
                    await turn()
                    assert set(seen) == set(plane.tracker.connections())
                    nursery.start_soon(plane.tracker.drain, 30)
                    await turn()
                    plane.tracker.hurry()
            assert [await read(client, 5) for client in (one, two)] == [b"hello", b"hello"]
            assert [await read(client) for client in (one, two)] == [b"", b""]
        assert plane.tracker.count.silent == 2


async def test_trios_own_server_ends_with_the_accepting() -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        ended = False

        async def serve_listeners(handlers: trio.Nursery) -> None:
            nonlocal ended
            with pytest.raises(BaseExceptionGroup) as raised:
                await trio.serve_listeners(echo, [TrioListener(entry, plane=plane)], handler_nursery=handlers)
            assert isinstance(raised.value.exceptions[0], TrioAcceptingEnded)
            ended = True

        with connect(entry) as client, trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_listeners, nursery)
                client.send(b"one")
                assert await read(client) == b"one"
                await plane.gate.end()
                client.send(b"two")
                assert await read(client) == b"two"
                client.close()
        assert ended
        # Its `async with listener` closed the listener; what the generation leaves behind is the registry's.
        assert plane.registry.entries == (entry,)


async def test_a_failing_handler_ends_its_own_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()

        async def dispatch(stream: trio.SocketStream) -> None:
            if await stream.receive_some() == b"fail":
                raise RuntimeError("this handler is broken")
            await echo(stream)

        async with trio.open_nursery() as nursery:
            listener = TrioListener(entry, plane=plane)
            nursery.start_soon(lambda: serve(dispatch, listener, plane=plane))
            with connect(entry) as other, connect(entry) as failing:
                other.send(b"echo")
                failing.send(b"fail")
                assert await read(failing) == b""
                other.send(b"still here")
                assert await read(other) == b"still here"
            await wait_for_end(plane)
            await plane.gate.end()
    assert "this handler is broken" in caplog.text
    assert len(caplog.records) == 1


async def test_tls_is_tracked_from_the_acceptance_to_the_end() -> None:
    authority = trustme.CA()
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)

    async with a_plane() as plane, trio.open_nursery() as nursery:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        listener = trio.SSLListener(TrioListener(entry, plane=plane), server_context, https_compatible=True)
        nursery.start_soon(lambda: serve(echo, listener, plane=plane))
        with trio.fail_after(60):
            stream = await trio.open_ssl_over_tcp_stream(
                *entry.sock.getsockname(), ssl_context=client_context, https_compatible=True
            )
            await stream.aclose()
            await wait_for_end(plane)
            plain = await trio.open_tcp_stream(*entry.sock.getsockname())
            client = trio.SSLStream(plain, client_context, server_hostname="localhost", https_compatible=True)
            async with client:
                await client.send_all(b"secret")
                assert await client.receive_some() == b"secret"
                assert len(plane.tracker) == 1
            await wait_for_end(plane)
        await plane.gate.end()


def test_who_does_not_use_trio_need_not_have_it() -> None:
    program = "import sys; import ecdysis_async.anyio_listeners; assert 'trio' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
