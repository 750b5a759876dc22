"""The predecessor's side of moving connections: it offers them, and lets go of those that the successor has taken.

Descriptors pass over a socketpair of their own, in batches. A connection is checked, packed and sent without an await
between. For each batch the receiver says once which connections it takes, *before* it reads from any of them. Then the
sender lets go of its copies of these, and keeps the others. If the receiver dies without an answer, the sender goes on
with all of them. Closing a copy never disturbs the peer, as long as there is another one.

Nothing here knows a loop or a protocol: a connection packs itself (``connection.py``).
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Collection

import anyio
import anyio.lowlevel

from ecdysis_async._system.descriptors import send_with_descriptors
from ecdysis_async._system.garbage import without_full_collections

from .connection import Connection
from .parcel import BATCH, MESSAGE_BYTES, Answer, MalformedMessage, TransferRecord, write_batch
from .tracker import Tracker

__all__ = ["Sender", "socketpair"]

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

# How many bytes of what the connections had received travel in one message.
BATCH_BYTES = 96 * 1024
# What one connection may bring along at most, encoded. A connection with more stays, and drains.
PARCEL_BYTES = 64 * 1024
# How many batches may be on their way: the next one is being packed while one is being resumed.
WINDOW = 6
# The next batch is packed in the same turn of the loop, if those before it took no longer than this, seconds.
TURN_SECONDS = 0.0005
# How many connections are looked at in one turn of the loop.
LOOKS_PER_TURN = 64

# What the kernel may hold of messages that were not received yet, in bytes.
BUFFER_BYTES = 1024 * 1024

# Connections that were busy are looked at again when they say that they are at a safe point, and this often, seconds;
# and that takes no more than this share of the CPU.
LOOK_AGAIN_SECONDS = 0.05
LOOK_AGAIN_SHARE = 0.05
# When connections are offered again that the receiver had no room for, seconds; twice as long each time.
NO_ROOM_SECONDS = 0.1
NO_ROOM_MAX_SECONDS = 2.0

# How long a sender whose time is up waits for the answers to what it has sent, seconds.
LAST_ANSWERS_SECONDS = 0.5

# Descriptors in flight are limited per user (ETOOMANYREFS, unix(7)); no event tells when there is room again, seconds.
IN_FLIGHT_PAUSE_SECONDS = 0.01


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends, non-blocking: each message is whole, and comes with its descriptors."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return ends


class Sender:
    """Passes connections on to the successor, until none is left or the goodbyes begin.

    Args:
        sock: the sender's end, which it takes over.
        tracker: of this generation.
        log: where it says what has happened.
    """

    def __init__(self, sock: socket.socket, tracker: Tracker, log: Log) -> None:
        self._sock = sock
        self._tracker = tracker
        self.log = log
        self._queue: deque[Connection] = deque()
        # The connections in the queue or on their way: a copy that is sent twice would have two readers.
        self._listed: set[Connection] = set()
        # The connections on their way, by the number of their message.
        self._sent: dict[int, list[Connection]] = {}
        self._number = 0
        self._batch = BATCH
        self._no_room_until = 0.0
        self._no_room_seconds = NO_ROOM_SECONDS
        self._news = anyio.Event()
        # Whether the receiver has closed its end: then it takes nothing more.
        self._is_over = False

    async def run(self, died: anyio.Event, on_swept: Callable[[], None]) -> None:
        """Pass on what can move, until the receiver ends. Its caller cancels it when it is time for the goodbyes.

        Args:
            died: set when the successor is dead.
            on_swept: called once each connection was looked at.

        Cancelled, it waits shortly for the answers to what it has sent.
        """
        self._tracker.on_safe_point = self._enqueue
        begun, moved = time.monotonic(), self._tracker.count.transferred
        try:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(self._end_at_death, died, task_group.cancel_scope)
                task_group.start_soon(self._hear_all, task_group.cancel_scope)
                await self._send_all(on_swept)
        finally:
            self._tracker.moves = False
            self._tracker.on_safe_point = None
            if not died.is_set():
                # The goodbyes are due, so there is little time; the receiver needs less.
                with anyio.move_on_after(LAST_ANSWERS_SECONDS, shield=True):
                    await self._hear_last()
            self._end(is_dead=died.is_set())
            self.log.info(
                "transfer: %d connections have moved in %.3f seconds, %d are left",
                self._tracker.count.transferred - moved,
                time.monotonic() - begun,
                len(self._tracker),
            )

    # What is sent

    async def _send_all(self, on_swept: Callable[[], None]) -> None:
        with without_full_collections():
            spent = await self._offer_all()
            # Handlers that were woken by this offer their connections now.
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            await self._send_queue()
            while self._sent:
                await self._wait_for_news()
        on_swept()
        while True:
            with anyio.move_on_after(max(LOOK_AGAIN_SECONDS, spent / LOOK_AGAIN_SHARE)):
                while True:
                    await self._wait_for_news()
                    await self._send_queue()
            spent = await self._offer_all()

    async def _offer_all(self) -> float:
        """Look at each connection, and send those at a safe point; return the seconds that the looks took."""
        spent = 0.0
        connections = self._tracker.connections()
        for start in range(0, len(connections), LOOKS_PER_TURN):
            begun = time.perf_counter()
            for connection in connections[start : start + LOOKS_PER_TURN]:
                self._enqueue(connection)
            spent += time.perf_counter() - begun
            await self._send_queue()
        return spent

    async def _send_queue(self) -> None:
        begun = time.monotonic()
        while self._queue:
            now = time.monotonic()
            if now < self._no_room_until:
                await anyio.sleep(self._no_room_until - now)
            while len(self._sent) >= WINDOW:
                await self._wait_for_news()
            error = self._send_batch()
            if error == errno.ETOOMANYREFS:
                # Too many descriptors are on their way, for this user; perhaps fewer find room.
                self._batch = max(1, self._batch // 2)
                await anyio.sleep(IN_FLIGHT_PAUSE_SECONDS)
            elif error == errno.EAGAIN:
                await anyio.wait_writable(self._sock)
            elif error:
                # The receiver has closed its end. Its last answers are still to be heard.
                await anyio.sleep_forever()
            elif time.monotonic() - begun >= TURN_SECONDS or not self._queue:
                await anyio.lowlevel.checkpoint()
                begun = time.monotonic()

    def _send_batch(self) -> int:
        """Look at some connections, and send those at a safe point; return the error number of sendmsg, or 0."""
        connections: list[Connection] = []
        texts: list[str] = []
        size = looks = 0
        while self._queue and len(connections) < self._batch and size < BATCH_BYTES and looks < LOOKS_PER_TURN:
            connection = self._queue.popleft()
            looks += 1
            parcel = self._pack(connection)
            if parcel is None:
                self._listed.discard(connection)
                continue
            text = self._write(parcel)
            if text is not None and len(text) > PARCEL_BYTES:
                self.log.info(
                    "a connection has %d kB of unread bytes and state, encoded, and %d can move: it stays, and drains",
                    len(text) // 1024,
                    PARCEL_BYTES // 1024,
                )
                text = None
            if text is None:
                connection.refused = True
                self._keep(connection)
                continue
            connections.append(connection)
            texts.append(text)
            size += len(text)
        if not connections:
            return 0
        self._number += 1
        message = write_batch(self._number, texts)
        try:
            send_with_descriptors(self._sock, message, [connection.fileno() for connection in connections])
        except OSError as error:
            for connection in connections:
                self._keep(connection)
                self._enqueue(connection)
            return error.errno or errno.EIO
        self._sent[self._number] = connections
        self._batch = min(BATCH, self._batch + 1)
        return 0

    def _pack(self, connection: Connection) -> TransferRecord | None:
        try:
            return connection.pack()
        except Exception:
            # The application's side of the connection failed.
            self.log.exception("a connection cannot be released: it stays, and drains")
            connection.refused = True
            return None

    def _write(self, parcel: TransferRecord) -> str | None:
        try:
            return json.dumps(parcel.to_json(), separators=(",", ":"), allow_nan=False)
        except Exception:
            # A protocol's state is checked nowhere else. It costs its own connection the transfer, and no other.
            self.log.exception("a connection released what is no JSON: it stays, and drains")
            return None

    def _keep(self, connection: Connection) -> None:
        self._listed.discard(connection)
        try:
            connection.keep()
        except Exception:
            self.log.exception("a connection was not taken, and cannot go on either")

    def _enqueue(self, connection: Connection) -> None:
        """Let a connection be looked at, and sent if it can be."""
        if connection.movable and not connection.refused and connection not in self._listed:
            self._listed.add(connection)
            self._queue.append(connection)
            self._news.set()

    async def _wait_for_news(self) -> None:
        self._news = anyio.Event()
        await self._news.wait()

    # What is heard

    async def _hear_all(self, scope: anyio.CancelScope) -> None:
        while await self._hear():
            # One answer in each turn: the protocols of all that have moved are told of their end in the next turn.
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    async def _hear_last(self) -> None:
        while self._sent and await self._hear():
            pass

    async def _hear(self) -> bool:
        """Wait for an answer, and act on it; return False once the receiver has ended."""
        while (is_heard := self._hear_now()) is None:
            await anyio.wait_readable(self._sock)
        return is_heard

    def _hear_now(self) -> bool | None:
        """Do the same without waiting; return None where no answer is there."""
        try:
            message = self._sock.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # The kernel says first that the other end was closed with something unread, then it gives its answers.
            return self._hear_now()
        except OSError:
            message = b""
        if not message:
            self._is_over = True
            return False
        try:
            answer = Answer.read(message)
            connections = self._sent.pop(answer.number)
        except (MalformedMessage, KeyError):
            self.log.exception("transfer: the successor answers what this release does not understand: %r", message)
            return False
        self._act(connections, answer.taken, answer.later)
        for reason in answer.reasons:
            self.log.warning("the successor does not take some connections: %s", reason)
        return True

    def _act(self, connections: list[Connection], taken: Collection[int], later: Collection[int]) -> None:
        for index, connection in enumerate(connections):
            if index in taken:
                self._listed.discard(connection)
                self._tracker.note_moved(connection)
                connection.let_go()
                continue
            self._keep(connection)
            if index in later:
                self._enqueue(connection)
            else:
                connection.refused = True
        if later:
            self._no_room_until = time.monotonic() + self._no_room_seconds
            self._no_room_seconds = min(2 * self._no_room_seconds, NO_ROOM_MAX_SECONDS)
        else:
            self._no_room_seconds = NO_ROOM_SECONDS
        self._news.set()

    async def _end_at_death(self, died: anyio.Event, scope: anyio.CancelScope) -> None:
        # The death has to be told: a process that the successor has forked may hold the other end open.
        await died.wait()
        scope.cancel()

    def _end(self, *, is_dead: bool) -> None:
        """Keep each connection that was not taken, if it is certain that it never will be."""
        # The last answers of a dead receiver are still there.
        while self._sent and self._hear_now():
            pass
        self._sock.close()
        for connections in self._sent.values():
            for connection in connections:
                if is_dead or self._is_over:
                    self._keep(connection)
                else:
                    # The receiver lives and does not answer. It may begin at any time, and two must never read.
                    connection.let_go()
        self._sent.clear()
        for connection in self._tracker.connections():
            connection.decline()
