"""The successor's process: its command line, environment and working directory, and the one descriptor it inherits.

What is written here decides *what* is run, starts it, and watches it through a pidfd; it knows nothing of the handoff
that follows on the channel. Nothing here forks a process of Python code: exec only.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from typing import Protocol
from weakref import WeakValueDictionary

import anyio

from ecdysis_async.errors import SpawnFailed

from .claims import (
    HISTORY_KEY,
    LAST_WORD_MARKER,
    LINE_MARKER,
    LOCK_FILE_MARKER,
    MARKER,
    RESTART_KEY,
    mark,
    mark_restart,
)
from .history import history
from .launch import TRAMPOLINE, Launch, read_first_lines
from .shortages import REMEDIES
from .signals import clean_mask
from .trace_context import KEY as TRACE_KEY
from .trace_context import trace_contexts

__all__ = [
    "Child",
    "Process",
    "Spawner",
    "describe_end",
    "describe_exit",
    "describe_spawn_failure",
    "find_children",
    "find_missing",
    "find_process",
    "spawn",
]

# This shell stands between this process and the successor, and is killed when the successor is let go. Then the
# successor is a child of systemd (reparenting, exit(2)). systemd 254 does not wait for a main process that is not its
# child when MAINPID= names it. Any `systemctl stop` would send SIGKILL right behind its SIGTERM, and the death of the
# process would go unnoticed (seen). The traps let the shell outlive signals to its group, and unlike ignored ones they
# do not reach the successor.
_REPARENTING_SHELL = ("/bin/sh", "-c", 'trap : HUP INT TERM USR1 USR2; "$@"; exit $?', "sh")
# How a shell tells that a signal has ended its child.
_SIGNAL_STATUS = 128

# How much of a program the kernel looks at for its interpreter (BINPRM_BUF_SIZE).
MAX_FIRST_LINE = 256

# What asyncio reports too for a child that was reaped by somebody else.
UNKNOWN_STATUS = 255

_REMEDIES = {
    **REMEDIES,
    errno.ENOENT: "it, or the interpreter in its first line, is not there any more: "
    "restore it, or set command= (--command)",
    errno.EACCES: "it is not executable for this user: chmod +x, or set command= (--command)",
    errno.ENOEXEC: "it is no program: give it a first line like #!/usr/bin/env python3, or set command= (--command)",
    errno.ETXTBSY: "it is being written: try again",
    errno.E2BIG: "arguments and environment are too large: shorten environment= or the env file",
    errno.EAGAIN: "too many processes: raise the limit (ulimit -u, TasksMax=)",
    errno.ENOMEM: "not enough memory: raise the limit (MemoryMax=), or stop something",
}


# Those that somebody waits for, by their pids: as PID 1 one has to reap others as well.
_processes: WeakValueDictionary[int, Process] = WeakValueDictionary()


def find_process(pid: int) -> Process | None:
    """Return the child of this process that somebody here waits for; None if it is nobody's."""
    return _processes.get(pid)


class Child(Protocol):
    """A successor's process. Its parent is this process, or the anchor that this one works for."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def pidfd(self) -> int:
        """Readable once it is dead."""

    async def wait(self) -> int:
        """Wait until it is dead and reaped; return its exit status, or the negative number of the signal."""

    async def end(self, grace: float) -> int:
        """Send SIGTERM, and SIGKILL if it lives on for ``grace`` seconds; return what :meth:`wait` does."""

    async def let_go(self) -> None:
        """Let it be a child of systemd, where it shall become the main process of a unit."""

    def close(self) -> None:
        """Let go of the pidfd, where it belongs to this object; harmless if done already."""


Spawner = Callable[[socket.socket, int], Awaitable[Child]]
"""Starts a successor with its end of the channel and its stderr, which stay the caller's; raises a RestartError."""


