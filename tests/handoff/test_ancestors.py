"""Older generations that are followed, or no more."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
from collections.abc import Iterator

import anyio
import pytest

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import Gate
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._handoff.ancestors import STOPPED, Ancestor, Ancestors
from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.host import AcceptingHost
from ecdysis_async._handoff.protocol import DrainMessage, FromPredecessor, SuccessorState
from ecdysis_async._handoff.successor import SuccessorSide
from ecdysis_async._ipc.channel import Channel, Frame
from ecdysis_async._ipc.peer import Peer
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.settings import Settings


async def test_what_is_let_go_before_it_is_followed_keeps_nobody_waiting(backend: str) -> None:
    ours, theirs = socket.socketpair()
    lineage = Ancestors()
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
    lineage = Ancestors()
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
    lineage, heard = Ancestors(), Channel(theirs)
    lineage.ancestors.append(Ancestor(1, os.getpid(), Peer(Channel(ours), os.pidfd_open(os.getpid()))))
    try:
        with anyio.fail_after(60):
            await lineage.reopen_logs()
            assert heard.receive_nowait() is None
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(lineage.follow, 3)
                assert (await heard.receive()).type == DrainMessage.REOPEN_LOGS
                await lineage.reopen_logs()
                assert (await heard.receive()).type == DrainMessage.REOPEN_LOGS
                await lineage.let_go()
            # Now a newer generation is the one to tell them.
            await lineage.reopen_logs()
            assert heard.receive_nowait() is None
    finally:
        lineage.close()
        heard.close()


async def test_who_was_to_hurry_before_it_is_followed_is_told_then(backend: str) -> None:
    ours, theirs = socket.socketpair()
    lineage, heard = Ancestors(), Channel(theirs)
    lineage.ancestors.append(Ancestor(1, os.getpid(), Peer(Channel(ours), os.pidfd_open(os.getpid()))))
    try:
        with anyio.fail_after(60):
            await lineage.hurry()
            assert heard.receive_nowait() is None
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(lineage.follow, 3)
                frame = await heard.receive()
                assert (frame.type, frame.body) == (DrainMessage.HURRY, {"why": STOPPED})
                await lineage.hurry()
                assert (await heard.receive()).type == DrainMessage.HURRY
                await lineage.let_go()
            await lineage.hurry()
            assert heard.receive_nowait() is None
    finally:
        lineage.close()
        heard.close()


@pytest.mark.backends("asyncio")
@pytest.mark.parametrize("strange", [{"jobs": None}, {"connections": "many"}, {"serving": 3}, {"ends_in": "soon"}])
async def test_another_releases_idea_of_a_drain_is_no_harm(
    backend: str, strange: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    lineage = Ancestors()
    ancestor = Ancestor(1, os.getpid(), Peer(Channel(ours), os.pidfd_open(os.getpid())))
    lineage.ancestors.append(ancestor)
    with theirs:
        lineage.deliver(ancestor, Frame(DrainMessage.PROGRESS, {"connections": 2, **strange}))
        assert "how generation 1 drains cannot be read" in caplog.text
        lineage.deliver(ancestor, Frame(DrainMessage.PROGRESS, {"connections": 1, "of a later release": [1]}))
        assert ancestor.connections == 1
        lineage.close()


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Be at the limit; not below it, where poll(2) fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("dies", [False, True])
async def test_what_follows_a_lost_way_of_connections_is_heard(
    backend: str, dies: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # Nothing was, from then on: systemd's main process was one that left, and the drain of it had no end in any status.
    ours, theirs = socket.socketpair()
    speaker = subprocess.Popen(["sleep", "60"])
    lineage, other_end = Ancestors(), Channel(theirs)
    ancestor = Ancestor(1, speaker.pid, Peer(Channel(ours), os.pidfd_open(speaker.pid)))
    lineage.ancestors.append(ancestor)
    heard: list[int | None] = []
    lineage.on_drained = lambda ancestor, body: heard.append(ancestor.connections)

    def note_main(ancestor: Ancestor) -> None:
        heard.append(ancestor.connections)
        speaker.kill()

    lineage.on_main = note_main
    try:
        with anyio.fail_after(60):
            await other_end.send(DrainMessage.TRANSFER, {}, [theirs.fileno()])
            await other_end.send(DrainMessage.PROGRESS, {"connections": 7})
            await other_end.send(DrainMessage.MAIN)
            await other_end.send(DrainMessage.DRAINED)
            if dies:
                speaker.kill()
                os.waitid(os.P_PID, speaker.pid, os.WEXITED | os.WNOWAIT)
            with no_descriptor_left():
                await lineage.follow(3)
    finally:
        speaker.kill()
        speaker.wait()
        lineage.close()
        other_end.close()
    # MAIN, DRAINED, and the death.
    assert heard == [7, 0, 0]
    assert f"generation 1 (pid {speaker.pid}) keeps what it was to pass on" in caplog.text
    assert "LimitNOFILE=" in caplog.text


async def test_a_lost_way_of_connections_keeps_no_successor_from_settling(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    other_end = Channel(theirs)
    plane = DataPlane(Registry(), Gate(), Tracker())
    generation = Generation(2, Settings(), AcceptingHost(plane), GenerationLog(2))
    inheritance = SuccessorSide(ours, generation, plane, lambda side: None, is_child=False)
    ancestor = Ancestor(1, os.getpid(), Peer(inheritance._channel, os.pidfd_open(os.getpid())))
    inheritance.predecessor, inheritance.state = ancestor, SuccessorState.PROBATION
    try:
        with anyio.fail_after(60):
            await other_end.send(DrainMessage.TRANSFER, {}, [theirs.fileno()])
            await other_end.send(FromPredecessor.SETTLED, {"ancestors": [], "report": {}})
            with no_descriptor_left():
                await inheritance.run()
        assert inheritance.state is SuccessorState.SETTLED
        # As the supervisor does with what came too early for it.
        for item in inheritance.farewells:
            generation.lineage.deliver(ancestor, item)
        assert f"generation 1 (pid {os.getpid()}) keeps what it was to pass on" in caplog.text
    finally:
        inheritance.close()
        other_end.close()


@pytest.mark.backends("asyncio")
async def test_the_way_of_connections_is_taken_over_where_no_descriptor_is_left(backend: str) -> None:
    # A duplicate was made of it: at the limit the newest generation died of that, in the middle of its service.
    ours, theirs = socket.socketpair()
    taken: list[socket.socket] = []
    lineage = Ancestors()
    lineage.on_transfer = taken.append
    ancestor = Ancestor(1, os.getpid(), Peer(Channel(ours), os.pidfd_open(os.getpid())))
    frame = Frame(DrainMessage.TRANSFER, {}, (theirs.detach(), os.dup(ours.fileno())))
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
