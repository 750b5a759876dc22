"""A server that makes one mistake, of the kind that the path asks for, with some of its answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

from ecdysis_async._proving.plan import Url
from ecdysis_async._proving.settings import REQUEST_HEADER

HOST = "127.0.0.1"

# Every so many answers one is wrong.
PERIOD = 5

# Requests of somebody else.
OTHERS = 1_000_000


class FaultyServer:
    """What counts its answers and its mistakes.

    Attributes:
        mistakes: how many it has made.
    """

    def __init__(self) -> None:
        self.mistakes = 0
        self._answers = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes on one connection."""
        try:
            while await self._answer(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has left
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; say whether another may follow."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        path = head[0].split()[1].strip("/")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        await reader.readexactly(int(headers.get("content-length", "0")))
        request = headers[REQUEST_HEADER]
        answer = f"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n{REQUEST_HEADER}: {request}\r\n\r\nhello".encode()
        self._answers += 1
        is_wrong = path != "right" and self._answers % PERIOD == 0
        self.mistakes += is_wrong
        match path if is_wrong else "right":
            case "twice":
                writer.write(answer + answer)
            case "late":  # the second one follows by itself
                writer.write(answer)
                await asyncio.sleep(0.003)
                writer.write(answer)
            case "swapped":
                other = int(request) + OTHERS
                writer.write(
                    answer.replace(f"{REQUEST_HEADER}: {request}".encode(), f"{REQUEST_HEADER}: {other}".encode())
                )
            case "short":
                writer.write(answer[:-2])
                return False
            case "reset":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return False
            case "nothing":
                return False
            case "never":
                await reader.read()
                return False
            case "noise":
                writer.write(b"hello, who is there?\r\n\r\n")
            case "error":
                writer.write(answer.replace(b"200 OK", b"503 Busy"))
            case "closing":  # right, but the connection ends without a word of it
                writer.write(answer)
                return False
            case "goodbye":  # right, and announced
                writer.write(answer.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
                return False
            case _:
                writer.write(answer)
        return True


@contextlib.asynccontextmanager
async def faulty_server() -> AsyncIterator[tuple[FaultyServer, Url]]:
    """Serve on a port of its own."""
    faulty = FaultyServer()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await faulty.serve(reader, writer)
        tasks.discard(task)

    server = await asyncio.start_server(serve, HOST, 0)
    try:
        yield faulty, Url("http", HOST, server.sockets[0].getsockname()[1])
    finally:
        server.close()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
