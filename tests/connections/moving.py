"""What the tests of moving connections share: two generations on real sockets, and their protocols."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio

from ecdysis_async._accepting.asyncio_servers import GatedServer, create_server
from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._connections.parcel import MESSAGE_BYTES, Release, Transferable
from ecdysis_async._connections.receiver import Receiver
from ecdysis_async._connections.sender import Sender, socketpair
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
        # What makes the protocol that goes on with a connection.
        self.resume: Callable[[int], Lines] = self.make

    def make_again(self, count: int) -> Lines:
        return self.resume(count)

    def make(self, count: int = 0) -> Lines:
        self.protocols.append(Lines(count))
        return self.protocols[-1]


@contextlib.asynccontextmanager
async def a_side() -> AsyncIterator[Side]:
    async with a_plane() as plane:
        side = Side(plane)
        side.server = await create_server(plane, side.make, "127.0.0.1", 0, name=NAME, resume=side.make_again)
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
        await Receiver(self.theirs, self.new.plane.gate.find_resumer, log).run()

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
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(pair.receive)
            task_group.start_soon(pair.send)
            await pair.swept.wait()
            while len(pair.new.plane.tracker) < len(pair.clients):
                await turn()
            task_group.cancel_scope.cancel()
    await turn()


def receive_batch(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    message, ancillary, _, _ = sock.recvmsg(MESSAGE_BYTES, 4096, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for _, _, data in ancillary:
        numbers.frombytes(data)
    body: dict[str, Any] = json.loads(message)
    return body, list(numbers)