def find_children(pid: int) -> list[int]:
    """Return the children of a process (proc_pid_task_children(5)); none where that cannot be known."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(each) for each in file.read().split()]
    except (OSError, ValueError):
        return []


class Process:
    """A child process, seen through a pidfd: never through a number that another process may have by now.

    It owns the pidfd and the child's zombie. A child that is alive when this object goes stays alive.

    Attributes:
        pid: its process id.
        pidfd: readable once it is dead.
        returncode: None until it is reaped; then its exit status, or the negative number of the signal.
        is_kept: whether a shell stands in between, whose process group the successor is in.
    """

    def __init__(self, pid: int, pidfd: int, *, is_kept: bool = False) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.is_kept = is_kept
        self.returncode: int | None = None
        _processes[pid] = self
        # One task waits on the pidfd, for all others.
        self._waiting = anyio.Lock()

    async def wait(self) -> int:
        """Wait until it is dead, reap it, and return its exit status, or the negative number of the signal.

        Any number of tasks may wait; cancellation only stops waiting.
        """
        while self.returncode is None:
            async with self._waiting:
                if self.returncode is None:
                    await anyio.wait_readable(self.pidfd)
                    self.reap()
        return self.returncode

    async def end(self, grace: float) -> int:
        """Send SIGTERM, and SIGKILL if it lives on for ``grace`` seconds; reap it and return what :meth:`wait` does.

        One that has become another user may not be killed by this one: that is waited for as long again, and left
        alive, with ``UNKNOWN_STATUS`` returned and ``returncode`` None.

        Cancellation kills it at once, and is raised when it is reaped.
        """
        self.send_signal(signal.SIGTERM)
        try:
            with anyio.move_on_after(grace):
                return await self.wait()
        finally:
            with anyio.CancelScope(shield=True):
                # Ends one that is stopped (SIGSTOP) too, on which SIGTERM only waits.
                is_sent = self.send_signal(signal.SIGKILL)
                with anyio.move_on_after(math.inf if is_sent else grace):
                    await self.wait()
        return UNKNOWN_STATUS if self.returncode is None else self.returncode

    def send_signal(self, number: int) -> bool:
        """Send it a signal; say whether it was sent: not to one that is dead, nor to one that is another user now."""
        if self.returncode is not None:
            return False
        try:
            if self.is_kept:
                # No other group can have this number, as long as the shell is not reaped; if it is, this raises.
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                os.killpg(self.pid, number)
            else:
                self._send(number)
        # Dead, and reaped by somebody else: SIGCHLD is ignored, or the application waits for every child. Or the
        # command changes the user, as sudo(8) does.
        except (ChildProcessError, ProcessLookupError, PermissionError):
            return False
        return True

    def _send(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS):
                raise
            # A sandbox may deny that call. The number of a child that is not reaped is nobody else's; of any other
            # process this raises.
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(self.pid, number)

    async def let_go(self) -> None:
        """Let a kept successor be a child of systemd; it goes on, and only its peer's pidfd tells of its death."""
        if self.is_kept and self.returncode is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            await self.wait()

    def close(self) -> None:
        """Close the pidfd; harmless if done already. Nobody may wait any more, and a live child is left alone."""
        if self.pidfd != -1:
            os.close(self.pidfd)
            self.pidfd = -1

    def reap(self) -> None:
        """Take note of its end, if it is dead."""
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        # Reaped by somebody else: SIGCHLD is ignored, or the application waits for every child.
        except ChildProcessError:
            self.returncode = UNKNOWN_STATUS
            return
        if result is not None:
            self.returncode = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
            if self.is_kept and self.returncode > _SIGNAL_STATUS:
                self.returncode = _SIGNAL_STATUS - self.returncode


class _Detached(subprocess.Popen[bytes]):
    """A child that may outlive this object and this process, which is what a successor is for."""

    def __del__(self) -> None:
        """Neither warn that it still runs, nor let the next Popen reap it."""


