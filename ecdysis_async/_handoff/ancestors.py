"""The older generations that are still there: what a newer one knows of them, and hears from them."""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio

from ecdysis_async._ipc.channel import Frame
from ecdysis_async._ipc.peer import Death, Peer
from ecdysis_async.errors import ChannelError, DescriptorsLost

from .protocol import DrainMessage

__all__ = ["STOPPED", "Ancestor", "Ancestors", "beyond"]

logger = logging.getLogger("ecdysis_async")

# Why an older generation is to hurry, where it is not for being one of too many.
STOPPED = "stop"

# How long an older generation gets to end itself before it is killed from here, seconds.
GRACE_SECONDS = 5.0


@dataclass(slots=True)
class Ancestor:
    """An older generation that is still there, or the predecessor.

    Attributes:
        generation: its number.
        pid: its process.
        peer: the channel to it.
        connections: how many it has left; None before it has said so.
        jobs: how many jobs without a connection it has left.
        serving: what it still serves, in a few words each, as far as it has said so.
        ends_at: when its drain ends at the latest, on the loop's clock, as far as it has said so.
        drained: set when it has drained.
    """

    generation: int
    pid: int
    peer: Peer
    connections: int | None = None
    jobs: int = 0
    serving: list[str] = field(default_factory=list)
    ends_at: float | None = None
    drained: anyio.Event = field(default_factory=anyio.Event)
    # Whether its deadline was brought forward, because too many drain.
    is_hurried: bool = False

    def describe(self) -> str:
        """Say in words which one it is, and how many connections it has, as far as it has said so."""
        match self.connections:
            case None:
                count = "an unknown number of connections"
            case 1:
                count = "1 connection"
            case number:
                count = f"{number} connections"
        return f"generation {self.generation} (pid {self.pid}) with {count}"

    def note_progress(self, body: Mapping[str, Any]) -> None:
        """Take note of what it has left, as far as its release says so.

        Raises:
            OverflowError, TypeError, ValueError: it says something else than this release understands.
        """
        connections, ends_in = body.get("connections"), body.get("ends_in")
        self.connections = int(connections) if connections is not None else None
        self.jobs = int(body.get("jobs", 0))
        self.serving = [str(each) for each in body.get("serving", ())]
        self.ends_at = anyio.current_time() + float(ends_in) if ends_in is not None else None

    def to_json(self) -> dict[str, Any]:
        """Return what travels in LISTENERS; channel and pidfd travel beside it, in this order."""
        return {"generation": self.generation, "pid": self.pid}


def beyond(ancestors: Iterable[Ancestor], max_draining: int) -> list[Ancestor]:
    """Return the oldest of those that still drain, as many as are more than ``max_draining``."""
    draining = sorted((each for each in ancestors if not each.drained.is_set()), key=lambda each: each.generation)
    return draining[: max(0, len(draining) - max_draining)]


