"""Clients of HTTP and WebSockets on plain sockets, that count exactly what became of each request and connection."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"

# Far more than any answer takes.
PATIENCE_SECONDS = 60.0

NEW_PAUSE_SECONDS = 0.02
KEEP_ALIVE_PAUSE_SECONDS = 0.2
MUTE_SECONDS = 0.05
SLOW_SECONDS = (0.1, 0.7)

# More than one event is long.
EVENT_SIZE = 100

TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA
RESTARTING = 1012

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]

# Of each kind, how many there are.
CLIENTS = {"new": 2, "keep-alive": 5, "slow": 3, "silent": 2, "websocket": 4, "stream": 2}


class Load:
    """Clients of all kinds, until told to end.

    Attributes:
        answers: right ones, by kind.
        generations: who gave them.
        failures: whatever else happened, by kind and error: there must be none.
        goodbyes: connections that the server ended in good order, by kind.

    Args:
        connect: opens a connection.
        kinds: of ``CLIENTS``.
    """

    def __init__(self, connect: Connect, kinds: Collection[str] = tuple(CLIENTS)) -> None:
        self.answers: Counter[str] = Counter()
        self.generations: Counter[int] = Counter()
        self.failures: Counter[str] = Counter()
        self.goodbyes: Counter[str] = Counter()
        self._connect = connect
        self._kinds = kinds
        self._ended = asyncio.Event()
        self._random = random.Random()

    async def run(self) -> None:
        behaviours = {
            "new": self._visit,
            "keep-alive": self._keep_alive,
            "slow": self._ask_slowly,
            "silent": self._keep_silent,
            "websocket": self._talk,
            "stream": self._listen,
        }
        async with asyncio.TaskGroup() as clients:
            for kind in self._kinds:
                for _ in range(CLIENTS[kind]):
                    clients.create_task(self._repeat(kind, behaviours[kind]))

    def end(self) -> None:
        """Begin nothing new."""
        self._ended.set()

    async def _repeat(self, kind: str, client: Callable[[str, Streams], Awaitable[None]]) -> None:
        while not self._ended.is_set():
            try:
                streams = await self._connect()
                try:
                    await client(kind, streams)
                finally:
                    streams[1].close()
            except (OSError, EOFError, AssertionError) as error:
                self.failures[f"{kind}: {error!r}"] += 1

    async def _visit(self, kind: str, streams: Streams) -> None:
        # A server has to wait for the first byte of what it accepted.
        await self._rest(self._random.uniform(0, MUTE_SECONDS))
        await self._ask(kind, streams)
        await self._rest(self._random.uniform(0, NEW_PAUSE_SECONDS))

    async def _keep_alive(self, kind: str, streams: Streams) -> None:
        while not self._ended.is_set() and await self._ask(kind, streams):
            await self._rest(self._random.uniform(0, KEEP_ALIVE_PAUSE_SECONDS))

    async def _ask_slowly(self, kind: str, streams: Streams) -> None:
        while not self._ended.is_set() and await self._ask(
            kind, streams, f"slow/{self._random.uniform(*SLOW_SECONDS):.2f}"
        ):
            pass

    async def _keep_silent(self, kind: str, streams: Streams) -> None:
        if await self._ask(kind, streams):
            await self._unless_ended(streams[0].read(1))
            if not self._ended.is_set():
                self.goodbyes[kind] += 1

    async def _ask(self, kind: str, streams: Streams, what: str = "echo") -> bool:
        """Make a request; say whether the connection is good for another one."""
        text = f"{self._random.getrandbits(32):x}"
        streams[1].write(f"GET /{what}/{text} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_SECONDS):
            headers = await read_head(streams[0])
            body = await streams[0].readexactly(int(headers["content-length"]))
            self._note(kind, body.decode(), text)
            if headers.get("connection") != "close":
                return True
            assert await streams[0].read() == b""
        self.goodbyes[kind] += 1
        return False

    async def _listen(self, kind: str, streams: Streams) -> None:
        streams[1].write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(PATIENCE_SECONDS):
            await read_head(streams[0])
        end = b""
        while not self._ended.is_set():
            async with asyncio.timeout(PATIENCE_SECONDS):
                size = int(await streams[0].readuntil(b"\r\n"), 16)
                chunk = (await streams[0].readexactly(size + 2))[:-2]
            if not chunk:
                break
            # Of the last chunks, because a proxy cuts them anew.
            end = (end + chunk)[-EVENT_SIZE:]
            self.answers[kind] += 1
        if not self._ended.is_set():
            assert end.endswith(b"data: bye\n\n"), end
            self.goodbyes[kind] += 1

    async def _talk(self, kind: str, streams: Streams) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await upgrade(streams)
        while not self._ended.is_set():
            text = f"{self._random.getrandbits(32):x}"
            streams[1].write(frame(TEXT, text.encode()))
            async with asyncio.timeout(PATIENCE_SECONDS):
                opcode, payload = await read_frame(streams)
                if opcode == CLOSE:
                    await say_goodbye(streams, payload)
                    self.goodbyes[kind] += 1
                    return
            self._note(kind, payload.decode(), text)
            await self._rest(self._random.uniform(0, KEEP_ALIVE_PAUSE_SECONDS))

    def _note(self, kind: str, answer: str, text: str) -> None:
        generation, _, echo = answer.partition(" ")
        assert echo == text, (answer, text)
        self.answers[kind] += 1
        self.generations[int(generation)] += 1

    async def _rest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _unless_ended(self, coroutine: Coroutine[Any, Any, bytes]) -> bytes:
        """Await something, or nothing once the load is over."""
        waiting = [asyncio.create_task(coroutine), asyncio.create_task(self._ended.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return b"" if self._ended.is_set() else await waiting[0]  # type: ignore[return-value]
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


def by_tcp(port: int) -> Connect:
    """Connect to a port."""
    return functools.partial(asyncio.open_connection, HOST, port)


def by_unix(path: Path) -> Connect:
    """Connect to a Unix socket."""
    return functools.partial(asyncio.open_unix_connection, path)


async def fetch(port: int, path: str) -> str:
    """Make one request on a connection of its own."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        headers = await read_head(reader)
        return (await reader.readexactly(int(headers["content-length"]))).decode()
    finally:
        writer.close()


async def upgrade(streams: Streams) -> None:
    """Open a WebSocket."""
    streams[1].write(
        b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    await read_head(streams[0])


async def say_goodbye(streams: Streams, payload: bytes) -> None:
    """See that a WebSocket was closed for the right reason, and see its closing through."""
    assert payload[:2] == struct.pack("!H", RESTARTING), payload
    streams[1].write(frame(CLOSE, payload[:2]))
    # No reset. What comes after a close is discarded (RFC 6455, 1.4): an echo may.
    await streams[0].read()


async def read_head(reader: asyncio.StreamReader) -> dict[str, str]:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    assert status.split()[1] in ("200", "101"), status
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def frame(opcode: int, payload: bytes) -> bytes:
    """Make a short frame of a client (RFC 6455, 5.2)."""
    mask = os.urandom(4)
    return bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))


async def read_frame(streams: Streams) -> tuple[int, bytes]:
    """Read a short frame of a server; its pings are answered."""
    reader, writer = streams
    while True:
        first, second = await reader.readexactly(2)
        opcode, payload = first & 0x0F, await reader.readexactly(second)
        if opcode != PING:
            return opcode, payload
        writer.write(frame(PONG, payload))
