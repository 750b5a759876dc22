"""Live connections on their way from a generation that leaves to its successor.

Descriptors pass over a socketpair of their own, in batches. A connection is checked, packed and sent without an await
between. For each batch the receiver says once which ones it takes, *before* it reads from any of them: a predecessor
that has heard it lets go of its copies, and one that has not, because the receiver died, goes on with all of them. What
is refused it keeps as well. Closing a copy never disturbs the peer, as long as there is another one.

Nothing here knows a loop or a protocol: see ``parcel.py`` for who does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import resource
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._system.descriptors import close_all, receive_with_descriptors, send_with_descriptors
from ecdysis_async._system.garbage import age_all_objects, without_full_collections

from .parcel import ConnectionResumer, Refused, Release, Transferable, TransferRecord
from .tracker import Connection, Tracker

__all__ = ["Receiver", "Release", "Sender", "Transferable", "make_room", "socketpair"]

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

# How many connections travel in one message, and how many bytes of what they had received. The kernel takes 253
# descriptors; fewer keep both loops from stalling, and cost nothing that could be measured. In a turn of asyncio's loop
# so many are packed, so many aborted and so many told of their end: 1.5 ms.
BATCH = 16
BATCH_BYTES = 96 * 1024
# What one connection may bring along at most, encoded. More stays, and drains.
PARCEL_BYTES = 64 * 1024
# How many batches may be on their way: the next one is being packed while one is being resumed.
WINDOW = 6
# The next one is packed in the same turn of the loop, if they took no longer than this so far, seconds.
TURN_SECONDS = 0.0005
# How many connections are looked at in one turn of the loop.
LOOKS_PER_TURN = 64
# How many are resumed at a time: each takes a few turns of the loop, and these are long while it serves others.
RESUMED_AT_A_TIME = 8

MESSAGE_BYTES = 256 * 1024
BUFFER_BYTES = 1024 * 1024

# Connections that were busy are looked at again when they say that they are at a safe point, and this often, seconds;
# and no more than this share of the CPU is spent on that.
LOOK_AGAIN_SECONDS = 0.05
LOOK_AGAIN_SHARE = 0.05
# When connections are offered again that the receiver had no room for, seconds; twice as long each time.
NO_ROOM_SECONDS = 0.1
NO_ROOM_MAX_SECONDS = 2.0

# How long a sender whose time is up waits for the answers to what it has sent, seconds.
LAST_ANSWERS_SECONDS = 0.5

# Descriptors in flight are limited per user (ETOOMANYREFS, unix(7)); no event tells when there is room again, seconds.
IN_FLIGHT_PAUSE_SECONDS = 0.01

# The receiver leaves a share of its descriptors to those who connect.
RESERVE_SHARE = 0.05
RESERVE_AT_LEAST = 16
# A table for this many descriptors takes half a megabyte.
ROOM_AT_MOST = 65536


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends, non-blocking: each message is whole, and comes with its descriptors."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return ends


def make_room(connections: int) -> None:
    """Make the table of descriptors large enough for as many more, while nothing is served yet.

    It doubles when it is full, and in a process of several threads each doubling is a stall of 8 to 18 ms.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(2 * connections + 256, soft - 1, ROOM_AT_MOST)
    with contextlib.suppress(OSError, ValueError):
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, wanted))


