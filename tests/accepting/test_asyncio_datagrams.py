"""Datagram endpoints of asyncio and uvloop: they read between commit and pause only, and lose nothing by that."""

from __future__ import annotations

import asyncio
import contextvars
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from ecdysis_async._accepting.asyncio_datagrams import (
    READS_PER_TURN,
    DatagramEndpoint,
    create_datagram_endpoint,
    is_service,
)
from ecdysis_async._sockets.addresses import Internet
from tests.planes import a_plane, read, turn, watched_by_epoll

pytestmark = pytest.mark.backends("asyncio", "uvloop")

LOCALHOST = "127.0.0.1"


class Recorder(asyncio.DatagramProtocol):
    """Keeps what it is told, and counts its datagrams."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.received: list[bytes] = []
        self.errors: list[Exception] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.calls.append("made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append(data)
        self.transport.sendto(data, addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("lost")


@pytest.fixture
def client() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((LOCALHOST, 0))
        sock.setblocking(False)
        yield sock


async def closed(transport: asyncio.BaseTransport) -> None:
    transport.close()
    await turn()


async def test_nothing_is_read_before_the_commit_and_nothing_is_lost(client: socket.socket) -> None:
    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0))
        client.connect(transport.get_extra_info("sockname"))
        client.send(b"1")
        await turn()
        assert (protocol.calls, protocol.received) == (["made"], [])
        await plane.gate.open()
        assert await read(client) == b"1"
        await closed(transport)


async def test_pauses_lose_nothing(client: socket.socket) -> None:
    """A thousand datagrams, of which twenty at most have to wait in the kernel's queue, and fifty pauses."""
    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0))
        address = transport.get_extra_info("sockname")
        descriptor = transport.get_extra_info("socket").fileno()
        expected = []
        for number in range(100):
            for part in range(10):
                client.sendto(datagram := f"{number}.{part}".encode(), address)
                expected.append(datagram)
            if number % 2:
                await plane.gate.open()
                await turn(number % 5)
            else:
                await plane.gate.pause()
                received = len(protocol.received)
                await turn()
                assert len(protocol.received) == received
                assert not watched_by_epoll(descriptor)
        await plane.gate.open()
        with anyio.fail_after(60):
            while len(protocol.received) < len(expected):
                await turn()
        assert protocol.received == expected
        await closed(transport)


async def test_a_flood_leaves_room_for_others(client: socket.socket) -> None:
    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0))
        for _ in range(3 * READS_PER_TURN):
            client.sendto(b"?", transport.get_extra_info("sockname"))
        await plane.gate.open()
        while (before := len(protocol.received)) < 3 * READS_PER_TURN:
            await turn(1)
            assert len(protocol.received) <= before + READS_PER_TURN
        await closed(transport)


async def test_replies_get_out_when_reading_has_ended(client: socket.socket) -> None:
    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0))
        await plane.gate.open()
        await plane.gate.end()
        client.sendto(b"unread", transport.get_extra_info("sockname"))
        transport.sendto(b"last words", client.getsockname())
        assert await read(client) == b"last words"
        assert protocol.received == []
        await closed(transport)
        # The supervisor's now: a successor may have it.
        assert len(plane.registry.entries) == 1


@pytest.mark.parametrize("way", ["close", "abort"])
async def test_close_frees_the_address(way: str) -> None:
    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0))
        await plane.gate.open()
        address = transport.get_extra_info("sockname")
        getattr(transport, way)()
        getattr(transport, way)()
        assert transport.is_closing()
        assert protocol.calls == ["made"]
        await turn()
        assert protocol.calls == ["made", "lost"]
        assert (plane.registry.entries, plane.gate.acceptors) == ((), ())
        transport.sendto(b"too late", address)
        with socket.socket(type=socket.SOCK_DGRAM) as other:
            other.bind(address)


async def test_who_cancels_every_task_closes_the_endpoint_and_not_the_plane() -> None:
    stayed = False
    async with a_plane() as plane:
        _, protocol = await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0))
        await turn()
        own = [task for task in asyncio.all_tasks() if "close_at_the_end" in task.get_name()]
        assert len(own) == 1
        own[0].cancel()
        await turn()
        assert protocol.calls == ["made", "lost"]
        stayed = True
    assert stayed


async def test_a_protocol_may_close_its_transport_between_two_datagrams(client: socket.socket) -> None:
    class Once(Recorder):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            self.transport.close()

    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(plane, Once, (LOCALHOST, 0))
        for _ in range(3):
            client.sendto(b"?", transport.get_extra_info("sockname"))
        await plane.gate.open()
        assert await read(client) == b"?"
        await turn()
        assert protocol.received == [b"?"]


async def test_errors_go_to_the_protocol() -> None:
    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0))
        transport.sendto(bytes(100_000), (LOCALHOST, 9))
        assert [type(error) for error in protocol.errors] == [OSError]
        await closed(transport)


async def test_the_protocol_runs_in_the_context_of_who_asked_for_it(client: socket.socket) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    class Looking(Recorder):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(variable.get().encode(), addr)

    async with a_plane() as plane:
        variable.set("the application's")
        transport, _ = await create_datagram_endpoint(plane, Looking, (LOCALHOST, 0))
        await asyncio.create_task(plane.gate.open(), context=contextvars.Context())
        client.sendto(b"?", transport.get_extra_info("sockname"))
        assert await read(client) == b"the application's"
        await closed(transport)


