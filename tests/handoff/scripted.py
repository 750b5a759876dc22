"""What tests of a handoff share: a host that remembers, a generation of it, and a successor that a test speaks for."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import anyio.to_thread

from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.side import COUNTERS
from ecdysis_async._ipc.channel import Channel
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import Process, spawn
from ecdysis_async.settings import Settings


class Host:
    """Sockets that nobody accepts from; it remembers what was asked of it."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.connections = 3
        self.asked: list[str] = []

    async def pause(self, spare: Callable[[Entry], bool]) -> None:
        spared = [entry.name for entry in self.registry.entries if spare(entry)]
        self.asked.append(f"pause, but not {', '.join(spared)}")

    async def resume(self) -> None:
        self.asked.append("resume")

    def hurry(self) -> None:
        self.asked.append("hurry")


@contextlib.contextmanager
def a_generation(settings: Settings | None = None) -> Iterator[tuple[Generation, Host]]:
    """Make a generation with two sockets, of the names "kept" and "unwanted"."""
    host = Host()
    try:
        for name in "kept", "unwanted":
            host.registry.obtain(Internet("127.0.0.1", 0), name=name)
        yield Generation(1, settings or Settings(), host, GenerationLog(1)), host
    finally:
        host.registry.close(unlink=True)


class Successor:
    """A process that sleeps, and its end of the channel, on which the test speaks."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self.channel: Channel | None = None

    async def spawn(self, channel: socket.socket, stderr: int) -> Process:
        """Start it: the spawner of a predecessor's side."""
        launch = Launch(("sleep", "600"), None, dict(os.environ))
        # It sleeps with a socket that nobody speaks on: its end is the test's.
        here, there = socket.socketpair()
        with here, there:
            self.process = await anyio.to_thread.run_sync(spawn, launch, there, stderr)
        self.channel = Channel(channel.dup())
        return self.process

    async def say_hello(self, opened: int = 0, closed: int = 0) -> None:
        """Say who it is, and how many connections it has had."""
        assert self.process is not None and self.channel is not None
        counters = os.memfd_create("counters")
        try:
            os.write(counters, COUNTERS.pack(opened, closed))
            body = {"versions": [1, 1], "pid": self.process.pid}
            await self.channel.send("hello", body, [self.process.pidfd, counters])
        finally:
            os.close(counters)

    async def expect(self, type: str) -> dict[str, object]:
        """Receive the next message, which is of this type; return its body."""
        assert self.channel is not None
        frame = await self.channel.receive()
        frame.close()
        assert frame.type == type
        return frame.body

    def close(self) -> None:
        """Let go of the channel."""
        if self.channel is not None:
            self.channel.close()
