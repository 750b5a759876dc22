"""A peer's pidfd, on every loop."""

from __future__ import annotations

import os
import socket
import subprocess

import anyio
import pytest

from ecdysis_async._ipc.channel import Channel, Frame
from ecdysis_async._ipc.peer import Death, Peer
from ecdysis_async.errors import ChannelClosed, ChannelError, GarbledFrame


async def test_a_replaced_pidfd_is_closed_only_when_nobody_waits_on_it() -> None:
    # Closed at once, its number went to the next connection, and the end of the wait took the reader of that one away:
    # under load uvloop raised, and asyncio let the connection hang.
    ours, theirs = socket.socketpair()
    wrapper, speaker = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    peer, other_end = Peer(Channel(ours), os.pidfd_open(wrapper.pid)), Channel(theirs)
    replaced = peer.pidfd
    delivered: list[Frame | ChannelError | Death] = []

    def deliver(item: Frame | ChannelError | Death) -> None:
        delivered.append(item)
        if isinstance(item, Frame):
            item.close()
            peer.watch(os.pidfd_open(speaker.pid))
            os.fstat(replaced)
            speaker.kill()

    try:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(peer.run, deliver)
                await anyio.wait_all_tasks_blocked()
                await other_end.send("hello")
    finally:
        for process in (wrapper, speaker):
            process.kill()
            process.wait()
    assert [type(item) for item in delivered] == [Frame, Death]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(replaced)
    peer.close()
    other_end.close()


async def test_behind_what_cannot_be_understood_a_sender_gets_all_of_it_back() -> None:
    # A predecessor whose word was garbled passed its connections on, waited for an answer, and lost them.
    ours, theirs = socket.socketpair()
    speaker = subprocess.Popen(["sleep", "60"])
    peer, other_end = Peer(Channel(ours), os.pidfd_open(speaker.pid)), Channel(theirs)
    delivered: list[Frame | ChannelError | Death] = []
    kept, passed_on = socket.socketpair()
    try:
        with kept, anyio.fail_after(60):
            theirs.send(b"\xff" * 64)
            with passed_on:
                await other_end.send("transfer", {}, [passed_on.fileno()])
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(peer.run, delivered.append)
                await anyio.wait_readable(kept)
                assert kept.recv(1) == b""
                with pytest.raises(ChannelClosed):
                    await other_end.send("progress")
                # The other direction goes on.
                await peer.channel.send("hurry")
                assert (await other_end.receive()).type == "hurry"
                speaker.kill()
    finally:
        speaker.kill()
        speaker.wait()
    assert [type(item) for item in delivered] == [GarbledFrame, Death]
    peer.channel.refuse()
    peer.close()
    peer.channel.refuse()
    other_end.close()
