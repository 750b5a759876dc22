"""A child process: started with what it shall have and nothing else, watched, ended and reaped."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest

from ecdysis_async._system import process as process_module
from ecdysis_async._system.launch import Launch, describe_launch
from ecdysis_async._system.process import UNKNOWN_STATUS, Process, describe_end, describe_exit, find_missing, spawn
from ecdysis_async.errors import SpawnFailed

# These modules alone, without those above them: the package claims the channel when it is imported.
BELOW_THE_PACKAGE = f"""
import sys, types
package = sys.modules["ecdysis_async"] = types.ModuleType("ecdysis_async")
package.__path__ = [{str(Path(process_module.__file__).parents[1])!r}]
"""

PYTHONPATH = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])


@pytest.fixture
def theirs() -> Iterator[socket.socket]:
    """Make the end of a channel that a child gets."""
    here, there = socket.socketpair()
    with here, there:
        yield there


@pytest.fixture
def start(theirs: socket.socket) -> Iterator[Callable[..., Process]]:
    """Start commands; they are ended, and reaped, with the test."""
    started = []

    def start(*command: str) -> Process:
        process = spawn(launch_of(*command), theirs, 2)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED)
        process.close()


def launch_of(*command: str) -> Launch:
    launch, _ = describe_launch(command, None, None)
    return launch


def stop(process: Process) -> None:
    """Stop it, and return once it is stopped: signals that wait beside SIGSTOP may be served before it."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def is_alive(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


async def test_its_stderr_is_the_one_given(theirs: socket.socket) -> None:
    reading, writing = os.pipe()
    process = spawn(launch_of("sh", "-c", "echo to stderr >&2"), theirs, writing)
    os.close(writing)
    with open(reading, "rb") as stream:
        assert await anyio.to_thread.run_sync(stream.read) == b"to stderr\n"
    assert await process.wait() == 0
    process.close()


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        (None, 0, r"No such file.*restore it, or set command="),
        ("#!/no/such/interpreter\n", 0o755, r"No such file.*interpreter"),
        ("#!/bin/sh\n", 0o644, r"Permission denied.*chmod \+x"),
        ("\0\1\2", 0o755, r"Exec format error.*#!"),
    ],
)
async def test_an_exec_fails_and_then_succeeds(
    theirs: socket.socket, tmp_path: Path, content: str | None, mode: int, expected: str
) -> None:
    program = tmp_path / "program"
    if content is not None:
        program.write_text(content)
        program.chmod(mode)
    with pytest.raises(SpawnFailed, match=f"cannot start '{program}': {expected}") as raised:
        spawn(launch_of(str(program)), theirs, 2)
    assert raised.value.phase == "start"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    process = spawn(launch_of(str(program)), theirs, 2)
    assert await process.wait() == 7
    process.close()


def test_a_directory_that_vanished_is_named(theirs: socket.socket, tmp_path: Path) -> None:
    launch = Launch(("true",), str(tmp_path / "gone"), dict(os.environ))
    with pytest.raises(SpawnFailed, match=r"cannot start 'true' in '.*gone': No such file"):
        spawn(launch, theirs, 2)


def test_arguments_that_no_kernel_takes(theirs: socket.socket) -> None:
    with pytest.raises(SpawnFailed, match="null"):
        spawn(launch_of("true", "a\0b"), theirs, 2)
    with pytest.raises(SpawnFailed, match="shorten"):
        spawn(launch_of("true", "x" * 10_000_000), theirs, 2)


def test_what_is_no_text_is_a_failure_like_others(theirs: socket.socket) -> None:
    variables: dict[str, Any] = {**os.environ, "PORT": 8000}
    with pytest.raises(SpawnFailed, match=r"cannot start 'true': .*int"):
        spawn(Launch(("true",), None, variables), theirs, 2)


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.backends("asyncio")
@pytest.mark.parametrize("is_kept", [False, True])
async def test_no_memory_is_copied_to_start_it(backend: str, theirs: socket.socket, is_kept: bool) -> None:
    """After a fork each page that this process writes to is a fault, and the fork is a stall."""
    pages = 4096
    with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for generation in range(2):
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = generation
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            if generation == 0:
                # The first touch of each: what is counted is what is meant.
                assert faults >= pages
                process = spawn(launch_of("true"), theirs, 2, is_kept=is_kept)
                await process.wait()
                process.close()
    assert faults < pages // 2


async def test_any_number_of_tasks_may_wait(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    first = anyio.CancelScope()
    codes: list[int] = []

    async def wait(scope: anyio.CancelScope) -> None:
        with scope:
            codes.append(await process.wait())

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, first)
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                tasks.start_soon(wait, anyio.CancelScope())
            await anyio.wait_all_tasks_blocked()
            # The one that watches for all of them gives up.
            first.cancel()
            await anyio.wait_all_tasks_blocked()
            process.send_signal(signal.SIGUSR1)
    assert codes == [-signal.SIGUSR1] * 3
    assert await process.wait() == process.returncode == -signal.SIGUSR1


