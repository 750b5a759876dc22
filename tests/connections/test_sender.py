"""Connections that move, over real sockets: what is said in which order, and who has them after each kind of fault."""

from __future__ import annotations

import array
import asyncio
import contextlib
import functools
import json
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from ecdysis_async._accepting.anyio_streams import serve
from ecdysis_async._accepting.asyncio_servers import GatedServer, create_server, start_server
from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._connections import sender as transfer
from ecdysis_async._connections.parcel import TransferRecord
from ecdysis_async._connections.sender import Receiver, Release, Sender, Transferable, socketpair
from ecdysis_async._connections.tracker import current_connection
from ecdysis_async.errors import DrainInterrupt
from tests.planes import a_plane, connect, read, turn

log = logging.getLogger(__name__)

NAME = "line"


class Lines(asyncio.Protocol, Transferable):
    """Answers each line with its number, over all processes; its connection moves between any two bytes."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.received = b""
        self.is_transferable = True
        self.kept = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            self.count += 1
            self.transport.write(b"%d %s\n" % (self.count, line))

    def release_connection(self) -> Release | None:
        return Release(self.count, self.received) if self.is_transferable else None

    def keep_connection(self) -> None:
        self.kept += 1


class Side:
    """One generation: a plane with a server, of protocols that it remembers."""

    def __init__(self, plane: DataPlane) -> None:
        self.plane = plane
        self.protocols: list[Lines] = []
        self.server: GatedServer

    def make(self, count: int = 0) -> Lines:
        self.protocols.append(Lines(count))
        return self.protocols[-1]


@contextlib.asynccontextmanager
async def a_side() -> AsyncIterator[Side]:
    async with a_plane() as plane:
        side = Side(plane)
        side.server = await create_server(plane, side.make, "127.0.0.1", 0, name=NAME, resume=side.make)
        await plane.gate.open()
        yield side


class Pair:
    """Two generations, of which the first has clients."""

    def __init__(self, old: Side, new: Side, clients: list[socket.socket]) -> None:
        self.old, self.new, self.clients = old, new, clients
        self.ours, self.theirs = socketpair()
        self.died = anyio.Event()
        self.swept = anyio.Event()
        self.sender = Sender(self.ours, old.plane.tracker, log)
        old.plane.tracker.moves = True

    async def send(self) -> None:
        await self.sender.run(self.died, self.swept.set)

    async def receive(self) -> None:
        await Receiver(self.theirs, self.new.plane, log).run()

    async def ask_all(self, text: bytes, number: int, *, before: bytes = b"") -> None:
        """Let each client send a line, or the rest of one, and check its answer."""
        for client in self.clients:
            await anyio.wait_writable(client)
            client.send(text + b"\n")
        for client in self.clients:
            assert await read(client) == b"%d %s%s\n" % (number, before, text)


@contextlib.asynccontextmanager
async def a_pair(clients: int) -> AsyncIterator[Pair]:
    async with a_side() as old, a_side() as new:
        (entry,) = old.plane.registry.entries
        with contextlib.ExitStack() as stack:
            pair = Pair(old, new, [stack.enter_context(connect(entry)) for _ in range(clients)])
            stack.callback(pair.theirs.close)
            stack.callback(pair.ours.close)
            await pair.ask_all(b"one", 1)
            yield pair


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def move_all(pair: Pair) -> None:
    """Move everything, and end both sides."""
    with anyio.fail_after(10):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(pair.receive)
            task_group.start_soon(pair.send)
            await pair.swept.wait()
            while len(pair.new.plane.tracker) < len(pair.clients):
                await turn()
            task_group.cancel_scope.cancel()
    await turn()


@pytest.mark.backends("asyncio", "uvloop")
async def test_connections_go_on_in_the_successor_with_what_was_half_read() -> None:
    async with a_pair(200) as pair:
        for client in pair.clients:
            client.send(b"tw")
        while any(protocol.received != b"tw" for protocol in pair.old.protocols):
            await turn()
        await move_all(pair)
        assert pair.old.plane.tracker.count.transferred == 200
        assert len(pair.old.plane.tracker) == 0
        await pair.ask_all(b"o", 2, before=b"tw")
        assert len(pair.new.protocols) == 200
        # Twice as many were not left open anywhere.
        assert all(protocol.transport.is_closing() for protocol in pair.old.protocols)


@pytest.mark.backends("asyncio", "uvloop")
async def test_an_adopted_connection_keeps_its_age_and_tcp_nodelay() -> None:
    async with a_pair(1) as pair:
        (before,) = pair.old.plane.tracker.connections()
        await move_all(pair)
        (after,) = pair.new.plane.tracker.connections()
        assert after.since == before.since
        (protocol,) = pair.new.protocols
        sock = protocol.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert protocol.transport.get_extra_info("peername") == pair.clients[0].getsockname()


@pytest.mark.backends("asyncio", "uvloop")
async def test_what_is_not_ready_moves_as_soon_as_it_says_so() -> None:
    async with a_pair(3) as pair:
        busy = pair.old.protocols[0]
        busy.is_transferable = False
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.receive)
                task_group.start_soon(pair.send)
                await pair.swept.wait()
                assert len(pair.new.protocols) == 2
                # It is served all the time.
                pair.clients[0].send(b"two\n")
                assert await read(pair.clients[0]) == b"2 two\n"
                busy.is_transferable = True
                while len(pair.new.protocols) < 3:
                    await turn()
                task_group.cancel_scope.cancel()
        pair.clients[0].send(b"three\n")
        assert await read(pair.clients[0]) == b"3 three\n"


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_receiver_that_dies_before_it_answers_costs_nothing() -> None:
    async with a_pair(100) as pair:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.send)
                await anyio.wait_readable(pair.theirs)
                # With batches on their way, unread.
                pair.theirs.close()
        assert pair.old.plane.tracker.count.transferred == 0
        await pair.ask_all(b"two", 2)
        assert {protocol.kept for protocol in pair.old.protocols} >= {1}


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_receiver_that_dies_after_its_answer_has_what_it_has_taken() -> None:
    async with a_pair(10) as pair:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.send)
                await anyio.wait_readable(pair.theirs)
                batch, numbers = receive_batch(pair.theirs)
                # It reads, and dies: what was begun must never be taken up again.
                answer = {"batch": batch["batch"], "taken": [0, 1, 2], "later": [], "reasons": []}
                pair.theirs.send(json.dumps(answer).encode())
                for number in numbers:
                    os.close(number)
                pair.theirs.close()
                pair.died.set()
        await turn()
        assert pair.old.plane.tracker.count.transferred == 3
        answers = []
        for client in pair.clients:
            with contextlib.suppress(ConnectionError):  # it has been told already
                client.send(b"two\n")
            with contextlib.suppress(ConnectionError):
                answers.append(await read(client))
        assert answers.count(b"2 two\n") == 7


@pytest.mark.backends("asyncio", "uvloop")
async def test_half_of_a_batch_refused_stays() -> None:
    async with a_pair(40) as pair:
        make, refusals = pair.new.make, iter(range(40))

        def resume(count: int) -> Lines:
            if next(refusals) % 2:
                raise ArithmeticError("this state is not understood")
            return make(count)

        pair.new.server.moves = type(pair.new.server.moves)(resume)  # type: ignore[call-arg, misc]
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.receive)
                task_group.start_soon(pair.send)
                await pair.swept.wait()
                await pair.ask_all(b"two", 2)
                task_group.cancel_scope.cancel()
        assert (len(pair.new.protocols), pair.old.plane.tracker.count.transferred) == (20, 20)
        assert sum(protocol.kept for protocol in pair.old.protocols) == 20


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_receiver_without_room_takes_what_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RESERVE_AT_LEAST", 0)
    monkeypatch.setattr(transfer, "RESERVE_SHARE", 0.0)
    monkeypatch.setattr(transfer, "NO_ROOM_SECONDS", 0.001)
    async with a_pair(30) as pair:
        with anyio.fail_after(10), contextlib.ExitStack() as stack:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.send)
                await anyio.wait_readable(pair.theirs)
                # Room for ten: the kernel leaves the others out (MSG_CTRUNC).
                resource.setrlimit(resource.RLIMIT_NOFILE, (highest_descriptor() + 1 + 10 + holes(), hard))
                task_group.start_soon(pair.receive)
                while not pair.old.plane.tracker.count.transferred:
                    await turn()
                first = pair.old.plane.tracker.count.transferred
                await pair.ask_all(b"two", 2)
                # As soon as there is room, the others follow.
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                while pair.old.plane.tracker.count.transferred < 30:
                    await turn()
                task_group.cancel_scope.cancel()
        assert 0 < first < 30
        await pair.ask_all(b"three", 3)


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_client_that_leaves_meanwhile_is_missed_by_nobody() -> None:
    async with a_pair(20) as pair:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.send)
                await anyio.wait_readable(pair.theirs)
                for client in pair.clients[:10]:
                    client.close()
                del pair.clients[:10]
                task_group.start_soon(pair.receive)
                await pair.swept.wait()
                while len(pair.new.plane.tracker) != 10:
                    await turn()
                task_group.cancel_scope.cancel()
        await turn()
        assert len(pair.old.plane.tracker) == 0
        await pair.ask_all(b"two", 2)


@pytest.mark.backends("asyncio", "uvloop")
async def test_one_is_never_sent_twice() -> None:
    async with a_pair(1) as pair:
        (connection,) = pair.old.plane.tracker.connections()
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.send)
                await anyio.wait_readable(pair.theirs)
                for _ in range(10):
                    pair.old.plane.tracker.note_safe_point(connection)
                    await anyio.sleep(transfer.LOOK_AGAIN_SECONDS / 5)
                _, numbers = receive_batch(pair.theirs)
                for number in numbers:
                    os.close(number)
                assert len(numbers) == 1
                with pytest.raises(BlockingIOError):
                    pair.theirs.recv(1)
                pair.theirs.close()


@pytest.mark.backends("asyncio", "uvloop")
async def test_nothing_is_left_open() -> None:
    async with a_pair(1):
        pass
    before = descriptors()
    async with a_pair(100) as pair:
        await move_all(pair)
    await turn()
    assert descriptors() == before


@pytest.mark.backends("asyncio", "uvloop")
async def test_tls_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_pair(1) as pair:
        pair.old.server.is_secure = True
        (connection,) = pair.old.plane.tracker.connections()
        assert not connection.movable
        assert connection.pack() is None


@pytest.mark.backends("asyncio", "uvloop")
async def test_unflushed_writes_do_not_move() -> None:
    async with a_pair(1) as pair:
        (connection,) = pair.old.plane.tracker.connections()
        pair.old.protocols[0].transport.write(b"x" * 10_000_000)
        assert pair.old.protocols[0].transport.get_write_buffer_size()
        assert connection.pack() is None
        assert pair.old.protocols[0].transport.is_reading()


class Cautious(Lines):
    """Reads no more when it has got something, until it is told to."""

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.transport.pause_reading()


@pytest.mark.backends("asyncio", "uvloop")
async def test_what_comes_along_may_be_enough_for_a_protocol_and_comes_first() -> None:
    async with a_pair(1) as pair:
        (client,) = pair.clients
        client.send(b"tw")
        while pair.old.protocols[0].received != b"tw":
            await turn()
        # It is there to be read when the successor begins.
        pair.old.protocols[0].transport.pause_reading()
        client.send(b"more")
        made: list[Cautious] = []

        def make(count: int = 0) -> Cautious:
            made.append(Cautious(count))
            return made[-1]

        async with a_plane() as plane:
            await create_server(plane, make, "127.0.0.1", 0, name=NAME, resume=make)
            await plane.gate.open()
            pair.new.plane = plane
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.receive)
                task_group.start_soon(pair.send)
                while not (made and made[0].received):
                    await turn()
                for expected in (b"tw", b"twmore"):
                    await anyio.sleep(0.05)
                    assert made[0].received == expected
                    assert not made[0].transport.is_reading()
                    made[0].transport.resume_reading()
                task_group.cancel_scope.cancel()


@pytest.mark.backends("asyncio", "uvloop")
@pytest.mark.parametrize("is_offered", [False, True], ids=["busy", "refused"])
async def test_the_end_of_what_a_client_sends_is_told_once(*, is_offered: bool) -> None:
    ends: list[Lines] = []

    class Patient(Lines):
        def eof_received(self) -> bool:
            ends.append(self)
            return True

    def refuse(count: int) -> Lines:
        raise ArithmeticError(count)

    def make(count: int = 0) -> Lines:
        protocol = Patient(count)
        protocol.is_transferable = is_offered
        return protocol

    async with a_plane() as old, a_plane() as new:
        await create_server(old, make, "127.0.0.1", 0, name=NAME, resume=make)
        await create_server(new, make, "127.0.0.1", 0, name=NAME, resume=refuse)
        await old.gate.open()
        await new.gate.open()
        with connect(old.registry.entries[0]) as client:
            client.send(b"one\n")
            assert await read(client) == b"1 one\n"
            client.shutdown(socket.SHUT_WR)
            while not ends:
                await turn()
            ours, theirs = socketpair()
            old.tracker.moves = True
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(Receiver(theirs, new, log).run)
                task_group.start_soon(Sender(ours, old.tracker, log).run, anyio.Event(), lambda: None)
                # Looked at several times.
                await anyio.sleep(6 * transfer.LOOK_AGAIN_SECONDS)
                task_group.cancel_scope.cancel()
            assert len(ends) == 1
            ends[0].transport.abort()


@pytest.mark.backends("asyncio", "uvloop")
async def test_what_is_too_much_to_move_stays_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with a_pair(1) as pair:
        text = b"x" * transfer.PARCEL_BYTES
        pair.clients[0].send(text)
        while len(pair.old.protocols[0].received) < len(text):
            await turn()
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(pair.receive)
            task_group.start_soon(pair.send)
            await pair.swept.wait()
            task_group.cancel_scope.cancel()
        assert pair.old.plane.tracker.count.transferred == 0
        assert "64 can move: it stays, and drains" in caplog.text
        pair.clients[0].send(b"\n")
        assert await read(pair.clients[0]) != b""


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_handler_that_offers_its_stream_ends_when_it_has_moved() -> None:
    ends: list[object] = []

    async def handle(plane: DataPlane, reader: Any, writer: Any, count: int = 0) -> None:
        try:
            while True:
                try:
                    line = await plane.tracker.until_draining(reader.readline())
                except DrainInterrupt:
                    await plane.tracker.transfer(count)
                    continue
                if not line:
                    writer.close()
                    return
                count += 1
                writer.write(b"%d %s" % (count, line))
        except DrainInterrupt as interrupt:
            ends.append(interrupt.moved)

    async with a_plane() as old, a_plane() as new:
        for plane in (old, new):
            handler: Callable[..., Any] = functools.partial(handle, plane)
            await start_server(plane, handler, "127.0.0.1", 0, name=NAME, resume=handler)
            await plane.gate.open()
        with connect(old.registry.entries[0]) as client, anyio.fail_after(10):
            client.send(b"one\ntw")
            assert await read(client) == b"1 one\n"
            ours, theirs = socketpair()
            old.tracker.moves = True
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(Receiver(theirs, new, log).run)
                task_group.start_soon(Sender(ours, old.tracker, log).run, anyio.Event(), lambda: None)
                while not new.tracker.connections():
                    await turn()
                client.send(b"o\n")
                assert await read(client) == b"2 two\n"
                task_group.cancel_scope.cancel()
        assert ends == [True]
        assert len(old.tracker) == 0


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_handler_goes_on_when_nobody_takes_its_stream() -> None:
    async with a_plane() as plane:
        goes_on = anyio.Event()

        async def handle(reader: Any, writer: Any) -> None:
            with pytest.raises(DrainInterrupt):
                await plane.tracker.until_draining(reader.readline())
            await plane.tracker.transfer(None)
            goes_on.set()
            writer.close()

        await start_server(plane, handle, "127.0.0.1", 0, resume=lambda *_: None)
        await plane.gate.open()
        ours, theirs = socketpair()
        plane.tracker.moves = True
        with connect(plane.registry.entries[0]) as client, anyio.fail_after(10):
            while not plane.tracker.connections():
                await turn()
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(Sender(ours, plane.tracker, log).run, anyio.Event(), lambda: None)
                await anyio.wait_readable(theirs)
                theirs.close()
            await goes_on.wait()
            assert await read(client) == b""


@pytest.mark.backends("asyncio", "uvloop", "trio")
@pytest.mark.parametrize("kind", ["anyio", "anyio-unix", "trio"])
async def test_streams_of_anyio_and_trio_go_on_in_the_successor(kind: str, backend: str, tmp_path: Path) -> None:
    if kind == "trio" and backend != "trio":
        return
    ends: list[bool] = []

    async def handle(plane: DataPlane, stream: Any, count: int = 0) -> None:
        receive = stream.receive_some if kind == "trio" else stream.receive
        send = stream.send_all if kind == "trio" else stream.send
        try:
            while True:
                try:
                    data = await plane.tracker.until_draining(receive(4))
                except DrainInterrupt:
                    await plane.tracker.transfer(count)
                    continue
                count += len(data)
                await send(b"%d %s\n" % (count, data))
        except DrainInterrupt as interrupt:
            ends.append(interrupt.moved)
            raise

    async with a_plane() as old, a_plane() as new, anyio.create_task_group() as task_group:
        for number, plane in enumerate((old, new)):
            if kind == "anyio-unix":
                entry = plane.registry.listen_unix(str(tmp_path / str(number)), name=NAME)
            else:
                entry = plane.registry.listen_tcp("127.0.0.1", 0, name=NAME)
            handler = functools.partial(handle, plane)
            listener: Any = entry.sock
            if kind == "trio":
                from ecdysis_async._accepting.trio_streams import TrioListener

                listener = TrioListener(entry, plane=plane)
            task_group.start_soon(functools.partial(serve, handler, listener, resume=handler, plane=plane))
            await turn()
            await plane.gate.open()
        with connect(old.registry.entries[0]) as client, anyio.fail_after(10):
            client.send(b"abcd")
            assert await read(client) == b"4 abcd\n"
            ours, theirs = socketpair()
            old.tracker.moves = True
            task_group.start_soon(Receiver(theirs, new, log).run)
            task_group.start_soon(Sender(ours, old.tracker, log).run, anyio.Event(), lambda: None)
            while not new.tracker.connections() or len(old.tracker):
                await turn()
            client.send(b"efgh")
            assert await read(client) == b"8 efgh\n"
        assert ends == [True]
        task_group.cancel_scope.cancel()


async def test_a_state_that_is_no_json_is_the_handlers_error() -> None:
    async with a_plane() as plane:
        assert current_connection.get() is None
        with pytest.raises(TypeError, match="not JSON serializable"):
            await plane.tracker.transfer(object())
        # Nothing moves: it just goes on.
        await plane.tracker.transfer({"any": "thing"})


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_protocol_whose_state_is_no_json_costs_nobody_else_anything() -> None:
    async with a_pair(3) as pair:
        stays = pair.old.protocols[0]
        stays.release_connection = lambda: Release(object())  # type: ignore[method-assign]
        with anyio.fail_after(10):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.receive)
                task_group.start_soon(pair.send)
                await pair.swept.wait()
                while len(pair.new.plane.tracker) < 2:
                    await turn()
                task_group.cancel_scope.cancel()
        assert stays.kept == 1
        assert len(pair.old.plane.tracker) == 1
        await pair.ask_all(b"two", 2)


async def test_what_was_sent_before_an_end_that_left_something_unread_is_heard() -> None:
    """The kernel reports that first, as ECONNRESET."""
    async with a_plane() as plane:
        ours, theirs = socketpair()
        receiver = Receiver(theirs, plane, log)
        theirs.send(b"never read")
        ours.send(b"{}")
        ours.close()
        with theirs:
            assert await receiver._receive() == ({}, [])
            assert await receiver._receive() is None
        ours, theirs = socketpair()
        sender = Sender(ours, plane.tracker, log)
        sender._sent[1] = []
        ours.send(b"never read")
        theirs.send(json.dumps({"batch": 1, "taken": [], "later": [], "reasons": []}).encode())
        theirs.close()
        with ours:
            assert sender._hear_now() is True
            assert sender._hear_now() is False


def test_what_a_later_release_adds_is_left_out() -> None:
    fields = TransferRecord("name", 1.5, Release([1], b"\0\xff", "kind")).to_json()
    assert TransferRecord.from_json([*json.loads(json.dumps(fields)), "more"]) == TransferRecord(
        "name", 1.5, Release([1], b"\0\xff", "kind")
    )


def receive_batch(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    message, ancillary, _, _ = sock.recvmsg(transfer.MESSAGE_BYTES, 4096, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for _, _, data in ancillary:
        numbers.frombytes(data)
    body: dict[str, Any] = json.loads(message)
    return body, list(numbers)


def open_descriptors() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc/self/fd"))


def highest_descriptor() -> int:
    return max(open_descriptors())


def holes() -> int:
    """Return minus the number of those below the highest one that are free: they are taken first."""
    numbers = set(open_descriptors())
    return len(numbers) - max(numbers) - 1
