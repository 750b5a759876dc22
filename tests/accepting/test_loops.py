"""Gated loops: what asks them for a server gets one behind the gate, while there is a plane on that loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from ecdysis_async._accepting.asyncio_connections import ServerConnection
from ecdysis_async._accepting.asyncio_datagrams import DatagramEndpoint
from ecdysis_async._accepting.asyncio_servers import GatedServer, start_server
from ecdysis_async._accepting.data_plane import DataPlane, activate, active, deactivate
from ecdysis_async._accepting.loops import LoopName, loop_factory, run
from ecdysis_async._connections.connection import current_connection
from tests.planes import a_plane, turn

LOCALHOST = "127.0.0.1"


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> LoopName:
    name: LoopName = request.param
    return name


@contextlib.asynccontextmanager
async def an_active_plane() -> AsyncIterator[DataPlane]:
    async with a_plane() as plane:
        activate(plane)
        try:
            yield plane
            while plane.tracker.connections():
                await turn()
            await turn()
        finally:
            deactivate()


async def ask(address: Any) -> bytes:
    """Connect, ask, and return the answer."""
    if isinstance(address, str):
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        reader, writer = await asyncio.open_connection(*address)
    writer.write(b"?\n")
    answer = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return answer


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())
    writer.close()


def test_run_returns_the_result_and_names_its_loops(loop: LoopName) -> None:
    async def main() -> tuple[bool, bool]:
        running = asyncio.get_running_loop()
        return isinstance(running, uvloop.Loop), running.get_debug()

    assert run(main, loop=loop, debug=True) == (loop == "uvloop", True)
    assert run(main(), loop=loop) == (loop == "uvloop", False)


def test_auto_takes_uvloop_where_it_is_installed() -> None:
    async def main() -> bool:
        return isinstance(asyncio.get_running_loop(), uvloop.Loop)

    assert run(main)
    assert isinstance(loop_factory("auto"), type)


def test_without_uvloop_auto_is_asyncio_and_uvloop_an_error_with_a_remedy() -> None:
    script = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
# As if it were not installed.
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "uvloop":
            raise ModuleNotFoundError(name=name)
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "uvloop" else find_spec(name)
sys.meta_path.insert(0, Hide())
from ecdysis_async._accepting.loops import run

async def main():
    assert isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop)

run(main)
try:
    run(main, loop="uvloop")
except ModuleNotFoundError as error:
    print(error)
"""
    project = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", script, project], capture_output=True, text=True, check=True)
    assert "pip install" in done.stdout


def test_an_unknown_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="auto"):
        loop_factory("quickest")  # type: ignore[arg-type]


def test_servers_that_ask_the_loop_are_gated(loop: LoopName) -> None:
    async def main() -> None:
        async with an_active_plane() as plane:
            server = await asyncio.start_server(answer, LOCALHOST, 0)
            assert isinstance(server, GatedServer)
            assert not server.is_serving()
            await plane.gate.open()
            assert await ask(server.sockets[0].getsockname()) == b"?\n"
            assert plane.tracker.opened == 1

    run(main, loop=loop)


def test_unix_servers_that_ask_the_loop_are_gated(loop: LoopName, tmp_path: Path) -> None:
    async def main() -> None:
        async with an_active_plane() as plane:
            server = await asyncio.start_unix_server(answer, tmp_path / "socket")
            assert isinstance(server, GatedServer)
            await plane.gate.open()
            assert await ask(str(tmp_path / "socket")) == b"?\n"
            assert plane.tracker.opened == 1

    run(main, loop=loop)


def test_datagram_services_are_gated_and_clients_are_not(loop: LoopName) -> None:
    async def main() -> None:
        async with an_active_plane() as plane:
            create = asyncio.get_running_loop().create_datagram_endpoint
            client, _ = await create(asyncio.DatagramProtocol, (LOCALHOST, 0))
            assert not isinstance(client, DatagramEndpoint)
            port = client.get_extra_info("sockname")[1]
            client.close()
            await turn()
            service, _ = await create(asyncio.DatagramProtocol, (LOCALHOST, port))
            assert isinstance(service, DatagramEndpoint)
            await plane.gate.open()
            service.close()
            await turn()
            connected, _ = await create(asyncio.DatagramProtocol, None, (LOCALHOST, port))
            assert not isinstance(connected, DatagramEndpoint)
            connected.close()
            await turn()

    run(main, loop=loop)


def test_our_own_servers_pass_the_gate_once(loop: LoopName) -> None:
    async def main() -> None:
        async with an_active_plane() as plane:
            seen: list[object] = []

            async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                seen.append(current_connection.get())
                await answer(reader, writer)

            server = await start_server(plane, handle, LOCALHOST, 0)
            await plane.gate.open()
            assert await ask(server.sockets[0].getsockname()) == b"?\n"
            assert (plane.tracker.opened, len(plane.gate.acceptors), len(plane.registry.entries)) == (1, 1, 1)
            assert isinstance(seen[0], ServerConnection)

    run(main, loop=loop)


def test_without_a_plane_the_loop_is_as_it_was(loop: LoopName, tmp_path: Path) -> None:
    async def main() -> None:
        for server in (
            await asyncio.start_server(answer, LOCALHOST, 0),
            await asyncio.start_unix_server(answer, tmp_path / "socket"),
        ):
            assert not isinstance(server, GatedServer)
            assert await ask(server.sockets[0].getsockname()) == b"?\n"
            server.close()
            await server.wait_closed()
        endpoint, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            asyncio.DatagramProtocol, (LOCALHOST, 0)
        )
        assert not isinstance(endpoint, DatagramEndpoint)
        endpoint.close()
        await turn()

    run(main, loop=loop)


def test_the_loop_of_another_thread_is_left_alone(loop: LoopName) -> None:
    outcome: list[object] = []

    async def elsewhere() -> None:
        with pytest.raises(LookupError, match="another event loop"):
            active()
        server = await asyncio.start_server(answer, LOCALHOST, 0)
        outcome.append(isinstance(server, GatedServer))
        server.close()
        await server.wait_closed()

    async def main() -> None:
        async with an_active_plane() as plane:
            assert active() is plane
            thread = threading.Thread(target=run, args=(elsewhere,), kwargs={"loop": loop})
            thread.start()
            await asyncio.to_thread(thread.join)
            assert plane.gate.acceptors == ()

    run(main, loop=loop)
    assert outcome == [False]


def test_no_loop_at_all_has_no_plane(loop: LoopName) -> None:
    async def main() -> None:
        async with an_active_plane():
            with pytest.raises(LookupError, match="another event loop"):
                await asyncio.to_thread(active)

    run(main, loop=loop)
    with pytest.raises(LookupError, match="async with Ecdysis"):
        active()


def test_a_given_socket_reaches_the_registry(loop: LoopName) -> None:
    async def main() -> None:
        async with an_active_plane() as plane:
            listener = socket.create_server((LOCALHOST, 0))
            server = await asyncio.get_running_loop().create_server(asyncio.Protocol, sock=listener)
            assert isinstance(server, GatedServer)
            assert len(plane.registry.entries) == 1

    run(main, loop=loop)
