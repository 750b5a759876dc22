"""Clients of a service that count exactly what became of each request, on loopback only.

They speak the lines of ``service.py``, or HTTP. Every request ends as one answer or as one failure of a kind. A ``bye``
behind an answer is none: the client connects anew and goes on. New connections come at moments of their own, whether or
not earlier ones are answered, so that a stall is not hidden by the requests it held up. A load ends by itself: at its
limit of requests, if not before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import enum
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

__all__ = ["Address", "Counts", "Failure", "Http", "Kind", "Lines", "Load", "Mix", "Outcome", "percentile"]

HOST = "127.0.0.1"

# A port of loopback, or one of another of its hosts, or the path of a Unix socket.
Address = int | tuple[str, int] | str

# Nothing here takes longer than a few seconds, also on a busy machine: whoever waits longer waits for ever.
PATIENCE_SECONDS = 60.0

# A client that has failed comes back this much later: it would ask a service that is down a thousand times a second.
FAILURE_PAUSE_SECONDS = 0.1

# Half of the new connections stay mute for up to this long: a server must wait for the first byte of what it accepted.
MUTE_SECONDS = 0.05


class Kind(enum.StrEnum):
    """What a client does with its connection."""

    NEW = "new"  # connect, one request, close
    KEEP_ALIVE = "keep-alive"  # request after request on one connection
    SLOW = "slow"  # the same, and the server takes its time for each
    SILENT = "silent"  # one request, then nothing until the server says goodbye


class Failure(enum.StrEnum):
    """How a request can fail."""

    REFUSED = "refused"
    RESET = "reset"
    UNANSWERED = "unanswered"  # closed with a request in flight
    WRONG = "wrong answer"
    TIMEOUT = "timeout"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Mix:
    """How many clients of each kind there are, and how they behave.

    Attributes:
        new_per_second: new connections, on the average, at random moments and whether or not earlier ones are answered.
        hasty: clients that come back on a new connection as soon as they are answered. A server accepts in nearly every
            turn of its loop then, also in that of its pause.
        keep_alive: clients that ask again after a pause.
        pause: the longest such pause, in seconds.
        slow: clients whose requests take the server some time.
        slow_seconds: the shortest and the longest of these times.
        silent: clients that ask once and then keep their connection open.
        limit: the number of requests at which the load ends by itself.
    """

    new_per_second: float = 100
    hasty: int = 0
    keep_alive: int = 12
    pause: float = 0.04
    slow: int = 6
    slow_seconds: tuple[float, float] = (0.3, 3.0)
    silent: int = 4
    limit: int = 100_000


class Outcome(NamedTuple):
    """One request.

    Attributes:
        begun: when it was made, in seconds of CLOCK_MONOTONIC: of a new connection the moment that it was due.
        seconds: how long it took to its answer or its failure; of slow ones, what came on top of the time asked for.
        generation: who answered, if it was answered.
        failure: how it failed, if it failed.
    """

    begun: float
    seconds: float
    generation: int | None
    failure: Failure | None


@dataclass(slots=True)
class Counts:
    """What became of the requests of a load.

    Attributes:
        requests: how many were made.
        answers: how many of them were answered, and rightly.
        failures: how many were not.
        generations: the answers of each generation.
        reconnects: connections that took the place of one that ended in ``bye``.
        silent_closed: connections that the server closed with no request in flight.
        goodbyes: answers that said that their connection ends behind them.
        latencies: of the answers, in seconds, a new connection's from when it was due; of slow ones, what came on
            top of the time that was asked for.
        lateness: how much later than due each new connection was begun, in seconds: the load's own delay.
        outcomes: of each request.
    """

    requests: Counter[Kind] = field(default_factory=Counter)
    answers: Counter[Kind] = field(default_factory=Counter)
    failures: Counter[Failure] = field(default_factory=Counter)
    generations: Counter[int] = field(default_factory=Counter)
    reconnects: int = 0
    silent_closed: int = 0
    goodbyes: int = 0
    latencies: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def __str__(self) -> str:
        """Tell it in one line."""
        failures = ", ".join(f"{number} {failure}" for failure, number in self.failures.items()) or "none"
        return (
            f"{self.requests.total()} requests, {self.answers.total()} answers, failures: {failures}; generations "
            f"{dict(sorted(self.generations.items()))}; {self.reconnects} reconnects, {self.silent_closed} closed "
            f"while silent; latency p50 {percentile(self.latencies, 50) * 1000:.2f} ms, "
            f"p99 {percentile(self.latencies, 99) * 1000:.2f} ms, max {percentile(self.latencies, 100) * 1000:.2f} ms"
        )


class Lines:
    """What the line service speaks."""

    def encode(self, command: str, text: str) -> bytes:
        """Make a request."""
        return f"{command} {text}\n".encode()

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        """Return an answer: a generation, the text, and ``bye`` where the connection is at its end."""
        return await reader.readline()


class Http(Lines):
    """HTTP/1.1, with answers of the same form."""

    def encode(self, command: str, text: str) -> bytes:
        path = "/".join((*command.split(), text))
        return f"GET /{path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        try:
            status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        except asyncio.IncompleteReadError:
            return b""
        if status.split()[1] != "200":
            return status.encode()
        return body + (b" bye" if headers.get("connection") == "close" else b"")


class Load:
    """Clients of all kinds against one address, until told to end."""

    def __init__(self, address: Address, mix: Mix, dialect: Lines | None = None) -> None:
        self.address = address
        self.mix = mix
        self.dialect = dialect or Lines()
        self.counts = Counts()
        self.random = random.Random()
        self.texts = itertools.count()
        self._ended = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether no more requests are made."""
        return self._ended.is_set() or self.is_limited

    @property
    def is_limited(self) -> bool:
        """Whether as many requests were made as there may be."""
        return self.counts.requests.total() >= self.mix.limit

    def end(self) -> None:
        """Make no more requests; those in flight are still waited for."""
        self._ended.set()

    async def run(self) -> Counts:
        """Run the clients until the load is over and each request has its answer or has failed."""
        async with asyncio.TaskGroup() as clients:
            clients.create_task(self._arrive(clients))
            for _ in range(self.mix.hasty):
                clients.create_task(self._hurry())
            for _ in range(self.mix.keep_alive):
                clients.create_task(self._keep_alive())
            for _ in range(self.mix.slow):
                clients.create_task(self._ask_slowly())
            for _ in range(self.mix.silent):
                clients.create_task(self._keep_silent())
        return self.counts

    async def wait_for_end(self, seconds: float) -> None:
        """Wait that long, or until the load is told to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    async def _arrive(self, clients: asyncio.TaskGroup) -> None:
        due = time.monotonic()
        while self.mix.new_per_second:
            due += self.random.expovariate(self.mix.new_per_second)
            await self.wait_for_end(due - time.monotonic())
            if self.is_over:
                return
            clients.create_task(self._visit(due))

    async def _visit(self, due: float) -> None:
        mute = max(0.0, self.random.uniform(-MUTE_SECONDS, MUTE_SECONDS))
        async with Client(self, Kind.NEW) as client:
            self.counts.lateness.append(time.monotonic() - due)
            await client.ask("echo", mute=mute, due=due)

    async def _hurry(self) -> None:
        while not self.is_over:
            async with Client(self, Kind.NEW) as client:
                await client.ask("echo")

    async def _keep_alive(self) -> None:
        async with Client(self, Kind.KEEP_ALIVE) as client:
            while not self.is_over:
                await client.rest(self.random.uniform(0, self.mix.pause))
                await client.ask("echo")

    async def _ask_slowly(self) -> None:
        async with Client(self, Kind.SLOW) as client:
            while not self.is_over:
                seconds = self.random.uniform(*self.mix.slow_seconds)
                await client.ask(f"slow {seconds:.3f}", patience=seconds)

    async def _keep_silent(self) -> None:
        async with Client(self, Kind.SILENT) as client:
            while not self.is_over:
                await client.ask("echo")
                await client.rest(math.inf)


class Client:
    """One client, which has at most one connection and at most one request in flight."""

    def __init__(self, load: Load, kind: Kind) -> None:
        self._load = load
        self._kind = kind
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._has_been_dismissed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def ask(self, command: str, *, patience: float = 0.0, mute: float = 0.0, due: float | None = None) -> None:
        """Make one request, on a new connection where there is none, and count what becomes of it.

        Args:
            command: what to ask for; the text to be echoed is added.
            patience: how long the server was asked to take.
            mute: how long to wait between the connection and the first byte.
            due: when it should have been made; now, if not given. The latency counts from there.
        """
        counts = self._load.counts
        text = f"{self._load.random.getrandbits(32):x}-{next(self._load.texts)}"
        counts.requests[self._kind] += 1
        begun = time.monotonic() if due is None else due
        try:
            async with asyncio.timeout(PATIENCE_SECONDS + patience):
                reader, writer = self._streams or await self._connect()
                if mute:
                    await asyncio.sleep(mute)
                if writer.is_closing():
                    # It was reset while it was mute. asyncio would tell with the answer, and uvloop by no OSError.
                    raise ConnectionResetError
                writer.write(self._load.dialect.encode(command, text))
                await writer.drain()
                answer = await self._load.dialect.read(reader)
        except OSError as error:
            await self._fail(_failure_of(error), begun)
            return
        elapsed = time.monotonic() - begun - patience - mute
        match answer.decode(errors="replace").split():
            case [generation, echo, *bye] if echo == text and generation.isdecimal() and bye in ([], ["bye"]):
                counts.answers[self._kind] += 1
                counts.generations[int(generation)] += 1
                counts.latencies.append(elapsed)
                counts.outcomes.append(Outcome(begun, elapsed, int(generation), None))
                if bye:
                    counts.goodbyes += 1
                    await self._dismiss()
            case [] | ["bye"]:
                await self._fail(Failure.UNANSWERED, begun)
            case _:
                await self._fail(Failure.WRONG, begun)

    async def rest(self, seconds: float) -> None:
        """Make no request for a while, or until the load is over, and notice if the server closes meanwhile."""
        if self._streams is None:
            await self._load.wait_for_end(seconds)
            return
        goodbye = asyncio.create_task(self._streams[0].readline())
        over = asyncio.create_task(self._load.wait_for_end(seconds))
        try:
            await asyncio.wait((goodbye, over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()
            goodbye.cancel()
            line, _ = await asyncio.gather(goodbye, over, return_exceptions=True)
        if line in (b"", b"bye\n"):
            self._load.counts.silent_closed += 1
            await self._dismiss()
        elif isinstance(line, OSError):
            self._load.counts.failures[_failure_of(line)] += 1
            await self._close()
        elif isinstance(line, bytes):
            self._load.counts.failures[Failure.WRONG] += 1
            await self._close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        match self._load.address:
            case str(path):
                self._streams = await asyncio.open_unix_connection(path)
            case (host, port):
                self._streams = await asyncio.open_connection(host, port)
            case port:
                self._streams = await asyncio.open_connection(HOST, port)
        if self._has_been_dismissed:
            self._has_been_dismissed = False
            self._load.counts.reconnects += 1
        return self._streams

    async def _fail(self, failure: Failure, begun: float) -> None:
        self._load.counts.failures[failure] += 1
        self._load.counts.outcomes.append(Outcome(begun, time.monotonic() - begun, None, failure))
        await self._close()
        await self._load.wait_for_end(FAILURE_PAUSE_SECONDS)

    async def _dismiss(self) -> None:
        self._has_been_dismissed = True
        await self._close()

    async def _close(self) -> None:
        if self._streams is None:
            return
        _, writer = self._streams
        self._streams = None
        writer.close()
        # Whatever there was to be read was read: how the server's end of it ends is no matter of ours.
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many percent do not exceed; not a number where there are none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _failure_of(error: OSError) -> Failure:
    match error:
        case ConnectionRefusedError():
            return Failure.REFUSED
        case ConnectionResetError() | BrokenPipeError() | ConnectionAbortedError():
            return Failure.RESET
        case TimeoutError():
            return Failure.TIMEOUT
    return Failure.OTHER


async def main() -> None:
    """Load a service that runs already."""
    parser = argparse.ArgumentParser(description="Load a line service on loopback, and count what becomes of it.")
    parser.add_argument("port", type=int)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    load = Load(arguments.port, Mix())
    async with asyncio.TaskGroup() as task_group:
        task_group.create_task(load.run())
        await load.wait_for_end(arguments.seconds)
        load.end()
    print(load.counts)


if __name__ == "__main__":
    asyncio.run(main())