def find_missing() -> str | None:
    """Name what this platform, kernel or sandbox lacks to hand sockets over to a child and watch it; None: nothing."""
    if not (hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal") and hasattr(socket, "SCM_RIGHTS")):
        return "this platform has no pidfds, or passes no descriptors over Unix sockets"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        # A lack of descriptors passes, and says so itself.
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return None
        return (
            f"the system call pidfd_open is denied here ({error.strerror}): by the kernel, or a container's seccomp "
            "profile"
        )
    return None


def spawn(
    launch: Launch,
    channel: socket.socket,
    stderr: int,
    *,
    is_kept: bool = False,
    line: socket.socket | None = None,
    lock_file: int = -1,
    last_word: int = -1,
    restart: str = "",
    trace: str | None = None,
) -> Process:
    """Start the successor. It blocks for the time of an exec: call it in a thread.

    Args:
        launch: what to run.
        channel: the successor's end of the channel; with the line, the locks and the last word the only descriptor
            it gets besides 0, 1 and 2; stays ours.
        stderr: the descriptor that becomes its 2; stays ours.
        is_kept: it shall become a child of systemd later, by :meth:`Process.let_go`.
        line: the worker's end of its line to the anchor, where the anchor starts it; stays ours.
        lock_file: the file of the service's locks; -1 for none; stays ours.
        last_word: the memory with what is counted here; -1 for none; stays ours.
        restart: the id of the restart that it is started for; empty where it is none.
        trace: the trace context of the process that has asked for it; None: the one of the restart here, if any.

    The successor blocks no signal, whatever this process blocks.

    Raises:
        SpawnFailed: there is no process; the text says why and what can be done.
    """
    passed = {MARKER: channel.fileno()}
    if line is not None:
        passed[LINE_MARKER] = line.fileno()
    if lock_file >= 0:
        passed[LOCK_FILE_MARKER] = lock_file
    if last_word >= 0:
        passed[LAST_WORD_MARKER] = last_word
    environment = launch.environment | {key: mark(descriptor) for key, descriptor in passed.items()}
    if restart:
        environment[RESTART_KEY] = mark_restart(restart, channel.fileno())
    if history.path is not None:
        environment[HISTORY_KEY] = history.path
    if (context := trace or trace_contexts.find(restart)) is not None:
        environment[TRACE_KEY] = context
    try:
        _find_program(launch)
        # With neither preexec_fn nor a change of user, subprocess takes vfork: fork would stop this process for as
        # long as the kernel copies its page tables, 58 ms at 4 GB.
        with clean_mask():
            child = _Detached(
                (*_REPARENTING_SHELL, *launch.arguments) if is_kept else launch.arguments,
                cwd=launch.directory,
                env=environment,
                stderr=stderr,
                pass_fds=list(passed.values()),
                process_group=0 if is_kept else None,
            )
    # No error may end this process, which serves, and goes on serving.
    except Exception as error:
        raise SpawnFailed(describe_spawn_failure(launch, error), phase="start") from error
    try:
        pidfd = os.pidfd_open(child.pid)
    except OSError as error:
        child.kill()
        child.wait()
        raise SpawnFailed(describe_spawn_failure(launch, error), phase="start") from error
    return Process(child.pid, pidfd, is_kept=is_kept)


def require_program(launch: Launch) -> None:
    """See that the program is there, and its interpreter.

    Raises:
        SpawnFailed: one of them is not; the text names it.
    """
    try:
        _find_program(launch)
    except OSError as error:
        raise SpawnFailed(describe_spawn_failure(launch, error), phase="start") from error


def _find_program(launch: Launch) -> None:
    """Find what exec would not: behind a shell that is but an exit status, and for a script the kernel names no file.

    Raises:
        OSError: the program, or the interpreter in its first lines, is not there, or may not be executed.
    """
    program = launch.arguments[0]
    path: str | None = os.path.join(launch.directory or "", program)
    if os.sep not in program:
        # Loaded here, because few commands need it.
        import shutil

        path = shutil.which(program, path=launch.environment.get("PATH", os.defpath))
    if path is None or not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), program)
    first, second = read_first_lines(path)
    interpreters = [first[2:].split(None, 1)[:1]] if first.startswith(b"#!") else []
    if interpreters and second.startswith(TRAMPOLINE):
        interpreters.append(second.removeprefix(TRAMPOLINE).split()[:1])
    for each in (os.fsdecode(word).strip('"') for words in interpreters for word in words):
        if os.path.isabs(each) and not os.path.exists(each):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), each)


def describe_end(returncode: int) -> str:
    """Say in a sentence's words how a process ended."""
    return f"{'ended with' if returncode >= 0 else 'was'} {describe_exit(returncode)}"


def describe_exit(returncode: int) -> str:
    """Say how a process ended."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    # Real-time signals have no names of their own.
    except ValueError:
        return f"killed by signal {-returncode}"


def describe_spawn_failure(launch: Launch, error: Exception) -> str:
    """Say why a program could not be started, and what to do about it."""
    program = launch.arguments[0]
    text = f"cannot start {program!r}: {error}"
    if isinstance(error, OSError):
        # subprocess names the directory in place of the program where that is what failed.
        if launch.directory is not None and error.filename == launch.directory:
            text = f"cannot start {program!r} in {launch.directory!r}: {error.strerror}"
        elif remedy := _REMEDIES.get(error.errno or 0):
            missing = f": {error.filename}" if error.filename not in (None, program) else ""
            text = f"cannot start {program!r}: {error.strerror}{missing} ({remedy})"
    return text
