"""The upgrade of an anchor in place: what it knows goes into sealed memory, and its successor is itself, executed anew.

The pid, the children, the sockets and every other descriptor stay; only the code is another one. What must not be lost
in between stays in the kernel: connections in their queues, the workers' words in their lines, signals, because they
are blocked, and deaths, because a dead child waits to be reaped.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ecdysis_async._ipc.worker_link import WorkerLink
from ecdysis_async._system.claims import ANCHOR_CHECK_MARKER, ANCHOR_MARKER, mark
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import Process
from ecdysis_async.errors import RestartError
from ecdysis_async.report import RestartReport

from .pool import Slot, Worker, WorkerPool, WorkerState

__all__ = [
    "FORMAT",
    "ReceivedState",
    "UpgradeFailed",
    "blocked_signals",
    "check",
    "claim",
    "describe_crew",
    "execute",
    "repeat_signals",
    "restore_crew",
    "seal",
    "try_state",
    "unblock_signals",
]

# Raised whenever an older release could not read what is written here, or the other way round.
FORMAT: Final = 1

# What a process gets for itself while it has no handlers.
SIGNALS: Final = frozenset(
    {
        signal.SIGCHLD,
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
)

# How much of what the new code writes, where it fails, is passed on.
ERROR_CHARACTERS = 4096


class UpgradeFailed(RestartError):
    """The anchor goes on as it is: the new code does not take its state over, or cannot be executed."""


@dataclass(frozen=True, slots=True)
class ReceivedState:
    """What this process was executed with.

    Attributes:
        state: what the former code knew; see :func:`describe_crew` and ``Anchor``.
        is_check: this process only has to say, by its exit status, whether it can read that.
    """

    state: Mapping[str, Any]
    is_check: bool


def describe_crew(crew: WorkerPool) -> tuple[dict[str, Any], list[int]]:
    """Return the workers as JSON, and the descriptors that have to survive, which it names."""
    descriptors: list[int] = []
    workers = []
    numbers = {worker: index for index, worker in enumerate(crew)}
    for slot in crew.slots:
        for worker in slot.workers:
            descriptors += [worker.process.pidfd, worker.line.fileno()]
            workers.append(
                {
                    "slot": slot.index,
                    "generation": worker.generation,
                    "process": worker.process.pid,
                    "pidfd": worker.process.pidfd,
                    "line": worker.line.fileno(),
                    "pending": base64.b64encode(worker.line.pending).decode(),
                    "born": worker.born,
                    "starter": numbers.get(worker.starter) if worker.starter is not None else None,
                    "pid": worker.pid,
                    "state": worker.state.value,
                    "connections": worker.connections,
                    "requests": worker.requests,
                    "rss": worker.rss,
                    # JSON knows no infinity, and no NaN.
                    "request_limit": worker.request_limit if worker.request_limit < 2**63 else None,
                    "served_since": worker.served_since if worker.served_since == worker.served_since else None,
                    "is_told_to_leave": worker.is_told_to_leave,
                    "environment": dict(worker.environment),
                }
            )
    slots = [{"index": each.index, "failures": each.failures, "retry_at": each.retry_at} for each in crew.slots]
    return {"target": crew.target, "slots": slots, "workers": workers}, descriptors


def restore_crew(body: Mapping[str, Any]) -> WorkerPool:
    """Return the crew that was described; it owns the descriptors.

    Raises:
        KeyError, TypeError, ValueError: it is described otherwise.
    """
    slots = [
        Slot(int(each["index"]), failures=int(each["failures"]), retry_at=float(each["retry_at"]))
        for each in body["slots"]
    ]
    by_index = {slot.index: slot for slot in slots}
    workers: list[Worker] = []
    for each in body["workers"]:
        starter, limit, since = each["starter"], each["request_limit"], each["served_since"]
        for descriptor in (each["pidfd"], each["line"]):
            os.set_inheritable(descriptor, False)
        worker = Worker(
            generation=int(each["generation"]),
            process=Process(int(each["process"]), int(each["pidfd"])),
            line=WorkerLink(socket.socket(fileno=int(each["line"]))),
            born=float(each["born"]),
            starter=workers[starter] if starter is not None else None,
            pid=int(each["pid"]),
            state=WorkerState(each["state"]),
            connections=int(each["connections"]),
            requests=int(each["requests"]),
            rss=each["rss"],
            is_told_to_leave=bool(each["is_told_to_leave"]),
            environment={str(name): str(value) for name, value in each["environment"].items()},
        )
        if limit is not None:
            worker.request_limit = float(limit)
        if since is not None:
            worker.served_since = float(since)
        worker.line.resume(base64.b64decode(each["pending"]))
        workers.append(worker)
        by_index[int(each["slot"])].workers.append(worker)
    return WorkerPool(int(body["target"]), slots)


def seal(state: Mapping[str, Any]) -> int:
    """Write a state into memory that nobody can change any more; return its descriptor, which is the caller's."""
    memory = os.memfd_create("ecdysis-anchor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(json.dumps({"format": FORMAT, **state}).encode())
        while view:
            view = view[os.write(memory, view) :]
        fcntl.fcntl(
            memory,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE,
        )
    except BaseException:
        os.close(memory)
        raise
    return memory


def claim() -> ReceivedState | None:
    """Return what this process was executed with; None where it is no upgrade. Call it once.

    Raises:
        UpgradeFailed: there is something, and it cannot be read.
    """
    for marker in (ANCHOR_CHECK_MARKER, ANCHOR_MARKER):
        text = os.environ.pop(marker, None)
        if text is None:
            continue
        try:
            descriptor, device, inode = map(int, text.split(":"))
            found = os.fstat(descriptor)
            if (found.st_dev, found.st_ino) != (device, inode) or not stat.S_ISREG(found.st_mode):
                raise ValueError("something else is open under its number")
            state = json.loads(os.pread(descriptor, found.st_size, 0))
            os.close(descriptor)
            if state["format"] != FORMAT:
                raise ValueError(f"it is of format {state['format']}, and this release knows {FORMAT}")
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UpgradeFailed(f"the state of the former anchor cannot be read: {error}") from error
        return ReceivedState(state, is_check=marker == ANCHOR_CHECK_MARKER)
    return None


def check(launch: Launch, memory: int, timeout: float) -> None:
    """Run the new code on a state, as a child that only says whether it can read that. It blocks.

    Raises:
        UpgradeFailed: it cannot, or does not start; with what it has written.
    """
    try:
        result = subprocess.run(
            launch.arguments,
            cwd=launch.directory,
            env={**launch.environment, ANCHOR_CHECK_MARKER: mark(memory)},
            pass_fds=[memory],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UpgradeFailed(f"the new anchor could not be tried: {error}", phase="check") from error
    if result.returncode != 0:
        raise UpgradeFailed(
            f"the new anchor does not take over: exit status {result.returncode}",
            phase="check",
            stderr=result.stdout[-ERROR_CHARACTERS:].strip(),
        )


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Let signals wait in the kernel. Call it in the main thread, which alone is there after an exec."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        unblock_signals()


def unblock_signals() -> None:
    """Take the signals that waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def repeat_signals(pipe: int) -> None:
    """Send the signals again that the former code has not acted upon (``SignalReceiver.fileno``); close the pipe."""
    with contextlib.suppress(BlockingIOError):
        for number in set(os.read(pipe, 65536)) & SIGNALS:
            os.kill(os.getpid(), number)
    os.close(pipe)


def try_state(state: Mapping[str, Any]) -> None:
    """See that a state can be restored, without the descriptors that it names.

    Raises:
        KeyError, TypeError, ValueError: it cannot.
    """
    workers = []
    for each in state["crew"]["workers"]:
        ours, theirs = socket.socketpair()
        ours.close()
        workers.append({**each, "pidfd": os.open(os.devnull, os.O_RDONLY), "line": theirs.detach()})
    crew = restore_crew({**state["crew"], "workers": workers})
    for worker in crew:
        worker.line.close()
        worker.process.close()
    if state["last_report"] is not None:
        RestartReport.from_json(state["last_report"])
    for sockets in state["sockets"].values():
        if len(sockets["descriptions"]) != len(sockets["descriptors"]):
            raise ValueError("sockets and descriptors do not match")


def execute(launch: Launch, memory: int, descriptors: Sequence[int]) -> None:
    """Become the new code; does not return. Call it within :func:`blocked_signals`.

    Args:
        launch: what to run.
        memory: the state.
        descriptors: what has to survive.

    Raises:
        UpgradeFailed: it could not be executed, and everything is as it was.
    """
    kept = [memory, *descriptors]
    former = _working_directory()
    try:
        for descriptor in kept:
            os.set_inheritable(descriptor, True)
        if launch.directory is not None:
            os.chdir(launch.directory)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None: nothing is buffered
                stream.flush()
        os.execve(launch.arguments[0], launch.arguments, {**launch.environment, ANCHOR_MARKER: mark(memory)})  # noqa: S606
    except OSError as error:
        for descriptor in kept:
            os.set_inheritable(descriptor, False)
        if former is not None:
            os.chdir(former)
        raise UpgradeFailed(f"{launch.arguments[0]} could not be executed: {error}", phase="exec") from error


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None
