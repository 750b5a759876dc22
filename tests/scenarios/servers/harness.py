"""A service of ``service.py`` that runs: started and ended here, and heard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from ecdysis_async import RestartReport
from ecdysis_async.cli import client
from tests.scenarios.servers.clients import fetch

PROJECT = Path(__file__).resolve().parents[3]
SERVICE = Path(__file__).with_name("service.py")

PYTHON = [sys.executable, "-W", "error"]
ECDYSIS = [*PYTHON, "-m", "ecdysis_async.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT)}

# What ``ecdysis run`` serves, and by what, in the place of each of ``service.SERVE``.
ASGI = "tests.scenarios.servers.service:asgi"
OPTION = "--server-option"
UVICORN = [ASGI, "--server=uvicorn", OPTION, "timeout_keep_alive=600"]
HTTPTOOLS = [*UVICORN, OPTION, "http=httptools", OPTION, "ws=websockets-sansio"]
TARGETS = {
    "uvicorn": [*HTTPTOOLS, "--no-transfer"],
    "uvicorn-h11": [*UVICORN, OPTION, "http=h11", OPTION, "ws=wsproto", "--no-transfer"],
    "uvicorn-moving": HTTPTOOLS,
    "uvicorn-http2": [*UVICORN, OPTION, "http=zttp", OPTION, "http2=true"],
    "hypercorn": [ASGI, "--server=hypercorn", OPTION, "keep_alive_timeout=600", "--no-transfer"],
    "aiohttp": ["tests.scenarios.servers.service:make_aiohttp", "--factory", "--server=aiohttp", "--no-transfer"],
}

PATIENCE_SECONDS = 60.0

# What a healthy service never writes.
BLEMISHES = ("Exception ignored", "Warning", "never awaited", "never retrieved", "ERROR", "does not end")


class Service:
    """A service and what its generations tell.

    Attributes:
        port: where it serves.
        generations: those that have served.
        pids: theirs.
        reports: of those that have ended, of the restart that each was shed by.
        shutdowns: the state that each was in when its application was shut down.
        notes: what a page in a browser has told.
    """

    def __init__(self, facts: asyncio.StreamReader, control: str | None) -> None:
        self.port = 0
        self.generations: list[int] = []
        self.pids: list[int] = []
        self.reports: dict[int, RestartReport | None] = {}
        self.shutdowns: dict[int, str] = {}
        self.notes: list[str] = []
        self._facts = facts
        self._control = control
        self._news = asyncio.Condition()
        self._is_over = False

    async def listen(self) -> None:
        """Take note of everything, to the end of the last generation."""
        while line := await self._facts.readline():
            fact = json.loads(line)
            match fact["event"]:
                case "serving":
                    self.port = fact["port"]
                    self.generations.append(fact["generation"])
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
        self._is_over = True
        async with self._news:
            self._news.notify_all()

    async def wait_for_generations(self, number: int) -> None:
        """Wait until so many have served."""
        await self._wait_for(self.pids, number)

    async def wait_for_ends(self, number: int) -> None:
        """Wait until so many have ended."""
        await self._wait_for(self.reports, number)

    async def wait_for_notes(self, number: int) -> None:
        """Wait until a page has told so much."""
        await self._wait_for(self.notes, number)

    async def _wait_for(self, facts: Sized, number: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS), self._news:
            await self._news.wait_for(lambda: len(facts) >= number or self._is_over)
        assert len(facts) >= number, "the service has ended"

    async def restart(self) -> dict[str, Any]:
        """Restart it; return the report, or what the error was."""
        if self._control is None:
            answer: dict[str, Any] = json.loads(await asyncio.wait_for(fetch(self.port, "/restart"), PATIENCE_SECONDS))
            return answer
        # As the command does it, but for the start of a process each time.
        try:
            done = await asyncio.to_thread(client.restart, self._control, "settled", lambda event: None)
        except client.CommandFailed as error:
            return {"error": str(error)}
        report: dict[str, Any] = done["report"]
        return report

    async def stop(self) -> None:
        """Stop it; its last connections may go on for the time of a drain."""
        if self._control is None:
            os.kill(self.pids[-1], signal.SIGTERM)
        else:
            await asyncio.to_thread(client.stop, self._control, lambda event: None)


@contextlib.asynccontextmanager
async def running(
    server: str,
    loop: str,
    directory: Path,
    *,
    settings: Mapping[str, float],
    is_main: bool = False,
    options: Sequence[str] = (),
) -> AsyncIterator[Service]:
    """Run a service; stop it, and wait until the last of its processes has let go of stdout.

    Args:
        server: of those in ``service.SERVE``.
        loop: which it runs on.
        directory: where it looks for what it shall do, and writes its stderr to.
        settings: of the ``Ecdysis``.
        is_main: it is a program of its own, which is restarted by a client; instead of one of ``ecdysis run``, which is
            by its control socket.
        options: more of ``ecdysis run``.
    """
    control = None if is_main else str(directory / "control")
    if control is None:
        command = [*PYTHON, str(SERVICE), server, loop, json.dumps(dict(settings))]
    else:
        given = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        common = ["--loop", loop, "--bind", "127.0.0.1:0", "--control", control, "--no-access-log"]
        command = [*ECDYSIS, "run", *TARGETS[server], *common, *given, *options]
    with (directory / "stderr").open("wb") as stderr:
        first = subprocess.Popen(
            command,
            cwd=directory,
            env={**ENVIRONMENT, "SERVICE_DIRECTORY": str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    facts = asyncio.StreamReader()
    assert first.stdout is not None
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(facts), first.stdout
    )
    service = Service(facts, control)
    listening = asyncio.create_task(service.listen())
    try:
        await service.wait_for_generations(1)
        yield service
        await service.stop()
        await asyncio.wait_for(asyncio.shield(listening), PATIENCE_SECONDS)
    except BaseException:
        print((directory / "stderr").read_text(errors="replace"))  # noqa: T201 - pytest shows it with a failure
        raise
    finally:
        if not listening.done():
            for pid in service.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        first.kill()
        first.wait()
        await listening
        transport.close()


def find_blemishes(directory: Path) -> list[str]:
    """Return what the service that was run there should not have written."""
    lines = (directory / "stderr").read_text().splitlines()
    blemishes = [line for line in lines if any(blemish in line for blemish in BLEMISHES)]
    # The broken release says so.
    return [line for line in blemishes if "this release is broken" not in line and "startup failed" not in line]
