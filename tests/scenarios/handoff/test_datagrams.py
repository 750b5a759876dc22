"""UDP over restarts: each datagram is answered exactly once, whoever was reading when it came."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Self

import pytest

from tests.scenarios.handoff.harness import PATIENCE_SECONDS, Service

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]

RESTARTS = 10
SENDERS = 4
# How many of a sender's datagrams may be under way: what all of them have in the kernel's queue fits into it, so that
# whatever is lost was lost by a generation.
WINDOW = 16

PROTOCOL = """
import asyncio

class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.transport.sendto(b"%d %s" % (os.getpid(), data), address)

transport, _ = await ecdysis.create_datagram_endpoint(Echo, ("127.0.0.1", 0))
udp = transport.get_extra_info("sockname")
"""

LISTENER = """
from ecdysis_async.anyio_listeners import DatagramListener

datagrams = DatagramListener(ecdysis.bind_udp("127.0.0.1", 0))
udp = datagrams.extra(anyio.abc.SocketAttribute.local_address)

async def echo():
    async for data, address in datagrams:
        await datagrams.send((b"%d %s" % (os.getpid(), data), address))

_ = ecdysis._task_group.start_soon(echo)
"""


class Senders:
    """Several sockets in a thread, each of which keeps a window of numbered datagrams under way.

    Attributes:
        answers: how often each datagram was answered, as "sender number".
        sent: how many were sent in all.
        pids: who answered, in their order.
    """

    def __init__(self, address: list[object]) -> None:
        self.answers: Counter[str] = Counter()
        self.pids: list[int] = []
        self.sent = 0
        self._sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(SENDERS)]
        for sock in self._sockets:
            sock.connect(tuple(address))
        self._under_way = dict.fromkeys(self._sockets, 0)
        self._stopping = threading.Event()
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run)

    def wait_for(self, pid: int) -> None:
        """Wait until a process answers."""
        with self._condition:
            assert self._condition.wait_for(lambda: self.pids[-1:] == [pid], PATIENCE_SECONDS), self.pids

    def _run(self) -> None:
        for sock in self._sockets:
            self._fill(sock)
        # What is still under way at the end is waited for; nothing more may come after it.
        while any(self._under_way.values()):
            ready, _, _ = select.select(self._sockets, [], [], PATIENCE_SECONDS)
            if not ready:
                return
            for sock in ready:
                self._read(sock)
                if not self._stopping.is_set():
                    self._fill(sock)
        select.select(self._sockets, [], [], 0)
        for sock in self._sockets:
            self._read(sock)

    def _fill(self, sock: socket.socket) -> None:
        while self._under_way[sock] < WINDOW:
            sock.send(b"%d %d" % (self._sockets.index(sock), self.sent))
            self.sent += 1
            self._under_way[sock] += 1

    def _read(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                pid, _, number = sock.recv(100, socket.MSG_DONTWAIT).decode().partition(" ")
                self._under_way[sock] -= 1
                self.answers[number] += 1
                if self.pids[-1:] != [int(pid)]:
                    with self._condition:
                        self.pids.append(int(pid))
                        self._condition.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.join()
        for sock in self._sockets:
            sock.close()


@pytest.mark.backends("asyncio", "uvloop", "anyio", "trio")
def test_each_datagram_is_answered_once(backend: str, run_service: Run) -> None:
    service = run_service(
        backend, at_start=PROTOCOL if backend in ("asyncio", "uvloop") else LISTENER, ecdysis={"probation": 0.05}
    )
    with Senders(service.run("udp")) as senders:
        senders.wait_for(service.pids[0])
        for _ in range(RESTARTS):
            senders.wait_for(service.restart()["successor_pid"])
    assert len(senders.answers) == senders.sent
    assert set(senders.answers.values()) == {1}
    # Only a dead one's last answers come late: they wait in the sender's queue, and not in the service's.
    assert list(dict.fromkeys(senders.pids)) == service.pids
