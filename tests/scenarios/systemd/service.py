"""The service that systemd runs in the tests: it answers lines, as benchmarks/service.py does, and obeys.

Each generation reads its settings afresh from the file that the command line names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import ecdysis_async
from benchmarks.service import converse
from ecdysis_async import Ecdysis, RestartError


async def answer(ecdysis: Ecdysis, line: str) -> Any:
    """Do what a line asks for, of what the load does not ask for."""
    match line.split(" "):
        case ["who"]:
            return {
                "pid": os.getpid(),
                "uid": os.geteuid(),
                "generation": ecdysis.generation,
                "names": sorted(os.environ),
                "stash": bytes(ecdysis.inherited_stash.get("who", b"")).decode(),
            }
        case ["stall", seconds]:
            time.sleep(float(seconds))
            return {}
        case ["restart", until]:
            try:
                return (await ecdysis.restart(until=until)).to_json()  # type: ignore[arg-type]
            except RestartError as error:
                return {"error": str(error)}
        case ["stop", "partially"]:
            ecdysis.stop(partial=True)
            return {}
    return None


async def linger(ecdysis: Ecdysis, line: bytes) -> bytes:
    """Answer so many seconds after the drain has begun, which no test can tell beforehand."""
    _, seconds, text = line.split()
    await ecdysis.draining.wait()
    await asyncio.sleep(float(seconds))
    return b"echo " + text + b"\n"


async def hold(settings: dict[str, Any]) -> bytes:
    """Wait until the test lets go."""
    sys.stdout.write("held\n")
    sys.stdout.flush()
    # The test is another process.
    while not Path(settings["released"]).exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return b""


async def fail(asked: asyncio.Event) -> None:
    """Crash as services of Python mostly do: by an exception."""
    await asked.wait()
    raise RuntimeError("a defect")


async def main(settings: dict[str, Any]) -> None:
    """Run one generation."""
    is_to_fail = asyncio.Event()
    exec(settings["at_start"], {})
    async with Ecdysis(**settings["ecdysis"]) as ecdysis:
        if settings["keeps"]:
            ecdysis.stash("who", f"left by pid {os.getpid()}".encode, "start", 7, keep=True)
        if settings["hold"] == "commit":
            ecdysis.stash("held", lambda: hold(settings), "commit")

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async def read_line() -> bytes:
                while True:
                    line = await reader.readline()
                    if line == b"hold\n":
                        await hold(settings)
                    if line == b"fail\n":
                        is_to_fail.set()
                    if line.startswith(b"linger "):
                        return await linger(ecdysis, line)
                    reply = await answer(ecdysis, line.decode().strip())
                    if reply is None:
                        return line
                    await send(json.dumps(reply).encode() + b"\n")

            async def send(data: bytes) -> None:
                writer.write(data)
                await writer.drain()

            # A client that the test has finished with may be gone.
            with contextlib.suppress(ConnectionError):
                try:
                    await converse(ecdysis, read_line, send)
                finally:
                    writer.close()

        sockets = [getattr(ecdysis, method)(*values, **options) for method, values, options in settings["sockets"]]
        for sock in sockets:
            if sock.family == sock.family.AF_UNIX:
                await ecdysis.start_unix_server(handle, sock=sock)
            else:
                await ecdysis.start_server(handle, sock=sock)
        if settings["become"] and os.geteuid() == 0:
            os.setgroups([])
            os.setgid(settings["become"])
            os.setuid(settings["become"])
        names = Path(settings["addresses"])
        names.with_suffix(".draft").write_text(json.dumps([sock.getsockname() for sock in sockets]))
        names.with_suffix(".draft").replace(names)
        await asyncio.sleep(settings["before_ready"])
        if settings["hold"] == "ready":
            await hold(settings)
        await ecdysis.ready()
        async with asyncio.TaskGroup() as tasks:
            failing = tasks.create_task(fail(is_to_fail))
            await ecdysis.finished()
            failing.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    # The steps of a restart: tests wait for them.
    logging.getLogger("ecdysis_async").setLevel(logging.DEBUG)
    ecdysis_async.run(main(json.loads(Path(sys.argv[1]).read_text())), loop="asyncio")
