"""What Linux says of the processes of a service: whose children they are, and what memory they use.

Reading it may block for a moment: call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator

__all__ = ["find_acceptors", "find_family", "measure_memory"]

_LISTEN = "0A"  # TCP_LISTEN in proc_net_tcp(5)

# The state, and the parent, of proc_pid_stat(5); the name before them may hold anything.
_STAT = re.compile(rb"\) (\S) (\d+) ")


def find_family(roots: Iterable[int]) -> set[int]:
    """Return these processes and their descendants, as far as they live."""
    children: dict[int, list[int]] = {}
    alive = set()
    for name in os.listdir("/proc"):
        # Gone meanwhile.
        with contextlib.suppress(OSError):
            if name.isdecimal() and (found := _STAT.search(_read(f"/proc/{name}/stat"))) and found[1] not in b"ZX":
                alive.add(int(name))
                children.setdefault(int(found[2]), []).append(int(name))
    family: set[int] = set()
    waiting = [pid for pid in roots if pid in alive]
    while waiting:
        pid = waiting.pop()
        if pid not in family:
            family.add(pid)
            waiting += children.get(pid, ())
    return family


def find_acceptors(pids: Iterable[int], port: int) -> set[int]:
    """Return those of some processes that have a socket which listens on this port."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        # No IPv6 here.
        with contextlib.suppress(FileNotFoundError):
            for line in _read(table).decode().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{inode}]")
    return {pid for pid in pids if not sockets.isdisjoint(_list_descriptors(pid))}


def _list_descriptors(pid: int) -> Iterator[str]:
    """Return what the descriptors of a process are."""
    # Gone meanwhile, or another user's: the process, or one of its descriptors.
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{name}")


def measure_memory(pids: Iterable[int]) -> int:
    """Return what processes use together, in bytes of PSS: what they share is counted once (proc_pid_smaps(5))."""
    total = 0
    for pid in pids:
        # Gone meanwhile, or another user's.
        with contextlib.suppress(OSError):
            if found := re.search(rb"^Pss:\s+(\d+) kB", _read(f"/proc/{pid}/smaps_rollup"), re.MULTILINE):
                total += int(found[1]) * 1024
    return total


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
