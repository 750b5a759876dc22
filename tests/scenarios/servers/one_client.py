"""A service by the adapter of one server, and its client in a thread: what tests of a drain run as programs."""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import ecdysis_async
from tests.scenarios.servers.harness import PATIENCE_SECONDS, PROJECT

__all__ = ["live", "run", "run_program"]

Client = Callable[[int, Callable[..., object], ecdysis_async.Ecdysis], None]


def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the text of a program to its end, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


async def live(receive: Any, send: Any) -> None:
    """Be the lifespan of an ASGI application that has none."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


def run(
    loop: str,
    kind: str,
    client: Client,
    *,
    asgi: Any,
    aiohttp: Any,
    websockets: Any = None,
    drain_timeout: float = 30.0,
) -> None:
    """Serve until the client has ended.

    Args:
        loop: asyncio, uvloop or trio.
        kind: the server; an option of uvicorn's may follow, as in "uvicorn http=h11".
        client: run in a thread once the service serves, with its port, what calls something on the loop, and the
            ``Ecdysis``.
        asgi: the application.
        aiohttp: the handler of each path, in its place.
        websockets: the handler, in its place.
        drain_timeout: of the service, seconds.
    """
    main = functools.partial(_main, kind, client, (asgi, aiohttp, websockets), drain_timeout)
    if loop == "trio":
        import trio

        trio.run(main)
    else:
        ecdysis_async.run(main, loop=loop)  # type: ignore[arg-type] # one of two here


async def _main(kind: str, client: Client, served: tuple[Any, Any, Any], drain_timeout: float) -> None:
    async with ecdysis_async.Ecdysis(drain_timeout=drain_timeout) as ecdysis:
        sock = ecdysis.listen_tcp("127.0.0.1", 0)
        call = _find_call()

        def begin_when_serving() -> None:
            while ecdysis.state is not ecdysis_async.State.SERVING:
                threading.Event().wait(0.01)
            try:
                client(sock.getsockname()[1], call, ecdysis)
            finally:
                call(ecdysis.stop)

        threading.Thread(target=begin_when_serving, daemon=True).start()
        await _serve(kind, ecdysis, sock, *served)


def _find_call() -> Callable[..., object]:
    """Return what calls a function on the running loop, from a thread."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        call: Callable[..., object] = trio.lowlevel.current_trio_token().run_sync_soon
        return call
    return asyncio.get_running_loop().call_soon_threadsafe


async def _serve(
    kind: str, ecdysis: ecdysis_async.Ecdysis, sock: socket.socket, asgi: Any, aiohttp: Any, websockets: Any
) -> None:
    name, _, option = kind.partition(" ")
    # The others need not be there, and are not loaded.
    adapter = importlib.import_module(f"ecdysis_async.servers.{name}")
    if name == "uvicorn":
        import uvicorn

        options: Any = dict([option.split("=")])
        await adapter.serve(ecdysis, uvicorn.Config(asgi, log_config=None, **options), [sock])
    elif name == "hypercorn":
        from hypercorn.config import Config

        config = Config()
        config.errorlog = None
        await adapter.serve(ecdysis, asgi, config, [sock])
    elif name == "aiohttp":
        from aiohttp import web

        application = web.Application()
        application.router.add_get("/{path:.*}", aiohttp)
        await adapter.serve(ecdysis, application, sock=sock, access_log=None)
    else:
        await adapter.serve(ecdysis, websockets, socks=[sock], compression=None)
