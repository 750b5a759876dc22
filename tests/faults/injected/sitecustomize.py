"""What makes a process of the service fail: Python imports it at its start, where it is on PYTHONPATH.

The product knows nothing of it. Messages and system calls of the package are wrapped, and act where the file ``armed``
says so: once, in the first process that comes there in the role that is meant. Where a file ``recording`` is instead,
each point that is reached is told. ``points.py`` finds the same points in the source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import importlib.machinery
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any

DIRECTORY = os.environ.get("FAULTS")
PACKAGE = "ecdysis_async."
CHANNEL = f"{PACKAGE}_ipc.channel"

# Whose calls are points: by the object that has the function, and the name under which the package calls it.
SEAMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "os": (os, ("dup", "execve", "ftruncate", "memfd_create", "open", "pidfd_open", "pipe2", "pwrite", "replace")),
    "fcntl": (fcntl, ("fcntl",)),
    "signal": (signal, ("pidfd_send_signal",)),
    "socket": (socket, ("recv_fds", "send_fds", "socketpair")),
    "sock": (socket.socket, ("accept", "bind", "connect", "listen", "recvmsg", "sendmsg")),
    "subprocess": (subprocess, ("_fork_exec",)),
}

# How long one is slow, seconds: longer than the library waits for nothing, shorter than any of its limits.
SLOW_SECONDS = 0.5

# How far up the stack one looks for who speaks on a channel.
DEPTH = 16

_open, _write, _rename, _kill = os.open, os.write, os.rename, os.kill
# The error that the next system call for a message meets.
pending_error: int | None = None


def find_kind() -> str:
    """Say what this process is, from what it was given at its start."""
    if "ECDYSIS_CHECK" in os.environ or "ECDYSIS_ANCHOR_CHECK" in os.environ:
        return "check"
    if "ECDYSIS_LINE" in os.environ:
        return "worker"
    if "--takeover" in sys.orig_argv and "ECDYSIS_ANCHOR" not in os.environ:
        return "newcomer"
    if "run" in sys.orig_argv:
        return "anchor"
    return "command" if "restart" in sys.orig_argv else "generation"


def tell(what: str, **facts: Any) -> None:
    """Append a line to what the harness reads; short enough to be written in one piece."""
    descriptor = _open(f"{DIRECTORY}/events", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _write(descriptor, json.dumps({"event": what, "pid": os.getpid(), "kind": KIND, **facts}).encode() + b"\n")
    finally:
        os.close(descriptor)


def read(name: str) -> dict[str, Any] | None:
    """Return what the harness has written for this process, or None."""
    try:
        descriptor = _open(f"{DIRECTORY}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found: dict[str, Any] = json.loads(os.read(descriptor, 65536))
    finally:
        os.close(descriptor)
    return found


def find_role(serving: Sequence[int]) -> str:
    """Say what this process is in what happens now."""
    if KIND in ("worker", "generation"):
        return "predecessor" if os.getpid() in serving else "successor"
    return KIND


def reach(point: str) -> str | None:
    """Note that this point is reached; return the fault that it is time for, unless that is done here."""
    if (recording := read("recording")) is not None:
        tell("reached", point=point, role=find_role(recording["serving"]))
        return None
    armed = read("armed")
    if armed is None or armed["point"] != point or armed["role"] != find_role(armed["serving"]):
        return None
    try:
        _rename(f"{DIRECTORY}/armed", f"{DIRECTORY}/fired")
    except OSError:  # another process was here first
        return None
    fault: str = armed["fault"]
    tell("fired", point=point, fault=fault)
    match fault:
        case "SIGKILL" | "SIGSTOP":
            _kill(os.getpid(), signal.Signals[fault])
        case "slow":
            time.sleep(SLOW_SECONDS)
        case _:
            return fault
    return None


def find_caller(frame: FrameType | None) -> str | None:
    """Return the package's function that makes a call, itself or by subprocess."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(PACKAGE):
            return f"{name.removeprefix(PACKAGE)}:{frame.f_code.co_qualname}"
        if name not in ("subprocess", __name__, "sitecustomize"):
            return None
        frame = frame.f_back
    return None


def wrap(owner: Any, name: str, label: str) -> None:
    """Make a function a point wherever the package calls it."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def seam(*arguments: Any, **named: Any) -> Any:
        global pending_error
        if (caller := find_caller(sys._getframe(1))) is not None:
            if name == "sendmsg" and pending_error is not None:
                number, pending_error = pending_error, None
                raise OSError(number, os.strerror(number))
            if (fault := reach(f"{caller} {label}")) is not None:
                number = getattr(errno, fault)
                raise OSError(number, os.strerror(number))
        return original(*arguments, **named)

    setattr(owner, name, seam)


def find_conversation(frame: FrameType | None) -> str:
    """Say which conversation a message is part of, from who sends or receives it."""
    for _ in range(DEPTH):
        if frame is None:
            break
        if frame.f_code.co_filename.endswith("/worker_link.py"):
            return "line"
        frame = frame.f_back
    return "handoff"


def wrap_channel(module: ModuleType) -> None:
    """Make each message a point, where it is sent and where it is received."""
    encode: Callable[..., bytes] = vars(module)["encode"]
    receive: Callable[..., Any] = module.Channel.receive_nowait

    def encode_or_fail(type: str, body: Any, descriptor_count: int) -> bytes:
        global pending_error
        data = encode(type, body, descriptor_count)
        caller = sys._getframe(1)
        if caller.f_code.co_name in ("send", "send_at_once"):
            match reach(f"{find_conversation(caller)} {str(type)!r} sent"):
                case None:
                    pass
                case "garbage":
                    return b"\xff" * len(data)
                case name:
                    pending_error = getattr(errno, name)
        return data

    def receive_or_fail(self: Any) -> Any:
        frame = receive(self)
        if frame is not None:
            fault = reach(f"{find_conversation(sys._getframe(1))} {str(frame.type)!r} received")
            if fault is not None and frame.descriptors:
                # As the kernel does where there is no room for them (MSG_CTRUNC).
                frame.close()
                dataclasses.replace(frame, descriptors=(), lost_descriptors=True).require_descriptors()
        return frame

    vars(module)["encode"] = encode_or_fail
    module.Channel.receive_nowait = receive_or_fail


class Loader(importlib.machinery.SourceFileLoader):
    """Loads the channel, and wraps it."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute it first."""
        super().exec_module(module)
        wrap_channel(module)


class Finder:
    """Finds the channel, and nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> Any:
        """Find one module, with a loader that wraps it."""
        if name != CHANNEL:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.origin is None:
            return None
        return importlib.util.spec_from_file_location(name, spec.origin, loader=Loader(name, spec.origin))


if DIRECTORY is not None and (KIND := find_kind()) in os.environ.get("FAULTS_KINDS", KIND).split(","):
    with contextlib.suppress(FileNotFoundError):  # the test is over, and its directory gone
        tell("started", at=time.time())
        for prefix, (owner, names) in SEAMS.items():
            for name in names:
                wrap(owner, name, f"{prefix}.{name}")
        sys.meta_path.insert(0, Finder())
