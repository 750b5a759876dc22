"""What a server of ASGI is given in place of the application: it says goodbye to clients, and counts requests.

The application is the one seam that all servers of ASGI have in public. Requests are left as they are. Once this
generation leaves, the header ``Connection`` of responses says so; HTTP/2 has a frame for that (``http2.py``).

Where a server's own objects tell which requests are under way, nobody takes note of a request until this generation
leaves: see :meth:`Application.rest`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from weakref import WeakSet

import anyio.lowlevel

from ecdysis_async._accepting.asyncio_connections import ServerConnection
from ecdysis_async._accepting.asyncio_servers import note_no_servers
from ecdysis_async._accepting.data_plane import active
from ecdysis_async._accepting.gated_socket import AcceptedConnection
from ecdysis_async._connections.connection import Connection, current_connection, describe_request
from ecdysis_async._service.exclusive import in_application
from ecdysis_async._system.history import Note, history
from ecdysis_async.servers._protocols.frames import FrameFollower, follow_frames
from ecdysis_async.servers._protocols.http import count_unread, will_move
from ecdysis_async.servers._protocols.requests import RequestsUnderWay

from .goodbye import RESTARTING, Goodbye, make_state
from .transfer import TRANSFER, Transfer

__all__ = ["Application"]

log = logging.getLogger("ecdysis_async")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


# When a connection without a request is closed after its client has hung up: after so many seconds, and so many turns
# of the loop behind them. A server that has read a request takes a few turns to begin with it, and turns may be long.
DESERTED_SECONDS = 0.05
DESERTED_TURNS = 20


# What a server has just read is on its way to its parser for so many turns of the loop, on trio: nobody shows it then.
TURNS_OF_READING = 2


class Application:
    """Stands before the application: knows which connections are busy, and says goodbye to clients.

    Attributes:
        failure: why the application's start-up failed, if it did.
        inbound: what is to be fed with all bytes that a connection receives, on trio.

    Args:
        app: the application, of ASGI 3.
        goodbye: learns which WebSockets are open.
        expects_more: says of a connection whether its client still sends the running request, or its server holds what
            was sent behind that.
    """

    def __init__(
        self,
        app: Callable[[Any, Any, Any], Awaitable[Any]],
        goodbye: Goodbye,
        expects_more: Callable[[Any], bool] = lambda connection: False,
    ) -> None:
        self._expects_more = expects_more
        self.failure: BaseException | None = None
        self.inbound: dict[AcceptedConnection, FrameFollower] = {}
        self._app = app
        self._goodbye = goodbye
        self._draining, self._state = goodbye.ecdysis.draining, make_state(goodbye.ecdysis)
        self._tracker = active().tracker
        # The requests that each connection has at this moment: with HTTP/2 that may be many.
        self._requests: dict[Connection, dict[_Request, None]] = {}
        # The connections whose client has hung up.
        self._deserted: WeakSet[ServerConnection] = WeakSet()
        # How many requests were begun.
        self._count = 0
        self._tracker.counters.append(lambda: self._count)
        # What finds the requests of HTTP/1 at the leaving, and whether that is relied on.
        self._under_way: RequestsUnderWay | None = None
        self._is_resting = False

    def rest(self, under_way: RequestsUnderWay) -> None:
        """Take no note of requests of HTTP/1 until this generation leaves, once one of them proves that this is enough.

        The server has to give requests the state of its lifespan, with the event that this generation leaves.

        Args:
            under_way: finds the requests then. Where it does not find the first one, a warning says so, and note is
                taken of each request, as of those of other servers.
        """
        self._under_way = under_way
        self._tracker.on_leave.append(self._find_requests)

    def __call__(self, scope: Message, receive: Receive, send: Send) -> Awaitable[None]:
        # A plain function: each request would pay for a coroutine around its own.
        if self._is_resting and scope["type"] == "http" and scope["http_version"] != "2":
            self._count += 1
            return self._app(scope, receive, send)
        if scope["type"] == "lifespan":
            return self._live(scope, receive, send)
        return self._attend(scope, receive, send)

    async def _attend(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request, or a WebSocket, and take note of it."""
        self._count += 1
        state = self._tell_state(scope)
        if self._under_way is not None and scope["type"] == "http" and scope["http_version"] != "2":
            self._find_own_request(self._under_way)
        connection = current_connection.get()
        request = self._take_note(scope, connection)
        try:
            if scope["type"] == "websocket":
                # Where this implementation of WebSockets cannot move, an offer has no effect.
                state.setdefault(TRANSFER, Transfer())
                follow = functools.partial(self._follow_frames, connection, scope["http_version"])
                await _WebSocket(self._goodbye, receive, send, follow).run(self._app, scope)
            else:
                await self._respond(scope, receive, send)
        finally:
            if connection is not None and request is not None:
                self._finish(connection, request)

    def _follow_frames(self, connection: object, http_version: str) -> Callable[[], bool]:
        """Begin to follow the frames of a WebSocket; return what says whether its client is in a message."""
        if http_version.startswith("1"):
            if isinstance(connection, ServerConnection):
                return follow_frames(connection)
            if isinstance(connection, AcceptedConnection):
                self.inbound[connection] = follower = FrameFollower()
                return follower.is_in_message
        # In a stream of HTTP/2 its bytes do not stand alone.
        return lambda: False

    def _tell_state(self, scope: Message) -> Message:
        """Let the application find what there is of this generation in the state of a scope, and return that."""
        state: Message = scope.setdefault("state", {})
        state.update(self._state)
        return state

    async def _live(self, scope: Message, receive: Receive, send: Send) -> None:
        """Run the lifespan, and keep the reason if its beginning fails.

        An application that does not know the protocol raises at the sight of the scope, and is served without it. An
        application that has received the event knows the protocol. If it fails then, servers would go on without it,
        and a broken release would be taken for a good one.
        """
        self._tell_state(scope)
        is_asked = is_started = False
        begun = time.monotonic()
        # Servers that the application starts by itself are not the adapter's.
        note_no_servers()

        async def receive_through() -> Message:
            nonlocal is_asked
            message = await receive()
            is_asked = True
            return message

        async def send_through(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "lifespan.startup.complete":
                history.note(Note.STEP, what="lifespan start-up", begun=begun)
                is_started = start_up.is_over = True
            elif message["type"] == "lifespan.startup.failed":
                # Frameworks say so while they handle the exception.
                self.failure = sys.exception() or RuntimeError(message.get("message") or "the start-up failed")
                # The adapter raises the failure: the server would log it a second time.
                message = {**message, "message": ""}
            await send(message)

        try:
            with in_application() as start_up:
                await self._app(scope, receive_through, send_through)
        except Exception as error:
            if self.failure is not None and not is_started:
                return
            if is_asked and not is_started:
                self.failure = error
                await send({"type": "lifespan.startup.failed", "message": ""})
                return
            raise

    def _respond(self, scope: Message, receive: Receive, send: Send) -> Awaitable[None]:
        # Plain functions, as `__call__` is: a request sends several messages.
        def send_through(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start" and self._draining.is_set():
                return self._begin_response(message, send)
            return send(message)

        # HTTP/2 and 3 have no such header (RFC 9113, 8.2.2).
        is_http_1 = scope["http_version"].startswith("1")
        return self._app(scope, receive, send_through if is_http_1 else send)

    async def _begin_response(self, message: Message, send: Send) -> None:
        """Send the beginning of a response while this generation leaves, with the goodbye if it is the last one."""
        if await self._is_last():
            message = {**message, "headers": _with_goodbye(message.get("headers", ()))}
        await send(message)

    async def _is_last(self) -> bool:
        """Say whether the running request is the last one that its connection gets an answer to.

        What a client has sent behind it is answered first, as long as there is time: the client would not know whether
        it was heard.
        """
        if will_move():
            return False
        connection = current_connection.get()
        if self._goodbye.late.is_set() or connection is None:
            return True
        for _ in range(TURNS_OF_READING):
            # First, because an eager task begins before its server has read the end of its request.
            await anyio.lowlevel.checkpoint()
            if self.is_asked_more(connection):
                return False
        return True

    def is_asked_more(self, connection: Connection) -> bool:
        """Say whether more is to come of a connection's running request, or was received behind it."""
        try:
            return self._expects_more(connection) or count_unread(connection.fileno()) > 0
        except (OSError, ValueError, AttributeError):
            # It is closed, and may have no socket any more.
            return False

    def close_after_answer(self, connection: ServerConnection) -> None:
        """Close a connection whose client will ask no more, or shall not, once it has the answers to all it has asked.

        Its server would keep it, and its descriptor, until its time to be idle is over. It may be lost already.
        """
        asyncio.get_running_loop().call_later(DESERTED_SECONDS, self._close_deserted, connection, DESERTED_TURNS)

    def _close_deserted(self, connection: ServerConnection, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._close_deserted, connection, turns - 1)
            return
        if connection in self._requests:
            self._deserted.add(connection)
            return
        # There is no request. A task that is known would be the server's own for the connection: it is not waited for.
        connection.idle()
        connection.close()

    def is_busy(self, connection: Connection) -> bool:
        """Say whether a connection has a request at this moment."""
        return connection in self._requests

    def _take_note(self, scope: Message, connection: Connection | None) -> _Request | None:
        """Let the drain know that this connection is busy, with what, and which task to cancel at the deadline.

        Return the request, for ``_finish``; None where the drain does not wait for it by its connection.
        """
        # On trio, a deadline cancels the connection's own scope, and its requests with it.
        task = asyncio.current_task() if isinstance(connection, ServerConnection) else None
        if connection is None or (task is None and not isinstance(connection, AcceptedConnection)):
            return None
        request = _Request(scope, task)
        self._begin(connection, request)
        return request

    def _begin(self, connection: Connection, request: _Request) -> None:
        self._requests.setdefault(connection, {})[request] = None
        connection.describe_requests = self._describe_requests
        if isinstance(connection, ServerConnection):
            connection.busy(request.task)

    def _finish(self, connection: Connection, request: _Request) -> None:
        requests = self._requests[connection]
        del requests[request]
        if not requests:
            del self._requests[connection]
        if isinstance(connection, ServerConnection):
            if requests:
                connection.busy(next(iter(requests)).task)
            else:
                connection.idle()
                self._go_idle(connection, request)

    def _describe_requests(self, connection: Connection) -> list[str]:
        return [request.describe() for request in self._requests.get(connection, ())]

    def _go_idle(self, connection: ServerConnection, last: _Request) -> None:
        """Let a connection that is idle by now move, or end it: its client has hung up, or the drain is nearly over."""
        if connection.is_over():
            return
        connection.note_safe_point()
        # What was busy at the farewell is closed behind it; WebSockets and HTTP/2 have endings of their own.
        is_late = connection.interrupted and last.is_http_1
        if is_late or connection in self._deserted:
            self.close_after_answer(connection)

    # Requests of which nobody took note

    def _find_own_request(self, under_way: RequestsUnderWay) -> None:
        """Find the running request as it would be found at the leaving, to know whether that works."""
        task, connection = asyncio.current_task(), current_connection.get()
        assert task is not None
        try:
            request = under_way.find(task)
            found = request.connection if request is not None else None
            if found is None:
                raise LookupError("it has no connection")
        except Exception as error:  # noqa: BLE001 - whatever a server raises that is built otherwise
            self._take_note_of_all(error)
            return
        if not isinstance(connection, ServerConnection):
            # The server was told to give requests a context of their own (``reset_contextvars``).
            current_connection.set(found)
        elif connection is not found:
            self._take_note_of_all(LookupError("it has another connection"))
            return
        self._is_resting = not self._draining.is_set() and not self._tracker.draining.is_set()

    def _take_note_of_all(self, error: Exception) -> None:
        self._under_way = None
        log.warning(
            "this release of the server does not show its requests (%r): note is taken of each, which costs some time",
            error,
        )

    def _find_requests(self) -> None:
        """Find what is going on, in the turn in which this generation leaves."""
        under_way, is_resting = self._under_way, self._is_resting
        self._is_resting = False
        if under_way is None or not is_resting:
            return
        known = {request.task for requests in self._requests.values() for request in requests}
        for task in under_way.tasks():
            if task.done() or task in known:
                continue
            try:
                request = under_way.find(task)
            except Exception:
                # The drain waits for it all the same.
                log.exception("the server does not show a request: it is not told that this generation leaves")
                self._tracker.follow(task, "a request")
                continue
            if request is None:
                # It has not come here yet.
                continue
            noted = _Request(request.scope, task, is_older=True)
            if request.connection is None or request.connection.is_over():
                # Its client has gone; what it does may matter.
                self._tracker.follow(task, f"{noted.describe()}, whose client has gone")
                continue
            self._begin(request.connection, noted)
            task.add_done_callback(functools.partial(self._end_noted, request.connection, noted))
            request.say_goodbye_if(functools.partial(self._is_last_of, request.connection))

    def _end_noted(self, connection: Connection, request: _Request, _: asyncio.Task[Any]) -> None:
        self._finish(connection, request)

    def _is_last_of(self, connection: ServerConnection) -> bool:
        """Say of a request that was found what ``_is_last`` says of those that note was taken of."""
        return not connection.will_move and (self._goodbye.late.is_set() or not self.is_asked_more(connection))


class _Request:
    """One request, or one WebSocket, from its beginning to its end.

    Attributes:
        scope: of ASGI.
        task: that runs it, on asyncio.
        since: when it was noted, by CLOCK_MONOTONIC.
        is_older: whether it had begun before, when nobody took note of it.
    """

    __slots__ = ("is_older", "scope", "since", "task")

    def __init__(self, scope: Message, task: asyncio.Task[Any] | None, *, is_older: bool = False) -> None:
        self.scope = scope
        self.is_older = is_older
        self.task = task
        self.since = time.monotonic()

    @property
    def is_http_1(self) -> bool:
        """Whether it is one of HTTP/1, and no WebSocket."""
        return self.scope["type"] == "http" and bool(self.scope["http_version"].startswith("1"))

    def describe(self) -> str:
        """Describe it in a few words."""
        method = self.scope.get("method", "WebSocket")
        return describe_request(method, self.scope["path"], self.since, is_older=self.is_older)


class _WebSocket:
    """One WebSocket, which is closed without its application's doing once this generation leaves."""

    def __init__(
        self, goodbye: Goodbye, receive: Receive, send: Send, follow: Callable[[], Callable[[], bool]]
    ) -> None:
        self._goodbye = goodbye
        self._receive = receive
        self._send = send
        self._follow = follow
        self._is_dismissed = False
        self._is_disconnected = False

    async def run(self, app: Callable[[Any, Any, Any], Awaitable[Any]], scope: Message) -> None:
        try:
            with contextlib.suppress(_Dismissed):
                await app(scope, self._receive_through, self._send_through)
        finally:
            self._goodbye.discard_websocket(self._dismiss)
        # Receives to the end of the closing handshake: a socket that is closed with something unread resets.
        while self._is_dismissed and not self._is_disconnected:
            await self._receive_through()

    async def _receive_through(self) -> Message:
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            self._is_disconnected = True
            self._goodbye.discard_websocket(self._dismiss)
        return message

    async def _send_through(self, message: Message) -> None:
        if self._is_dismissed:
            if message["type"] == "websocket.close":
                return
            # A subclass of OSError, as the specification asks of a server whose client is gone.
            raise _Dismissed("this WebSocket was closed, because the service restarts")
        if message["type"] == "websocket.close":
            self._goodbye.discard_websocket(self._dismiss)
        if message["type"] != "websocket.accept":
            await self._send(message)
            return
        is_in_message = self._follow()
        await self._send(message)
        self._goodbye.add_websocket(self._dismiss, is_in_message)

    async def _dismiss(self) -> None:
        self._is_dismissed = True
        # OSError: the client was faster. RuntimeError: the server was, after a ping that was not answered.
        with contextlib.suppress(OSError, RuntimeError):
            await self._send({"type": "websocket.close", "code": RESTARTING, "reason": "the service restarts"})


class _Dismissed(OSError):
    """An application sends to a WebSocket that was closed."""


def _with_goodbye(headers: Any) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in headers if name.lower() != b"connection"]
    return [*others, (b"connection", b"close")]
