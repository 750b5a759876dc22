"""The successor's side of a restart, with a predecessor whose words the test says."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.host import AcceptingHost
from ecdysis_async._handoff.protocol import SuccessorEvent, SuccessorState
from ecdysis_async._handoff.successor import SuccessorSide
from ecdysis_async._ipc.channel import Channel
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.release import describe_release
from ecdysis_async.errors import HandoffAborted, StartupError
from ecdysis_async.report import RestartReport
from ecdysis_async.settings import Settings
from tests.planes import a_plane


@dataclass(frozen=True)
class Start:
    """A generation that starts, and the channel to its predecessor, on which the test speaks."""

    side: SuccessorSide
    plane: DataPlane
    channel: Channel
    predecessor: subprocess.Popen[bytes]

    async def hand_over(self, **changes: Any) -> None:
        """Send one socket, and who the predecessor is."""
        registry = Registry()
        registry.obtain(Internet("127.0.0.1", 0), name="web")
        sockets, descriptors = registry.describe()
        body = {
            "restart": "id", "generation": 2, "predecessor": {"generation": 1, "pid": self.predecessor.pid},
            "sockets": sockets, "stash": [], "stash_later": [], "ancestors": [], "env_file_keys": ["KEY"],
        }  # fmt: skip
        pidfd, stderr, pipe = (
            os.pidfd_open(self.predecessor.pid),
            os.open(os.devnull, os.O_RDWR),
            os.pipe2(os.O_CLOEXEC),
        )
        os.close(pipe[1])
        try:
            await self.channel.send("listeners", body | changes, [pidfd, stderr, pipe[0], *descriptors])
        finally:
            for descriptor in (pidfd, stderr, pipe[0]):
                os.close(descriptor)
            registry.close(unlink=False)

    async def expect(self, type: str) -> dict[str, Any]:
        """Receive the next message, which is of this type; return its body."""
        frame = await self.channel.receive()
        frame.close()
        assert frame.type == type
        return frame.body


@contextlib.asynccontextmanager
async def a_start() -> AsyncIterator[Start]:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    predecessor = subprocess.Popen(["sleep", "600"])
    try:
        async with a_plane() as plane:
            generation = Generation(1, Settings(), AcceptingHost(plane), GenerationLog(1))
            side = SuccessorSide(ours, generation, plane, lambda side: None, is_child=False)
            try:
                with anyio.fail_after(60):
                    yield Start(side, plane, channel, predecessor)
            finally:
                side.close()
    finally:
        channel.close()
        predecessor.kill()
        predecessor.wait()


async def greet(start: Start) -> None:
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(start.side.greet)
        hello = await start.expect("hello")
        assert (hello["versions"], hello["pid"]) == ([1, 1], os.getpid())
        await start.hand_over()


async def test_it_takes_over_and_serves_from_the_commit_on(backend: str) -> None:
    async with a_start() as start, anyio.create_task_group() as task_group:
        await greet(start)
        side, registry = start.side, start.plane.registry
        assert (side.generation.number, side.generation.env_file_keys) == (2, ("KEY",))
        assert side.predecessor is not None
        assert [entry.name for entry in registry.unclaimed()] == ["web"]
        entry = registry.obtain(Internet("127.0.0.1", 0), name="web")
        registry.obtain(Internet("127.0.0.1", 0), name="new")
        task_group.start_soon(side.run)
        side.post(SuccessorEvent.READY)
        assert await start.expect("ready") == {
            "claimed": [0],
            "created": ["new"],
            "max_draining": 8,
            "release": describe_release(),
        }
        assert not entry.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        await start.channel.send("commit", {"stash": []})
        assert "opened_at" in await start.expect("serving")
        assert side.opened.is_set() and entry.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        report = RestartReport("id", 2, start.predecessor.pid)
        await start.channel.send("settled", {"report": report.to_json(), "ancestors": []})
        await side.over.wait()
        assert (side.state, side.report) == (SuccessorState.SETTLED, report)
        task_group.cancel_scope.cancel()


async def test_what_fails_is_told_in_one_line(backend: str) -> None:
    async with a_start() as start, anyio.create_task_group() as task_group:
        await greet(start)
        task_group.start_soon(start.side.run)
        start.side.post(SuccessorEvent.FAILED, StartupError("there is no such table"))
        assert await start.expect("failed") == {"error": "there is no such table"}
        await start.side.over.wait()
        assert (start.side.state, start.side.summary) == (SuccessorState.ABORTED, "there is no such table")
        task_group.cancel_scope.cancel()


async def test_an_option_that_is_wrong_is_told_as_such(backend: str) -> None:
    async with a_start() as start, anyio.create_task_group() as task_group:
        await greet(start)
        task_group.start_soon(start.side.run)
        error = StartupError("there is no such option")
        error.is_usage = True
        start.side.post(SuccessorEvent.FAILED, error)
        assert await start.expect("failed") == {"error": "there is no such option", "is_usage": True}
        await start.side.over.wait()
        task_group.cancel_scope.cancel()


async def test_a_dead_predecessor_is_followed_once_this_side_is_ready(backend: str) -> None:
    async with a_start() as start, anyio.create_task_group() as task_group:
        await greet(start)
        task_group.start_soon(start.side.run)
        start.side.post(SuccessorEvent.READY)
        await start.expect("ready")
        start.predecessor.kill()
        await start.side.opened.wait()
        await start.side.over.wait()
        assert start.side.state is SuccessorState.SETTLED
        task_group.cancel_scope.cancel()


@pytest.mark.parametrize(
    "changes", [{"sockets": []}, {"ancestors": None}, {"stash_later": 3}, {"generation": "x"}, {"predecessor": None}]
)
async def test_what_is_no_handoff_aborts(backend: str, changes: dict[str, Any]) -> None:
    async with a_start() as start:
        await start.hand_over(**changes)
        with pytest.raises(HandoffAborted, match="did not hand over its sockets"):
            await start.side.greet()
        assert start.side.state is SuccessorState.ABORTED


async def test_a_restart_that_is_called_off_aborts(backend: str) -> None:
    async with a_start() as start:
        await start.channel.send("abort")
        with pytest.raises(HandoffAborted, match="called the restart off"):
            await start.side.greet()


async def test_the_provision_of_a_dead_predecessor_is_its_answer(backend: str) -> None:
    async with a_start() as start, anyio.create_task_group() as task_group:
        await start.hand_over(provision=True)
        start.channel.close()
        # It is said to nobody, and what lies in the channel is read all the same.
        await start.side.greet()
        assert [entry.name for entry in start.plane.registry.unclaimed()] == ["web"]
        start.predecessor.kill()
        task_group.start_soon(start.side.run)
        start.side.post(SuccessorEvent.READY)
        await start.side.over.wait()
        assert start.side.state is SuccessorState.SETTLED
        task_group.cancel_scope.cancel()


async def test_nothing_is_promoted_over_a_predecessor_that_lives_and_says_nothing_more(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecdysis_async._ipc.peer.DEATH_GRACE_SECONDS", 0.05)
    async with a_start() as start:
        await start.hand_over(provision=True)
        start.channel.close()
        await start.side.greet()
        await start.side.run()
        assert start.side.state is SuccessorState.ABORTED


@pytest.mark.parametrize("is_as_before", [True, False])
async def test_an_answer_comes_behind_the_provision(backend: str, *, is_as_before: bool) -> None:
    async with a_start() as start, anyio.create_task_group() as task_group:
        await start.hand_over(provision=True)
        task_group.start_soon(start.side.greet)
        assert (await start.expect("hello"))["provision"] is True
        await anyio.wait_all_tasks_blocked()
        assert start.side.state is SuccessorState.GREETING
        if is_as_before:
            await start.channel.send("listeners", {"as_before": True})
        else:
            await start.hand_over(generation=7)
        while start.side.predecessor is None:
            await anyio.wait_all_tasks_blocked()
        assert start.side.generation.number == (2 if is_as_before else 7)
        assert [entry.name for entry in start.plane.registry.unclaimed()] == ["web"]


async def test_the_provision_of_a_restart_that_was_called_off_is_let_go(backend: str) -> None:
    async with a_start() as start:
        await start.hand_over(provision=True)
        await start.channel.send("abort")
        with pytest.raises(HandoffAborted, match="called the restart off"):
            await start.side.greet()
        assert start.side.state is SuccessorState.ABORTED