class Ancestors:
    """The older generations that still drain: how far they are, and which of them is too many.

    One generation reads what they say: the newest one that has settled.
    """

    def __init__(self) -> None:
        self.ancestors: list[Ancestor] = []
        self.on_drained: Callable[[Ancestor, Mapping[str, Any]], None] = lambda ancestor, body: None
        # Called with what an ancestor has counted by itself.
        self.on_counted: Callable[[Ancestor, object], None] = lambda ancestor, body: None
        # Called when an ancestor is ended by force, with what had kept it from ending.
        self.on_forced: Callable[[Ancestor, list[str]], None] = lambda ancestor, kept: None
        # Called when an ancestor has made its successor the main process in the eyes of the service manager.
        self.on_main: Callable[[Ancestor], None] = lambda ancestor: None
        # Called with the socket over which an ancestor passes its connections on; it is then the callee's.
        self.on_transfer: Callable[[socket.socket], None] | None = None
        self._following: anyio.CancelScope | None = None
        self._ended = anyio.Event()
        self._is_let_go = False
        # Before it was known who drains: the last request to open logs anew, and whether all deadlines were to be now.
        self._reopening_request: str | None = None
        self._has_to_hurry = False

    async def follow(self, max_draining: int, drain_seconds: float = math.inf, exit_seconds: float = math.inf) -> None:
        """Listen to all of them until each one is dead, and tell those beyond ``max_draining`` to hurry.

        Args:
            max_draining: how many may drain.
            drain_seconds: how long a drain may take.
            exit_seconds: how long a process may take to end after its drain. It ends itself then. Where it cannot,
                because it is stopped or its interpreter stands still, it is killed a moment later.
        """
        try:
            with anyio.CancelScope() as self._following:
                if self._is_let_go:
                    return
                for ancestor in beyond(self.ancestors, max_draining):
                    ancestor.is_hurried = True
                    await _tell(ancestor, DrainMessage.HURRY)
                if self._has_to_hurry:
                    await self.hurry()
                if self._reopening_request is not None:
                    await self.reopen_logs(self._reopening_request)
                async with anyio.create_task_group() as task_group:
                    for ancestor in self.ancestors:
                        task_group.start_soon(self._listen, ancestor, drain_seconds, exit_seconds + GRACE_SECONDS)
        finally:
            # However it ends: somebody may wait for that.
            self._ended.set()

    async def _listen(self, ancestor: Ancestor, drain_seconds: float, exit_seconds: float) -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self._outlast, ancestor, drain_seconds, exit_seconds)
            await ancestor.peer.run(functools.partial(self.deliver, ancestor))
            task_group.cancel_scope.cancel()

    async def _outlast(self, ancestor: Ancestor, drain_seconds: float, exit_seconds: float) -> None:
        """Kill an ancestor that does not end."""
        with anyio.move_on_after(drain_seconds + exit_seconds):
            await ancestor.drained.wait()
            await anyio.sleep(exit_seconds)
        if ancestor in self.ancestors and ancestor.peer.send_signal(signal.SIGKILL):
            logger.error(
                "generation %d (pid %d) has not ended %g s after its drain, and does not end itself: it is killed",
                ancestor.generation,
                ancestor.pid,
                exit_seconds,
            )

    async def let_go(self) -> list[dict[str, Any]]:
        """Listen to them no more; return what a successor has to know to go on where this one ended."""
        self._is_let_go = True
        if self._following is not None:
            self._following.cancel()
            await self._ended.wait()
        return [
            {"pid": ancestor.pid, "pending": base64.b64encode(ancestor.peer.channel.pending).decode()}
            for ancestor in self.ancestors
        ]

    async def reopen_logs(self, request: str = "") -> None:
        """Let all of them open log files anew that were moved away, for the request of this id."""
        if self._following is None:
            # The predecessor may be of a release that takes an unknown message for a failure until it has settled.
            self._reopening_request = request
        elif not self._is_let_go:
            for ancestor in tuple(self.ancestors):
                await _tell(ancestor, DrainMessage.REOPEN_LOGS, {"request": request})

    async def hurry(self) -> None:
        """Let all their deadlines be now, because the service is to end."""
        if self._following is None:
            # They are followed once the predecessor has settled, and the pid file names this process.
            self._has_to_hurry = True
        elif not self._is_let_go:
            for ancestor in tuple(self.ancestors):
                await _tell(ancestor, DrainMessage.HURRY, {"why": STOPPED})

    async def outlive(self) -> None:
        """Wait until each of them is dead. Call it while ``follow`` runs."""
        if self.ancestors:
            await self._ended.wait()

    def close(self) -> None:
        """Let go of the descriptors. Cancel ``follow`` first."""
        while self.ancestors:
            self.ancestors.pop().peer.close()

    def deliver(self, ancestor: Ancestor, item: Frame | ChannelError | Death) -> None:
        """Take note of what an ancestor says."""
        match item:
            case Frame(type=DrainMessage.PROGRESS):
                self.on_counted(ancestor, item.body.get("counts"))
                try:
                    ancestor.note_progress(item.body)
                except (OverflowError, TypeError, ValueError):
                    logger.warning("how generation %d drains cannot be read", ancestor.generation, exc_info=True)
            case Frame(type=DrainMessage.DRAINED):
                ancestor.connections = 0
                ancestor.drained.set()
                self.on_counted(ancestor, item.body.get("counts"))
                try:
                    self.on_drained(ancestor, item.body)
                except (KeyError, OverflowError, TypeError, ValueError):
                    # Another release's idea of a report; whatever it says, it must not end the newest generation.
                    logger.warning("the report of generation %d cannot be read", ancestor.generation, exc_info=True)
            case Frame(type=DrainMessage.TRANSFER, descriptors=[descriptor, *others]) if self.on_transfer is not None:
                # Taken over, not duplicated: there may be no further descriptor to be had.
                for other in others:
                    os.close(other)
                self.on_transfer(socket.socket(fileno=descriptor))
                return
            case Frame(type=DrainMessage.FORCED):
                kept = item.body.get("kept")
                self.on_forced(ancestor, [str(each) for each in kept] if isinstance(kept, list) else [])
            case Frame(type=DrainMessage.MAIN):
                self.on_main(ancestor)
            case DescriptorsLost():
                # It finds the way of its connections closed, and serves them to their end itself.
                logger.warning(
                    "generation %d (pid %d) keeps what it was to pass on: %s", ancestor.generation, ancestor.pid, item
                )
            case Death():
                # A dead process is the main one no more, whether or not it could say so.
                self.on_main(ancestor)
                # Still in the list means still to be closed; its tasks end with this call.
                self.ancestors.remove(ancestor)
                ancestor.drained.set()
                ancestor.peer.close()
        if isinstance(item, Frame):
            item.close()


async def _tell(ancestor: Ancestor, message: DrainMessage, body: Mapping[str, Any] | None = None) -> None:
    with contextlib.suppress(ChannelError):  # it is leaving at this moment
        await ancestor.peer.channel.send(message, body, timeout=2)
