"""Clients of HTTP that hold on to their sockets, and count each one that is taken from them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

from tests.scenarios.servers.clients import HOST, read_head

PATIENCE_SECONDS = 30.0

# How long those who are active pause between two requests, seconds.
PAUSES = (0.0, 0.002, 0.05, 0.2)


class Crowd:
    """Many clients, each with a connection that is to last.

    Attributes:
        answers: how many were right.
        failures: whatever else happened to a request, by error: there must be none.
        closed: connections that the server has ended.
        generations: who answered.

    Args:
        port: where the service is.
        idle: how many ask once, and then not before they are told to end.
        active: how many ask at random moments: one request, several at once, or one in pieces.
        seed: of these moments.
    """

    def __init__(self, port: int, *, idle: int, active: int, seed: int = 0) -> None:
        self.answers = self.closed = 0
        self.failures: Counter[str] = Counter()
        self.generations: Counter[int] = Counter()
        self._port = port
        self._idle = idle
        self._active = active
        self._random = random.Random(seed)
        self._ended = asyncio.Event()
        self._arrived = asyncio.Semaphore(0)

    async def run(self) -> None:
        """Ask until told to end."""
        async with asyncio.TaskGroup() as task_group:
            for number in range(self._idle):
                task_group.create_task(self._live(f"idle-{number}", is_active=False))
                if number % 50 == 0:
                    await asyncio.sleep(0.005)
            for number in range(self._active):
                task_group.create_task(self._live(f"active-{number}", is_active=True))

    async def all_arrived(self) -> None:
        """Wait until each one has had its first answer."""
        for _ in range(self._idle + self._active):
            await asyncio.wait_for(self._arrived.acquire(), PATIENCE_SECONDS)

    def end(self) -> None:
        """Let each one ask once more, and leave."""
        self._ended.set()

    async def _live(self, name: str, *, is_active: bool) -> None:
        try:
            await self._connect_and_ask(name, is_active=is_active)
        except (OSError, EOFError, TimeoutError, ValueError, KeyError) as error:
            self.failures[f"{name.partition('-')[0]}: {error!r}"] += 1

    async def _connect_and_ask(self, name: str, *, is_active: bool) -> None:
        client = _Client(self)
        serial = 0
        # The connection outlives every restart, or is counted.
        while True:
            await client.connect(self._port)
            while not client.is_closed:
                await client.ask([f"{name}-{serial}-{piece}" for piece in range(self._pieces(is_active=is_active))])
                serial += 1
                if serial == 1:
                    self._arrived.release()
                if self._ended.is_set():
                    await client.ask([f"{name}-last"])
                    client.close()
                    return
                await self._pause(client, is_active=is_active)
            self.closed += 1

    def _pieces(self, *, is_active: bool) -> int:
        return self._random.choice((1, 1, 1, 2, 5)) if is_active else 1

    async def _pause(self, client: _Client, *, is_active: bool) -> None:
        if not is_active:
            await client.rest(self._ended)
        else:
            await asyncio.sleep(self._random.choice(PAUSES))

    @property
    def random(self) -> random.Random:
        return self._random


class _Client:
    def __init__(self, crowd: Crowd) -> None:
        self.is_closed = True
        self._crowd = crowd

    async def connect(self, port: int) -> None:
        self._reader, self._writer = await asyncio.open_connection(HOST, port)
        self.is_closed = False

    async def ask(self, texts: list[str]) -> None:
        """Send requests at once, or in two pieces, and check the answers."""
        if self.is_closed:
            return
        data = b"".join(b"GET /echo/%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % text.encode() for text in texts)
        cut = self._crowd.random.choice((len(data), len(data), self._crowd.random.randrange(1, len(data))))
        self._writer.write(data[:cut])
        if data[cut:]:
            await asyncio.sleep(self._crowd.random.choice(PAUSES[:3]))
            self._writer.write(data[cut:])
        for text in texts:
            async with asyncio.timeout(PATIENCE_SECONDS):
                headers = await read_head(self._reader)
                body = (await self._reader.readexactly(int(headers["content-length"]))).decode()
            generation, _, echo = body.partition(" ")
            if echo != text:
                raise ValueError(f"{echo} in the place of {text}")
            self._crowd.answers += 1
            self._crowd.generations[int(generation)] += 1
            if headers.get("connection", "") == "close":
                # Those that were sent with it may have no answer: not with the answer that says so.
                self.close()
                return

    async def rest(self, ended: asyncio.Event) -> None:
        """Wait until it is told to end, or the server closes."""
        over = asyncio.ensure_future(self._reader.read(1))
        waiting = asyncio.ensure_future(ended.wait())
        await asyncio.wait([over, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if over.done():
            if over.result():
                raise ValueError("the server has sent something that nobody asked for")
            self.close()
        else:
            over.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await over

    def close(self) -> None:
        self.is_closed = True
        self._writer.close()
