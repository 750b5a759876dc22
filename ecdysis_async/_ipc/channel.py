"""Frames with descriptors over an AF_UNIX stream socket: what the handoff travels on.

:class:`FrameDecoder` turns bytes and descriptors into frames and knows no socket; :class:`Channel` moves them and knows
no message of the handoff. Neither may lose a descriptor: each one received belongs to a frame that was handed out, or
it is closed.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel

from ecdysis_async._system.descriptors import (
    MAX_PER_MESSAGE,
    DescriptorWriter,
    close_all,
    receive_with_descriptors,
    send_with_descriptors,
)
from ecdysis_async._system.forking import withhold_from_children
from ecdysis_async.errors import (
    ChannelClosed,
    ChannelError,
    DescriptorMismatch,
    DescriptorsLost,
    FrameTooLarge,
    GarbledFrame,
    TruncatedFrame,
)

__all__ = ["Channel", "Frame", "FrameDecoder", "encode"]

# Frozen for ever: a release must understand the first frame of every other release, older or newer. Magic, length of
# the payload in bytes, number of descriptors; then the payload, a JSON object in UTF-8 with a "type".
MAGIC = b"ECDY"
HEADER = struct.Struct(">4sII")

MAX_PAYLOAD = 16 * 1024 * 1024
MAX_DESCRIPTORS = 16384

READ_SIZE = 64 * 1024

# Descriptors in flight are limited per user (ETOOMANYREFS, unix(7)); no event tells when another process of the same
# user has taken some out, so it is tried again after this many seconds.
IN_FLIGHT_PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class Frame:
    """One message of the handoff, as it came over a channel.

    Attributes:
        type: the message's name, such as ``"hello"``.
        body: the rest of the JSON object.
        descriptors: owned by the receiver of the frame; close-on-exec.
        lost_descriptors: whether the kernel has dropped descriptors of it; those that came are closed.
    """

    type: str
    body: dict[str, Any]
    descriptors: tuple[int, ...] = ()
    lost_descriptors: bool = False

    def require_descriptors(self) -> None:
        """Raise an error where descriptors of it are lost.

        Raises:
            DescriptorsLost: they are; it has the rest of the frame.
        """
        if self.lost_descriptors:
            raise DescriptorsLost(
                f"descriptors of {self.type!r} were lost on the way, most likely because this process has too many "
                "open files: raise the limit (ulimit -n, LimitNOFILE=)",
                self.type,
                self.body,
            )

    def close(self) -> None:
        """Close the descriptors. Call it once, and only if nobody else has taken them over."""
        close_all(self.descriptors)


def encode(type: str, body: Mapping[str, Any], descriptor_count: int) -> bytes:
    """Write a frame as bytes.

    Raises:
        ValueError: it is larger than any peer accepts, or the body has a "type" of its own or is no JSON.
    """
    if "type" in body:
        raise ValueError('the body of a frame has no "type": that is the name of the message')
    payload = json.dumps({"type": type, **body}, separators=(",", ":"), allow_nan=False).encode("ascii")
    # Every batch of descriptors needs a byte to travel with (unix(7)); JSON may end in spaces.
    payload = payload.ljust(descriptor_count // MAX_PER_MESSAGE + 1)
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame of {len(payload):,} bytes is too large: the limit is {MAX_PAYLOAD:,}")
    if descriptor_count > MAX_DESCRIPTORS:
        raise ValueError(f"a frame of {descriptor_count:,} descriptors is too large: the limit is {MAX_DESCRIPTORS:,}")
    return HEADER.pack(MAGIC, len(payload), descriptor_count) + payload


class FrameDecoder:
    """Bytes and descriptors in, frames out; no I/O.

    Descriptors must be fed in the order they came, and not later than the bytes they came with. After an error the
    decoder holds nothing and accepts nothing more.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()
        # Descriptors of the frame that is next to have some were dropped.
        self._is_bereft = False
        self._failed = False

    @property
    def pending(self) -> bytes:
        """The bytes that are not yet part of a complete frame."""
        return bytes(self._buffer)

    @property
    def holds_descriptors(self) -> bool:
        """Whether descriptors came, or were to come, that belong to no complete frame yet."""
        return bool(self._descriptors) or self._is_bereft

    def feed(self, data: bytes, descriptors: Iterable[int] = (), *, lost_descriptors: bool = False) -> list[Frame]:
        """Take over what was received and return the frames that are complete with it.

        Args:
            data: the bytes.
            descriptors: what came with them.
            lost_descriptors: whether more should have come with them.

        Raises:
            GarbledFrame: this is no frame.
            FrameTooLarge: more bytes, or more descriptors, are announced than a frame may have.
            DescriptorMismatch: a frame came with fewer, or with more, descriptors than it states.

        On an error every descriptor is closed, also those of frames that the same call had completed.
        """
        self._descriptors.extend(descriptors)
        self._is_bereft |= lost_descriptors
        self._buffer += data
        frames: list[Frame] = []
        try:
            if self._failed:
                raise GarbledFrame("bytes after a frame that was broken")
            while (frame := self._next_frame()) is not None:
                frames.append(frame)
        except ChannelError:
            self._failed = True
            for frame in frames:
                frame.close()
            self.close()
            raise
        return frames

    def end(self) -> None:
        """Say that nothing more will come.

        Raises:
            TruncatedFrame: that is in the middle of a frame. The descriptors it came with are closed.
        """
        bytes_left, descriptors_left = len(self._buffer), len(self._descriptors)
        self.close()
        if bytes_left or descriptors_left:
            raise TruncatedFrame(
                f"the channel ended within a frame ({bytes_left} bytes and {descriptors_left} descriptors of it came)"
            )

    def close(self) -> None:
        """Forget what is pending and close its descriptors."""
        self._buffer.clear()
        self._is_bereft = False
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        descriptors = tuple(self._descriptors)
        self._descriptors.clear()
        close_all(descriptors)

    def _next_frame(self) -> Frame | None:
        # Looked at before the header is complete, so that a peer who talks something else is found out at once.
        start = self._buffer[: len(MAGIC)]
        if not MAGIC.startswith(start):
            raise GarbledFrame(f"a frame begins with {MAGIC!r}, not with {bytes(start)!r}")
        if len(self._buffer) < HEADER.size:
            # Descriptors travel with a byte of their own frame; with no byte pending there is none they may belong to.
            if not self._buffer and self.holds_descriptors:
                raise DescriptorMismatch(f"{len(self._descriptors)} descriptors more came than the frame states")
            return None
        _, length, count = HEADER.unpack_from(self._buffer)
        if length > MAX_PAYLOAD or count > MAX_DESCRIPTORS:
            raise FrameTooLarge(f"a frame announces {length:,} bytes and {count:,} descriptors")
        end = HEADER.size + length
        if len(self._buffer) < end:
            if len(self._descriptors) > count:
                raise DescriptorMismatch(f"{len(self._descriptors)} descriptors came, the frame states {count}")
            return None
        lost_descriptors = count > 0 and self._is_bereft
        if len(self._descriptors) < count and not lost_descriptors:
            raise DescriptorMismatch(f"{len(self._descriptors)} descriptors came, the frame states {count}")
        type, body = _parse(bytes(self._buffer[HEADER.size : end]))
        del self._buffer[:end]
        if lost_descriptors:
            # All that came are its own: the kernel merges nothing that follows descriptors into one read with them.
            self._is_bereft = False
            self._close_descriptors()
            return Frame(type, body, lost_descriptors=True)
        return Frame(type, body, tuple(self._descriptors.popleft() for _ in range(count)))


