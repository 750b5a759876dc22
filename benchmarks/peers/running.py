"""One server that runs, what it needs around it, and what is seen of it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import HOST, Http
from benchmarks.peers import sampler
from benchmarks.peers.building import PROJECT

# What a server may take over its start before something is wrong.
LIMIT_SECONDS = 30.0

# What a command may take.
COMMAND_SECONDS = 120.0

# prctl(2).
PR_SET_CHILD_SUBREAPER = 36

# A release that fails as it is loaded.
BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server, and how its documentation says that it is restarted.

    Attributes:
        name: for the table.
        language: what it is written in.
        how: how it is restarted.
        provide: makes sure that it is here; returns its version.
        command: starts it.
        restart: returns when it is done, as far as it can be told: True if that is known, False if it is known to have
            failed, None if whoever asks learns nothing.
        configure: writes its files for a release.
        has_upstream: whether another server answers its slow requests.
        keeps_connections: whether a connection serves more than one request.
        is_quick: whether a quick run has it.
        is_ours: whether no request of it may fail.
    """

    name: str
    language: str
    how: str
    provide: Callable[[], str]
    command: Callable[[Running], Sequence[str]]
    restart: Callable[[Running], Awaitable[bool | None]]
    configure: Callable[[Running, str], None] | None = None
    has_upstream: bool = False
    keeps_connections: bool = True
    is_quick: bool = False
    is_ours: bool = False


class Running:
    """One server that runs.

    Attributes:
        port: where.
        upstream_port: where the server behind it is, if it has one.
        directory: for its files.
        process: what was started last.
        started_at: when, in seconds of CLOCK_MONOTONIC.
    """

    def __init__(self, peer: Peer, ports: tuple[int, int], directory: Path, import_seconds: float) -> None:
        self.port, self.upstream_port = ports
        self.directory = directory
        self._peer = peer
        self._known = set(sampler.descendants(os.getpid()))
        self._release = directory / "release"
        self._environment = {
            **os.environ,
            "ADDRESS": self.address,
            "HOME": str(directory),
            "PYTHONPATH": str(PROJECT),
            "PYTHONWARNINGS": "ignore",  # some of them use what is deprecated
            "RELEASE_FILE": str(self._release),
            "IMPORT_SECONDS": str(import_seconds),
        }
        self.release("0")
        if peer.has_upstream:
            command = [sys.executable, "-m", "uvicorn", "benchmarks.asgi:app", "--host", HOST]
            self._upstream = self._start([*command, "--port", str(self.upstream_port), "--no-access-log"])
        self.release("1")
        self._sampler = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.sampler"],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._sampler.stdout is not None
        self._sampler.stdout.readline()
        self.start()

    @property
    def address(self) -> str:
        """Where it serves."""
        return f"{HOST}:{self.port}"

    def start(self) -> None:
        """Start it."""
        self.started_at = time.monotonic()
        self.process = self._start(self._peer.command(self))

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.directory / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def release(self, release: str) -> None:
        """Put a release where the next start finds it."""
        self._release.write_text(release)
        if self._peer.configure is not None:
            self._peer.configure(self, release)

    async def restart(self) -> bool | None:
        """Restart it, and return what is known of that."""
        return await self._peer.restart(self)

    async def run(self, *command: str) -> bool:
        """Run a command to its end, or to the end of patience, and return whether it succeeded."""
        process = self._start(command)
        try:
            return await asyncio.to_thread(process.wait, COMMAND_SECONDS) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            return False

    async def _wait_until_serving(self, port: int) -> None:
        async with asyncio.timeout(LIMIT_SECONDS):
            while True:
                if self.process.poll() is not None:
                    raise RuntimeError((self.directory / "log").read_text())
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection(HOST, port)
                    writer.write(Http().encode("echo", "hello"))
                    answer = await Http().read(reader)
                    writer.close()
                    if answer:
                        return
                await asyncio.sleep(0.005)

    async def wait_until_all_serve(self) -> float:
        """Wait for it and for what is behind it; return how long its own start took, in seconds.

        Raises:
            RuntimeError: it has ended.
        """
        await self._wait_until_serving(self.port)
        took = time.monotonic() - self.started_at
        if self._peer.has_upstream:
            await self._wait_until_serving(self.upstream_port)
        return took

    def end(self) -> list[sampler.Sample]:
        """Kill all that was started, and return what was seen of it."""
        text, _ = self._sampler.communicate()
        while pids := set(sampler.descendants(os.getpid())) - self._known:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):  # one of a process that is still to go
                    os.waitpid(pid, 0)
        return sampler.read(text)


def adopt_orphans() -> None:
    """Become the parent of every process whose own parent ends, so that it is seen and ended whoever has started it.

    Raises:
        OSError: the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def send(number: signal.Signals) -> Callable[[Running], Awaitable[bool | None]]:
    """Restart by a signal, which says nothing of what becomes of it."""

    async def restart(running: Running) -> bool | None:
        # It may have ended, of a release before.
        running.process.send_signal(number)
        return None

    return restart


@contextlib.contextmanager
def reserved_ports() -> Iterator[tuple[int, int]]:
    """Return ports that the kernel gives to nobody else, and that a server may still listen on.

    Two sockets with SO_REUSEADDR may be bound to one, if only one of them listens: socket(7).
    """
    with socket.socket() as one, socket.socket() as other:
        for holder in (one, other):
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((HOST, 0))
        yield one.getsockname()[1], other.getsockname()[1]
