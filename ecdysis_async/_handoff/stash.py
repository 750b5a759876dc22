"""State that outlives the process: what one generation leaves to the next, in sealed memory files (memfd).

What travels is descriptors, so a gigabyte is written once and never copied through a pipe. The predecessor's part is
:class:`Stashes` and :class:`Batch`, the successor's is :class:`InheritedStash`; neither knows the handoff.
"""

from __future__ import annotations

import enum
import fcntl
import functools
import inspect
import logging
import mmap
import os
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import anyio
import anyio.lowlevel

from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import GarbledFrame, StashFailed

__all__ = ["At", "Batch", "InheritedStash", "Piece", "Producer", "Stashes", "Version"]

# What can be produced. Everything else that has a buffer (array, mmap, NumPy) is taken as well.
Piece: TypeAlias = bytes | bytearray | memoryview
Pieces: TypeAlias = Piece | Iterable[Piece] | AsyncIterable[Piece]
Producer: TypeAlias = Callable[[], Pieces | Awaitable[Pieces]]

Version: TypeAlias = str | int
KeepState: TypeAlias = Callable[[str, Version, int], None]

# A reader maps what it is given: without these seals, its writer could cut it short (SIGBUS), or change it.
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

MAX_NAME = 128

log = logging.getLogger("ecdysis_async")

# How much one call in a thread writes, bytes: between two of them the restart can be called off.
SLICE = 64 * 1024 * 1024
# Pieces that are smaller are collected to this size first: a thread for each of them would cost more than the writing.
GATHER = 1024 * 1024
# How long pieces are collected before the loop has its turn, seconds.
TURN_SECONDS = 0.002


class At(enum.StrEnum):
    """When a stash is made."""

    START = "start"  # when the restart begins; it can be read from the successor's first line on
    COMMIT = "commit"  # after the pause; it can be read after ready()


@dataclass(frozen=True, slots=True)
class Order:
    """What the application wants to leave to its successors."""

    name: str
    producer: Producer
    at: At
    version: Version
    is_kept: bool = False


