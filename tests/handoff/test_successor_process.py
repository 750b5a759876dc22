"""The successor's process: started with its end of a channel, ended, and nothing left of it in either case."""

from __future__ import annotations

import os
import signal
import socket
import sys

import anyio
import anyio.to_thread
import pytest

from ecdysis_async._handoff.side import ALL_COUNTERS, COUNTERS
from ecdysis_async._handoff.successor_process import SuccessorProcess
from ecdysis_async._ipc.peer import Death
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import Process, spawn
from ecdysis_async.errors import RestartUnsupported, SpawnFailed


async def run(program: str, channel: socket.socket, stderr: int) -> Process:
    launch = Launch((sys.executable, "-c", program), None, dict(os.environ))
    return await anyio.to_thread.run_sync(spawn, launch, channel, stderr)


async def test_it_is_started_and_its_end_is_learnt(backend: str) -> None:
    async def start(channel: socket.socket, stderr: int) -> Process:
        return await run("import sys; sys.exit('the last words')", channel, stderr)

    successor = await SuccessorProcess.start(start)
    with anyio.fail_after(60):
        await successor.process.wait()
    await successor.collect_exit()
    assert (successor.exit_status, successor.stderr.read(), successor.is_known) == (1, "the last words", False)
    assert successor.is_dead()
    successor.close()
    assert successor.is_dead()


async def test_it_is_asked_before_it_is_killed_and_its_counters_are_read(backend: str) -> None:
    async def start(channel: socket.socket, stderr: int) -> Process:
        return await run("import time; time.sleep(600)", channel, stderr)

    successor = await SuccessorProcess.start(start)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(successor.peer.run, lambda item: None)
            counters = os.memfd_create("counters")
            os.write(counters, COUNTERS.pack(5, 3))
            successor.know(os.dup(successor.process.pidfd), counters)
            assert (successor.is_known, successor.is_dead(), successor.read_open_connections()) == (True, False, 2)
            # One of a release before this says no more.
            assert successor.read_work() == (0, 3)
            os.pwrite(counters, ALL_COUNTERS.pack(5, 3, 70), 0)
            assert (successor.read_work(), successor.read_open_connections()) == ((70, 3), 2)
            await successor.end(leaves_by_itself=False)
            await successor.peer.died.wait()
        await successor.collect_exit()
    assert successor.exit_status == -signal.SIGTERM
    successor.close()


async def test_what_may_accept_is_killed_at_once(backend: str) -> None:
    async def start(channel: socket.socket, stderr: int) -> Process:
        return await run("import time; time.sleep(600)", channel, stderr)

    successor = await SuccessorProcess.start(start)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(successor.peer.run, lambda item: None)
            successor.know(os.dup(successor.process.pidfd), os.memfd_create("counters"))
            await successor.end(leaves_by_itself=False, at_once=True)
            await successor.peer.died.wait()
        await successor.collect_exit()
    assert successor.exit_status == -signal.SIGKILL
    successor.close()


async def test_behind_a_wrapper_the_one_that_speaks_is_killed_as_well(backend: str) -> None:
    async def start(channel: socket.socket, stderr: int) -> Process:
        return await run("import time; time.sleep(600)", channel, stderr)

    successor = await SuccessorProcess.start(start)
    here, there = socket.socketpair()
    with here, there:
        speaker = await start(there, 2)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            heard: list[object] = []
            task_group.start_soon(successor.peer.run, heard.append)
            successor.know(os.dup(speaker.pidfd), os.memfd_create("counters"))
            task_group.cancel_scope.cancel()
        await successor.kill()
        assert await speaker.wait() == -signal.SIGKILL
    assert not any(isinstance(each, Death) for each in heard)
    speaker.close()
    successor.close()


async def test_what_cannot_be_started_leaves_nothing(backend: str) -> None:
    async def fail(channel: socket.socket, stderr: int) -> Process:
        raise OSError(24, "Too many open files")

    async def refuse(channel: socket.socket, stderr: int) -> Process:
        raise RestartUnsupported("not here")

    with pytest.raises(SpawnFailed, match="the successor could not be started: OSError"):
        await SuccessorProcess.start(fail)
    with pytest.raises(RestartUnsupported, match="not here"):
        await SuccessorProcess.start(refuse)
