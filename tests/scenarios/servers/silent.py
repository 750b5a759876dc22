"""A service on anyio or trio whose ``serve`` is called, and whose ``ready`` is not: in its body, or in another task.

It says what its own client saw.
"""

from __future__ import annotations

import logging
import os
import sys

import anyio

from ecdysis_async import Ecdysis


def tell(text: str) -> None:
    os.write(1, text.encode() + b"\n")


async def handle(stream: anyio.abc.SocketStream) -> None:
    async with stream:
        await stream.send(b"hello")


async def ask(ecdysis: Ecdysis, port: int) -> None:
    await ecdysis.settled.wait()
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        tell((await stream.receive()).decode())
    ecdysis.stop()


class Heard(logging.Handler):
    """Whether anything was said."""

    is_set = False

    def emit(self, record: logging.LogRecord) -> None:
        self.is_set = True


async def call_ready(ecdysis: Ecdysis) -> None:
    heard = Heard()
    logging.getLogger().addHandler(heard)
    while not heard.is_set:  # noqa: ASYNC110 - a log has no event
        await anyio.sleep(0.01)
    tell(str(ecdysis.state))
    await ecdysis.ready()


async def main() -> None:
    where = sys.argv[1]
    async with Ecdysis(systemd=False) as ecdysis, anyio.create_task_group() as task_group:
        sock = ecdysis.listen_tcp("127.0.0.1", 0)
        task_group.start_soon(ask, ecdysis, sock.getsockname()[1])
        if where == "body":
            await ecdysis.serve(handle, sock)
        else:
            task_group.start_soon(ecdysis.serve, handle, sock)
            await call_ready(ecdysis)


if __name__ == "__main__":
    logging.basicConfig(level="WARNING", stream=sys.stderr)
    anyio.run(main, backend=os.environ["LOOP"])
