"""What comes to a supervisor from where no task runs, and from outside: callbacks, asyncio's own cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from ecdysis_async import Ecdysis, State
from ecdysis_async._accepting.asyncio_servers import GatedServer
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import Process, spawn
from tests.planes import turn


@pytest.mark.backends("asyncio", "uvloop")
async def test_stop_from_a_callback_of_the_loop(backend: str) -> None:
    async with Ecdysis(restart_signals=(), stop_signals=()) as ecdysis:
        await ecdysis.ready()
        asyncio.get_running_loop().call_soon(ecdysis.stop)
        await ecdysis.finished()
    assert ecdysis.state is State.ENDED


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_cancellation_during_the_drain_hurries_it_and_goes_on(backend: str) -> None:
    held, draining = asyncio.Event(), asyncio.Event()
    ends: list[str] = []

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.set()
        try:
            await reader.readline()
        except asyncio.CancelledError:
            ends.append("cut")
            raise
        finally:
            writer.close()

    async def serve() -> None:
        async with Ecdysis(restart_signals=(), stop_signals=(), drain_timeout=600) as ecdysis:
            server = await ecdysis.start_server(hold, "127.0.0.1", 0)
            assert isinstance(server, GatedServer)
            await ecdysis.ready()
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await held.wait()
            ecdysis.stop()
            draining.set()
            writers.append(writer)

    writers: list[asyncio.StreamWriter] = []
    task = asyncio.create_task(serve())
    await draining.wait()
    # Once the block is being left, and waits.
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ends == ["cut"]
    for writer in writers:
        writer.close()
        await writer.wait_closed()


async def test_before_the_block_there_is_a_clear_error(backend: str) -> None:
    ecdysis = Ecdysis(restart_signals=(), stop_signals=())
    for ask in (ecdysis.ready, ecdysis.finished, ecdysis.serve_forever):
        with pytest.raises(RuntimeError, match="not entered"):
            await ask()
    with pytest.raises(RuntimeError, match="not entered"):
        ecdysis.stop()
    # A socket that was made here no successor would inherit.
    with pytest.raises(RuntimeError, match="not entered"):
        ecdysis.listen_tcp("127.0.0.1", 0)
    with pytest.raises(RuntimeError, match="not entered"):
        _ = ecdysis.generation
    async with ecdysis:
        await ecdysis.ready()
        assert ecdysis.generation == 1


@pytest.mark.backends("uvloop", "trio")
async def test_goodbyes_begin_before_the_successor_is_told_of_the_transfer(backend: str) -> None:
    """Both ends of it are closed, and not by the garbage collector, whose warning fails this test."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def start(channel: socket.socket, stderr: int) -> Process:
        return await anyio.to_thread.run_sync(spawn, Launch(("sleep", "600"), None, dict(os.environ)), channel, stderr)

    async with Ecdysis(restart_signals=(), stop_signals=()) as ecdysis:
        await ecdysis.ready()
        life = ecdysis._life
        life.handover = handover = PredecessorSide(life.generation, lambda handover: None, spawner=start)
        await handover._start()
        successor = handover._running
        handover.over.set()
        # It does not read.
        with contextlib.suppress(BlockingIOError):
            while True:
                successor.peer.channel._sock.send(bytes(4096))
        before = descriptors()
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(ecdysis._leaving._move_connections, lambda: None)
                while descriptors() < before + 2:
                    await turn()
                task_group.cancel_scope.cancel()
        assert descriptors() == before
        await successor.process.end(0)
        handover._close()
        life.handover = None


async def test_what_is_served_is_described_by_who_knows_it(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ecdysis_async")
    async with Ecdysis(restart_signals=(), stop_signals=()) as ecdysis:
        ecdysis.listen_tcp("127.0.0.1", 0, name="web")
        ecdysis.describe_serving = lambda entries, control_path: f"{[entry.name for entry in entries]}, {control_path}"
        await ecdysis.ready()
    assert "['web'], None" in caplog.text


async def test_a_block_that_could_not_be_entered_can_be_entered_later(backend: str, tmp_path: Path) -> None:
    directory = tmp_path / "not yet"
    ecdysis = Ecdysis(restart_signals=(), stop_signals=(), control_socket=directory / "control")
    with pytest.raises(FileNotFoundError, match="mkdir"):
        await ecdysis.__aenter__()
    assert ecdysis.state is State.STARTING
    directory.mkdir(mode=0o700)
    async with ecdysis:
        await ecdysis.ready()
        with pytest.raises(RuntimeError, match="entered once"):
            await ecdysis.__aenter__()


async def test_a_first_generation_that_is_not_ready_in_time_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async with Ecdysis(systemd=False, ready_timeout=0.01) as ecdysis:
        with anyio.fail_after(60):
            while not caplog.messages:  # noqa: ASYNC110 - a log has no event
                await anyio.sleep(0.01)
        await ecdysis.ready()
        ecdysis.stop()
    assert "not ready 0.01 s after the start: nothing is accepted; nobody has called ready()" in caplog.text


async def test_two_tasks_may_announce_readiness() -> None:
    async with Ecdysis(systemd=False) as ecdysis:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(ecdysis.ready)
            task_group.start_soon(ecdysis.ready)
        assert ecdysis.state is State.SERVING
        ecdysis.stop()


class Follower(Ecdysis):
    """A generation that has a predecessor."""

    @property
    def predecessor_pid(self) -> int:
        return os.getppid()


@pytest.mark.backends("asyncio")
@pytest.mark.parametrize("has_served", [False, True])
async def test_a_lock_is_said_to_be_the_old_releases_at_the_start_only(backend: str, *, has_served: bool) -> None:
    async def fail() -> None:
        async with Follower(systemd=False) as ecdysis:
            if has_served:
                await ecdysis.ready()
            raise RuntimeError("the lock of a customer")

    with pytest.raises(RuntimeError, match="the lock of a customer") as caught:
        await fail()
    assert ("another process of this service" in "".join(getattr(caught.value, "__notes__", ()))) is not has_served
