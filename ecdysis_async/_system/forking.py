"""What a child must not have that the application forks without executing anything: multiprocessing, ``os.fork``.

Such a child is a copy of this process. It would hold the listening sockets open, so that clients queue where nobody
accepts, and the next start finds its address in use. It would keep the ends of our channels open, so that nobody learns
of this process' death by them. Children of ``subprocess`` execute another program, and keep nothing of this.
"""

from __future__ import annotations

import contextlib
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

__all__ = ["withhold_from_children", "withholding_from_children"]


class HasDescriptor(Protocol):
    """Whatever owns a descriptor: a socket, a channel. Its number is negative once it is closed."""

    def fileno(self) -> int:
        """Return the number of the descriptor."""


_withheld: weakref.WeakSet[HasDescriptor] = weakref.WeakSet()
_finders: list[Callable[[], Iterable[HasDescriptor]]] = []


def withhold_from_children(holder: HasDescriptor) -> None:
    """Let forked children have nothing of a socket, nor of its duplicates, for as long as its owner lives."""
    _withheld.add(holder)


@contextlib.contextmanager
def withholding_from_children(find: Callable[[], Iterable[HasDescriptor]]) -> Iterator[None]:
    """Let children that are forked inside this block have none of the sockets that are found at that moment."""
    _finders.append(find)
    try:
        yield
    finally:
        _finders.remove(find)


def _holders() -> list[HasDescriptor]:
    return [*_withheld, *(holder for find in _finders for holder in find())]


def _let_go_in_child() -> None:
    """Put /dev/null in the place of each socket that is withheld.

    The numbers stay in use, because the owners of the sockets were copied as well: they would close whatever has got
    their number meanwhile. A registration with epoll belongs to the open socket, which the parent still has, and so the
    parent's event loop notices nothing.
    """
    inodes = set()
    for holder in _holders():
        with contextlib.suppress(OSError, ValueError):
            if (number := holder.fileno()) >= 0:
                inodes.add(os.fstat(number).st_ino)
    numbers = [number for number in _open_descriptors() if _is_one_of(number, inodes)] if inodes else []
    if not numbers:
        return
    # Closed first: at the limit of open files there is room for /dev/null only then.
    os.close(numbers[0])
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in numbers:
        if number != null:
            os.dup2(null, number, inheritable=False)
    if null not in numbers:
        os.close(null)


def _open_descriptors() -> Iterator[int]:
    try:
        yield from map(int, os.listdir("/proc/self/fd"))
    except OSError:
        # Without /proc the owners' own numbers are all that is known: duplicates stay.
        for holder in _holders():
            with contextlib.suppress(OSError, ValueError):
                yield holder.fileno()


def _is_one_of(number: int, inodes: set[int]) -> bool:
    try:
        found = os.fstat(number)
    except OSError:
        return False  # the directory itself, which is closed by now
    return stat.S_ISSOCK(found.st_mode) and found.st_ino in inodes


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