class Stashes:
    """What a generation makes for each of its successors.

    Attributes:
        keep: called with the name, the version and the descriptor of each stash that is to be kept for the case of a
            crash, when it is made.
    """

    def __init__(self) -> None:
        self.keep: KeepState = lambda name, version, descriptor: None
        self._orders: dict[str, Order] = {}

    def add(self, name: str, producer: Producer, at: At | str, version: Version, *, keep: bool = False) -> None:
        """Let each restart make a stash.

        Raises:
            ValueError, TypeError: an argument is not what it should be, or the name is taken.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a stash is a string, not {name!r}")
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"the name of a stash is of 1 to {MAX_NAME} printable characters, not {name!r}")
        if name in self._orders:
            raise ValueError(f"there is a stash {name!r} already: give this one another name")
        if not callable(producer):
            raise TypeError(f"the producer of the stash {name!r} cannot be called: pass a function that returns bytes")
        if isinstance(version, bool) or not isinstance(version, str | int):
            raise TypeError(f"the version of the stash {name!r} is a string or a number, not {version!r}")
        if at not in set(At):
            raise ValueError(f'a stash is made at "start" or at "commit", not {at!r}')
        self._orders[name] = Order(name, producer, At(at), version, keep)

    def names(self, at: At) -> list[str]:
        """Return what is made then."""
        return [order.name for order in self._orders.values() if order.at is at]

    def is_kept(self, name: str) -> bool:
        """Say whether a stash is to be kept for the case of a crash."""
        return name in self._orders and self._orders[name].is_kept

    def batch(self, at: At) -> Batch:
        """Return what has to be made for one restart."""
        return Batch([order for order in self._orders.values() if order.at is at], self.keep)


class Batch:
    """What one restart hands over at one moment.

    Attributes:
        making: the name of what is being made.
        descriptors: what was made, in the order of its description; they belong to the batch.
    """

    def __init__(self, orders: Iterable[Order] = (), keep: KeepState | None = None) -> None:
        self.making: str | None = None
        self.descriptors: list[int] = []
        self._orders = list(orders)
        self._keep = keep
        self._sizes: list[int] = []

    async def make(self) -> None:
        """Make all of it, one after the other.

        Raises:
            StashFailed: a producer raised, or returned what is no bytes; or there is no memory.
        """
        for order in self._orders:
            self.making = order.name
            try:
                descriptor = _make_memory()
                self.descriptors.append(descriptor)
                self._sizes.append(await _fill(descriptor, order.producer))
                if order.is_kept and self._keep is not None:
                    self._keep(order.name, order.version, descriptor)
            except Exception as error:
                raise StashFailed(f"the stash {order.name!r} could not be made: {error!r}") from error
        self.making = None

    def describe(self) -> list[dict[str, Any]]:
        """Return what travels beside the descriptors, as JSON."""
        return [
            {"name": order.name, "version": order.version, "size": size}
            for order, size in zip(self._orders, self._sizes, strict=True)
        ]

    def close(self) -> None:
        """Let go of it: a successor that has it keeps it. Harmless if done already."""
        while self.descriptors:
            os.close(self.descriptors.pop())


async def _fill(descriptor: int, producer: Producer) -> int:
    """Write what a producer gives, and seal it; return its size in bytes."""
    writer = _Writer(descriptor)
    made: Any = producer()
    if inspect.isawaitable(made):
        made = await made
    if _is_piece(made):
        await writer.add(made)
    elif isinstance(made, AsyncIterable):
        pieces = aiter(made)
        try:
            async for piece in pieces:
                await writer.add(piece)
        finally:
            # Here and now, where the restart is called off: not when it is collected.
            if isinstance(pieces, AsyncGenerator):
                with anyio.CancelScope(shield=True):
                    await pieces.aclose()
    elif isinstance(made, Iterable) and not isinstance(made, str):
        for piece in made:
            await writer.add(piece)
    else:
        raise TypeError(f"its producer gives bytes, or yields them, and no {type(made).__name__}")
    return await writer.finish()


def _is_piece(value: object) -> bool:
    try:
        memoryview(value).release()  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


class _Writer:
    """Writes pieces to a memory file, in a thread, and never keeps the loop from its turn for long."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = 0
        self._gathered = bytearray()
        self._turn = time.monotonic() + TURN_SECONDS

    async def add(self, piece: Piece) -> None:
        """Take a piece; when this returns, its producer may change it."""
        with memoryview(piece) as view, view.cast("B") as octets:
            is_small = octets.nbytes < GATHER
            if is_small:
                self._gathered += octets
            if len(self._gathered) >= GATHER or (self._gathered and not is_small):
                await self._write_gathered()
            if not is_small:
                await self._write(octets)
        if time.monotonic() > self._turn:
            await anyio.lowlevel.checkpoint()
            self._turn = time.monotonic() + TURN_SECONDS

    async def finish(self) -> int:
        """Write what is left, and let nobody write any more; return how many bytes there are."""
        await self._write_gathered()
        # It takes milliseconds where there are gigabytes.
        await run_in_thread(lambda: fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SEALS))
        return self._size

    async def _write_gathered(self) -> None:
        with memoryview(self._gathered) as view:
            await self._write(view)
        self._gathered.clear()

    async def _write(self, octets: memoryview) -> None:
        for start in range(0, octets.nbytes, SLICE):
            with octets[start : start + SLICE] as part:
                # Cancelled, this waits for the thread: nobody writes from a buffer that is given back.
                await run_in_thread(functools.partial(_write, self._descriptor, part, self._size))
                self._size += part.nbytes
        self._turn = time.monotonic() + TURN_SECONDS


def _write(descriptor: int, octets: memoryview, position: int) -> None:
    # What takes the time is the kernel's finding of new pages. Writing through a mapping, populated beforehand or not,
    # takes twice as long, because that clears each page first; smaller slices or fallocate gain nothing.
    while octets:
        written = os.pwrite(descriptor, octets, position)
        octets, position = octets[written:], position + written


class _NoStash(KeyError):
    """There is no such stash, or none yet; its text is a sentence, which a ``KeyError`` would put into quotes."""

    def __str__(self) -> str:
        return str(self.args[0])


