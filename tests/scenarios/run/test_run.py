"""``ecdysis run``: every server, and every loop, starts, restarts under load without a failure, and stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.scenarios.run.harness import HERE, Run, by_tcp, loading, running, visiting_echo, visiting_http

pytestmark = pytest.mark.main_python_only

ASGI, AIOHTTP = ("apps:asgi",), ("apps:make_aiohttp", "--factory")
NORMAL, RESTARTING = 1000, 1012

Visit = Callable[[], Coroutine[Any, Any, None]]


@pytest.mark.parametrize(
    ("target", "server", "loop"),
    [
        # Each server on each loop is in tests/scenarios/servers.
        (ASGI, "uvicorn", "asyncio"),
        (ASGI, "hypercorn", "trio"),
        (AIOHTTP, "aiohttp", "uvloop"),
        (("apps:echo",), "websockets", "uvloop"),
        (("apps:main",), "main", "asyncio"),
        (("apps:main_on_trio",), "main", "trio"),
    ],
)
def test_restarts_under_load(target: tuple[str, ...], server: str, loop: str, tmp_path: Path) -> None:
    arguments = (*target, "--app-dir", str(HERE), "--port", "0", "--server", server, "--loop", loop)

    async def test() -> None:
        async with running(tmp_path, *arguments, "--no-access-log") as run:
            port = await run.find_port()
            visit = {"main": visiting_echo(by_tcp(port)), "websockets": visiting_websocket(port)}.get(server)
            async with loading(visit or visiting_http(by_tcp(port))):
                await restart_twice(run)
            await run.wait_for(rf"serving on .*: {target[0]} by {server}.* on {loop}")

    asyncio.run(test())


async def restart_twice(run: Run) -> None:
    """Restart by the command, and by a signal."""
    code, output = await run.restart()
    assert code == 0, output
    run.signal(signal.SIGHUP)
    id = await run.wait_for(r"restart (\w+)\] the restart is settled: generation 3")
    await run.wait_for(rf"restart {id}\] the former workers have drained")


def visiting_websocket(port: int) -> Visit:
    """Return a visit that talks until it is asked to come back."""

    async def visit() -> None:
        async with connect(f"ws://127.0.0.1:{port}") as websocket:
            with contextlib.suppress(ConnectionClosed):
                for _ in range(50):
                    await websocket.send("hello")
                    assert await websocket.recv() == "hello"
                    await asyncio.sleep(0.01)
        assert websocket.close_code in (NORMAL, RESTARTING), websocket.close_code

    return visit


def test_a_websocket_that_was_accepted_opens_during_the_drain(tmp_path: Path) -> None:
    arguments = ("apps:echo", "--app-dir", str(HERE), "--port", "0", "--server", "websockets", "--loop", "asyncio")
    # Neither a restart on a busy machine nor the drain ends what has not said anything.
    patience = ("--drain-timeout", "60", "--server-option", "open_timeout=60")

    async def test() -> None:
        async with running(tmp_path, *arguments, *patience) as run:
            port = await run.find_port()
            with socket.create_connection(("127.0.0.1", port)) as silent:
                # Accepted after that one, and so is it.
                async with connect(f"ws://127.0.0.1:{port}") as websocket:
                    await websocket.send("hello")
                    assert await websocket.recv() == "hello"
                code, output = await run.restart()
                assert code == 0, output
                # Its server no longer accepts, and websockets' own would refuse it.
                async with connect(f"ws://127.0.0.1:{port}", sock=silent) as websocket:
                    await websocket.send("hello")
                    assert await websocket.recv() == "hello"
                # Both have ended, and nothing is waited for.
                await run.wait_for(
                    r"the former workers have drained in .* s: [1-9]\d* drained, 0 silent, \d+ \w+, 0 cut"
                )

    asyncio.run(test())
