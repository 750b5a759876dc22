"""One tracked connection: its safe points, how it ends, and how it is offered to a successor.

A data plane derives its own connections from :class:`Connection`. Each of them knows how it is interrupted, cancelled
and aborted; nothing here accepts, reads or writes, and nothing knows a loop.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import anyio

from ecdysis_async._sockets.entry import Until
from ecdysis_async.errors import DrainInterrupt

from .parcel import TransferRecord

__all__ = [
    "LEAVING",
    "Connection",
    "Offer",
    "Verdict",
    "current_connection",
    "describe_peer",
    "describe_request",
]

T = TypeVar("T")

# How much of a request's path is told.
MAX_PATH = 200

current_connection: ContextVar[Connection | None] = ContextVar("ecdysis_current_connection", default=None)
"""The connection, or the tracked work, that the running task serves; data planes set it in each handler."""

# What a handler is told at its safe point.
LEAVING = "this generation is leaving: close the connection now"
MOVABLE = "this generation is leaving, and this connection can move to the next one: await transfer(state)"
MOVED = "this connection has moved to the next generation"


def describe_request(method: str, path: str, since: float, *, is_older: bool = False) -> str:
    """Describe a request in a few words: its method, its path without the query, and its age.

    Args:
        method: or what takes its place.
        path: as the client has written it, or decoded.
        since: when it began, by CLOCK_MONOTONIC.
        is_older: whether it had begun before that.
    """
    # What a client has written goes into logs and onto terminals.
    shown = path.partition("?")[0][:MAX_PATH].encode("unicode_escape").decode()
    return f"{method} {shown}, {'more than ' if is_older else ''}{time.monotonic() - since:.1f} s old"


def describe_peer(sock: Any) -> str:
    """Say who is at the other end of a socket, as far as that is known."""
    try:
        peer = sock.getpeername()
    except (OSError, AttributeError):
        return "a client that has gone"
    if isinstance(peer, tuple):
        host, port, *_ = peer
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "a client of this machine"


class Verdict(enum.Enum):
    """What becomes of a connection that its handler has offered for transfer."""

    OPEN = "open"
    SENT = "sent"  # it is on its way, and the answer is not known
    STAYS = "stays"
    MOVED = "moved"


@dataclass(slots=True)
class Offer:
    """What a handler at a safe point gives away of its connection, and the verdict that it waits for."""

    state: Any
    verdict: Verdict = Verdict.OPEN
    decided: anyio.Event = field(default_factory=anyio.Event)

    def decide(self, verdict: Verdict) -> None:
        """Let the handler go on, or end."""
        self.verdict = verdict
        self.decided.set()


class Connection:
    """One connection, or one piece of tracked work, as the drain and the transfer see it.

    Data planes derive from it. ``interrupt``, ``cancel`` and ``abort`` may be called at any time and more than once;
    none of them may raise or block.

    Attributes:
        until: when the listener ends that accepted it.
        since: when it was accepted, by CLOCK_MONOTONIC; for a connection that has moved, the time in the predecessor.
        news: set at the end of the connection, while a drain waits for it. Most connections end without one.
        interrupted: whether the drain has asked it to close.
        silent: whether it was at a safe point when the drain asked it to close.
        invited: whether its handler shall offer it for transfer at its next safe point.
        offer: what its handler offers for transfer at this moment.
        moved: whether it has moved to the successor.
        refused: whether the successor will never take it.
        is_closed: whether the tracker counts it no more.
        describe_requests: returns a few words on each request that it has, where its server knows requests.
    """

    # Whether a client is at the other end: only clients can be lost.
    is_accepted: ClassVar[bool] = True

    # What most connections never change stands in the class: each of them would pay for it.
    news: anyio.Event | None = None
    interrupted: bool = False
    silent: bool = False
    invited: bool = False
    offer: Offer | None = None
    moved: bool = False
    refused: bool = False
    is_closed: bool = False
    describe_requests: Callable[[Any], list[str]] | None = None
    _idle_scopes: list[anyio.CancelScope] | None = None

    def __init__(self, until: Until = Until.DRAIN) -> None:
        self.until = until
        self.since = time.monotonic()

    @property
    def is_at_safe_point(self) -> bool:
        """Whether a task of it waits at a safe point."""
        return bool(self._idle_scopes)

    def interrupt(self) -> None:
        """Close at a safe point if there is one: wake the ``until_draining`` of this connection's handler."""
        self.interrupted = True
        for scope in self._idle_scopes or ():
            scope.cancel()

    def mark_silent(self, *, is_silent: bool) -> None:
        """Say whether it was at a safe point when a server said goodbye to it by a way of its own."""
        self.silent = is_silent

    def cancel(self) -> None:
        """End the handler: the deadline has come."""

    def abort(self) -> None:
        """Let go of the socket without waiting for anything."""

    def describe(self) -> list[str]:
        """Say in a few words each what is lost where it is cut: its requests, or else the connection itself."""
        requests = self.describe_requests(self) if self.describe_requests is not None else []
        age = time.monotonic() - self.since
        return requests or [f"{self.what()}, {age:.1f} s old"]

    def what(self) -> str:
        """Say what it is, and whose."""
        return "a connection"

    def is_over(self) -> bool:
        """Say whether it ended without telling: asked now and then of connections that cannot always know."""
        return False

    # How it moves to a successor

    @property
    def movable(self) -> bool:
        """Whether it can ever move, at one of the moments to come."""
        return False

    def fileno(self) -> int:
        """Return the descriptor of its socket."""
        raise NotImplementedError

    def pack(self) -> TransferRecord | None:
        """Stop reading, and return what travels; at no safe point, change nothing and return None.

        Until ``keep`` or ``let_go`` is called, nothing may read from it or write to it.
        """
        return None

    def keep(self) -> None:
        """Go on with it: it was packed, and has not moved."""

    def let_go(self) -> None:
        """Close this process' copy without a word to the peer: it has moved."""

    def invite(self) -> None:
        """Wake its handler at its next safe point, so that it offers the connection for transfer."""
        self.invited = True
        for scope in self._idle_scopes or ():
            scope.cancel()

    def decline(self) -> None:
        """Let its handler go on, because nothing moves any more; on its way, the connection waits for its answer."""
        self.invited = False
        if self.offer is not None and self.offer.verdict is Verdict.OPEN:
            self.offer.decide(Verdict.STAYS)

    async def transfer(self, state: Any, note_safe_point: Callable[[Connection], None]) -> None:
        """Offer it for transfer, and wait for what becomes of that.

        Args:
            state: what the successor's handler is given.
            note_safe_point: told that the connection may be packed now.

        Raises:
            DrainInterrupt: it has moved.

        Cancelled while the connection is on its way, it waits for the answer first: there must never be two readers.
        """
        offer = self.offer = Offer(state)
        note_safe_point(self)
        try:
            await offer.decided.wait()
        finally:
            if offer.verdict is Verdict.SENT:
                with anyio.CancelScope(shield=True):
                    await offer.decided.wait()
            self.offer = None
        if offer.verdict is Verdict.MOVED:
            raise DrainInterrupt(MOVED, moved=True)

    async def at_safe_point(self, awaitable: Awaitable[T]) -> T:
        """Await something that ``interrupt`` may cancel; see ``Ecdysis.until_draining``."""
        scope = anyio.CancelScope()
        if self._idle_scopes is None:
            self._idle_scopes = []
        self._idle_scopes.append(scope)
        try:
            with scope:
                # The scope is entered first: a finished result is still returned, and a coroutine gets its await.
                if self.interrupted or self.invited:
                    scope.cancel()
                return await awaitable
        finally:
            self._idle_scopes.remove(scope)
        raise self._leave_safe_point()

    def _leave_safe_point(self) -> DrainInterrupt:
        """Return what the handler is told."""
        if self.interrupted:
            self.silent = True
            return DrainInterrupt(LEAVING)
        # A handler that does not take part is invited again, but later: it may loop.
        self.invited = False
        return DrainInterrupt(MOVABLE)
