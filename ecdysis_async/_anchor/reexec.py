"""The upgrade of an anchor in place: what it knows goes into sealed memory, and then the process executes itself anew.

The pid, the children, the sockets and every other descriptor stay; only the code is another one. What must not be lost
in between stays in the kernel. Connections wait in their queues, and the workers' words in their links. Signals wait
because they are blocked, and deaths because a dead child waits to be reaped.
"""

from __future__ import annotations

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

from ecdysis_async._system.claims import ANCHOR_CHECK_MARKER, ANCHOR_MARKER, mark
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import describe_spawn_failure
from ecdysis_async._system.stderr import PREFIX
from ecdysis_async.errors import RestartError

from .config import AnchorConfig
from .state import AnchorState

__all__ = [
    "FORMAT",
    "OPTIONS_KEY",
    "ReceivedState",
    "UpgradeFailed",
    "blocked_signals",
    "check",
    "claim",
    "execute",
    "find_control_path",
    "find_options",
    "is_next_code",
    "repeat_signals",
    "seal",
    "tell_options",
    "try_state",
    "unblock_signals",
]

# The number of the format. It is raised whenever an older release could not read what is written here, or the other way
# round.
FORMAT: Final = 1

# The signals that are blocked while the process has no handlers for them.
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

# How much of what failing new code has written is passed on.
ERROR_CHARACTERS = 4096

# Before the options that new code has tried in its check, in a line of their own on its stdout.
OPTIONS_PREFIX = "ecdysis-options "
# Where they stand in the state that the new code is executed with.
OPTIONS_KEY = "options"


class UpgradeFailed(RestartError):
    """The anchor goes on as it is: the new code does not take its state over, or cannot be executed."""


@dataclass(frozen=True, slots=True)
class ReceivedState:
    """What this process was executed with.

    Attributes:
        state: what the former code knew; see ``AnchorState.describe``.
        is_check: whether this process only has to say, by its exit status, that it can read the state.
    """

    state: Mapping[str, Any]
    is_check: bool


