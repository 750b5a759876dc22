"""Connections that move, over real sockets: what is said in which order, and who has them after each kind of fault."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket

import anyio
import pytest

from ecdysis_async._accepting.asyncio_servers import create_server
from ecdysis_async._connections import sender as transfer
from ecdysis_async._connections.parcel import Answer, Release
from ecdysis_async._connections.receiver import Receiver
from ecdysis_async._connections.sender import Sender, socketpair
from ecdysis_async._connections.tracker import Tracker
from tests.connections.moving import NAME, Lines, a_pair, descriptors, move_all, receive_batch
from tests.planes import a_plane, connect, read, turn

log = logging.getLogger(__name__)


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
async def test_what_is_not_ready_moves_as_soon_as_it_says_so() -> None:
    async with a_pair(3) as pair:
        busy = pair.old.protocols[0]
        busy.is_transferable = False
        with anyio.fail_after(60):
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
        with anyio.fail_after(60):
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
        with anyio.fail_after(60):
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
async def test_a_client_that_leaves_meanwhile_is_missed_by_nobody() -> None:
    async with a_pair(20) as pair:
        with anyio.fail_after(60):
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
        with anyio.fail_after(60):
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
async def test_tls_does_not_move() -> None:
    async with a_pair(1) as pair:
        pair.old.server._acceptors[0].hooks.is_secure = True
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
        assert not self.received or self.transport.is_reading()
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
                # A loop that reads the rest before its turn comes gives it all at once.
                assert made[0].received in (b"tw", b"twmore")
                assert not made[0].transport.is_reading()
                made[0].transport.resume_reading()
                while made[0].received != b"twmore":
                    await turn()
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
                task_group.start_soon(Receiver(theirs, new.gate.find_resumer, log).run)
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
async def test_a_protocol_whose_state_is_no_json_costs_nobody_else_anything() -> None:
    async with a_pair(3) as pair:
        stays = pair.old.protocols[0]
        stays.release_connection = lambda: Release(object())  # type: ignore[method-assign]
        with anyio.fail_after(60):
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


async def test_the_last_answers_of_a_receiver_that_left_something_unread_are_heard() -> None:
    """The kernel reports that first, as ECONNRESET."""
    ours, theirs = socketpair()
    sender = Sender(ours, Tracker(), log)
    sender._sent[1] = []
    ours.send(b"never read")
    theirs.send(Answer(1).write())
    theirs.close()
    with ours:
        assert sender._hear_now() is True
        assert sender._hear_now() is False


@pytest.mark.backends("asyncio", "uvloop")
@pytest.mark.parametrize("answer", [b"{", b"[]", b'{"batch":1,"taken":7,"later":[],"reasons":[]}', b"[" * 100_000])
async def test_an_answer_that_is_not_understood_never_makes_two_readers(answer: bytes) -> None:
    """The receiver may have taken anything: what it was sent is let go, and what it was not sent stays."""
    async with a_pair(3) as pair:
        (first, *_), protocols = pair.clients, pair.old.protocols
        for protocol in protocols[1:]:
            protocol.is_transferable = False
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(pair.send)
                await anyio.wait_readable(pair.theirs)
                _, numbers = receive_batch(pair.theirs)
                for number in numbers:
                    os.close(number)
                pair.theirs.send(answer)
        assert await read(first) == b""
        del pair.clients[0]
        await pair.ask_all(b"two", 2)
