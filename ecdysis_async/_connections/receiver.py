"""The successor's side of moving connections: it takes over what can go on here, and closes everything else.

For each batch the receiver says once which connections it takes, *before* it reads from any of them. Whatever stands in
a message, each descriptor that came with it is served or closed; the predecessor keeps what was not taken. Nothing here
knows a loop, a protocol or a gate: see ``parcel.py`` for what resumes a connection.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import anyio

from ecdysis_async._system.descriptors import close_all, receive_with_descriptors
from ecdysis_async._system.garbage import age_all_objects

from .parcel import BATCH, MESSAGE_BYTES, Answer, Batch, ConnectionResumer, MalformedMessage, Refused, TransferRecord

__all__ = ["Delivery", "Receiver", "make_room"]

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]
Begin = Callable[[socket.socket], Awaitable[None]]

# How many connections are resumed at a time: each takes a few turns of the loop, which serves others as well. Where
# these turns are long, because the machine is busy, more are resumed in them. Otherwise those that have moved first and
# ask already would hold up the rest beyond the end of the drain.
RESUMED_AT_A_TIME = 8
RESUMED_AT_MOST = 128
LONG_SECONDS = 0.02

# The receiver leaves a share of its descriptors to those who connect.
RESERVE_SHARE = 0.05
RESERVE_AT_LEAST = 16
# A table for this many descriptors takes half a megabyte.
ROOM_AT_MOST = 65536


def make_room(connections: int) -> None:
    """Make the table of descriptors large enough for as many more, while nothing is served yet.

    It doubles when it is full, and in a process of several threads each doubling is a stall of 8 to 18 ms.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(2 * connections + 256, soft - 1, ROOM_AT_MOST)
    with contextlib.suppress(OSError, ValueError):
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, wanted))


