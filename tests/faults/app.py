"""The service that is made to fail: it answers each line with who it is, and its connections move at a restart.

``main`` is what ``ecdysis run`` serves; run as a script, it is a service without an anchor. A file ``broken`` in the
working directory makes it a release that does not start, ``breaks-later`` one that starts once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import ecdysis_async
from ecdysis_async import Ecdysis, current
from ecdysis_async.transfer import Release, Transferable


class Lines(asyncio.Protocol, Transferable):
    """Answers a line with its process, its generation, and the number of the line on this connection."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self.received = (self.received + data).split(b"\n")
        for _ in lines:
            self.count += 1
            self.transport.write(b"%d %d %d\n" % (os.getpid(), current().generation, self.count))

    def release_connection(self) -> Release:
        return Release(self.count, self.received)


async def main(ecdysis: Ecdysis) -> None:
    """Be one generation, on as many ports as the file ``ports`` says."""
    if Path("broken").exists() and (ecdysis.generation > 1 or ecdysis.is_successor):
        raise RuntimeError("this release does not start")
    if Path("breaks-later").exists():
        try:
            Path("was-here").touch(exist_ok=False)
        except FileExistsError:
            raise RuntimeError("this release starts once only") from None
    for name in Path("ports").read_text(encoding="utf-8").split():
        server = await ecdysis.create_server(Lines, "127.0.0.1", 0, name=name, resume=Lines)
        (port,) = {each.getsockname()[1] for each in server.sockets}  # type: ignore[attr-defined] # asyncio.Server's
        Path(f"port.{name}").write_text(str(port), encoding="utf-8")
    await ecdysis.serve_forever()


async def be_alone() -> None:
    """Serve without an anchor."""
    _, control, probation, _ = sys.argv
    async with Ecdysis(
        control_socket=control, pid_file="pid", probation=float(probation), drain_timeout=60, exit_timeout=60
    ) as ecdysis:
        await main(ecdysis)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    ecdysis_async.run(be_alone, loop="uvloop" if sys.argv[3] == "uvloop" else "asyncio")
