"""Who has what an application cannot have, in words: what its "address already in use", or "locked", leaves out.

It reads /proc (proc(5)), and blocks for as long as that takes: it is for a process that cannot start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any

__all__ = ["describe_held", "describe_owner", "describe_taken", "find_siblings"]

# TCP_LISTEN of the kernel, as /proc/net/tcp writes it.
LISTENING = "0A"
TABLES = ("tcp", "tcp6")

MAX_PORT = 65535
WORDS_SHOWN = 40

# How libraries name the address that they could not bind, in what they say of the error.
_PORT = re.compile(r"(?:', |:)(\d{1,5})\b")
_IN_USE = re.compile(r"address already in use|failed to bind", re.IGNORECASE)

_PID = re.compile(r"\bpid\W{0,3}(\d{1,9})\b", re.IGNORECASE)
_LOCKED = re.compile(r"\block(?:ed)?\b", re.IGNORECASE)

LOCK_REMEDIES = (
    "Let the old release leave first (ecdysis run --one-at-a-time), or open it once this release is final "
    "(ecdysis_async.settled)"
)
REMEDIES = (
    "Open it once this release is final (ecdysis_async.settled), or in one process at a time "
    "(ecdysis_async.exclusive); hand its socket over (listen_tcp of the Ecdysis); or let the old release leave first "
    "(ecdysis run --one-at-a-time)"
)


def describe_taken(error: BaseException, relatives: Collection[int]) -> str | None:
    """Say of an "address already in use" which port it is about, who has it, and what can be done.

    Args:
        error: what an application has raised, or anything that came of it.
        relatives: the processes of this service.

    Returns:
        One or two sentences; None where the error is another one, or the port is not known.
    """
    candidates = [port for each in _walk(error) if _is_in_use(each) for port in _find_ports(each)]
    if not candidates:
        return None
    listening = _find_listening()
    port = next((each for each in candidates if each in listening), None)
    if port is None:
        return None
    owner = describe_owner(port, relatives)
    pids = _find_pids(listening[port])
    if any(pid == os.getpid() for pid in pids):
        return f"Port {port} is open in this process already: it is opened twice"
    if any(pid in relatives for pid in pids):
        return (
            f"Port {port} is taken by {owner}, which is of this service and serves until this process does. {REMEDIES}"
        )
    return f"Port {port} is taken by {owner}: stop that program, or take another port"


def describe_held(error: BaseException, relatives: Collection[int]) -> str | None:
    """Say of an error about a lock that a process of this service may have it, and what can be done.

    Args:
        error: what an application has raised, or anything that came of it.
        relatives: the processes of this service.

    Returns:
        A sentence or two; None where the error is another one, or there is no other process.
    """
    for each in _walk(error) if relatives else ():
        text = str(each)
        pid = next((pid for pid in map(int, _PID.findall(text)) if pid in relatives), None)
        if pid is not None:
            return f"Pid {pid} is of this service, and serves until this process does. {LOCK_REMEDIES}"
        if isinstance(each, BlockingIOError) or _LOCKED.search(text) is not None:
            return (
                "If another process of this service has it, such as the old release, that serves until this process "
                f"does. {LOCK_REMEDIES}"
            )
    return None


def describe_owner(port: int, relatives: Collection[int] = ()) -> str:
    """Say who listens on a TCP port of this machine, as far as that can be seen.

    Args:
        port: the port.
        relatives: the processes that are named before others.
    """
    found = _find_listening().get(port, {})
    pids = _find_pids(found)
    if not pids:
        uids = sorted(set(found.values()) - {os.geteuid()})
        return f"a process of uid {uids[0]}" if uids else "a process that cannot be seen from here"
    pid = next((each for each in pids if each in relatives), pids[0])
    return f"pid {pid} ({_describe_command(pid)})"


def find_siblings() -> list[int]:
    """Return the other children of this process' parent, of a worker: those of its anchor."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/task/{parent}/children", encoding="ascii") as file:
            return [pid for pid in map(int, file.read().split()) if pid != os.getpid()]
    # The kernel may have been built without it (CONFIG_PROC_CHILDREN).
    except (OSError, ValueError):
        return []


def _walk(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, and all that have led to it or are in it."""
    pending, seen = [error], set()
    while pending:
        each = pending.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        others = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        pending += [other for other in (*others, each.__cause__, each.__context__) if other is not None]


def _is_in_use(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.EADDRINUSE or _IN_USE.search(str(error)) is not None


def _find_ports(error: BaseException) -> Iterator[int]:
    """Yield what may be the port: named in the error, or in a variable where it was raised."""
    yield from (int(found) for found in _PORT.findall(str(error)) if 0 < int(found) <= MAX_PORT)
    for variables in reversed(list(_variables(error.__traceback__))):
        for value in (*variables.values(), getattr(variables.get("self"), "server_address", None)):
            if isinstance(value, tuple) and len(value) in (2, 4) and _is_port(value[1]):
                yield value[1]
        if _is_port(port := variables.get("port")):
            yield port


def _variables(trace: TracebackType | None) -> Iterator[dict[str, Any]]:
    while trace is not None:
        yield trace.tb_frame.f_locals
        trace = trace.tb_next


def _is_port(value: object) -> bool:
    return isinstance(value, int) and 0 < value <= MAX_PORT


def _find_listening() -> dict[int, dict[str, int]]:
    """Return the inodes of the sockets that listen, and whose they are (uid), by their ports."""
    found: dict[int, dict[str, int]] = {}
    for table in TABLES:
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/net/{table}", encoding="ascii") as file:
            for line in list(file)[1:]:
                fields = line.split()
                if fields[3] == LISTENING:
                    found.setdefault(int(fields[1].rpartition(":")[2], 16), {})[fields[9]] = int(fields[7])
    return found


def _find_pids(inodes: Collection[str]) -> list[int]:
    """Return the processes that have one of these sockets open, as far as this user may see them."""
    links = {f"socket:[{inode}]" for inode in inodes}
    with contextlib.suppress(OSError):
        pids = [int(name) for name in (os.listdir("/proc") if links else ()) if name.isdecimal()]
        return sorted(pid for pid in pids if not links.isdisjoint(_read_links(f"/proc/{pid}/fd")))
    return []


def _read_links(directory: str) -> Iterator[str]:
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                yield os.readlink(entry.path)


def _describe_command(pid: int) -> str:
    """Name the program of a process, and what it runs; its other arguments may hold a password."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = os.fsdecode(file.read()).split("\0")
    except OSError:
        return "it has just ended"
    shown = [os.path.basename(words[0])]
    if "-m" in words[1:-1]:
        shown += ["-m", words[words.index("-m", 1) + 1]]
    else:
        shown += [os.path.basename(word) for word in words[1:] if word and not word.startswith("-")][:1]
    return "".join(each if each.isprintable() else "?" for each in " ".join(shown))[:WORDS_SHOWN]
