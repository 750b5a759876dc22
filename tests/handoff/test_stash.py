"""The stash: what producers give arrives as it was, nobody can change it, and nothing stays open or blocks the loop."""

from __future__ import annotations

import array
import fcntl
import gc
import mmap
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest

from ecdysis_async._handoff import stash
from ecdysis_async._handoff.stash import At, Batch, InheritedStash, Producer, Stashes
from ecdysis_async.errors import GarbledFrame, StashFailed

BIG = bytes(range(256)) * 4 * 1024 * 20 + b"and some"  # more than is written at once
MEDIUM = BIG[: stash.GATHER]


async def pass_on(*producers: Producer) -> InheritedStash:
    """Make stashes named 0, 1, 2, ... and receive them."""
    stashes, inherited = Stashes(), InheritedStash()
    for number, producer in enumerate(producers):
        stashes.add(str(number), producer, "start", number)
    batch = stashes.batch(At.START)
    try:
        await batch.make()
        inherited.receive(batch.describe(), batch.descriptors)
    finally:
        batch.close()
    return inherited


def yielding(*pieces: Any) -> Callable[[], Iterator[Any]]:
    return lambda: iter(pieces)


def yielding_async(*pieces: Any) -> Callable[[], AsyncIterator[Any]]:
    async def produce() -> AsyncIterator[Any]:
        for piece in pieces:
            await anyio.lowlevel.checkpoint()
            yield piece

    return produce


def returning_async(value: Any) -> Callable[[], Any]:
    async def produce() -> Any:
        await anyio.lowlevel.checkpoint()
        return value

    return produce


NUMBERS = [b"%d\n" % number for number in range(300_000)]

# What produces, and what shall arrive.
PRODUCERS: dict[str, tuple[Callable[[], Any], bytes]] = {
    "bytes": (lambda: b"bytes", b"bytes"),
    "nothing": (lambda: b"", b""),
    "bytearray": (lambda: bytearray(b"bytearray"), b"bytearray"),
    "memoryview": (lambda: memoryview(b"memoryview")[2:], b"moryview"),
    "array": (lambda: array.array("I", [1, 2]), array.array("I", [1, 2]).tobytes()),
    "big": (lambda: BIG, BIG),
    "async": (returning_async(b"async"), b"async"),
    "no pieces": (yielding(), b""),
    "pieces": (yielding(b"a", b"", bytearray(b"b")), b"ab"),
    "list": (lambda: [b"a", b"list"], b"alist"),
    "small and big": (yielding(b"small", BIG, b"small", MEDIUM, b"end"), b"small" + BIG + b"small" + MEDIUM + b"end"),
    "async pieces": (yielding_async(b"a", BIG, b"b"), b"a" + BIG + b"b"),
    "async list": (returning_async([b"a", b"b"]), b"ab"),
    "many small": (lambda: iter(NUMBERS), b"".join(NUMBERS)),
}


@pytest.mark.parametrize("name", PRODUCERS)
async def test_what_is_produced_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stash, "SLICE", 16 * 1024 * 1024)
    producer, expected = PRODUCERS[name]
    view = (await pass_on(producer))["0"]
    arrived = view == expected
    assert arrived
    assert view.readonly


async def test_a_mapping_of_views_with_versions() -> None:
    inherited = await pass_on(lambda: b"a", lambda: b"b")
    assert (list(inherited), len(inherited), "1" in inherited, "2" in inherited) == (["0", "1"], 2, True, False)
    assert {name: bytes(view) for name, view in inherited.items()} == {"0": b"a", "1": b"b"}
    assert inherited.version("1") == 1
    assert inherited.get("2") is None


async def test_nobody_can_change_it() -> None:
    stashes = Stashes()
    stashes.add("cache", lambda: b"settled", "start", 0)
    batch = stashes.batch(At.START)
    await batch.make()
    descriptor = batch.descriptors[0]
    try:
        for change in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 0),
            lambda: os.ftruncate(descriptor, 4096),
            lambda: mmap.mmap(descriptor, 7),
            lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                change()
    finally:
        batch.close()


