"""Older generations that are followed, or no more."""

from __future__ import annotations

import os
import resource
import socket

import anyio
import pytest

from ecdysis_async.channel import Channel, Frame
from ecdysis_async.lineage import Ancestor, Lineage
from ecdysis_async.peer import Peer
from ecdysis_async.protocol import Farewell


async def test_what_is_let_go_before_it_is_followed_keeps_nobody_waiting(backend: str) -> None:
    ours, theirs = socket.socketpair()
    lineage = Lineage()
    lineage.ancestors.append(Ancestor(1, os.getpid(), Peer(Channel(ours), os.pidfd_open(os.getpid()))))
    try:
        with anyio.fail_after(60):
            told = await lineage.let_go()
            await lineage.follow(3)
            assert await lineage.let_go() == told == [{"pid": os.getpid(), "pending": ""}]
            await lineage.outlive()
    finally:
        lineage.close()
        theirs.close()


async def test_a_following_that_is_cancelled_keeps_nobody_waiting(backend: str) -> None:
    ours, theirs = socket.socketpair()
    lineage = Lineage()
    lineage.ancestors.append(Ancestor(1, os.getpid(), Peer(Channel(ours), os.pidfd_open(os.getpid()))))
    try:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(lineage.follow, 3)
                await anyio.wait_all_tasks_blocked()
                task_group.cancel_scope.cancel()
            await lineage.outlive()
            await lineage.let_go()
    finally:
        lineage.close()
        theirs.close()


async def test_log_files_that_moved_before_it_is_followed_are_told_of_then(backend: str) -> None:
    ours, theirs = socket.socketpair()
    lineage, heard = Lineage(), Channel(theirs)
    lineage.ancestors.append(Ancestor(1, os.getpid(), Peer(Channel(ours), os.pidfd_open(os.getpid()))))
    try:
        with anyio.fail_after(60):
            await lineage.reopen_logs()
            assert heard.receive_nowait() is None
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(lineage.follow, 3)
                assert (await heard.receive()).type == Farewell.REOPEN_LOGS
                await lineage.reopen_logs()
                assert (await heard.receive()).type == Farewell.REOPEN_LOGS
                await lineage.let_go()
            # Now a newer generation is the one to tell them.
            await lineage.reopen_logs()
            assert heard.receive_nowait() is None
    finally:
        lineage.close()
        heard.close()


@pytest.mark.backends("asyncio")
async def test_the_way_of_connections_is_taken_over_where_no_descriptor_is_left(backend: str) -> None:
    # A duplicate was made of it: at the limit the newest generation died of that, in the middle of its service.
    ours, theirs = socket.socketpair()
    taken: list[socket.socket] = []
    lineage = Lineage()
    lineage.on_transfer = taken.append
    ancestor = Ancestor(1, os.getpid(), Peer(Channel(ours), os.pidfd_open(os.getpid())))
    frame = Frame(Farewell.TRANSFER, {}, (theirs.detach(), os.dup(ours.fileno())))
    expected = frame.descriptors[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.pipe()
        lineage.deliver(ancestor, frame)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        ancestor.peer.close()
    (sock,) = taken
    with sock:
        assert sock.fileno() == expected
