"""Handlers at a safe point: what they are told, what they offer for transfer, and what becomes of it."""

from __future__ import annotations

import functools
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream

from ecdysis_async._accepting.anyio_streams import serve
from ecdysis_async._accepting.asyncio_servers import start_server
from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._connections.connection import Connection, current_connection, describe_peer, describe_request
from ecdysis_async._connections.receiver import Receiver
from ecdysis_async._connections.sender import Sender, socketpair
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async.errors import DrainInterrupt
from tests.connections.moving import NAME
from tests.planes import a_plane, connect, read, turn

log = logging.getLogger(__name__)


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
        with connect(old.registry.entries[0]) as client, anyio.fail_after(60):
            client.send(b"one\ntw")
            assert await read(client) == b"1 one\n"
            ours, theirs = socketpair()
            old.tracker.moves = True
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(Receiver(theirs, new.gate.find_resumer, log).run)
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
        with connect(plane.registry.entries[0]) as client, anyio.fail_after(60):
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
                entry = plane.registry.obtain(Unix(str(tmp_path / str(number))), name=NAME)
            else:
                entry = plane.registry.obtain(Internet("127.0.0.1", 0), name=NAME)
            handler = functools.partial(handle, plane)
            listener: Any = entry.sock
            if kind == "trio":
                from ecdysis_async._accepting.trio_streams import TrioListener

                listener = TrioListener(entry, plane=plane)
            task_group.start_soon(functools.partial(serve, handler, listener, resume=handler, plane=plane))
            await turn()
            await plane.gate.open()
        with connect(old.registry.entries[0]) as client, anyio.fail_after(60):
            client.send(b"abcd")
            assert await read(client) == b"4 abcd\n"
            ours, theirs = socketpair()
            old.tracker.moves = True
            task_group.start_soon(Receiver(theirs, new.gate.find_resumer, log).run)
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


async def test_a_finished_result_is_returned_also_while_draining() -> None:
    tracker = Tracker()

    async def result() -> str:
        return "result"

    assert await tracker.until_draining(result()) == "result"
    await tracker.drain(0)
    assert await tracker.until_draining(result()) == "result"
    with pytest.raises(DrainInterrupt):
        await tracker.until_draining(anyio.sleep_forever())


async def test_a_request_that_comes_in_the_tick_of_the_interrupt_is_not_lost() -> None:
    """Either the request is returned, or its bytes are still there to be read."""

    async def handle(stream: SocketStream, tracker: Tracker, requests: list[bytes]) -> None:
        connection = Connection()
        current_connection.set(connection)
        tracker.open(connection)
        try:
            requests.append(await tracker.until_draining(stream.receive()))
        except DrainInterrupt:
            requests.append(await stream.receive())
        tracker.close(connection)

    for turns in range(6):
        requests: list[bytes] = []
        tracker = Tracker()
        ours, theirs = socket.socketpair()
        with theirs:
            async with await SocketStream.from_socket(ours) as stream, anyio.create_task_group() as task_group:
                task_group.start_soon(handle, stream, tracker, requests)
                await turn()
                theirs.send(b"request")
                await turn(turns)
                for connection in tracker.connections():
                    connection.interrupt()
        assert requests == [b"request"]


async def test_errors_of_the_awaited_pass_through() -> None:
    tracker = Tracker()

    async def fail() -> None:
        raise LookupError("this one")

    with pytest.raises(LookupError, match="this one"):
        await tracker.until_draining(fail())


def test_a_request_is_described_without_its_query_and_without_what_a_terminal_obeys() -> None:
    described = describe_request("GET", "/\x1b[2J/\u2028?token=secret", time.monotonic() - 2)
    assert described.startswith("GET /\\x1b[2J/\\u2028, ")
    assert described.endswith(" s old")


def test_a_peer_is_described_as_far_as_it_is_known() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert describe_peer(ours) == "a client of this machine"
    assert describe_peer(ours) == "a client that has gone"
    assert describe_peer(None) == "a client that has gone"
