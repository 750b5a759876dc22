"""Two servers loaded in turn from one process: slices of time side by side, under kept connections and new ones."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

HOST = "127.0.0.1"

# No answer takes longer, seconds.
PATIENCE_SECONDS = 30.0

_Measured = TypeVar("_Measured")


@dataclass(frozen=True, slots=True)
class Extent:
    """How long to measure: pairs of processes, pairs of slices with each, and seconds of a slice."""

    processes: int
    slices: int
    seconds: float


# A short one, to show that a benchmark works.
QUICK = Extent(processes=1, slices=2, seconds=0.02)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What clients ask for, and how they know that an answer is complete.

    Attributes:
        request: what each client sends.
        ending: what an answer ends in.
        clients: how many there are: each turn sends one request for each of them, and then reads the answers.
    """

    request: bytes
    ending: bytes
    clients: int

    def ask(self, sockets: Sequence[socket.socket]) -> None:
        """Make one request on each connection.

        Raises:
            RuntimeError: a server answers with something else.
        """
        for sock in sockets:
            sock.sendall(self.request)
        for sock in sockets:
            self._read_answer(sock)

    def _read_answer(self, sock: socket.socket) -> None:
        answer = b""
        while not answer.endswith(self.ending):
            piece = sock.recv(65536)
            if not piece:
                raise RuntimeError(f"the server answered {answer!r}")
            answer += piece


class KeepAlive:
    """Requests on connections that stay open."""

    name = "kept connection"

    def __init__(self, port: int, exchange: Exchange) -> None:
        self.exchange = exchange
        self._sockets = [connect(port) for _ in range(exchange.clients)]

    def turn(self) -> None:
        """Make a request on each connection."""
        self.exchange.ask(self._sockets)

    def close(self) -> None:
        """Close the connections."""
        for sock in self._sockets:
            sock.close()


class Connecting:
    """A connection for each request."""

    name = "new connection"

    def __init__(self, port: int, exchange: Exchange) -> None:
        self.exchange = exchange
        self._port = port

    def turn(self) -> None:
        """Make a request on as many new connections."""
        sockets = [connect(self._port) for _ in range(self.exchange.clients)]
        self.exchange.ask(sockets)
        for sock in sockets:
            sock.close()

    def close(self) -> None:
        """Leave nothing: nothing is open between two turns."""


Workload = type[KeepAlive] | type[Connecting]
WORKLOADS: tuple[Workload, ...] = (KeepAlive, Connecting)


@dataclass(frozen=True, slots=True)
class Rate:
    """What one slice came to."""

    per_second: float
    cpu_each: float  # seconds of the server's processor time for each request


def connect(port: int) -> socket.socket:
    """Open a connection."""
    sock = socket.create_connection((HOST, port), timeout=PATIENCE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def measure(load: KeepAlive | Connecting, cpu_seconds: Callable[[], float], seconds: float) -> Rate:
    """Load a server for a slice of time; `cpu_seconds` tells what it has used of the processor so far."""
    turns = 0
    used = cpu_seconds()
    begun = time.perf_counter()
    elapsed = 0.0
    # One turn at least, however long this process has waited for the processor before it comes so far.
    while elapsed < seconds:
        load.turn()
        turns += 1
        elapsed = time.perf_counter() - begun
    # The client has its answers, and the server still has connections to close: they count for it all the same.
    requests = turns * load.exchange.clients
    return Rate(requests / elapsed, (cpu_seconds() - used) / requests)


def alternate(slices: int, measure_one: Callable[[int], _Measured]) -> list[tuple[_Measured, _Measured]]:
    """Measure the first and the second of two in turn; each of them is the first one half of the time."""
    pairs = []
    for number in range(slices):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        measured = {which: measure_one(which) for which in order}
        pairs.append((measured[0], measured[1]))
    return pairs