class Sender:
    """The predecessor's side: from its settling on, until nothing is left or the goodbyes begin.

    Args:
        sock: the sender's end; it takes it over.
        tracker: of this generation.
        log: where it says what has happened.
    """

    def __init__(self, sock: socket.socket, tracker: Tracker, log: Log) -> None:
        self._sock = sock
        self._tracker = tracker
        self.log = log
        self._queue: deque[Connection] = deque()
        # What stands in the queue or is on its way: a copy that is sent twice has two readers.
        self._listed: set[Connection] = set()
        # What is on its way, by the number of its message.
        self._sent: dict[int, list[Connection]] = {}
        self._number = 0
        self._batch = BATCH
        self._no_room_until = 0.0
        self._no_room_seconds = NO_ROOM_SECONDS
        self._news = anyio.Event()
        # Whether the receiver has closed its end: it will take nothing more.
        self._is_over = False

    async def run(self, died: anyio.Event, on_swept: Callable[[], None]) -> None:
        """Pass on what can be, until the receiver ends; cancel it when it is time for the goodbyes.

        Args:
            died: set when the successor is dead.
            on_swept: called once each connection was looked at.
        """
        self._tracker.on_ripe = self._enqueue
        begun, moved = time.monotonic(), self._tracker.count.transferred
        try:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(self._end_at_death, died, task_group.cancel_scope)
                task_group.start_soon(self._hear_all, task_group.cancel_scope)
                await self._send_all(on_swept)
        finally:
            self._tracker.moves = False
            self._tracker.on_ripe = None
            if not died.is_set():
                # Whoever cancels this has little time, and the receiver needs less.
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
        """Look at each connection, and send those that are at a safe point; return the seconds that the looks took."""
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
                # The receiver has closed its end. What it said before is still to be heard.
                await anyio.sleep_forever()
            elif time.monotonic() - begun >= TURN_SECONDS or not self._queue:
                await anyio.lowlevel.checkpoint()
                begun = time.monotonic()

    def _send_batch(self) -> int:
        """Look at some connections, and send those that are at a safe point; return the error that sendmsg had, or 0.

        There is no await in here.
        """
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
        message = f'{{"batch":{self._number},"connections":[{",".join(texts)}]}}'.encode()
        numbers = [connection.fileno() for connection in connections]
        try:
            send_with_descriptors(self._sock, message, numbers)
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
            # The application's side of it.
            self.log.exception("a connection cannot be released: it stays, and drains")
            connection.refused = True
            return None

    def _write(self, parcel: TransferRecord) -> str | None:
        try:
            return json.dumps(parcel.to_json(), separators=(",", ":"), allow_nan=False)
        except Exception:
            # A protocol's state is checked nowhere else; it costs its own connection the transfer, and nobody else.
            self.log.exception("a connection released what is no JSON: it stays, and drains")
            return None

    def _keep(self, connection: Connection) -> None:
        self._listed.discard(connection)
        try:
            connection.keep()
        except Exception:
            self.log.exception("a connection was not taken, and cannot go on either")

    def _enqueue(self, connection: Connection) -> None:
        """Let it be looked at, and sent if it can be."""
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
            # One in each turn: the protocols of all that have moved are told of their end in the next one.
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    async def _hear_last(self) -> None:
        while self._sent and await self._hear():
            pass

    async def _hear(self) -> bool:
        """Wait for an answer, and act on it; False, where the receiver has ended and everything it said was heard."""
        while (is_heard := self._hear_now()) is None:
            await anyio.wait_readable(self._sock)
        return is_heard

    def _hear_now(self) -> bool | None:
        """The same without waiting; None, where nothing was said."""
        try:
            message = self._sock.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # The kernel says first that the other end was closed with something unread, and then what it had said.
            return self._hear_now()
        except OSError:
            message = b""
        if not message:
            self._is_over = True
            return False
        try:
            answer = json.loads(message)
            connections = self._sent.pop(int(answer["batch"]))
            taken, later, reasons = set(answer["taken"]), set(answer["later"]), list(answer["reasons"])
        except (KeyError, TypeError, ValueError):
            self.log.exception("transfer: the successor answers what this release does not understand: %r", message)
            return False
        self._act(connections, taken, later)
        for reason in reasons:
            self.log.warning("the successor does not take some connections: %s", reason)
        return True

    def _act(self, connections: list[Connection], taken: set[int], later: set[int]) -> None:
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
        # A process that the successor has forked may hold the other end open.
        await died.wait()
        scope.cancel()

    def _end(self, *, is_dead: bool) -> None:
        """Keep everything that was not taken, and certainly never will be."""
        # What a dead receiver has said last.
        while self._sent and self._hear_now():
            pass
        self._sock.close()
        for connections in self._sent.values():
            for connection in connections:
                if is_dead or self._is_over:
                    self._keep(connection)
                else:
                    # It lives and does not answer; it may begin at any time, and two must never read.
                    connection.let_go()
        self._sent.clear()
        for connection in self._tracker.connections():
            connection.decline()