async def test_it_can_be_called_off_while_something_is_produced() -> None:
    begun, notes = anyio.Event(), []

    async def produce() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            begun.set()
            await anyio.sleep_forever()
        finally:
            notes.append("closed")

    await call_off(produce, begun)
    assert notes == ["closed"]


async def test_called_off_it_waits_for_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, notes = anyio.Event(), threading.Event(), []
    pwrite = os.pwrite

    def write(*arguments: Any) -> int:
        anyio.from_thread.run_sync(begun.set)
        go_on.wait()
        notes.append("written")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", write)

    async def produce() -> AsyncIterator[bytes]:
        try:
            yield MEDIUM
            yield MEDIUM
        finally:
            await anyio.lowlevel.checkpoint()
            notes.append("closed")

    await call_off(produce, begun, go_on)
    assert notes == ["written", "closed"]


async def call_off(producer: Producer, begun: anyio.Event, go_on: threading.Event | None = None) -> None:
    stashes = Stashes()
    stashes.add("long", producer, "start", 0)
    batch = stashes.batch(At.START)
    try:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(batch.make)
            await begun.wait()
            assert batch.making == "long"
            task_group.cancel_scope.cancel()
            if go_on is not None:
                go_on.set()
    finally:
        batch.close()


async def test_a_producer_runs_on_the_loop_and_its_bytes_are_written_in_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, writers = threading.get_ident(), set()
    pwrite = os.pwrite

    def note(*arguments: Any) -> int:
        writers.add(threading.get_ident())
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", note)

    def produce() -> bytes:
        assert threading.get_ident() == here
        return BIG

    arrived = (await pass_on(produce))["0"] == BIG
    assert arrived
    assert writers
    assert here not in writers


async def test_small_pieces_let_the_loop_turn() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    seen = []

    def produce() -> Iterator[bytes]:
        for _ in range(20):
            time.sleep(stash.TURN_SECONDS * 2)
            seen.append(turns)
            yield b"small"

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(count)
        inherited = await pass_on(produce)
        task_group.cancel_scope.cancel()
    assert inherited["0"] == b"small" * 20
    assert len(set(seen)) > 5


async def test_a_buffer_is_given_back_between_two_pieces() -> None:
    buffer = bytearray(b"x" * stash.GATHER)

    def produce() -> Iterator[bytearray]:
        yield buffer
        buffer.extend(b"yy")  # a BufferError, if somebody still held a view
        yield buffer

    arrived = (await pass_on(produce))["0"] == b"x" * stash.GATHER * 2 + b"yy"
    assert arrived


