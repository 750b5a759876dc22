"""The accept loop loses nothing: not at a pause, not at a cancellation, not without descriptors."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap

import anyio
import pytest

from ecdysis_async._accepting.gated_socket import AcceptedConnection, AcceptingEnded, SocketAcceptor, require_streams
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import Kind, Until
from tests.planes import a_plane, connect, read, turn, watched_by_epoll


async def accept_one(acceptor: SocketAcceptor) -> socket.socket:
    with anyio.fail_after(60):
        sock, _ = await acceptor.accept()
    return sock


async def test_nothing_is_accepted_before_the_gate_opens() -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        entry.start_listening()
        with connect(entry):
            with anyio.move_on_after(0.02):
                await SocketAcceptor(entry, plane=plane).accept()
            assert entry.is_waited_for()
            assert plane.tracker.opened == 0


async def test_who_waits_gets_the_connection_when_the_gate_opens() -> None:
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        acceptor = SocketAcceptor(entry, plane=plane)
        accepted = anyio.Event()

        async def accept() -> None:
            with await accept_one(acceptor):
                accepted.set()

        task_group.start_soon(accept)
        await turn()
        await plane.gate.open()
        with connect(entry):
            with anyio.fail_after(60):
                await accepted.wait()


async def test_an_accepted_socket_is_ready_to_use() -> None:
    # Protocol 0, as socket.socket() has it: asyncio sets TCP_NODELAY only where it is IPPROTO_TCP.
    mine = socket.socket()
    mine.bind(("127.0.0.1", 0))
    async with a_plane() as plane:
        entry = plane.registry.adopt(mine, name="mine")
        await plane.gate.open()
        acceptor = SocketAcceptor(mine, plane=plane)
        await plane.gate.add(acceptor)
        with connect(entry), await accept_one(acceptor) as sock:
            assert sock.gettimeout() == 0
            assert not sock.get_inheritable()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_connection_is_tracked_from_its_acceptance_until_its_socket_is_closed() -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0), until="exit")
        await plane.gate.open()
        acceptor = SocketAcceptor(entry, plane=plane)
        entry.start_listening()
        with connect(entry):
            with anyio.fail_after(60):
                sock, connection = await acceptor.accept()
            with sock:
                assert plane.tracker.connections() == (connection,)
                assert connection.until is entry.until
            assert plane.tracker.connections() == ()


async def test_a_dropped_socket_is_not_kept_open_by_the_tracker() -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        entry.start_listening()
        with connect(entry) as client:
            sock = await accept_one(SocketAcceptor(entry, plane=plane))
            with pytest.warns(ResourceWarning):
                del sock
            assert await read(client) == b""
            assert plane.tracker.connections() == ()


async def test_a_pause_leaves_the_queue_alone_until_the_gate_opens_again() -> None:
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        acceptor = SocketAcceptor(entry, plane=plane)
        accepted = anyio.Event()

        async def accept() -> None:
            with await accept_one(acceptor):
                accepted.set()

        task_group.start_soon(accept)
        await turn()
        await plane.gate.pause()
        with connect(entry):
            await turn(20)
            assert entry.is_waited_for()
            assert plane.tracker.opened == 0
            await plane.gate.open()
            with anyio.fail_after(60):
                await accepted.wait()


async def test_a_pause_that_is_undone_at_once_loses_no_waiter() -> None:
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        acceptor = SocketAcceptor(entry, plane=plane)
        accepted = anyio.Event()

        async def accept() -> None:
            with await accept_one(acceptor):
                accepted.set()

        task_group.start_soon(accept)
        await turn()
        await plane.gate.pause()
        await plane.gate.open()
        await turn()
        with connect(entry):
            with anyio.fail_after(60):
                await accepted.wait()


async def test_after_a_pause_the_loop_does_not_watch_the_descriptor() -> None:
    async with a_plane() as plane, anyio.create_task_group() as task_group:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        acceptor = SocketAcceptor(entry, plane=plane)

        async def accept() -> None:
            with pytest.raises(AcceptingEnded):
                await acceptor.accept()

        task_group.start_soon(accept)
        # uvloop and trio tell epoll in the next turn.
        await turn()
        assert watched_by_epoll(entry.sock.fileno())
        await plane.gate.pause()
        assert not watched_by_epoll(entry.sock.fileno())
        await plane.gate.end()


async def test_the_end_of_accepting_wakes_everyone_who_waits() -> None:
    async with a_plane() as plane:
        await plane.gate.open()
        acceptor = SocketAcceptor(plane.registry.obtain(Internet("127.0.0.1", 0)), plane=plane)
        ended = 0

        async def accept() -> None:
            nonlocal ended
            with pytest.raises(AcceptingEnded):
                await acceptor.accept()
            ended += 1

        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                for _ in range(3):
                    task_group.start_soon(accept)
                await turn()
                await plane.gate.end()
        assert ended == 3
        with pytest.raises(AcceptingEnded):
            await acceptor.accept()
        late = SocketAcceptor(plane.registry.obtain(Internet("127.0.0.1", 0)), plane=plane)
        with pytest.raises(AcceptingEnded):
            await late.accept()


async def test_closing_closes_the_socket_and_takes_it_out_of_the_gate() -> None:
    async with a_plane() as plane:
        await plane.gate.open()
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        acceptor = SocketAcceptor(entry, plane=plane)

        async def accept() -> None:
            with pytest.raises(AcceptingEnded):
                await acceptor.accept()

        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(accept)
                await turn()
                await acceptor.aclose()
        await acceptor.aclose()
        assert plane.gate.acceptors == ()
        assert plane.registry.entries == ()
        assert entry.sock.fileno() == -1


async def test_closing_while_the_generation_leaves_lets_the_registry_keep_the_socket() -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        acceptor = SocketAcceptor(entry, plane=plane)
        await plane.gate.add(acceptor)
        await plane.gate.end()
        await acceptor.aclose()
        assert plane.registry.entries == (entry,)
        assert entry.sock.fileno() != -1


async def test_closing_while_the_drain_begins_lets_the_registry_keep_the_socket() -> None:
    async with a_plane() as plane:
        await plane.gate.open()
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        acceptor = SocketAcceptor(entry, plane=plane)
        await plane.gate.add(acceptor)
        # A turn before the gate ends, `serve_forever` returns, and the application closes what it has.
        plane.tracker.draining.set()
        await acceptor.aclose()
        assert plane.registry.entries == (entry,)


async def test_several_tasks_may_accept_from_one_socket() -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        acceptor = SocketAcceptor(entry, plane=plane)
        await plane.gate.add(acceptor)
        accepted: list[socket.socket] = []

        async def accept() -> None:
            accepted.extend([await accept_one(acceptor) for _ in range(10)])

        async with anyio.create_task_group() as task_group:
            for _ in range(4):
                task_group.start_soon(accept)
            await turn()
            clients = [connect(entry) for _ in range(40)]
        for sock in clients + accepted:
            sock.close()
        assert len(accepted) == 40


@pytest.mark.parametrize("turns", range(6))
async def test_cancelling_an_accept_loses_no_connection(turns: int) -> None:
    """Whoever waits for an accepted connection, not for a readable socket, loses it here."""
    rounds = 50
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        await plane.gate.open()
        acceptor = SocketAcceptor(entry, plane=plane)
        await plane.gate.add(acceptor)
        accepted: list[socket.socket] = []

        async def accept(scope: anyio.CancelScope) -> None:
            with scope:
                sock, _ = await acceptor.accept()
                accepted.append(sock)

        clients = []
        for _ in range(rounds):
            async with anyio.create_task_group() as task_group:
                scope = anyio.CancelScope()
                task_group.start_soon(accept, scope)
                await turn()
                clients.append(connect(entry))
                await turn(turns)
                scope.cancel()
        while len(accepted) < rounds:
            accepted.append(await accept_one(acceptor))
        for sock in clients + accepted:
            sock.close()


async def test_other_sockets_are_refused_with_a_remedy() -> None:
    async with a_plane() as plane:
        with socket.socket() as stranger, pytest.raises(ValueError, match="adopt"):
            SocketAcceptor(stranger, plane=plane)
        with pytest.raises(TypeError, match="DatagramListener"):
            require_streams(
                SocketAcceptor(plane.registry.obtain(Internet("127.0.0.1", 0, is_datagram=True)), plane=plane)
            )


async def test_a_packet_socket_is_accepted_from_and_is_no_stream(tmp_path: object) -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Unix(f"{tmp_path}/packets", Kind.SEQPACKET))
        await plane.gate.open()
        acceptor = SocketAcceptor(entry, plane=plane)
        with pytest.raises(TypeError, match="SocketAcceptor"):
            require_streams(acceptor)
        await plane.gate.add(acceptor)
        with connect(entry) as client, await accept_one(acceptor) as sock:
            client.send(b"one")
            client.send(b"two")
            assert [await read(sock), await read(sock)] == [b"one", b"two"]


async def test_aborting_a_connection_ends_its_reads_and_is_harmless_afterwards() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            connection = AcceptedConnection(ours, Until.DRAIN)
            # Nobody of ours serves it: there is no scope to cancel, so its stream has to end.
            connection.cancel()
            assert ours.recv(1) == b""
            assert theirs.recv(1) == b""
            assert not connection.is_over()
        assert connection.is_over()
        connection.abort()


SHORT_OF_DESCRIPTORS = """
    import logging, os, resource, sys
    import anyio
    from ecdysis_async._accepting.anyio_streams import serve
    from ecdysis_async._sockets.addresses import Internet
    from tests.planes import a_plane

    logging.basicConfig(format="%(levelname)s %(message)s")

    async def handle(stream):
        await stream.send(b"welcome")
        async for _ in stream:
            pass

    async def main():
        async with a_plane() as plane:
            entry = plane.registry.obtain(Internet("127.0.0.1", 0))
            entry.start_listening()
            await plane.gate.open()
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
            print(entry.sock.getsockname()[1], flush=True)
            await serve(handle, entry, plane=plane)

    backend, _, options = sys.argv[1].partition("+")
    anyio.run(main, backend=backend, backend_options={"use_uvloop": True} if options else {})
"""


def test_without_descriptors_clients_wait_and_the_log_says_so_once(backend: str) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(SHORT_OF_DESCRIPTORS),
            {"uvloop": "asyncio+uvloop"}.get(backend, backend),
        ],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            address = ("127.0.0.1", int(child.stdout.readline()))
            clients = [socket.create_connection(address, timeout=30) for _ in range(50)]
            report = child.stderr.readline()
            # There is always one too many, so that each one that leaves lets the next one in, and then none again.
            for number, client in enumerate(clients):
                if number >= 15:
                    clients[number - 15].close()
                assert client.recv(7) == b"welcome"
            for client in clients:
                client.close()
        finally:
            child.send_signal(signal.SIGKILL)
        assert report.startswith("ERROR cannot take from tcp:127.0.0.1:0: Too many open files")
        assert "LimitNOFILE" in report
        assert child.stderr.read() == ""
