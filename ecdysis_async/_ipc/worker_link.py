"""The line between an anchor and one of its workers: what they tell each other besides the handoffs.

The anchor makes it for each worker that it starts; it is the worker's for life, and its end is the anchor's death. A
handoff itself goes between the two workers of a slot, or the anchor and the first one, on a channel of its own.
"""

from __future__ import annotations

import enum
import math
import os
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from ecdysis_async._system.descriptors import close_all, read_credentials
from ecdysis_async.errors import ChannelError, DescriptorsLost, RestartError

from .channel import Channel, Frame

__all__ = [
    "FromAnchor",
    "FromWorker",
    "WorkerLink",
    "describe_loss",
    "error_from_json",
    "error_to_json",
]


class FromAnchor(enum.StrEnum):
    """Messages to a worker."""

    WELCOME = "welcome"  # how often it shall tell of itself; whether the sockets outlive the anchor
    RESTART = "restart"  # make a successor, of this generation; sockets that the other workers have made
    SETTLE = "settle"  # the roll-out has succeeded: the restart of this slot is final
    REVERT = "revert"  # it has failed, and why: take the place of the successor again
    STOP = "stop"  # leave
    HURRY = "hurry"  # the deadline of the drain is now
    SPAWNED = "spawned"  # the successor's process; its pidfd
    SPAWN_FAILED = "spawn failed"
    EXITED = "exited"  # how a process ended
    REOPEN_LOGS = "reopen logs"  # the number of the answer, and the id of the request
    VERDICT = "verdict"  # what became of the restart of the service that this worker has asked for
    WORKER_EXITED = "worker exited"  # how another worker has ended, for the application


class FromWorker(enum.StrEnum):
    """Messages to the anchor."""

    BEAT = "beat"  # its loop turns; where it stands, and what it has
    SPAWN = "spawn"  # start a successor; its end of the channel, and its stderr
    END = "end"  # end a successor
    HANDOVER = "handover"  # where the restart of this slot stands
    CREATED = "created"  # sockets that are not the anchor's; it shall have them too
    DESCRIPTION = "description"  # in words, what it serves, where, and by what
    REOPENED = "reopened"  # how many log files
    RESTART = "restart"  # restart the whole service
    CANCEL = "cancel"  # call that off, if it is not too late
    STOP = "stop"  # stop the whole service


# How long the end of a process waits until the other end has its last words, seconds.
FLUSH_SECONDS = 2.0


class WorkerLink:
    """One end of a line. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._channel = Channel(sock)
        self._outbox: deque[tuple[str, Mapping[str, Any], Sequence[int]]] = deque()
        self._told = anyio.Event()
        self._sent = anyio.Event()
        self._is_broken = False

    @property
    def peer_pid(self) -> int:
        """The process that has made the line, as the kernel saw it then."""
        return read_credentials(self._sock).pid

    def fileno(self) -> int:
        """The socket's descriptor, or -1 once it is closed."""
        return self._channel.fileno()

    @property
    def pending(self) -> bytes:
        """What was read and not received yet, for :meth:`resume` in this process, executed anew."""
        return self._channel.pending

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to be sent, and no descriptor received that would be lost with this object."""
        return not self._outbox and not self._channel.holds_descriptors

    def resume(self, pending: bytes) -> None:
        """Go on where this process ended before it was executed anew."""
        self._channel.resume(pending)

    def tell(self, message: str, body: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Let ``run`` send a message, after those before it; the descriptors are taken over."""
        if self._is_broken:
            close_all(descriptors)
            return
        self._outbox.append((message, body, descriptors))
        # A waiter for those before it waits for this one as well.
        if self._sent.is_set():
            self._sent = anyio.Event()
        self._told.set()

    async def receive(self) -> Frame:
        """Wait for the next message, as :meth:`Channel.receive`; one that has lost its descriptors comes bereft."""
        try:
            return await self._channel.receive()
        except DescriptorsLost as error:
            return Frame(error.type, error.body, lost_descriptors=True)

    def receive_nowait(self) -> Frame | None:
        """Return the next message if it is here already, as :meth:`receive`."""
        try:
            return self._channel.receive_nowait()
        except DescriptorsLost as error:
            return Frame(error.type, error.body, lost_descriptors=True)

    async def run(self) -> None:
        """Send what is told until nobody takes it any more. The listening task finds out why."""
        while True:
            while self._outbox:
                message, body, descriptors = self._outbox[0]
                try:
                    # However long it takes: who reads nothing is stopped, and its death ends this.
                    await self._channel.send(message, body, descriptors, timeout=math.inf)
                except ChannelError:
                    self.give_up()
                    return
                self._outbox.popleft()
                close_all(descriptors)
            self._sent.set()
            self._told = anyio.Event()
            await self._told.wait()

    async def flush(self) -> None:
        """Return when all that was told is sent, or nobody takes it. Call it while ``run`` runs."""
        with anyio.move_on_after(FLUSH_SECONDS):
            while self._outbox:
                await self._sent.wait()

    def give_up(self) -> None:
        """Send nothing more, and forget what was to be sent."""
        self._is_broken = True
        while self._outbox:
            close_all(self._outbox.popleft()[2])
        self._sent.set()

    def close(self) -> None:
        """Let go of the line; harmless if done already."""
        self.give_up()
        self._channel.close()


def describe_loss(frame: Frame) -> str:
    """Say what a message that came bereft means."""
    what = f"pid {os.getpid()} has too many open files to receive what comes with {frame.type!r}"
    return f"{what}: raise the limit (ulimit -n, LimitNOFILE=)"


def error_to_json(error: RestartError) -> dict[str, Any]:
    """Return an error as it travels."""
    return {
        "error": type(error).__name__,
        "message": str(error.args[0]),
        "phase": str(error.phase) if error.phase is not None else None,
        "stderr": error.stderr,
    }


def error_from_json(body: Mapping[str, Any]) -> RestartError:
    """Return the error that the other end had, as one of its own class where this release knows that.

    Raises:
        KeyError: it is none.
    """
    kinds = {kind.__name__: kind for kind in RestartError.__subclasses__()}
    kind = kinds.get(body["error"], RestartError)
    return kind(str(body["message"]), phase=body["phase"], stderr=str(body["stderr"]))
