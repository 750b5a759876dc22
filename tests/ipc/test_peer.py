"""A peer's pidfd, on every loop."""

from __future__ import annotations

import os
import socket
import subprocess

import anyio
import pytest

from ecdysis_async._ipc.channel import Channel, Frame
from ecdysis_async._ipc.peer import Death, Peer
from ecdysis_async.errors import ChannelError


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
