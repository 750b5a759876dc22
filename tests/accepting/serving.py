"""What the tests of asyncio's servers share: protocols, clients that never block the loop, and an open plane."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio

from ecdysis_async._accepting.asyncio_servers import (
    GatedServer,
)
from ecdysis_async._accepting.data_plane import DataPlane
from tests.planes import a_plane, read, turn

LOCALHOST = "127.0.0.1"


class Echo(asyncio.Protocol):
    """Sends back what it receives."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class EchoOnce(Echo):
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that no event tells."""
    with anyio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - as its docstring says
            await asyncio.sleep(0.001)


@contextlib.contextmanager
def a_client(server: GatedServer) -> Iterator[socket.socket]:
    """Connect a client; the kernel does that at once on the loopback, whether anybody accepts or not."""
    address = server.sockets[0].getsockname()
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.connect(address)
        client.setblocking(False)
        yield client


@contextlib.asynccontextmanager
async def an_open_plane() -> AsyncIterator[DataPlane]:
    """Make a plane whose gate stands open, and see all its connections end."""
    async with a_plane() as plane:
        await plane.gate.open()
        yield plane
        # Those that no prune has seen yet are asked.
        await until(lambda: not plane.tracker.connections())
        # uvloop closes descriptors in the turn after.
        await turn()


async def answers(client: socket.socket, question: bytes = b"?") -> bool:
    """Ask, and say whether the answer is the question."""
    client.send(question)
    with anyio.fail_after(60):
        return await read(client) == question


def collect(reports: list[dict[str, Any]]) -> None:
    """Send what the loop reports to a list instead of the log."""
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))


async def open_tls(server: GatedServer, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.sockets[0].getsockname()
    return await asyncio.open_connection(host, port, ssl=context, server_hostname="localhost")
