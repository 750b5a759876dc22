"""A service of ``service.py`` that runs: started and ended here, and heard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ecdysis_async import RestartReport
from tests.servers.clients import fetch

PROJECT = Path(__file__).resolve().parents[2]
SERVICE = Path(__file__).with_name("service.py")

PATIENCE_SECONDS = 30.0

# What a healthy service never writes.
BLEMISHES = ("Exception ignored", "Warning", "never awaited", "never retrieved", "ERROR", "does not end")


class Service:
    """A service and what its generations tell.

    Attributes:
        port: where it serves.
        pids: of the generations that have served.
        reports: of those that have ended, of the restart that each was shed by.
        shutdowns: the state that each was in when its application was shut down.
        notes: what a page in a browser has told.
    """

    def __init__(self, facts: asyncio.StreamReader) -> None:
        self.port = 0
        self.pids: list[int] = []
        self.reports: dict[int, RestartReport | None] = {}
        self.shutdowns: dict[int, str] = {}
        self.notes: list[str] = []
        self._facts = facts
        self._news = asyncio.Condition()

    async def listen(self) -> None:
        """Take note of everything, to the end of the last generation."""
        while line := await self._facts.readline():
            fact = json.loads(line)
            match fact["event"]:
                case "serving":
                    self.port = fact["address"][1]
                    self.pids.append(fact["pid"])
                case "shutdown":
                    self.shutdowns[fact["pid"]] = fact["state"]
                case "note":
                    self.notes.append(fact["text"])
                case "ended":
                    report = fact["report"]
                    self.reports[fact["pid"]] = None if report is None else RestartReport.from_json(report)
            async with self._news:
                self._news.notify_all()

    async def wait_for_generations(self, number: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS), self._news:
            await self._news.wait_for(lambda: len(self.pids) >= number)

    async def wait_for_ends(self, number: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: len(self.reports) >= number)

    async def wait_for_notes(self, number: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS), self._news:
            await self._news.wait_for(lambda: len(self.notes) >= number)

    async def restart(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await asyncio.wait_for(fetch(self.port, "/restart"), PATIENCE_SECONDS))
        return answer


@contextlib.asynccontextmanager
async def running(server: str, loop: str, directory: Path, **settings: Any) -> AsyncIterator[Service]:
    """Run a service; stop it, and wait until the last of its processes has let go of stdout.

    Args:
        server: of those in ``service.SERVE``.
        loop: which it runs on.
        directory: where it looks for what it shall do, and writes its stderr to.
        settings: of the ``Ecdysis``.
    """
    command = [sys.executable, "-W", "error", str(SERVICE), server, loop, str(directory), json.dumps(settings)]
    with (directory / "stderr").open("wb") as stderr:
        first = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE, stderr=stderr
        )
    facts = asyncio.StreamReader()
    assert first.stdout is not None
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(facts), first.stdout
    )
    service = Service(facts)
    listening = asyncio.create_task(service.listen())
    try:
        await service.wait_for_generations(1)
        yield service
        os.kill(service.pids[-1], signal.SIGTERM)
        await asyncio.wait_for(asyncio.shield(listening), PATIENCE_SECONDS)
    finally:
        if not listening.done():
            for pid in service.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        await listening
        first.kill()
        first.wait()
        transport.close()


def find_blemishes(directory: Path) -> list[str]:
    """Return what the service that was run there should not have written."""
    lines = (directory / "stderr").read_text().splitlines()
    blemishes = [line for line in lines if any(blemish in line for blemish in BLEMISHES)]
    # The broken release says so.
    return [line for line in blemishes if "this release is broken" not in line and "startup failed" not in line]
