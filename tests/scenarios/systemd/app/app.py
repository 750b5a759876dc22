"""What ``ecdysis run`` serves in the tests of systemd and of containers: answers to lines, where the variable says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import Any

from ecdysis_async import Ecdysis


async def main(ecdysis: Ecdysis) -> None:
    """Run one worker. ``ADDRESS`` is where it listens, a path or HOST:PORT; with ``BROKEN`` it does not start."""
    if os.environ.get("BROKEN"):
        raise ValueError("a broken release")

    def answer(words: list[str]) -> Any:
        facts = {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "uid": os.geteuid(),
            "generation": ecdysis.generation,
            "release": os.path.realpath(__file__),
        }
        return facts if words == ["who"] else " ".join(words)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            try:
                while line := await reader.readline():
                    words = line.decode().split()
                    if words[:1] == ["slow"]:
                        await asyncio.sleep(float(words[1]))
                    if words[:1] == ["write"]:
                        try:
                            with open(words[1].replace("$STATE", os.environ["STATE_DIRECTORY"]), "w") as file:
                                words = ["written", file.name]
                        except OSError as error:
                            words = ["failed", str(error.strerror)]
                    if words[:1] == ["orphan"]:
                        # Its parent has gone by the time it ends, and whoever is PID 1 has to reap it.
                        process = await asyncio.create_subprocess_shell("sleep 0.2 & echo $!", stdout=-1)
                        assert process.stdout is not None
                        words = ["orphan", (await process.stdout.readline()).decode().strip()]
                        await process.wait()
                    is_leaving = ecdysis.draining.is_set()
                    reply = json.dumps(answer(words)) if words == ["who"] else f"{ecdysis.generation} {words[-1]}"
                    writer.write(f"{reply}{' bye' if is_leaving else ''}\n".encode())
                    await writer.drain()
                    if is_leaving:
                        break
            finally:
                writer.close()

    address = os.environ["ADDRESS"]
    if address.startswith("/"):
        await ecdysis.start_unix_server(handle, address)
    else:
        host, _, port = address.rpartition(":")
        await ecdysis.start_server(handle, host, int(port))
    await ecdysis.serve_forever()
