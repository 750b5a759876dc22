"""A service of `ecdysis run` for programs of others: started, restarted now and then, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ecdysis_async.cli import client

__all__ = ["PROJECT", "Service", "serving"]

PROJECT = Path(__file__).resolve().parent.parent.parent

# What a start, a restart or an end may take before something is wrong; far more than it needs.
LIMIT_SECONDS = 120.0


class Service:
    """One service that runs.

    Attributes:
        port: where it serves, on 127.0.0.1.
        control: its control socket.
        log: what it has written.
        reports: what its restarts came to.
        seconds: how long each of them took.
    """

    def __init__(self, port: int, control: str, log: Path, process: asyncio.subprocess.Process) -> None:
        self.port = port
        self.control = control
        self.log = log
        self.process = process
        self.reports: list[dict[str, Any]] = []
        self.seconds: list[float] = []

    async def restart(self, until: str = "settled") -> None:
        """Restart it.

        Raises:
            RuntimeError: it has failed; the message says why.
        """
        begun = time.monotonic()
        try:
            # By the code of the command, in this process: a process of its own each time is nothing that is looked at.
            done = await asyncio.to_thread(client.restart, self.control, until, lambda event: None)
        except client.CommandFailed as error:
            raise RuntimeError(f"a restart has failed: {error}") from error
        self.reports.append(done["report"])
        self.seconds.append(time.monotonic() - begun)

    async def restart_every(self, pause: float) -> None:
        """Restart it again and again, until this is cancelled; a restart that has begun is waited for."""
        while True:
            await asyncio.sleep(pause)
            restart = asyncio.create_task(self.restart())
            try:
                await asyncio.shield(restart)
            except asyncio.CancelledError:
                await restart
                raise


@contextlib.asynccontextmanager
async def serving(target: str, *options: str, app_dir: Path | None = None) -> AsyncIterator[Service]:
    """Run ``ecdysis run TARGET`` with options, in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="ecdysis-") as directory:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        log = Path(directory, "log")
        control = os.path.join(directory, "control")
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "ecdysis_async", "run", target, "--bind", f"127.0.0.1:{port}"),
                *("--control", control, "--app-dir", str(app_dir or Path(__file__).parent / "applications"), *options),
                stdout=output,
                stderr=output,
                cwd=PROJECT,
            )
        service = Service(port, control, log, process)
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                await _until_it_serves(service)
            yield service
        finally:
            if process.returncode is None:
                process.terminate()
            async with asyncio.timeout(LIMIT_SECONDS):
                await process.wait()


async def _until_it_serves(service: Service) -> None:
    while True:
        if service.process.returncode is not None:
            raise RuntimeError(f"the service has not started:\n{service.log.read_text(errors='replace')}")
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.close()
            return
        await asyncio.sleep(0.05)
