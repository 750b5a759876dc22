"""What the tests of the data planes share: a plane without a supervisor, and clients that never block the loop."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import Gate
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry


@contextlib.asynccontextmanager
async def a_plane(*, runs_handlers: bool = True) -> AsyncIterator[DataPlane]:
    """Make a plane whose gate is closed, and end it as a supervisor does: first the accepting, then the handlers."""
    registry, gate = Registry(), Gate()
    try:
        async with anyio.create_task_group() as task_group:
            try:
                yield DataPlane(registry, gate, Tracker(), task_group if runs_handlers else None)
            finally:
                with anyio.CancelScope(shield=True):
                    await gate.end()
                task_group.cancel_scope.cancel()
    finally:
        registry.close(unlink=True)


def connect(entry: Entry) -> socket.socket:
    """Queue a client. On the loopback the kernel does that at once, whether anybody accepts or not."""
    client = socket.socket(entry.sock.family, entry.sock.type)
    try:
        client.connect(entry.sock.getsockname())
        client.setblocking(False)
    except BaseException:
        client.close()
        raise
    return client


async def read(client: socket.socket, length: int = 65536) -> bytes:
    """Wait for something to read, or the end."""
    await anyio.wait_readable(client)
    return client.recv(length)


async def turn(times: int = 5) -> None:
    """Let the loop turn, so that everything that is ready to happen happens."""
    for _ in range(times):
        await anyio.lowlevel.checkpoint()


async def wait_for_end(plane: DataPlane) -> None:
    """Wait until no connection is tracked any more."""
    with anyio.fail_after(60):
        while len(plane.tracker):
            await turn()


def run_clients(address: Any, count: int) -> list[str]:
    """Connect, ask and hear the answer, again and again, as plain blocking clients; return what went wrong."""
    failures: list[str] = []

    def run() -> None:
        for number in range(count // 4):
            try:
                with socket.create_connection(address, timeout=30) as client:
                    client.sendall(b"ping")
                    answer = client.recv(16, socket.MSG_WAITALL)
            except OSError as error:
                failures.append(f"{number}: {error!r}")
            else:
                if answer != b"pong":
                    failures.append(f"{number}: {answer!r}")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def watched_by_epoll(descriptor: int) -> bool:
    """Say whether any epoll of this process watches a descriptor."""
    for number in os.listdir("/proc/self/fdinfo"):
        # The descriptor that listdir itself had open is gone again.
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/fdinfo/{number}") as info:
            for line in info:
                if line.startswith("tfd:") and int(line.split()[1]) == descriptor:
                    return True
    return False