WRONG: dict[str, Callable[[], Any]] = {
    "ZeroDivisionError": lambda: b"%d" % (1 // 0),
    "no NoneType": lambda: None,
    "no str": lambda: "text",
    "no int": lambda: 7,
    "bytes-like object is required, not 'str'": yielding(b"a", "text"),
    "bytes-like object is required": returning_async({"a": 1}),
    "contiguous": lambda: memoryview(b"abcd")[::2],
}


@pytest.mark.parametrize("message", WRONG)
async def test_what_is_no_producer_says_so(message: str) -> None:
    with pytest.raises(StashFailed, match=f"the stash '0' could not be made: .*{message}"):
        await pass_on(WRONG[message])


async def test_no_descriptor_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, flags: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", fail)
    with pytest.raises(StashFailed, match="Too many open files"):
        await pass_on(lambda: b"")


@pytest.mark.parametrize("name", ["", "x" * 129, "new\nline", "\0"])
def test_a_name_is_short_and_printable(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 128 printable"):
        Stashes().add(name, bytes, "start", 0)


def test_what_cannot_work_is_refused_at_once() -> None:
    stashes = Stashes()
    with pytest.raises(TypeError, match="the name of a stash is a string"):
        stashes.add(b"cache", bytes, "start", 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot be called"):
        stashes.add("cache", b"bytes", "start", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"start" or at "commit", not \'end\''):
        stashes.add("cache", bytes, "end", 0)
    for version in (None, 1.5, True):
        with pytest.raises(TypeError, match="a string or a number"):
            stashes.add("cache", bytes, "start", version)  # type: ignore[arg-type]
    stashes.add("cache", bytes, "commit", "v1")
    with pytest.raises(ValueError, match="already"):
        stashes.add("cache", bytes, "start", 0)
    assert (stashes.names(At.START), stashes.names(At.COMMIT)) == ([], ["cache"])


def test_why_there_is_none() -> None:
    inherited = InheritedStash()
    inherited.expect(["counters"])
    with pytest.raises(KeyError, match="the predecessor has left no stash 'cache'"):
        inherited["cache"]
    with pytest.raises(KeyError, match="made at the commit: it can be read after ready"):
        inherited["counters"]
    inherited.expect_no_more()
    with pytest.raises(KeyError, match="died before it made"):
        inherited.version("counters")


async def test_memory_is_given_back_with_the_last_view() -> None:
    inherited = await pass_on(lambda: b"popped", lambda: b"held", lambda: b"left")

    def maps() -> int:
        gc.collect()
        with open("/proc/self/maps") as file:
            return sum("memfd:ecdysis-stash" in line for line in file)

    assert maps() == 3
    part = inherited.pop("0")[2:]
    assert maps() == 3
    del part
    assert maps() == 2
    with pytest.raises(KeyError, match="was popped"):
        inherited["0"]
    assert inherited.version("0") == 0
    held = inherited["1"][1:]
    inherited.clear()
    assert maps() == 1
    assert (len(inherited), bytes(held)) == (0, b"eld")
    del held
    assert maps() == 0


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, b"12345")
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SEAL])
def test_what_could_still_change_is_refused(missing: int, memory: int) -> None:
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, stash.SEALS & ~missing)
    with pytest.raises(GarbledFrame, match="no sealed memory file of 5 bytes"):
        InheritedStash().receive([{"name": "cache", "version": 0, "size": 5}], [memory])


@pytest.mark.parametrize("size", [4, 6, 0, -1])
def test_a_wrong_size_is_refused(size: int, memory: int) -> None:
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, stash.SEALS)
    with pytest.raises(GarbledFrame, match="no sealed memory file"):
        InheritedStash().receive([{"name": "cache", "version": 0, "size": size}], [memory])


def test_what_is_no_memory_is_refused() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(GarbledFrame, match="no sealed memory file"):
            InheritedStash().receive([{"name": "cache", "version": 0, "size": 0}], [reader])
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    "described",
    [
        [],
        [{"name": "cache", "version": 0, "size": 5}] * 2,
        [{"name": 1, "version": 0, "size": 5}],
        [{"name": "cache", "version": None, "size": 5}],
        [{"name": "cache", "version": 0, "size": "5"}],
    ],
)
def test_a_garbled_description_is_refused(described: list[dict[str, Any]], memory: int) -> None:
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, stash.SEALS)
    with pytest.raises(GarbledFrame):
        InheritedStash().receive(described, [memory])


def test_a_batch_of_nothing() -> None:
    batch = Batch()
    assert batch.describe() == []
    batch.close()


async def test_what_is_made_at_the_commit_is_not_overlooked_before(caplog: pytest.LogCaptureFixture) -> None:
    inherited = InheritedStash()
    inherited.expect(["late"])
    for ask in (lambda: "late" in inherited, lambda: inherited.get("late"), lambda: inherited["late"]):
        with pytest.raises(KeyError, match=r"^the stash 'late' is made at the commit: it can be read after ready\(\)"):
            ask()
    assert "another" not in inherited
    assert inherited.get("another", 1) == 1
    assert caplog.messages == []
    assert list(inherited) == []
    assert len(inherited) == 0
    assert caplog.messages == [
        "inherited_stash is looked through before ready(), and lacks what is made at the commit: 'late'"
    ]
    inherited.expect_no_more()
    assert "late" not in inherited


async def test_what_nobody_has_read_is_known() -> None:
    inherited = await pass_on(lambda: b"one", lambda: b"two")
    first, *others = list(inherited)
    assert bytes(inherited[first])
    assert inherited.take_unread() == others
    assert inherited.take_unread() == []