async def test_unix_datagrams_and_what_does_not_fit_into_the_queue_of_the_receiver(tmp_path: Path) -> None:
    count = 1000
    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(
            plane, Recorder, str(tmp_path / "service"), family=socket.AF_UNIX
        )
        await plane.gate.open()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.bind(str(tmp_path / "client"))
            client.setblocking(False)
            client.sendto(b"?", transport.get_extra_info("sockname"))
            assert await read(client) == b"?"
            assert isinstance(transport, DatagramEndpoint)
            transport.set_write_buffer_limits(high=1000)
            assert transport.get_write_buffer_limits() == (250, 1000)
            for number in range(count):
                transport.sendto(str(number).encode(), client.getsockname())
            assert transport.get_write_buffer_size() > 1000
            assert protocol.calls == ["made", "pause"]
            # What is queued is sent before it closes.
            transport.close()
            with anyio.fail_after(60):
                assert [int(await read(client)) for _ in range(count)] == list(range(count))
                while "lost" not in protocol.calls:
                    await turn()
        assert protocol.calls == ["made", "pause", "resume", "lost"]
        assert transport.get_write_buffer_size() == 0


async def test_the_loop_comes_to_rest_when_what_had_no_room_is_sent(
    client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_plane() as plane:
        transport, _ = await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0))
        assert isinstance(transport, DatagramEndpoint)
        send, refused = transport._send, [b"1"]

        # The loopback always has room; an interface that waits for its neighbour's address has not.
        def send_or_refuse(data: bytes, address: Any) -> None:
            if data in refused:
                refused.remove(data)
                raise BlockingIOError
            send(data, address)

        monkeypatch.setattr(transport, "_send", send_or_refuse)
        for data in (b"1", b"2"):
            transport.sendto(data, client.getsockname())
        assert [await read(client), await read(client)] == [b"1", b"2"]
        await turn()
        # Before the commit it is not read from either.
        assert not watched_by_epoll(transport._sock.fileno())
        await closed(transport)


async def test_abort_drops_what_is_queued(tmp_path: Path) -> None:
    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(
            plane, Recorder, str(tmp_path / "service"), family=socket.AF_UNIX
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.bind(str(tmp_path / "client"))
            while not transport.get_write_buffer_size():  # type: ignore[attr-defined]
                transport.sendto(b"?", client.getsockname())
            transport.close()
            await turn()
            assert protocol.calls == ["made"]
            # To epoll it is writable all the time: the loop would not come to rest.
            assert not watched_by_epoll(transport.get_extra_info("socket").fileno())
            transport.abort()
            await turn()
        assert protocol.calls == ["made", "lost"]
        # The timer that was to try it again comes yet.
        assert isinstance(transport, DatagramEndpoint)
        transport._flush()
        assert protocol.calls == ["made", "lost"]


async def test_a_given_socket_is_registered_or_found(client: socket.socket) -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet(LOCALHOST, 0, is_datagram=True), name="game")
        transport, _ = await create_datagram_endpoint(plane, Recorder, sock=entry.sock)
        mine = socket.socket(type=socket.SOCK_DGRAM)
        mine.bind((LOCALHOST, 0))
        port = mine.getsockname()[1]
        other, _ = await create_datagram_endpoint(plane, Recorder, sock=mine)
        assert [each.name for each in plane.registry.entries] == ["game", f"udp:{LOCALHOST}:{port}"]
        await plane.gate.open()
        for endpoint in (transport, other):
            client.sendto(b"?", endpoint.get_extra_info("sockname"))
            assert await read(client) == b"?"
            await closed(endpoint)


async def test_a_client_is_the_loops_own(client: socket.socket) -> None:
    async with a_plane() as plane:
        transport, protocol = await create_datagram_endpoint(plane, Recorder, None, client.getsockname())
        assert not isinstance(transport, DatagramEndpoint)
        assert plane.registry.entries == ()
        client.sendto(b"!", transport.get_extra_info("sockname"))
        # The gate is closed, and yet.
        assert await read(client) == b"!"
        assert protocol.received == [b"!"]
        await closed(transport)


async def test_contradictions_are_told_and_leave_nothing() -> None:
    async with a_plane() as plane:
        with socket.socket() as sock, pytest.raises(ValueError, match="datagram"):
            await create_datagram_endpoint(plane, Recorder, sock=sock)
        with socket.socket(type=socket.SOCK_DGRAM) as sock, pytest.raises(ValueError, match="modifier"):
            await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0), sock=sock)
        with pytest.raises(TypeError, match="tuple"):
            await create_datagram_endpoint(plane, Recorder, LOCALHOST)
        with pytest.raises(TypeError, match="string"):
            await create_datagram_endpoint(plane, Recorder, (LOCALHOST, 0), family=socket.AF_UNIX)

        def fail() -> Recorder:
            raise RuntimeError("no protocol today")

        with pytest.raises(RuntimeError, match="today"):
            await create_datagram_endpoint(plane, fail, (LOCALHOST, 0))
        assert plane.registry.entries == ()


async def test_what_a_library_asks_its_loop_for_is_a_service_if_it_has_a_port_of_its_own() -> None:
    async with a_plane() as plane:
        registered = plane.registry.obtain(Internet(LOCALHOST, 0, is_datagram=True)).sock
        with (
            socket.socket(type=socket.SOCK_DGRAM) as unknown,
            socket.socket(fileno=os.dup(registered.fileno())) as same,
        ):
            assert [
                is_service(plane, (LOCALHOST, 53), None, None),
                is_service(plane, None, None, registered),
                is_service(plane, None, None, same),
                is_service(plane, (LOCALHOST, 0), None, None),
                is_service(plane, (LOCALHOST, 53), (LOCALHOST, 53), None),
                is_service(plane, None, None, None),
                is_service(plane, None, None, unknown),
                is_service(plane, "/run/client.sock", None, None),
            ] == [True] * 3 + [False] * 5
