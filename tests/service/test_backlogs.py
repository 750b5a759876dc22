"""Who waits in a queue when a generation stops accepting is answered, or left to those who go on with it."""

from __future__ import annotations

import socket
from pathlib import Path

import anyio

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gated_socket import AcceptingEnded, GatedSocket, accept_connection
from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._service.backlogs import Backlogs
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import Entry
from tests.planes import a_plane, connect


class Answering:
    """Answers each client of a socket with one byte."""

    def __init__(self, entry: Entry, plane: DataPlane) -> None:
        self.count = 0
        self._listener = GatedSocket(entry, plane=plane)
        assert plane.task_group is not None
        plane.task_group.start_soon(self._run)

    async def _run(self) -> None:
        try:
            while True:
                with await self._listener.take(accept_connection) as sock:
                    sock.send(b"!")
                    self.count += 1
        except AcceptingEnded:
            pass


async def open_gate(plane: DataPlane) -> None:
    """Open the gate, and return when a socket accepts."""
    await plane.gate.open()
    while not plane.gate.open_acceptors:
        await anyio.wait_all_tasks_blocked()


def listens(entry: Entry) -> bool:
    return bool(entry.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


async def answer(*, is_shared: bool) -> tuple[int, bool]:
    """Let three clients wait, and say how many were answered, and whether the socket still listens."""
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        entry.start_listening()
        answering = Answering(entry, plane)
        clients = [connect(entry) for _ in range(3)]
        try:
            with anyio.fail_after(60):
                await open_gate(plane)
                await Backlogs(plane, GenerationLog(1), 60, is_shared=is_shared).answer()
                while answering.count < len(clients):
                    await anyio.wait_all_tasks_blocked()
            assert not plane.gate.open_acceptors
            return answering.count, listens(entry)
        finally:
            for client in clients:
                client.close()


async def test_the_last_generation_answers_all_and_listens_no_more(backend: str) -> None:
    assert await answer(is_shared=False) == (3, False)


async def test_where_others_have_the_socket_it_goes_on_listening(backend: str) -> None:
    assert await answer(is_shared=True) == (3, True)


async def test_in_a_hurry_nobody_is_waited_for(backend: str) -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Internet("127.0.0.1", 0))
        entry.start_listening()
        # No process takes its clients.
        listener = GatedSocket(entry, plane=plane)
        with connect(entry), anyio.fail_after(60):
            await plane.gate.open()
            plane.tracker.hurry()
            await Backlogs(plane, GenerationLog(1), 600, is_shared=False).empty(plane.gate.acceptors)
        await listener.aclose()


async def test_what_a_successor_does_not_claim_is_answered_and_closed(backend: str, tmp_path: Path) -> None:
    async with a_plane() as plane:
        entry = plane.registry.obtain(Unix(str(tmp_path / "unclaimed")))
        other = plane.registry.obtain(Unix(str(tmp_path / "claimed")))
        for each in (entry, other):
            each.start_listening()
        answering = Answering(entry, plane)
        with connect(entry) as client, anyio.fail_after(60):
            await open_gate(plane)
            await Backlogs(plane, GenerationLog(1), 60, is_shared=False).finish([entry])
            while not answering.count:
                await anyio.wait_all_tasks_blocked()
            assert client.recv(1) == b"!"
        assert plane.registry.entries == (other,)
        assert not (tmp_path / "unclaimed").exists()
        assert (tmp_path / "claimed").exists()
        # The application may have been faster.
        await Backlogs(plane, GenerationLog(1), 60, is_shared=False).finish([entry])