class Delivery:
    """One message, and the descriptors that came with it: it owns them, and closes at its end what was not taken.

    Attributes:
        text: of the message.
        count: how many descriptors came.
        lost_descriptors: whether the kernel left the last ones out, because this process had no room for them.
    """

    def __init__(self, text: bytes, descriptors: Sequence[int], *, lost_descriptors: bool = False) -> None:
        self.text = text
        self.count = len(descriptors)
        self.lost_descriptors = lost_descriptors
        self._descriptors: dict[int, int] = dict(enumerate(descriptors))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors that were not taken; harmless if done already."""
        close_all(self._descriptors.values())
        self._descriptors.clear()

    def close_beyond(self, limit: int) -> int:
        """Close the first descriptor whose number is ``limit`` or more, and all behind it; return how many are left.

        The kernel gives the lowest number that is free: all below it are in use.
        """
        fitting = next((index for index, number in self._descriptors.items() if number >= limit), self.count)
        for index in range(fitting, self.count):
            os.close(self._descriptors.pop(index))
        return fitting

    def take(self, index: int) -> socket.socket:
        """Give one descriptor away, as the socket of a connection.

        Raises:
            Refused: it is no connection. The descriptor is still owned here.
        """
        try:
            sock = socket.socket(fileno=self._descriptors[index])
        except OSError as error:
            raise Refused("a descriptor came that is no socket") from error
        try:
            is_listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            is_connection = sock.type == socket.SOCK_STREAM and not is_listening
        except OSError:
            is_connection = False
        if not is_connection:
            sock.detach()
            raise Refused("a descriptor came whose socket is no connection")
        del self._descriptors[index]
        return sock


class Receiver:
    """Takes over live connections of the predecessor.

    Args:
        sock: the receiver's end, which it takes over.
        find_resumer: returns what resumes connections of the listener of a name; None where nobody listens by that
            name, or its connections cannot be resumed.
        log: where it says what has happened.
    """

    def __init__(self, sock: socket.socket, find_resumer: Callable[[str], ConnectionResumer | None], log: Log) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._find_resumer = find_resumer
        self.log = log
        self._served = 0
        self._aged = 0
        self._at_a_time = RESUMED_AT_A_TIME

    async def run(self) -> None:
        """Take over connections until the predecessor has ended, or says what this release does not understand.

        Cancelled, it takes no more; what it has taken is served.
        """
        # What the initialisation has left will live for long, too.
        age_all_objects()
        try:
            while (delivery := await self._receive()) is not None:
                await self._take(delivery)
        except MalformedMessage as error:
            # Its text says all: what the message was read by does not matter.
            self.log.error("transfer: the predecessor is not understood, and keeps the rest: %s", error)  # noqa: TRY400
        finally:
            self._sock.close()
            if self._served:
                self.log.info("transfer: %d connections of the predecessor are served here now", self._served)

    async def _receive(self) -> Delivery | None:
        """Wait for a message; return None where the predecessor has ended.

        Raises:
            MalformedMessage: it is longer than a message can be, or empty.
        """
        while True:
            try:
                return self._receive_now()
            except BlockingIOError:
                await anyio.wait_readable(self._sock)

    def _receive_now(self) -> Delivery | None:
        """Do the same without waiting.

        Raises:
            BlockingIOError: no message is there.
            MalformedMessage: see above.
        """
        try:
            received = receive_with_descriptors(self._sock, MESSAGE_BYTES)
        except ConnectionResetError:
            # The kernel says this first, once; the messages that were sent before are still there.
            return self._receive_now()
        delivery = Delivery(received.data, received.descriptors, lost_descriptors=received.lost_descriptors)
        if received.data and not received.is_cut:
            return delivery
        delivery.close()
        if not delivery.count and not received.data:
            return None
        raise MalformedMessage("its message is too long" if received.is_cut else "its message is empty")

    def _receive_if_there(self) -> Delivery | None:
        try:
            return self._receive_now()
        except BlockingIOError:
            return None

    async def _take(self, delivery: Delivery | None) -> None:
        """Say which connections of a batch are served here, and of those that have come meanwhile; then serve them.

        Raises:
            MalformedMessage: one is no batch.
        """
        taken: list[tuple[Begin, socket.socket]] = []
        try:
            while delivery is not None:
                with delivery:
                    taken += await self._accept(delivery)
                delivery = self._receive_if_there() if len(taken) < self._at_a_time else None
        finally:
            # The taken connections are this process', whatever happens.
            with anyio.CancelScope(shield=True):
                await self._resume(taken)

    async def _accept(self, delivery: Delivery) -> list[tuple[Begin, socket.socket]]:
        """Say which connections of a batch are served here, and return them."""
        batch = Batch.read(delivery.text)
        ready: list[tuple[Begin, socket.socket]] = []
        try:
            answer = self._choose(batch, delivery, ready)
            # The copies of what is refused are closed before the predecessor goes on with it.
            delivery.close()
            await self._answer(answer.write())
        except BaseException:
            for _, sock in ready:
                sock.close()
            raise
        return ready

    async def _resume(self, taken: Sequence[tuple[Begin, socket.socket]]) -> None:
        start = 0
        while start < len(taken):
            begun = time.monotonic()
            size = self._at_a_time
            async with anyio.create_task_group() as task_group:
                for begin, sock in taken[start : start + size]:
                    task_group.start_soon(self._begin, begin, sock)
            start += size
            is_long = time.monotonic() - begun > LONG_SECONDS
            self._at_a_time = min(2 * size, RESUMED_AT_MOST) if is_long else max(size // 2, RESUMED_AT_A_TIME)
        if self._served >= self._aged + BATCH:
            self._aged = self._served
            age_all_objects()

    def _choose(self, batch: Batch, delivery: Delivery, ready: list[tuple[Begin, socket.socket]]) -> Answer:
        """Put into ``ready`` what can be served here, and return the answer that says so."""
        count = len(batch.connections)
        if delivery.count > count or (delivery.count < count and not delivery.lost_descriptors):
            # Which descriptor belongs to which connection is not known then.
            reason = f"{delivery.count} descriptors came with {count} connections"
            self.log.error("transfer: the predecessor keeps a batch of connections: %s", reason)
            return Answer(batch.number, reasons=[reason])
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        fitting = delivery.close_beyond(soft - max(RESERVE_AT_LEAST, int(soft * RESERVE_SHARE)))
        reasons: set[str] = set()
        if fitting < count:
            reasons.add("too many files are open there (ulimit -n, LimitNOFILE=); it is tried again")
        taken: list[int] = []
        # In the order that they were sent in: where there is no room, the kernel leaves out the last ones.
        for index in range(fitting):
            try:
                begin = self._prepare(batch.connections[index])
                ready.append((begin, delivery.take(index)))
            except Refused as refusal:
                reasons.add(str(refusal))
            else:
                taken.append(index)
        return Answer(batch.number, taken, range(fitting, count), reasons)

    def _prepare(self, fields: Any) -> Begin:
        try:
            parcel = TransferRecord.from_json(fields)
            resumer = self._find_resumer(parcel.listener)
            if resumer is None:
                raise Refused(f"nobody listens on {parcel.listener} there")
            return resumer.prepare(parcel)
        except Refused:
            raise
        except Exception as error:
            self.log.exception("a connection of the predecessor's cannot be resumed: the predecessor keeps it")
            raise Refused(f"it cannot be resumed there: {error!r}") from error

    async def _answer(self, message: bytes) -> None:
        while True:
            try:
                self._sock.send(message, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await anyio.wait_writable(self._sock)
            except (BrokenPipeError, ConnectionResetError):
                # The predecessor is dead, or has let its copies go: it closes its end only when nothing is open.
                return
            else:
                return

    async def _begin(self, begin: Begin, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            await begin(sock)
        except Exception:
            self.log.exception("a connection of the predecessor's was taken over, and failed")
        else:
            self._served += 1
