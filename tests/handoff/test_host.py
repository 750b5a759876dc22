"""What a predecessor asks of the generation that it is a part of."""

from __future__ import annotations

import socket

import anyio

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import Gate
from ecdysis_async._accepting.gated_socket import AcceptingEnded, GatedSocket, accept_connection
from ecdysis_async._connections.connection import Connection
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._handoff.host import AcceptingHost
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.registry import Registry


async def test_a_generation_pauses_and_resumes_and_counts_what_it_has(backend: str) -> None:
    registry, gate, tracker = Registry(), Gate(), Tracker()
    plane = DataPlane(registry, gate, tracker)
    host = AcceptingHost(plane)
    entry = registry.obtain(Internet("127.0.0.1", 0))
    taken: list[socket.socket] = []

    async def accept() -> None:
        listener = GatedSocket(entry, plane=plane)
        try:
            while True:
                taken.append(await listener.take(accept_connection))
        except AcceptingEnded:
            ended.set()

    ended = anyio.Event()
    try:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                entry.start_listening()
                task_group.start_soon(accept)
                await host.resume()
                with await anyio.to_thread.run_sync(socket.create_connection, entry.sock.getsockname()):
                    while not taken:
                        await anyio.wait_all_tasks_blocked()
                    await host.pause(lambda entry: False)
                    assert not gate.open_acceptors
                    await host.pause(lambda entry: False)
                    await host.resume()
                    assert len(gate.open_acceptors) == 1
                await gate.end()
                await ended.wait()
    finally:
        for sock in taken:
            sock.close()
        registry.close(unlink=True)
    connection = Connection()
    tracker.open(connection)
    assert host.connections == 1
    tracker.close(connection)
    host.hurry()
    assert tracker.is_hurried