class Channel:
    """One end of the connection between two generations.

    It takes the socket over and makes it non-blocking. One task may receive while others send. The methods run on
    whatever event loop the caller is on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = FrameDecoder()
        self._frames: deque[Frame] = deque()
        self._failure: ChannelError | None = None
        self._sending = anyio.Lock()
        self._waiters = 0
        # The peer learns of this process' death by the end of the channel, whatever was forked meanwhile.
        withhold_from_children(self)

    def duplicate(self) -> socket.socket:
        """Return another socket for this end, by which a last word can be said once the channel itself is closed.

        Raises:
            OSError: there is no descriptor for it.
        """
        return self._sock.dup()

    def fileno(self) -> int:
        """The socket's descriptor, or -1 once the channel is closed."""
        return self._sock.fileno()

    async def send(
        self, type: str, body: Mapping[str, Any] | None = None, descriptors: Sequence[int] = (), *, timeout: float = 10
    ) -> None:
        """Send a frame, whole, and duplicates of descriptors; those given stay the caller's.

        Args:
            type: the message's name.
            body: the rest of the JSON object.
            descriptors: what travels with it.
            timeout: seconds until a peer that does not read is given up and the channel closed.

        Raises:
            ChannelClosed: the peer is gone, or the channel is closed.
            ChannelError: it was not sent in time, and the channel is closed; or the kernel refused a descriptor.
            ValueError: the frame is larger than any peer accepts.

        Cancelled before the first byte has left, nothing is sent. Later it finishes first: half a frame would garble
        the stream. An event loop that insists (``asyncio.Task.cancel``) finds the channel closed.
        """
        data = encode(type, body or {}, len(descriptors))
        with anyio.move_on_after(timeout) as scope:
            async with self._sending:
                try:
                    await self._write(data, descriptors, scope)
                except (BrokenPipeError, ConnectionResetError) as error:
                    # Keep the channel open: what the other end said last may still be waiting to be received.
                    raise ChannelClosed("the other end of the channel is closed") from error
                except BaseException as error:
                    if scope.shield:
                        self.close()
                    if isinstance(error, OSError):
                        raise ChannelError(f"{type!r} could not be sent: {error}") from error
                    raise
            return
        self.close()
        raise ChannelError(f"{type!r} could not be sent within {timeout:g} seconds: the other end does not read")

    def send_at_once(self, type: str, body: Mapping[str, Any], descriptors: Sequence[int] = ()) -> bool:
        """Send a frame to a peer that does not read yet: whole, or not at all; return whether it was sent.

        It is not sent where it needs more than one call of the kernel, where the socket has no room for it, or where
        too many descriptors are in flight. Call it while nothing else is being sent.

        Raises:
            ValueError: as :meth:`send`.
        """
        data = encode(type, body, len(descriptors))
        # The kernel takes a message of less than half of the buffer in one piece (unix_stream_sendmsg of Linux).
        room = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4
        if len(descriptors) > MAX_PER_MESSAGE or len(data) > room:
            return False
        try:
            sent = send_with_descriptors(self._sock, data, descriptors)
        except OSError:
            return False
        if sent < len(data):
            # The rest would have to be the very next bytes.
            self.close()
        return sent == len(data)

    async def receive(self) -> Frame:
        """Wait for the next frame.

        Raises:
            ChannelClosed: the peer has closed its end, between two frames, or this end is closed.
            DescriptorsLost: this frame has come without its descriptors; the next one may be received.
            ChannelError: one of its other subclasses; nothing can be received any more.

        Cancellation loses nothing.
        """
        # Before a frame is taken off the queue: once it is, nothing may be awaited any more.
        await anyio.lowlevel.checkpoint()
        while (frame := self.receive_nowait()) is None:
            await self._wait(anyio.wait_readable)
        return frame

    def receive_nowait(self) -> Frame | None:
        """Return the next frame if it is here already, else None. Raises what :meth:`receive` raises."""
        while not self._frames:
            if self._failure is not None:
                raise _copy(self._failure)
            try:
                if not self._read():
                    return None
            except ChannelError as error:
                self._failure = _copy(error)
                self._decoder.close()
                raise
        frame = self._frames.popleft()
        frame.require_descriptors()
        return frame

    @property
    def pending(self) -> bytes:
        """What was read and not handed out, for :meth:`resume` in another process that shares the socket.

        Descriptors do not go with it.
        """
        return b"".join(encode(frame.type, frame.body, 0) for frame in self._frames) + self._decoder.pending

    @property
    def holds_descriptors(self) -> bool:
        """Whether descriptors came that were not handed out: they do not go with ``pending``."""
        return self._decoder.holds_descriptors or any(
            frame.descriptors or frame.lost_descriptors for frame in self._frames
        )

    def resume(self, pending: bytes) -> None:
        """Go on where another process ended: call it before anything is received here.

        If it is broken, the next :meth:`receive` raises what is wrong with it.
        """
        try:
            self._frames.extend(self._decoder.feed(pending))
        except ChannelError as error:
            self._failure = _copy(error)

    def refuse(self) -> None:
        """Give back what nobody can receive here any more: the peer's sends fail, and what it has sent is closed.

        What this end sends still arrives. Harmless if done already.
        """
        try:
            self._sock.shutdown(socket.SHUT_RD)
            while (rest := receive_with_descriptors(self._sock, READ_SIZE)).data:
                close_all(rest.descriptors)
        except OSError:
            # The channel is closed, which gives all back; or there is no memory, and its close does so later.
            pass

    def close(self) -> None:
        """Close this end and every descriptor that was received and not handed out; harmless if done already."""
        if self._sock.fileno() != -1:
            # Wake the waiting tasks: a closed descriptor never becomes readable.
            if self._waiters:
                anyio.notify_closing(self._sock)
            self._sock.close()
        self._failure = self._failure or ChannelClosed("this end of the channel is closed")
        self._decoder.close()
        while self._frames:
            self._frames.popleft().close()

    def _read(self) -> bool:
        """Read once; False where there is nothing to read now."""
        try:
            received = receive_with_descriptors(self._sock, READ_SIZE)
        except BlockingIOError:
            return False
        except ConnectionResetError as error:
            self._decoder.end()
            raise ChannelClosed("the other end of the channel is gone") from error
        if not received.data:
            self._decoder.end()
            raise ChannelClosed("the other end of the channel is closed")
        self._frames.extend(
            self._decoder.feed(received.data, received.descriptors, lost_descriptors=received.lost_descriptors)
        )
        return True

    async def _write(self, data: bytes, descriptors: Sequence[int], scope: anyio.CancelScope) -> None:
        """Write a frame; from its first byte on, shield the scope."""
        writer = DescriptorWriter(data, descriptors)
        while not writer.is_done:
            if self._sock.fileno() == -1:
                raise ChannelClosed("this end of the channel is closed")
            try:
                writer.write(self._sock)
            except BlockingIOError:
                await self._wait(anyio.wait_writable)
                continue
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                await anyio.sleep(IN_FLIGHT_PAUSE)
                continue
            scope.shield = True

    async def _wait(self, wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        self._waiters += 1
        try:
            await wait(self._sock)
        except anyio.ClosedResourceError:
            raise ChannelClosed("this end of the channel was closed") from None
        finally:
            self._waiters -= 1


def _copy(error: ChannelError) -> ChannelError:
    # Without the traceback, which would keep the frames it passed through alive as long as the channel.
    return type(error)(*error.args)


def _parse(payload: bytes) -> tuple[str, dict[str, Any]]:
    try:
        body = json.loads(payload.decode("utf-8"))
    # RecursionError: brackets nested deeper than the parser follows.
    except (ValueError, RecursionError) as error:
        raise GarbledFrame(f"the payload of a frame is no JSON: {error}") from error
    type = body.pop("type", None) if isinstance(body, dict) else None
    if not isinstance(type, str):
        raise GarbledFrame('the payload of a frame is no object with a "type"')
    return type, body