@pytest.mark.parametrize("status", [0, 1, 255])
async def test_the_exit_status_is_returned(start: Callable[..., Process], status: int) -> None:
    assert await start("sh", "-c", f"exit {status}").wait() == status


async def test_cancelling_a_wait_leaves_it_to_the_next(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    for _ in range(3):
        with anyio.move_on_after(0.001):
            await process.wait()
        assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL


async def test_end_asks_before_it_kills(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    assert await process.end(30) == -signal.SIGTERM
    # Over, and whoever has the number now is not touched.
    process.send_signal(signal.SIGKILL)
    assert await process.end(30) == -signal.SIGTERM


async def test_end_kills_what_is_stopped(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    stop(process)
    with anyio.fail_after(60):
        assert await process.end(0.01) == -signal.SIGKILL


async def test_end_kills_at_once_when_it_is_cancelled(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    stop(process)
    with anyio.fail_after(60), anyio.move_on_after(0.01) as scope:
        await process.end(600)
    assert scope.cancelled_caught
    assert process.returncode == -signal.SIGKILL


async def test_a_child_that_somebody_else_reaped(start: Callable[..., Process]) -> None:
    process = start("true")
    await anyio.to_thread.run_sync(os.waitpid, process.pid, 0)
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == UNKNOWN_STATUS


async def test_signals_are_sent_to_the_living(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    assert process.send_signal(signal.SIGTERM)
    assert await process.wait() == -signal.SIGTERM
    assert not process.send_signal(signal.SIGTERM)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not signal its child")
async def test_one_of_another_user_is_left_alive(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    os.setresuid(65534, 65534, 0)
    try:
        assert not process.send_signal(signal.SIGTERM)
        assert await process.end(grace=0.01) == UNKNOWN_STATUS
        assert process.returncode is None
    finally:
        os.setresuid(0, 0, 0)
    assert process.send_signal(signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL


def test_it_outlives_the_object_without_a_warning(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    pidfd = os.dup(process.pidfd)
    process.close()
    process.close()
    gc.collect()
    # A Popen that is created afterwards reaps those that were forgotten; not this one.
    subprocess.run(["true"], check=True)
    assert is_alive(pidfd)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    process.returncode = -signal.SIGKILL
    os.close(pidfd)


@pytest.mark.backends("asyncio")
async def test_a_hundred_children_leave_nothing(theirs: socket.socket) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        process = await anyio.to_thread.run_sync(spawn, launch_of("true"), theirs, 2)
        assert await process.wait() == 0
        process.close()
        assert not os.path.exists(f"/proc/{process.pid}/stat")
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_describe_exit() -> None:
    assert describe_exit(0) == "exit status 0"
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL"
    assert describe_exit(-(signal.SIGRTMIN + 3)) == f"killed by signal {signal.SIGRTMIN + 3}"
    assert (describe_end(7), describe_end(-signal.SIGKILL)) == ("ended with exit status 7", "was killed by SIGKILL")


def test_nothing_is_missing_here() -> None:
    assert find_missing() is None


def test_a_system_call_that_is_denied_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*arguments: object) -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "pidfd_open", deny)
    assert "pidfd_open is denied here (Operation not permitted)" in str(find_missing())


async def test_a_child_is_ended_where_signals_by_pidfds_are_denied(
    start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*arguments: object) -> NoReturn:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    process = start("sleep", "600")
    monkeypatch.setattr(signal, "pidfd_send_signal", deny)
    assert await process.end(60) == -signal.SIGTERM
    assert not process.send_signal(signal.SIGTERM)


def test_platforms_without_the_means_can_import_it() -> None:
    code = (
        f"{BELOW_THE_PACKAGE}\n"
        "import os, signal, socket\n"
        "import anyio\n"
        "for module, names in {\n"
        "    os: ['pidfd_open', 'waitid', 'P_PIDFD', 'WEXITED', 'CLD_EXITED', 'fchmod'],\n"
        "    signal: ['pidfd_send_signal', 'SIGKILL'],\n"
        "    socket: ['AF_UNIX', 'CMSG_SPACE', 'SCM_RIGHTS', 'MSG_CMSG_CLOEXEC', 'MSG_NOSIGNAL'],\n"
        "}.items():\n"
        "    for name in names:\n"
        "        delattr(module, name)\n"
        "import ecdysis_async._ipc.channel\n"
        "from ecdysis_async._sockets.addresses import Internet\n"
        "from ecdysis_async._sockets.registry import Registry\n"
        "from ecdysis_async._system.process import find_missing\n"
        "assert find_missing()\n"
        "registry = Registry()\n"
        "assert registry.obtain(Internet('127.0.0.1', 0)).kind.value == 'tcp'\n"
        "registry.close(unlink=True)\n"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, env={**os.environ, "PYTHONPATH": PYTHONPATH}
    )