class InheritedStash(Mapping[str, memoryview]):
    """What the predecessor has left to this generation, by name: read-only views of its bytes.

    Empty in the first generation, unless a crash has left something. The memory is given back when the block of the
    ``Ecdysis`` ends, or earlier by :meth:`pop`, once nobody holds a view (or a slice of one) any more.

    A stash that is made at the commit is there after ``ready()``. To ask for it before, also by ``in`` and ``get()``,
    is an error (a ``KeyError`` that says so): to go on as if there were none would lose it. What is iterated over, or
    counted, lacks it until then, which is logged.
    """

    def __init__(self) -> None:
        self._views: dict[str, memoryview] = {}
        self._versions: dict[str, Version] = {}
        # What the predecessor makes at the commit, until it is here; and why it never comes.
        self._awaited: frozenset[str] = frozenset()
        self._is_forsaken = False
        # What the application has read, or was told that nobody has read.
        self._noted: set[str] = set()
        self._has_told_of_awaited = False

    def __getitem__(self, name: str) -> memoryview:
        try:
            view = self._views[name]
        except KeyError:
            raise self._error(name) from None
        self._noted.add(name)
        return view

    def __contains__(self, name: object) -> bool:
        if self._is_awaited(name):
            raise self._error(str(name))
        return name in self._views

    def get(self, name: str, default: Any = None) -> Any:
        """Return a view, or the default where the predecessor has left no such stash.

        Raises:
            KeyError: it has, but it is made at the commit, and this generation is not ready.
        """
        return self[name] if name in self else default  # noqa: SIM401 - this is `get`

    def __iter__(self) -> Iterator[str]:
        self._tell_of_awaited()
        return iter(self._views)

    def __len__(self) -> int:
        self._tell_of_awaited()
        return len(self._views)

    def version(self, name: str) -> Version:
        """Return what the predecessor has called the format of a stash; it is known after ``pop()`` as well.

        Raises:
            KeyError: there is no such stash.
        """
        try:
            return self._versions[name]
        except KeyError:
            raise self._error(name) from None

    def pop(self, name: str) -> memoryview:
        """Return a view and keep none: its memory is given back as soon as the last reference to it is dropped.

        Raises:
            KeyError: there is no such stash.
        """
        view = self[name]
        del self._views[name]
        return view

    # What the handoff tells it

    def expect(self, names: Iterable[str]) -> None:
        """Take note of what will be made at the commit."""
        self._awaited = frozenset(names)

    def expect_no_more(self) -> None:
        """Take note that the predecessor is dead: what is not here never comes."""
        self._is_forsaken = True

    def receive(self, described: Sequence[Mapping[str, Any]], descriptors: Sequence[int]) -> None:
        """Map what has come; the descriptors stay the caller's.

        Raises:
            GarbledFrame: something is not what it is described as, or could still be changed.
            OSError: it cannot be mapped.
            KeyError, TypeError, ValueError: the description is none.
        """
        if len(described) != len(descriptors):
            raise GarbledFrame(f"{len(descriptors)} descriptors came for {len(described)} stashes")
        for each, descriptor in zip(described, descriptors, strict=True):
            name, version, size = each["name"], each["version"], each["size"]
            if not isinstance(name, str) or not isinstance(version, str | int) or not isinstance(size, int):
                raise GarbledFrame(f"a stash is described as {dict(each)!r}")
            self._views[name] = _map(name, descriptor, size)
            self._versions[name] = version
        self._awaited -= self._views.keys()

    def versions(self) -> Mapping[str, Version]:
        """Return the versions of all that has come, by name."""
        return self._versions

    def take_unread(self) -> list[str]:
        """Return the names of what nobody has read, each once."""
        unread = [name for name in self._views if name not in self._noted]
        self._noted.update(unread)
        return unread

    def clear(self) -> None:
        """Let go of all views; those that somebody else holds stay valid."""
        self._views.clear()

    def _is_awaited(self, name: object) -> bool:
        return name in self._awaited and not self._is_forsaken

    def _tell_of_awaited(self) -> None:
        if self._awaited and not self._is_forsaken and not self._has_told_of_awaited:
            self._has_told_of_awaited = True
            log.warning(
                "inherited_stash is looked through before ready(), and lacks what is made at the commit: %s",
                ", ".join(map(repr, sorted(self._awaited))),
            )

    def _error(self, name: str) -> KeyError:
        return _NoStash(self._explain(name))

    def _explain(self, name: str) -> str:
        if name in self._versions:
            return f"the stash {name!r} was popped, or the block of the Ecdysis has ended"
        if name not in self._awaited:
            return f"the predecessor has left no stash {name!r}"
        if self._is_forsaken:
            return f"the predecessor died before it made the stash {name!r}, which was due at the commit"
        return f"the stash {name!r} is made at the commit: it can be read after ready()"


def _map(name: str, descriptor: int, size: int) -> memoryview:
    status = os.fstat(descriptor)
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # no memory file at all
        seals = 0
    if not stat.S_ISREG(status.st_mode) or status.st_size != size or seals & SEALS != SEALS:
        raise GarbledFrame(f"the stash {name!r} is no sealed memory file of {size:,} bytes")
    if size == 0:
        return memoryview(b"")
    # Private, because Linux before 6.7 refuses to share a file that nobody may write. It is never unmapped in so many
    # words, which an existing view would not survive: the last view takes it along.
    return memoryview(mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))


def _make_memory() -> int:
    try:
        return os.memfd_create("ecdysis-stash", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise OSError(error.errno, f"memfd_create: {error.strerror}") from error
