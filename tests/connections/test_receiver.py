"""What the receiver takes over, what it refuses, and that each descriptor that comes is served or closed."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator

import anyio
import pytest

from ecdysis_async._connections import receiver
from ecdysis_async._connections import sender as transfer
from ecdysis_async._connections.parcel import (
    MESSAGE_BYTES,
    Answer,
    ConnectionResumer,
    Release,
    TransferRecord,
    write_batch,
)
from ecdysis_async._connections.receiver import Receiver
from ecdysis_async._connections.sender import socketpair
from ecdysis_async._system.descriptors import send_with_descriptors
from tests.connections.moving import NAME, Lines, Side, a_pair, a_side, move_all
from tests.planes import read, turn, wait_for_end

log = logging.getLogger(__name__)


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
async def test_half_of_a_batch_refused_stays() -> None:
    async with a_pair(40) as pair:
        make, refusals = pair.new.make, iter(range(40))

        def resume(count: int) -> Lines:
            if next(refusals) % 2:
                raise ArithmeticError("this state is not understood")
            return make(count)

        pair.new.resume = resume
        with anyio.fail_after(60):
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
    monkeypatch.setattr(receiver, "RESERVE_AT_LEAST", 0)
    monkeypatch.setattr(receiver, "RESERVE_SHARE", 0.0)
    monkeypatch.setattr(transfer, "NO_ROOM_SECONDS", 0.001)
    async with a_pair(30) as pair:
        with anyio.fail_after(60), contextlib.ExitStack() as stack:
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


def open_descriptors() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc/self/fd"))


def highest_descriptor() -> int:
    return max(open_descriptors())


def holes() -> int:
    """Return minus the number of those below the highest one that are free: they are taken first."""
    numbers = set(open_descriptors())
    return len(numbers) - max(numbers) - 1


async def test_what_was_sent_before_an_end_that_left_something_unread_is_heard() -> None:
    """The kernel reports that first, as ECONNRESET."""
    ours, theirs = socketpair()
    receiving = Receiver(theirs, lambda name: None, log)
    theirs.send(b"never read")
    ours.send(b"{}")
    ours.close()
    with theirs:
        delivery = await receiving._receive()
        assert delivery is not None
        assert delivery.text == b"{}"
        assert await receiving._receive() is None


class Counting(ConnectionResumer):
    """Counts how many connections are resumed at a time."""

    def __init__(self) -> None:
        self.served = self.at_most = self._now = 0

    def prepare(self, parcel: TransferRecord) -> Callable[[socket.socket], Awaitable[None]]:
        return self._begin

    async def _begin(self, sock: socket.socket) -> None:
        self._now += 1
        self.at_most = max(self.at_most, self._now)
        await turn()
        self._now -= 1
        self.served += 1
        sock.close()


@pytest.mark.parametrize(("long_seconds", "at_most"), [(0.0, 32), (60.0, 8)])
async def test_more_are_resumed_at_a_time_where_turns_are_long(
    long_seconds: float, at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "LONG_SECONDS", long_seconds)
    ours, theirs = socketpair()
    counting = Counting()
    with ours, contextlib.ExitStack() as stack:
        for number in range(5):
            pairs = [socket.socketpair() for _ in range(16)]
            for end in itertools.chain(*pairs):
                stack.enter_context(end)
            send_with_descriptors(ours, write_batch(number, [RECORD] * 16), [served.fileno() for _, served in pairs])
        ours.shutdown(socket.SHUT_WR)
        with anyio.fail_after(60):
            await Receiver(theirs, lambda name: counting, log).run()
        answers = [Answer.read(ours.recv(MESSAGE_BYTES)) for _ in range(5)]
    assert [answer.number for answer in answers] == [0, 1, 2, 3, 4]
    assert all(answer.taken == frozenset(range(16)) for answer in answers)
    assert (counting.served, counting.at_most) == (80, at_most)


RECORD = json.dumps(TransferRecord(NAME, 1.0, Release(1)).to_json())


def describe(connections: int, record: str = RECORD) -> bytes:
    return write_batch(1, [record] * connections)


# Each with the descriptors that come along, of connections.
NOT_UNDERSTOOD = {
    "malformed JSON": b'{"batch":1,',
    "no UTF-8": b"\xff\xfe\xfd",
    "an array": b"[1,2]",
    "no field connections": b'{"batch":1}',
    "connections is a number": b'{"batch":1,"connections":7}',
    "no field batch": describe(4).replace(b'"batch":1,', b""),
    "nested too deep": b"[" * 100_000,
    "a message longer than allowed": describe(4) + b" " * MESSAGE_BYTES,
    "an empty message": b"",
}
REFUSED = {
    "more descriptors than connections": describe(2),
    "fewer descriptors than connections": describe(6),
    "a name that nobody listens on": describe(4, RECORD.replace(NAME, "another")),
    "a record that is none": describe(4, "{}"),
    "a record with a field of another type": describe(4, RECORD.replace("1.0", '"1.0"')),
}


@pytest.mark.backends("asyncio", "uvloop")
@pytest.mark.parametrize("text", [*NOT_UNDERSTOOD.values(), *REFUSED.values()], ids=[*NOT_UNDERSTOOD, *REFUSED])
async def test_whatever_stands_in_a_message_its_descriptors_are_closed(
    text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_side() as side:
        clients, served = make_connections(4)
        answer = await deliver(side, text, [sock.fileno() for sock in served])
        if text in REFUSED.values():
            assert answer is not None
            assert (answer.taken, answer.later) == (frozenset(), frozenset())
            assert answer.reasons
        else:
            # The receiver has ended: the predecessor keeps everything.
            assert answer is None
        if text in (*NOT_UNDERSTOOD.values(), describe(2), describe(6)) and text:
            assert "transfer: " in caplog.text
        assert len(side.plane.tracker) == 0
        assert_only_copies(clients, served)


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_descriptor_that_is_no_connection_costs_the_others_nothing() -> None:
    async with a_side() as side:
        clients, served = make_connections(2)
        with (
            open(os.devnull) as device,
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        ):
            others = [device.fileno(), listener.fileno(), datagrams.fileno()]
            numbers = [served[0].fileno(), *others, served[1].fileno()]
            answer = await deliver(side, describe(5), numbers)
            assert answer is not None
            assert answer.taken == {0, 4}
            assert len(answer.reasons) == 2
        for sock in served:
            sock.close()
        for client in clients:
            client.send(b"two\n")
            assert await read(client) == b"2 two\n"
            client.close()
        await wait_for_end(side.plane)


def make_connections(count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    """Return the clients' ends, and the predecessor's."""
    pairs = [socket.socketpair() for _ in range(count)]
    for client, _ in pairs:
        client.setblocking(False)
    return [client for client, _ in pairs], [served for _, served in pairs]


async def deliver(side: Side, text: bytes, numbers: list[int]) -> Answer | None:
    """Send a message to a receiver, and end; return its answer, if there was one, once it has ended."""
    ours, theirs = socketpair()
    with ours:
        send_with_descriptors(ours, text, numbers)
        ours.shutdown(socket.SHUT_WR)
        with anyio.fail_after(60):
            await Receiver(theirs, side.plane.gate.find_resumer, log).run()
        message = ours.recv(MESSAGE_BYTES)
    return Answer.read(message) if message else None


def assert_only_copies(clients: list[socket.socket], served: list[socket.socket]) -> None:
    """Check that the predecessor's copies are the only ones: the clients see the end when these are closed."""
    for sock in served:
        sock.close()
    for client in clients:
        with client:
            assert client.recv(1) == b""
