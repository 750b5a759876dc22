"""A program with several servers, each on a port of its own: ``KIND:PORT:SECONDS`` for each, with what its start takes.

Once it serves, the first generation asks all of them, restarts, and asks all of them again; the second one then asks
them, and stops. What they answer is written to stdout. With ``MODE=cut``, the first generation asks all of them what
they never answer, restarts, and writes what was cut.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from typing import Any

import anyio
import anyio.to_thread

import ecdysis_async
from ecdysis_async import Ecdysis

# What was asked in vain.
hanging: list[str] = []


async def hang_if_asked(path: str) -> None:
    """Answer nothing where the path says so."""
    if "/slow" in path:
        hanging.append(path)
        await anyio.sleep_forever()


def make_application(seconds: float) -> Any:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await anyio.sleep(seconds)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await hang_if_asked(scope["path"])
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    return application


async def by_uvicorn(ecdysis: Ecdysis, port: int, seconds: float) -> None:
    import uvicorn

    from ecdysis_async.servers.uvicorn import serve

    await serve(ecdysis, uvicorn.Config(make_application(seconds), port=port, log_config=None))


async def by_hypercorn(ecdysis: Ecdysis, port: int, seconds: float) -> None:
    from hypercorn.config import Config

    from ecdysis_async.servers.hypercorn import serve

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    await serve(ecdysis, make_application(seconds), config)


async def by_aiohttp(ecdysis: Ecdysis, port: int, seconds: float) -> None:
    from aiohttp import web

    from ecdysis_async.servers.aiohttp import serve

    async def answer(request: web.Request) -> web.Response:
        await hang_if_asked(request.path)
        return web.Response()

    async def start(app: web.Application) -> None:
        await anyio.sleep(seconds)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    app.on_startup.append(start)
    await serve(ecdysis, app, host="127.0.0.1", port=port)


async def by_websockets(ecdysis: Ecdysis, port: int, seconds: float) -> None:
    from ecdysis_async.servers.websockets import serve

    async def echo(websocket: Any) -> None:
        await hang_if_asked(websocket.request.path)
        async for message in websocket:
            await websocket.send(message)

    await serve(ecdysis, echo, "127.0.0.1", port)


async def by_streams(ecdysis: Ecdysis, port: int, seconds: float) -> None:
    async def answer(reader: Any, writer: Any) -> None:
        await hang_if_asked((await reader.readline()).decode())
        writer.write(b"HTTP/1.1 200 own\r\n\r\n")
        writer.close()

    await ecdysis.start_server(answer, "127.0.0.1", port)


async def by_anyio(ecdysis: Ecdysis, port: int, seconds: float) -> None:
    async def answer(stream: Any) -> None:
        await hang_if_asked((await stream.receive()).decode())
        await stream.send(b"HTTP/1.1 200 own\r\n\r\n")

    await ecdysis.serve(answer, ecdysis.listen_tcp("127.0.0.1", port))


KINDS = {
    "uvicorn": by_uvicorn,
    "hypercorn": by_hypercorn,
    "aiohttp": by_aiohttp,
    "websockets": by_websockets,
    "streams": by_streams,
    "anyio": by_anyio,
}


def ask(port: int) -> str:
    """Ask one server, on a new connection, and return the status of its answer, or what went wrong."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return sock.recv(4096).split()[1].decode()
    except (OSError, IndexError) as error:
        return repr(error)


def tell(*words: object) -> None:
    """Write a line, in one piece: two generations write to one pipe."""
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


def ask_in_vain(port: int) -> socket.socket:
    """Ask one server what it never answers, and go on waiting."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.sendall(
        b"GET /slow?token=secret HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    return sock


async def be_cut(ecdysis: Ecdysis, ports: list[int]) -> None:
    """Ask all servers in vain, and write what was cut by a restart."""
    await ecdysis.settled.wait()
    if ecdysis.generation > 1:
        while ecdysis.draining_generations:  # noqa: ASYNC110 - there is no event for that
            await anyio.sleep(0.01)
        assert ecdysis.last_report is not None
        tell(json.dumps(ecdysis.last_report.to_json()["cut_requests"]))
        ecdysis.stop()
        return
    with contextlib.ExitStack() as stack:
        for number, port in enumerate(ports, 1):
            stack.enter_context(await anyio.to_thread.run_sync(ask_in_vain, port))
            while len(hanging) < number:  # noqa: ASYNC110 - servers set it that know no event of each other
                await anyio.sleep(0.01)
        report = await ecdysis.restart("drained")
    tell(json.dumps(report.cut_requests))


async def drive(ecdysis: Ecdysis, ports: list[int]) -> None:
    """Ask all servers before and after a restart, and end."""

    async def ask_all(when: str) -> None:
        answers = [await anyio.to_thread.run_sync(ask, port) for port in ports]
        tell(f"generation {ecdysis.generation}, {when}:", *answers)

    await ecdysis.settled.wait()
    await ask_all("serving")
    if ecdysis.generation == 1:
        report = await ecdysis.restart("settled")
        tell(report.outcome)
        await ask_all("settled")
    else:
        # The predecessor asks as well, while it drains.
        while ecdysis.draining_generations:  # noqa: ASYNC110 - there is no event for that
            await anyio.sleep(0.01)
        ecdysis.stop()


async def serve(ecdysis: Ecdysis) -> None:
    servers = [each.split(":") for each in os.environ["ARGUMENTS"].split()]
    ports = [int(port) for _, port, _ in servers]
    async with anyio.create_task_group() as task_group:
        for kind, port, seconds in servers:
            task_group.start_soon(KINDS[kind], ecdysis, int(port), float(seconds))
        task_group.start_soon(be_cut if os.environ.get("MODE") == "cut" else drive, ecdysis, ports)


async def main() -> None:
    timeout = float(os.environ.get("READY_TIMEOUT", "60"))
    async with Ecdysis(probation=0.1, drain_timeout=0.5, ready_timeout=timeout, systemd=False) as ecdysis:
        await serve(ecdysis)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr)
    if os.environ["LOOP"] == "trio":
        anyio.run(main, backend="trio")
    else:
        ecdysis_async.run(main, loop=os.environ["LOOP"])  # type: ignore[arg-type]