class Receiver:
    """The successor's side.

    Args:
        sock: the receiver's end; it takes it over.
        plane: of this generation.
        log: where it says what has happened.
    """

    def __init__(self, sock: socket.socket, plane: DataPlane, log: Log) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._plane = plane
        self.log = log
        self._taken = 0
        self._aged = 0

    async def run(self) -> None:
        """Take over connections until the predecessor has ended, or this is cancelled: then what is here is served."""
        # What the initialisation has left will live for long, too.
        age_all_objects()
        try:
            while (batch := await self._receive()) is not None:
                await self._take(*batch)
        finally:
            self._sock.close()
            if self._taken:
                self.log.info("transfer: %d connections of the predecessor are served here now", self._taken)

    async def _receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """Wait for a batch: what was said of its connections, and as many descriptors as there was room for."""
        while True:
            try:
                message = receive_with_descriptors(self._sock, MESSAGE_BYTES)
            except BlockingIOError:
                await anyio.wait_readable(self._sock)
                continue
            except ConnectionResetError:
                # Said first, once; the messages that were sent before are still there.
                continue
            if not message.data:
                return None
            if message.is_cut:
                close_all(message.descriptors)
                self.log.error("transfer: a message of the predecessor's is too long; what is left there drains")
                return None
            return json.loads(message.data), message.descriptors

    async def _take(self, body: dict[str, Any], descriptors: list[int]) -> None:
        """Say which connections of a batch are served here, and then serve them."""
        ready: list[tuple[Callable[[socket.socket], Awaitable[None]], socket.socket]] = []
        taken: list[int] = []
        reasons: set[str] = set()
        count = len(body["connections"])
        # The kernel gives the lowest number that is free: all below it are in use.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = soft - max(RESERVE_AT_LEAST, int(soft * RESERVE_SHARE))
        fitting = list(itertools.takewhile(lambda number: number < limit, descriptors))
        close_all(descriptors[len(fitting) :])
        if len(fitting) < count:
            reasons.add("too many files are open there (ulimit -n, LimitNOFILE=); it is tried again")
        try:
            # In the order that they were sent in: where there is no room, the kernel leaves out the last ones.
            for index, number in enumerate(fitting):
                sock = socket.socket(fileno=number)
                try:
                    ready.append((self._prepare(body["connections"][index]), sock))
                except Refused as refusal:
                    reasons.add(str(refusal))
                    sock.close()
                else:
                    taken.append(index)
            later = list(range(len(fitting), count))
            answer = {"batch": body["batch"], "taken": taken, "later": later, "reasons": sorted(reasons)}
            await self._answer(json.dumps(answer).encode())
        except BaseException:
            for _, sock in ready:
                sock.close()
            raise
        # From here on they are this process', whatever happens.
        with anyio.CancelScope(shield=True):
            for start in range(0, len(ready), RESUMED_AT_A_TIME):
                async with anyio.create_task_group() as task_group:
                    for begin, sock in ready[start : start + RESUMED_AT_A_TIME]:
                        task_group.start_soon(self._begin, begin, sock)
        if self._taken >= self._aged + BATCH:
            self._aged = self._taken
            age_all_objects()

    def _prepare(self, fields: list[Any]) -> Callable[[socket.socket], Awaitable[None]]:
        try:
            parcel = TransferRecord.from_json(fields)
            adopter = next(self._adopters(parcel.listener), None)
            if adopter is None:
                raise Refused(f"nobody listens on {parcel.listener} there")
            return adopter.prepare(parcel)
        except Refused:
            raise
        except Exception as error:
            self.log.exception("a connection of the predecessor's cannot be resumed: it keeps it")
            raise Refused(f"it cannot be resumed there: {error!r}") from error

    def _adopters(self, name: str) -> Iterator[ConnectionResumer]:
        for acceptor in self._plane.gate.acceptors:
            if acceptor.entry.name == name and acceptor.adopter is not None:
                yield acceptor.adopter

    async def _answer(self, message: bytes) -> None:
        while True:
            try:
                self._sock.send(message, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await anyio.wait_writable(self._sock)
            except (BrokenPipeError, ConnectionResetError):
                # It is dead, or has given its copies up: in its lifetime it closes its end only when nothing is open.
                return
            else:
                return

    async def _begin(self, begin: Callable[[socket.socket], Awaitable[None]], sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            await begin(sock)
        except Exception:
            self.log.exception("a connection of the predecessor's was taken over, and failed")
        else:
            self._taken += 1
