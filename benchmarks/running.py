"""The line service of ``service.py`` as processes that run: started, restarted and ended from outside.

Whoever holds one hears what each generation has to say, and knows by pidfds when it is gone. Nothing here measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import IO, Any

from ecdysis_async import RestartReport

__all__ = ["RunningService", "running"]

PROJECT = Path(__file__).resolve().parent.parent

# What a service may take over its start, a restart or its end before something is wrong; far more than it needs.
LIMIT_SECONDS = 60.0


class Generation:
    """One process of the service, from its first word on."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.has_left = asyncio.Event()  # it has told what its end was like
        self.is_gone = asyncio.Event()
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._bury)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if there is anybody to receive it."""
        if not self.is_gone.is_set():
            with contextlib.suppress(ProcessLookupError):  # dead, and the loop has not seen it yet
                signal.pidfd_send_signal(self._pidfd, number)

    def _bury(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.is_gone.set()


class RunningService:
    """A service and its generations.

    Attributes:
        port: where it serves, on 127.0.0.1.
        generations: those that have served, by number, also when they are gone.
        reports: the restarts that were done, by the number of the generation that was shed; with what became of its
            connections once that one has left.
    """

    def __init__(self) -> None:
        self.port = 0
        self.generations: dict[int, Generation] = {}
        self.reports: dict[int, RestartReport] = {}
        self._is_ending = False
        self._heard = asyncio.Condition()

    @property
    def newest(self) -> Generation:
        """The generation that serves."""
        return self.generations[max(self.generations)]

    async def restart(self) -> RestartReport:
        """Ask the service to restart, as a client of its own; return its answer, once the restart is final.

        Raises:
            RuntimeError: the restart failed; the message is the service's.
        """
        async with asyncio.timeout(LIMIT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"restart\n")
            number, _, text = (await reader.readline()).decode().partition(" ")
            writer.close()
            body = json.loads(text.strip().removesuffix(" bye"))
            if "id" not in body:
                raise RuntimeError(f"the service did not restart: {body['error']}")
            report = RestartReport.from_json(body)
            self.reports.setdefault(int(number), report)
            async with self._heard:
                await self._heard.wait_for(lambda: report.generation in self.generations)
        return report

    async def wait_for_drained(self) -> None:
        """Wait until the generation that serves is the only process of this service."""
        async with asyncio.timeout(LIMIT_SECONDS):
            for generation in list(self.generations.values())[:-1]:
                await generation.has_left.wait()
                await generation.is_gone.wait()

    async def stop(self) -> None:
        """Stop the service, and wait until its last process is gone."""
        self.newest.send(signal.SIGTERM)
        async with asyncio.timeout(LIMIT_SECONDS):
            for generation in self.generations.values():
                await generation.has_left.wait()
                await generation.is_gone.wait()

    def kill(self) -> None:
        """Kill every generation, and those that come forward from now on."""
        self._is_ending = True
        for generation in self.generations.values():
            generation.send(signal.SIGKILL)

    async def note(self, fact: dict[str, Any]) -> None:
        """Take note of what a generation says."""
        number = fact["generation"]
        if fact["event"] == "serving":
            self.port = fact["port"]
            self.generations[number] = Generation(fact["pid"])
            if self._is_ending:
                self.kill()
        else:
            if fact["report"] is not None:
                self.reports[number] = RestartReport.from_json(fact["report"])
            self.generations[number].has_left.set()
        async with self._heard:
            self._heard.notify_all()


@contextlib.asynccontextmanager
async def running(
    *options: str, flags: Sequence[str] = (), stderr: IO[bytes] | None = None, directory: Path = PROJECT
) -> AsyncIterator[RunningService]:
    """Start a service, and yield it when it serves; at the end nothing is left of it, orderly or not.

    Args:
        options: of ``benchmarks.service``.
        flags: of the interpreter; each generation has them from the one before.
        stderr: for the stderr of all generations, instead of that of this process.
        directory: where the service and the library are taken from; through a link that is there, at each restart anew.

    Raises:
        RuntimeError: it ended before it served.
    """
    command = [sys.executable, *flags, "-m", "benchmarks.service", *options]
    # subprocess.Popen is taken: a child of asyncio's own would be killed with the transport of this end.
    first = subprocess.Popen(  # noqa: ASYNC220 - vfork is over within a millisecond
        command,
        cwd=directory,
        env={**os.environ, "PWD": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    assert first.stdout is not None
    facts = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(facts), first.stdout
    )
    service = RunningService()

    async def listen() -> None:
        # To its end: that is when the last generation, each of which has inherited this pipe, is gone.
        while line := await facts.readline():
            await service.note(json.loads(line))

    try:
        line = await facts.readline()
        if not line:
            raise RuntimeError("the service ended before it served: see what it has written to stderr")
        await service.note(json.loads(line))
        listening = asyncio.create_task(listen())
        try:
            yield service
        finally:
            service.kill()
            await asyncio.wait_for(listening, LIMIT_SECONDS)
            for generation in service.generations.values():
                await generation.is_gone.wait()
    finally:
        first.kill()
        first.wait()
        transport.close()
