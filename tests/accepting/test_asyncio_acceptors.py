"""One socket of a server: what is accepted, what waits through a pause, and that a pause or a close loses nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from ecdysis_async._accepting.asyncio_servers import (
    create_server,
    create_unix_server,
)
from ecdysis_async._accepting.gate import GateState
from ecdysis_async._sockets.addresses import Internet
from tests.accepting.serving import LOCALHOST, Echo, EchoOnce, a_client, an_open_plane, answers, open_tls, until
from tests.planes import a_plane, read, turn

pytestmark = pytest.mark.backends("asyncio", "uvloop")


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