def seal(state: Mapping[str, Any]) -> int:
    """Write a state into memory that nobody can change any more; return its descriptor, which is the caller's.

    Raises:
        OSError: there is no room for it.
    """
    try:
        memory = os.memfd_create("ecdysis-anchor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise OSError(error.errno, f"memfd_create: {error.strerror}") from error
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
    """Return what this process was executed with; None where it was not executed by a former anchor. Call it once.

    Raises:
        UpgradeFailed: there is a state, and it cannot be read.
    """
    for marker in (ANCHOR_CHECK_MARKER, ANCHOR_MARKER):
        text = os.environ.pop(marker, None)
        if text is None:
            continue
        if (descriptor := _find_memory(text)) is None:
            # Somebody else wrote it. A process that was executed with a state has had its check before.
            continue
        try:
            state = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
            os.close(descriptor)
            if state["format"] != FORMAT:
                raise ValueError(f"it is of format {state['format']}, and this release knows {FORMAT}")
        except (KeyError, OSError, OverflowError, TypeError, ValueError) as error:
            raise UpgradeFailed(f"the state of the former anchor cannot be read: {error}") from error
        return ReceivedState(state, is_check=marker == ANCHOR_CHECK_MARKER)
    return None


def is_next_code() -> bool:
    """Say whether this process was executed by a former anchor, and has not claimed the state yet."""
    marker = os.environ.get(ANCHOR_MARKER)
    return marker is not None and _find_memory(marker) is not None


def tell_options(options: str, control_path: str | None) -> None:
    """Tell the former code, as the child that tries the state, what was tried; the last word of a check.

    Args:
        options: what :func:`find_options` returns in the process that goes on.
        control_path: where commands will reach the service.
    """
    told = json.dumps({"options": options, "control": control_path})
    sys.stdout.write(f"\n{OPTIONS_PREFIX}{told}\n")
    sys.stdout.flush()


def find_control_path(tried: str | None) -> str | None:
    """Return where commands will reach the new code, by what its check has told; None where it has not said."""
    found = _read_tried(tried).get("control")
    return found if isinstance(found, str) else None


def find_options() -> str | None:
    """Return the options that were tried before this process was executed; None where a former release knew none.

    The files that they came from may have changed since, or be gone.
    """
    marker = os.environ.get(ANCHOR_MARKER)
    memory = _find_memory(marker) if marker is not None else None
    if memory is None:
        return None
    try:
        tried = json.loads(os.pread(memory, os.fstat(memory).st_size, 0)).get(OPTIONS_KEY)
    except (AttributeError, OSError, ValueError):
        # The claim, which comes next, says what is wrong with it.
        return None
    found = _read_tried(tried).get("options")
    return found if isinstance(found, str) else None


def _read_tried(tried: str | None) -> Mapping[str, Any]:
    try:
        found = json.loads(tried) if tried is not None else None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _find_memory(marker: str) -> int | None:
    """Return the descriptor that a marker names; None if something else, or nothing, is open under its number."""
    try:
        descriptor, device, inode = map(int, marker.split(":"))
        found = os.fstat(descriptor)
    except (OSError, OverflowError, ValueError):
        return None
    is_meant = (found.st_dev, found.st_ino) == (device, inode) and stat.S_ISREG(found.st_mode)
    return descriptor if is_meant else None


def check(launch: Launch, memory: int, timeout: float) -> str | None:
    """Run the new code on a state, as a child that only says whether it can read the state. It blocks.

    Returns:
        What it tells of the options that it has tried; None where it is of a release that does not tell them.

    Raises:
        UpgradeFailed: the new code cannot read it, or does not start; with what it has written.
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
    except OSError as error:
        reason = describe_spawn_failure(launch, error)
        raise UpgradeFailed(f"the new anchor could not be tried: {reason}", phase="check") from error
    except subprocess.SubprocessError as error:
        raise UpgradeFailed(f"the new anchor could not be tried: {error}", phase="check") from error
    # They may hold a password, and so never stand in an error.
    lines = [line for line in result.stdout.splitlines() if not line.startswith(OPTIONS_PREFIX)]
    if result.returncode != 0:
        complaints = [line for line in lines if line.startswith(PREFIX)]
        if complaints:
            raise UpgradeFailed(complaints[-1].removeprefix(PREFIX), phase="check")
        raise UpgradeFailed(
            f"the new anchor does not take over: exit status {result.returncode}",
            phase="check",
            stderr="\n".join(lines)[-ERROR_CHARACTERS:].strip(),
        )
    told = [line for line in result.stdout.splitlines() if line.startswith(OPTIONS_PREFIX)]
    return told[-1].removeprefix(OPTIONS_PREFIX) if told else None


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Let signals wait in the kernel. Call it in the main thread, the only one that there is after an exec."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        unblock_signals()


def unblock_signals() -> None:
    """Let the signals come that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def repeat_signals(pipe: int) -> None:
    """Send the signals again that the former code has not acted upon (``SignalReceiver.fileno``); close the pipe."""
    with contextlib.suppress(BlockingIOError):
        for number in set(os.read(pipe, 65536)) & SIGNALS:
            os.kill(os.getpid(), number)
    os.close(pipe)


def try_state(config: AnchorConfig, state: Mapping[str, Any]) -> None:
    """See that a state can be restored, without the descriptors that it names.

    Raises:
        KeyError, TypeError, ValueError: it cannot be restored.
    """
    workers = []
    for each in state["crew"]["workers"]:
        ours, theirs = socket.socketpair()
        ours.close()
        workers.append({**each, "pidfd": os.open(os.devnull, os.O_RDONLY), "line": theirs.detach()})
    restored = AnchorState.restore(config, {**state, "crew": {**state["crew"], "workers": workers}})
    for worker in restored.pool:
        worker.link.close()
        worker.process.close()
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
        UpgradeFailed: the new code could not be executed, and everything is as it was.
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
