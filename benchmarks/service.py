"""A line service on any of the loops, as real as a service can be that fits on a page: what the demo restarts.

It answers ``echo TEXT``, ``slow SECONDS TEXT`` and ``restart``, each with the number of its generation before it. Once
a generation leaves, its answers end in ``bye`` and it closes behind them. What each generation has to say of itself
goes to stdout, one line of JSON each. Nothing here measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio

import ecdysis_async
from ecdysis_async import DrainInterrupt, Ecdysis, RestartError

LOOPS = ("asyncio", "uvloop", "anyio", "trio")


async def converse(
    ecdysis: Ecdysis, read_line: Callable[[], Awaitable[bytes]], send: Callable[[bytes], Awaitable[object]]
) -> None:
    """Serve one connection until its client has enough, or until this generation leaves."""
    while True:
        try:
            line = await ecdysis.until_draining(read_line())
        except DrainInterrupt:
            await send(b"bye\n")
            return
        if not line:
            return
        answer = await answer_to(ecdysis, line.decode().rstrip("\n"))
        is_leaving = ecdysis.draining.is_set()
        await send(f"{ecdysis.generation} {answer}{' bye' if is_leaving else ''}\n".encode())
        if is_leaving:
            return


async def answer_to(ecdysis: Ecdysis, line: str) -> str:
    """Do what a line asks for."""
    match line.split(" "):
        case ["echo", text]:
            return text
        case ["slow", seconds, text]:
            await anyio.sleep(float(seconds))
            return text
        case ["restart"]:
            try:
                report = await ecdysis.restart(until="settled")
            except RestartError as error:
                return json.dumps({"error": str(error)})
            return json.dumps(report.to_json())
    return "what?"


async def serve_streams(ecdysis: Ecdysis, port: int) -> None:
    """Serve on asyncio or uvloop."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            await converse(ecdysis, reader.readline, send)
        finally:
            writer.close()

    sock = ecdysis.listen_tcp("127.0.0.1", port)
    await ecdysis.start_server(handle, sock=sock)
    await announce(ecdysis, sock.getsockname()[1])
    await ecdysis.finished()


async def serve_anyio(ecdysis: Ecdysis, port: int) -> None:
    """Serve by anyio, on either of its backends."""

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async def receive() -> bytes:
            try:
                return await stream.receive()
            except anyio.EndOfStream:
                return b""

        await converse(ecdysis, Lines(receive).read, stream.send)

    sock = ecdysis.listen_tcp("127.0.0.1", port)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(ecdysis.serve, handle, sock)
        await announce(ecdysis, sock.getsockname()[1])


async def serve_trio(ecdysis: Ecdysis, port: int) -> None:
    """Serve by trio alone."""
    import trio

    from ecdysis_async.trio_listeners import TrioListener

    async def handle(stream: trio.SocketStream) -> None:
        await converse(ecdysis, Lines(stream.receive_some).read, stream.send_all)

    sock = ecdysis.listen_tcp("127.0.0.1", port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ecdysis.serve, handle, TrioListener(sock))
        await announce(ecdysis, sock.getsockname()[1])


class Lines:
    """Lines of a stream that knows only pieces; a cancelled read loses nothing."""

    def __init__(self, receive: Callable[[], Awaitable[bytes | bytearray]]) -> None:
        self._receive = receive
        self._rest = b""

    async def read(self) -> bytes:
        """Return the next line, or what there is of it at the end of the stream."""
        while b"\n" not in self._rest:
            piece = await self._receive()
            if not piece:
                break
            self._rest += piece
        line, newline, self._rest = self._rest.partition(b"\n")
        return line + newline


async def announce(ecdysis: Ecdysis, port: int) -> None:
    """Begin to serve, and say so."""
    await ecdysis.ready()
    tell({"event": "serving", "generation": ecdysis.generation, "pid": os.getpid(), "port": port})


def tell(fact: dict[str, Any]) -> None:
    """Write a line for whoever has started the service. Far less than a pipe holds, so it does not block the loop."""
    # In one piece: with PYTHONUNBUFFERED print writes the end of the line by itself, after what another generation
    # writes into the same pipe in that moment.
    sys.stdout.write(json.dumps(fact) + "\n")
    sys.stdout.flush()


async def main(loop: str, port: int, probation: float, drain_timeout: float, max_draining: int) -> None:
    """Run one generation from its beginning to its end."""
    serve = {"anyio": serve_anyio, "trio": serve_trio}.get(loop, serve_streams)
    async with Ecdysis(probation=probation, drain_timeout=drain_timeout, max_draining=max_draining) as ecdysis:
        await serve(ecdysis, port)
    report = ecdysis.last_report
    is_ours = report is not None and report.predecessor_pid == os.getpid()
    tell(
        {
            "event": "left",
            "generation": ecdysis.generation,
            "report": report.to_json() if report is not None and is_ours else None,
        }
    )


def run() -> None:
    """Read the command line, which every generation shares, and run on the loop that it names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--probation", type=float, default=0.5)
    parser.add_argument("--drain-timeout", type=float, default=4.0)
    parser.add_argument("--max-draining", type=int, default=3)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    service = partial(
        main, arguments.loop, arguments.port, arguments.probation, arguments.drain_timeout, arguments.max_draining
    )
    match arguments.loop:
        case "anyio" | "trio" as loop:
            anyio.run(service, backend="trio" if loop == "trio" else "asyncio")
        case loop:
            ecdysis_async.run(service, loop=loop)


if __name__ == "__main__":
    run()
