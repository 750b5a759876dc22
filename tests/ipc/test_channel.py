"""Frames: what is sent arrives, what is broken is a typed error, and no descriptor is ever lost.

The autouse guard of conftest.py fails each test that leaves a descriptor open.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import itertools
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecdysis_async._ipc.channel import HEADER, MAGIC, MAX_DESCRIPTORS, MAX_PAYLOAD, Channel, FrameDecoder, encode
from ecdysis_async._system.descriptors import MAX_PER_MESSAGE
from ecdysis_async.errors import (
    ChannelClosed,
    ChannelError,
    DescriptorMismatch,
    DescriptorsLost,
    FrameTooLarge,
    GarbledFrame,
    TruncatedFrame,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
BODIES = st.dictionaries(st.text().filter(lambda key: key != "type"), JSON, max_size=5)
MESSAGES = st.lists(st.tuples(st.text(), BODIES, st.integers(0, 4)), max_size=5)


@contextlib.contextmanager
def channels() -> Iterator[tuple[Channel, Channel]]:
    here, there = map(Channel, socket.socketpair())
    try:
        yield here, there
    finally:
        here.close()
        there.close()


@contextlib.contextmanager
def raw_peer() -> Iterator[tuple[socket.socket, Channel]]:
    """A channel whose other end writes what it likes."""
    here, there = socket.socketpair()
    channel = Channel(there)
    try:
        yield here, channel
    finally:
        here.close()
        channel.close()


@contextlib.contextmanager
def files(count: int) -> Iterator[list[int]]:
    """Open descriptors that are told apart by their position."""
    opened = []
    try:
        for number in range(count):
            descriptor = os.memfd_create(str(number))
            opened.append(descriptor)
            os.ftruncate(descriptor, number)
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)


@contextlib.contextmanager
def file_limit(soft: int) -> Iterator[None]:
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def numbers(descriptors: Sequence[int]) -> list[int]:
    """Tell which of `files` these are."""
    return [os.fstat(descriptor).st_size for descriptor in descriptors]


def send_raw(sock: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    assert sock.sendmsg([data], ancillary) == len(data)


def is_open(descriptor: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


# --- the decoder ------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # a busy machine is no failure
@given(messages=MESSAGES, data=st.data())
def test_decoder_returns_what_was_encoded_however_it_is_split(
    messages: list[tuple[str, dict[str, Any], int]], data: st.DataObject
) -> None:
    # Plain numbers instead of open files: nothing here may close one, and an attempt raises EBADF.
    numbered = iter(range(1_000_000, 2_000_000))
    expected = [(name, body, tuple(next(numbered) for _ in range(count))) for name, body, count in messages]
    stream = b"".join(encode(name, body, len(descriptors)) for name, body, descriptors in expected)
    # The first byte of each frame, and the descriptors that travel with it.
    arriving: dict[int, tuple[int, ...]] = {}
    position = 0
    for name, body, descriptors in expected:
        arriving[position] = descriptors
        position += len(encode(name, body, len(descriptors)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=20)) | {0, len(stream)})
    decoder = FrameDecoder()
    found = []
    for start, end in itertools.pairwise(cuts):
        with_it = [number for at in range(start, end) for number in arriving.get(at, ())]
        found += decoder.feed(stream[start:end], with_it)
    decoder.end()
    assert [(frame.type, frame.body, frame.descriptors) for frame in found] == expected


@settings(deadline=None)  # a busy machine is no failure
@given(junk=st.binary(min_size=1, max_size=64), valid_count=st.integers(0, 2), descriptor_count=st.integers(0, 3))
def test_decoder_never_keeps_a_descriptor_of_garbage(junk: bytes, valid_count: int, descriptor_count: int) -> None:
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(descriptor_count)]
    decoder = FrameDecoder()
    frames = []
    with contextlib.suppress(ChannelError):
        frames = decoder.feed(encode("hello", {}, 0) * valid_count + junk, opened)
        decoder.end()
    for frame in frames:
        frame.close()
    assert not any(map(is_open, opened))
    assert decoder.pending == b""


@settings(deadline=None)  # a busy machine is no failure
@given(position=st.integers(0, 60), value=st.integers(0, 255))
def test_a_flipped_byte_is_an_error_of_ours_or_another_frame(position: int, value: int) -> None:
    data = bytearray(encode("listeners", {"names": ["tcp:127.0.0.1:8000"]}, 0))
    data[position % len(data)] = value
    decoder = FrameDecoder()
    try:
        frames = decoder.feed(bytes(data))
        decoder.end()
    except ChannelError:
        return
    assert len(frames) == 1


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"GET / HTTP/1.1\r\n", GarbledFrame),
        (b"ECX", GarbledFrame),
        (b"\0", GarbledFrame),
        (HEADER.pack(MAGIC, MAX_PAYLOAD + 1, 0), FrameTooLarge),
        (HEADER.pack(MAGIC, 2, MAX_DESCRIPTORS + 1), FrameTooLarge),
        (HEADER.pack(MAGIC, 0, 0), GarbledFrame),
        (HEADER.pack(MAGIC, 2, 0) + b"[]", GarbledFrame),
        (HEADER.pack(MAGIC, 2, 0) + b"{}", GarbledFrame),
        (HEADER.pack(MAGIC, 10, 0) + b'{"type":1}', GarbledFrame),
        (HEADER.pack(MAGIC, 1, 0) + b"\xff", GarbledFrame),
        (HEADER.pack(MAGIC, 100_000, 0) + b"[" * 100_000, GarbledFrame),
        (encode("hello", {}, 1), DescriptorMismatch),
    ],
)
def test_broken_bytes_are_a_typed_error(data: bytes, error: type[ChannelError]) -> None:
    decoder = FrameDecoder()
    with pytest.raises(error):
        decoder.feed(data)
    assert decoder.pending == b""
    with pytest.raises(GarbledFrame):
        decoder.feed(encode("hello", {}, 0))


@pytest.mark.parametrize("complete", [True, False])
def test_too_many_descriptors_are_closed(complete: bool) -> None:
    data = encode("listeners", {}, 1)
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    with pytest.raises(DescriptorMismatch):
        FrameDecoder().feed(data if complete else data[:-1], opened)
    assert not any(map(is_open, opened))


def test_an_error_closes_the_descriptors_of_frames_before_it_as_well() -> None:
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    with pytest.raises(GarbledFrame):
        FrameDecoder().feed(encode("listeners", {}, 2) + b"garbage", opened)
    assert not any(map(is_open, opened))


@pytest.mark.parametrize("length", [1, 4, HEADER.size, HEADER.size + 5])
def test_end_within_a_frame_is_truncation(length: int) -> None:
    opened = os.open("/dev/null", os.O_RDONLY)
    decoder = FrameDecoder()
    data = encode("stash", {}, 1)[:length]
    assert decoder.feed(data, [opened]) == []
    assert decoder.pending == data
    with pytest.raises(TruncatedFrame):
        decoder.end()
    assert not is_open(opened)
    assert decoder.pending == b""


def test_encode_refuses_what_no_peer_accepts() -> None:
    with pytest.raises(ValueError, match="too large"):
        encode("stash", {"x": "y" * MAX_PAYLOAD}, 0)
    with pytest.raises(ValueError, match="too large"):
        encode("listeners", {}, MAX_DESCRIPTORS + 1)
    with pytest.raises(ValueError, match="type"):
        encode("hello", {"type": "other"}, 0)
    with pytest.raises(ValueError, match="JSON"):
        encode("hello", {"x": float("nan")}, 0)


@pytest.mark.parametrize(
    "count", [0, 1, MAX_PER_MESSAGE, 30 * MAX_PER_MESSAGE, 30 * MAX_PER_MESSAGE + 1, MAX_DESCRIPTORS]
)
def test_each_batch_of_descriptors_has_a_byte_to_travel_with(count: int) -> None:
    data = encode("", {}, count)
    assert len(data) * MAX_PER_MESSAGE >= count
    (frame,) = FrameDecoder().feed(data, range(1_000_000, 1_000_000 + count))
    assert (frame.type, frame.body, len(frame.descriptors)) == ("", {}, count)


def test_the_format_is_frozen() -> None:
    # If this fails, no released version will understand this one: change the test never, and the format neither.
    assert encode("hello", {"versions": [1, 1]}, 3) == (
        b'ECDY\x00\x00\x00\x21\x00\x00\x00\x03{"type":"hello","versions":[1,1]}'
    )


# --- the channel ------------------------------------------------------------------------------------------------------


async def test_frames_arrive_in_order_with_their_descriptors() -> None:
    with channels() as (here, there), files(4) as opened:
        await here.send("hello", {"versions": [1, 2], "name": "\udcff"})
        await here.send("listeners", {}, opened[:3])
        await here.send("commit", {}, opened[3:])
        hello = await there.receive()
        assert (hello.type, hello.body, hello.descriptors) == ("hello", {"versions": [1, 2], "name": "\udcff"}, ())
        listeners = await there.receive()
        assert numbers(listeners.descriptors) == [0, 1, 2]
        assert not any(map(os.get_inheritable, listeners.descriptors))
        commit = await there.receive()
        assert numbers(commit.descriptors) == [3]
        listeners.close()
        commit.close()
        # The sender's own are still open.
        assert numbers(opened) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, MAX_PER_MESSAGE, MAX_PER_MESSAGE + 1, 1000])
async def test_many_descriptors_travel_in_batches(count: int) -> None:
    with file_limit(4096), files(count) as opened, channels() as (here, there):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(here.send, "listeners", {}, opened)
            frame = await there.receive()
        assert numbers(frame.descriptors) == list(range(count))
        frame.close()


@pytest.mark.parametrize(
    ("count", "size", "is_sent"), [(MAX_PER_MESSAGE, 0, True), (MAX_PER_MESSAGE + 1, 0, False), (0, 1_000_000, False)]
)
async def test_a_frame_is_sent_at_once_or_not_at_all(*, count: int, size: int, is_sent: bool) -> None:
    with files(count) as opened, channels() as (here, there):
        assert here.send_at_once("provision", {"text": "x" * size}, opened) is is_sent
        await here.send("behind")
        if is_sent:
            frame = await there.receive()
            assert (frame.type, numbers(frame.descriptors)) == ("provision", list(range(count)))
            frame.close()
        assert (await there.receive()).type == "behind"


async def test_a_full_channel_takes_nothing_at_once() -> None:
    with channels() as (here, there):
        sent = 0
        while here.send_at_once("more", {"text": "x" * 10_000}):
            sent += 1
        for _ in range(sent):
            assert (await there.receive()).type == "more"
        assert there.receive_nowait() is None


async def test_a_large_frame_passes_while_the_other_end_sends_one_too() -> None:
    body = {"text": "x" * 2_000_000}
    with channels() as (here, there):
        async with anyio.create_task_group() as tasks:
            # A reader and a writer wait on each descriptor at the same time.
            tasks.start_soon(here.send, "stash", body)
            tasks.start_soon(there.send, "stash", body)
            tasks.start_soon(here.receive)
            frame = await there.receive()
        assert frame.body == body


async def test_senders_do_not_mix_their_frames() -> None:
    with channels() as (here, there):
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(here.send, "progress", {"number": number, "text": "x" * 300_000})
            seen = [(await there.receive()).body["number"] for _ in range(10)]
        assert sorted(seen) == list(range(10))


class Starved(socket.socket):
    """A socket for which the kernel has no memory, twice: that cannot be had really."""

    times = 2

    def recvmsg(self, *arguments: Any) -> Any:
        if self.times:
            self.times -= 1
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return super().recvmsg(*arguments)


async def test_a_kernel_without_memory_costs_no_frame() -> None:
    ours, theirs = socket.socketpair()
    starved = Starved(fileno=theirs.detach())
    near, far = Channel(ours), Channel(starved)
    with contextlib.closing(near), contextlib.closing(far):
        await near.send("ready", {"number": 1}, [0])
        with anyio.fail_after(60):
            frame = await far.receive()
        assert (frame.body, len(frame.descriptors), starved.times) == ({"number": 1}, 1, 0)
        frame.close()


async def test_receive_nowait_returns_what_is_there() -> None:
    with raw_peer() as (peer, channel):
        assert channel.receive_nowait() is None
        data = encode("hello", {}, 0)
        peer.sendall(data[:5])
        assert channel.receive_nowait() is None
        peer.sendall(data[5:] + data)
        for _ in range(2):
            frame = channel.receive_nowait()
            assert frame is not None
            assert frame.type == "hello"
        assert channel.receive_nowait() is None
        peer.close()
        for _ in range(2):
            with pytest.raises(ChannelClosed):
                channel.receive_nowait()


async def test_cancelling_receive_loses_nothing() -> None:
    with channels() as (here, there):
        received: list[int] = []

        async def receive_with_interruptions() -> None:
            while len(received) < 200:
                with anyio.CancelScope() as scope:
                    tasks.start_soon(cancel_soon, scope)
                    received.append((await there.receive()).body["number"])

        async def cancel_soon(scope: anyio.CancelScope) -> None:
            await anyio.lowlevel.checkpoint()
            scope.cancel()

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive_with_interruptions)
                for number in range(200):
                    await here.send("progress", {"number": number})
        assert received == list(range(200))


async def test_another_process_goes_on_where_one_ended() -> None:
    with raw_peer() as (peer, channel):
        data = encode("progress", {"left": 3}, 0)
        peer.sendall(data * 3 + data[:20])
        await channel.receive()
        heir = Channel(socket.socket(fileno=os.dup(channel.fileno())))
        heir.resume(channel.pending)
        channel.close()
        peer.sendall(data[20:])
        for _ in range(3):
            assert (await heir.receive()).body == {"left": 3}
        assert heir.receive_nowait() is None
        heir.close()


async def test_going_on_with_garbage_is_an_error_of_the_next_receive() -> None:
    with channels() as (here, _):
        here.resume(b"garbage")
        with pytest.raises(GarbledFrame):
            await here.receive()


async def test_receive_takes_nothing_when_it_is_cancelled_already() -> None:
    with channels() as (here, there):
        await here.send("commit")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await there.receive()
        assert scope.cancelled_caught
        assert (await there.receive()).type == "commit"


async def test_the_peers_end_is_told_from_a_truncated_frame() -> None:
    with raw_peer() as (peer, channel):
        peer.sendall(encode("hello", {}, 0))
        peer.close()
        assert (await channel.receive()).type == "hello"
        with pytest.raises(ChannelClosed):
            await channel.receive()
    with raw_peer() as (peer, channel), files(1) as opened:
        send_raw(peer, encode("hello", {}, 1)[:-1], opened)
        peer.close()
        for _ in range(2):
            with pytest.raises(TruncatedFrame):
                await channel.receive()


async def test_a_peer_that_dies_with_unread_frames_is_gone() -> None:
    with channels() as (here, there):
        await here.send("listeners")
        await there.send("failed", {"why": "no module"})
        # With data unread the kernel reports ECONNRESET, but only after what the peer had sent.
        there.close()
        with pytest.raises(ChannelClosed):
            await here.send("commit")
        assert (await here.receive()).body == {"why": "no module"}
        with pytest.raises(ChannelClosed):
            await here.receive()


async def test_surplus_descriptors_break_the_channel() -> None:
    with raw_peer() as (peer, channel), files(2) as opened:
        send_raw(peer, encode("listeners", {}, 1), opened)
        for _ in range(2):
            with pytest.raises(DescriptorMismatch):
                await channel.receive()


@pytest.mark.parametrize("in_two", [False, True])
async def test_descriptors_that_the_kernel_dropped_cost_their_frame(in_two: bool) -> None:
    with raw_peer() as (peer, channel), files(10) as opened:
        data = encode("listeners", {"number": 7}, 10)
        send_raw(peer, encode("before", {}, 0))
        send_raw(peer, data[:20] if in_two else data, opened)
        free = os.dup(0)
        os.close(free)
        # Room for three: those arrive, the others are lost (MSG_CTRUNC).
        with file_limit(free + 3):
            frame = channel.receive_nowait()
            assert frame is not None
            assert frame.type == "before"
            assert channel.holds_descriptors
            if in_two:
                assert channel.receive_nowait() is None
                send_raw(peer, data[20:])
            with pytest.raises(DescriptorsLost, match="LimitNOFILE") as failure:
                channel.receive_nowait()
        assert (failure.value.type, failure.value.body) == ("listeners", {"number": 7})
        assert not channel.holds_descriptors
        # And what follows is as it should be.
        send_raw(peer, encode("after", {}, 2), opened[:2])
        after = await channel.receive()
        assert (after.type, len(after.descriptors)) == ("after", 2)
        after.close()


async def test_descriptors_that_were_dropped_and_belong_to_no_frame_break_the_channel() -> None:
    with raw_peer() as (peer, channel), files(4) as opened:
        send_raw(peer, encode("before", {}, 0), opened)
        free = os.dup(0)
        os.close(free)
        with file_limit(free), pytest.raises(DescriptorMismatch):
            channel.receive_nowait()


async def test_close_wakes_who_waits_and_drops_what_was_received() -> None:
    with raw_peer() as (peer, channel), files(2) as opened:
        send_raw(peer, encode("a", {}, 0) + encode("b", {}, 1), opened[:1])
        send_raw(peer, encode("c", {}, 1)[:-1], opened[1:])
        assert (await channel.receive()).type == "a"
        channel.close()
        channel.close()
        assert channel.fileno() == -1
        with pytest.raises(ChannelClosed):
            await channel.receive()
        with pytest.raises(ChannelClosed):
            await channel.send("hello")
    with channels() as (here, _):

        async def expect_closed() -> None:
            with pytest.raises(ChannelClosed):
                await here.receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(expect_closed)
            await anyio.wait_all_tasks_blocked()
            here.close()


async def test_send_gives_up_a_peer_that_does_not_read() -> None:
    with channels() as (here, there):
        with pytest.raises(ChannelError, match="does not read"):
            await here.send("stash", {"text": "x" * 3_000_000}, timeout=0.5)
        assert here.fileno() == -1
        with pytest.raises(TruncatedFrame):
            await there.receive()


async def test_a_frame_that_has_begun_is_finished_before_cancellation() -> None:
    with channels() as (here, there):
        body = {"text": "x" * 3_000_000}
        finished = False
        async with anyio.create_task_group() as tasks:

            async def send() -> None:
                nonlocal finished
                await here.send("stash", body)
                finished = True

            tasks.start_soon(send)
            # Until its first bytes are here.
            await anyio.wait_readable(there)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                frame = await there.receive()
        assert frame.body == body
        assert finished


async def test_a_frame_that_has_not_begun_is_not_sent_after_cancellation() -> None:
    with channels() as (here, there):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await here.send("commit")
        assert scope.cancelled_caught
        assert there.receive_nowait() is None
        await here.send("abort")
        assert (await there.receive()).type == "abort"


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_native_cancellation_half_way_closes_the_channel() -> None:
    with channels() as (here, there):
        task = asyncio.ensure_future(here.send("stash", {"text": "x" * 3_000_000}))
        await anyio.wait_readable(there)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert here.fileno() == -1
        with pytest.raises(TruncatedFrame):
            await there.receive()


async def test_a_descriptor_that_is_none_leaves_the_channel_usable() -> None:
    with channels() as (here, there):
        closed = os.dup(0)
        os.close(closed)
        with pytest.raises(ChannelError, match="Bad file descriptor"):
            await here.send("listeners", {}, [closed])
        await here.send("abort")
        assert (await there.receive()).type == "abort"


def test_the_kernel_reads_no_two_batches_at_once() -> None:
    # What the room for one batch per read, and the order of the descriptors, stand on.
    here, there = socket.socketpair()
    with here, there, files(3) as opened:
        send_raw(here, b"a")
        send_raw(here, b"b", opened[:2])
        send_raw(here, b"c", opened[2:])
        size = socket.CMSG_SPACE(MAX_PER_MESSAGE * 4)
        for expected in (b"ab", 2), (b"c", 1):
            data, ancillary, _, _ = there.recvmsg(100, size)
            received = array.array("i", ancillary[0][2])
            for descriptor in received:
                os.close(descriptor)
            assert (data, len(received)) == expected
