"""The load: clients of all kinds, each request at a moment of its own, whether or not earlier ones are answered.

The schedule is made beforehand and kept to (an open loop). A client whose last answer is late sends late, and its
request's latency counts from the moment at which it was due.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence

from .http_client import HttpConnection, RequestFailed
from .plan import Kind, PlanError, Shape, Url
from .records import Connection, Exchange, Fault, History
from .websocket_client import ComeBack, WebSocketConnection

__all__ = ["Load"]

# A client that has failed comes back this much later: it would ask a service that is down a thousand times a second.
FAILURE_PAUSE_SECONDS = 0.1

MAX_REQUESTS = 200_000
# So many clients ask at once at the most: the next ones wait, and their latency counts from when they were due.
MAX_IN_FLIGHT = 500

# An answer that takes longer than the patience is late; one that takes so many times as long is lost.
LOST_FACTOR = 6

# A second answer to the same request follows the first at once: so long it is waited for.
LINGER_SECONDS = 0.01

CLIENT_ERROR, SERVER_ERROR = 400, 500

Channel = HttpConnection | WebSocketConnection


class Load:
    """Clients against one address, until told to end.

    Args:
        url: where the service listens.
        shapes: what is asked.
        history: where everything is noted.
        patience: how long an answer may take, in seconds; it is awaited ``LOST_FACTOR`` times as long.
        identify_by: a header of the application's own.
    """

    def __init__(
        self, url: Url, shapes: Sequence[Shape], history: History, *, patience: float, identify_by: str | None = None
    ) -> None:
        self._url = url
        self._shapes = list(shapes)
        self._history = history
        self._limit = patience * LOST_FACTOR
        self._identify_by = identify_by
        self._random = random.Random()  # noqa: S311 - no secret
        self._ids = itertools.count(1)
        self._begun = time.monotonic()
        self._echoed: dict[str, bool] = {}
        self._room = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._over = asyncio.Event()

    def clock(self) -> float:
        """Return the time since the beginning, in seconds."""
        return time.monotonic() - self._begun

    def end(self) -> None:
        """Make no more requests; those in flight are still waited for."""
        self._over.set()

    async def try_out(self) -> None:
        """Ask for everything once: what is answered now is what each later answer is compared with.

        Raises:
            PlanError: something that was asked for by the user is not served.
        """
        shapes, self._shapes = self._shapes, []
        for shape in shapes:
            exchange = await self._visit(dataclasses.replace(shape, seconds=0.0), self.clock())
            answer = exchange.answer
            if exchange.fault is Fault.REFUSED:
                raise PlanError(f"nothing listens at {self._url}: {exchange.detail}")
            if exchange.fault is not None and not shape.optional:
                raise PlanError(f"{shape}: {exchange.fault}{f': {exchange.detail}' if exchange.detail else ''}")
            is_bad = exchange.fault is not None or (answer and answer.status and answer.status >= CLIENT_ERROR)
            if shape.optional and is_bad:
                why = f"status {answer.status}" if answer is not None else exchange.detail or str(exchange.fault)
                option = "--websocket-path" if shape.kind is Kind.WEBSOCKET else "--upload-path"
                what = "WebSockets" if shape.kind is Kind.WEBSOCKET else "uploads"
                self._history.notes.append(f"no {what}: {shape.path} answers with {why} (say where by {option})")
                continue
            status = answer.status if answer is not None else None
            if status is not None and shape.expect is None and status >= CLIENT_ERROR:
                if status >= SERVER_ERROR:
                    raise PlanError(f"{shape} is answered with status {status}: say by --path what the service answers")
                self._history.notes.append(f"{shape} is answered with status {status}: is the path right?")
            self._shapes.append(dataclasses.replace(shape, expect=shape.expect or status))
        # Trials are no part of the load.
        self._history.exchanges.clear()
        self._history.connections.clear()

    async def run(self) -> None:
        """Run the clients until the load is over and each request has its answer or has failed."""
        async with asyncio.TaskGroup() as clients:
            for shape in self._shapes:
                if shape.kind in (Kind.KEPT, Kind.WEBSOCKET):
                    for _ in range(shape.connections):
                        clients.create_task(self._keep(shape, shape.rate / shape.connections))
                else:
                    clients.create_task(self._arrive(shape, clients))
        self._history.ended = self.clock()

    async def _arrive(self, shape: Shape, clients: asyncio.TaskGroup) -> None:
        due = self.clock()
        while True:
            due += self._random.expovariate(shape.rate)
            if await self._is_over_before(due):
                return
            await self._room.acquire()
            clients.create_task(self._visit(shape, due)).add_done_callback(lambda _: self._room.release())

    async def _visit(self, shape: Shape, due: float) -> Exchange:
        """Ask once, on a connection of its own."""
        exchange = self._begin(shape, due)
        exchange.late = max(0.0, self.clock() - due)
        channel = self._new_channel(shape)
        try:
            async with self._noting_failures(exchange):
                await self._ask(channel, exchange, shape)
            if exchange.fault is None:
                await asyncio.sleep(LINGER_SECONDS)
        finally:
            await channel.close()
        return exchange

    async def _keep(self, shape: Shape, rate: float) -> None:
        """Ask again and again, on one connection as long as that is kept."""
        channel = self._new_channel(shape)
        due = self.clock() + self._random.uniform(0, 1 / rate)
        try:
            while not await self._is_over_before(due):
                exchange = self._begin(shape, due)
                # Idle for twice the average at the most: servers close what is idle for longer than a few seconds.
                due += self._random.uniform(0, 2 / rate)
                while exchange.ended is None:
                    async with self._noting_failures(exchange):
                        channel = await self._renew(channel, shape)
                        # A WebSocket that is told to come back asks the same once more, on the next connection.
                        with contextlib.suppress(ComeBack):
                            await self._ask(channel, exchange, shape)
                if exchange.fault is not None:
                    await channel.close()
                    await self._is_over_before(self.clock() + FAILURE_PAUSE_SECONDS)
        finally:
            await channel.close()

    async def _renew(self, channel: Channel, shape: Shape) -> Channel:
        """Return the connection, or another one where it has ended or is about to."""
        if channel.is_usable:
            return channel
        await channel.close()
        return self._new_channel(shape)

    def _new_channel(self, shape: Shape) -> Channel:
        record = Connection(len(self._history.connections), shape.kind, self.clock())
        self._history.connections.append(record)
        if shape.kind is Kind.WEBSOCKET:
            is_echoed = self._echoed.get(shape.path)
            return WebSocketConnection(record, self.clock, self._identify_by, is_echoed=is_echoed)
        return HttpConnection(record, self.clock, self._identify_by)

    async def _ask(self, channel: Channel, exchange: Exchange, shape: Shape) -> None:
        """Connect where that is to be done yet, and ask.

        Raises:
            ComeBack, RequestFailed: there was no answer.
        """
        exchange.connection = channel.record.number
        if channel.record.opened is None:
            channel.record.began = self.clock()
            await channel.open(self._url, shape)
        if isinstance(channel, WebSocketConnection):
            answer = await channel.ask(exchange)
            self._echoed[shape.path] = bool(channel.is_echoed)
        else:
            answer = await channel.ask(exchange, shape, self._url)
        exchange.answer, exchange.ended = answer, answer.at
        if shape.expect is not None and answer.status != shape.expect:
            raise RequestFailed(Fault.STATUS, f"status {answer.status} instead of {shape.expect}")

    @contextlib.asynccontextmanager
    async def _noting_failures(self, exchange: Exchange) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._limit):
                yield
        except TimeoutError:
            exchange.fault, exchange.detail = Fault.TIMEOUT, f"none within {self._limit:g} seconds"
            exchange.ended = self.clock()
        except RequestFailed as error:
            exchange.fault, exchange.detail = error.fault, error.detail
            exchange.ended = exchange.ended or self.clock()

    def _begin(self, shape: Shape, due: float) -> Exchange:
        exchange = Exchange(next(self._ids), shape.kind, str(shape).partition(" ")[2], due)
        self._history.exchanges.append(exchange)
        if len(self._history.exchanges) >= MAX_REQUESTS:
            self.end()
        return exchange

    async def _is_over_before(self, moment: float) -> bool:
        """Wait for that moment, or for the end of the load."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(moment - self.clock()):
                await self._over.wait()
        return self._over.is_set()
