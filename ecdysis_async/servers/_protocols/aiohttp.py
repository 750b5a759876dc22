"""What is seen of aiohttp's protocols: requests under way are found, and idle connections move to a successor.

aiohttp's parser hides whether it has read the beginning of a next request. So the bytes that it is fed are looked at.
If they ended with an empty line, and the last request is complete, nothing of another request has come: an empty line
would have ended its head. A request with a body of a given length mostly ends otherwise: its connection moves after a
later request.

What is used of aiohttp that it does not document stands in :data:`SEAMS`.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any, Final

from aiohttp import web

from ecdysis_async._accepting.asyncio_connections import ServerConnection, connection_of
from ecdysis_async._accepting.asyncio_servers import GatedServer
from ecdysis_async._connections.parcel import Release

from .http import IDLE, UnreadOnly, count_unread, will_move

__all__ = [
    "SEAMS",
    "AiohttpTransfer",
    "FollowedParser",
    "find_connection",
    "find_request",
    "has_next_request",
    "make_movable",
    "missing_seams",
    "stays",
]

SEAMS: Final = {
    "aiohttp.web_protocol:RequestHandler": (
        *("_buffer_paused", "_close", "_current_request", "_force_close", "_keepalive", "_message_tail", "_messages"),
        *("_parser", "_payload_parser", "_request_handler", "_request_in_progress", "_task_handler", "_upgraded"),
        "_waiter",
    ),
    "aiohttp.web_request:Request": ("_prepare_hook",),
    "aiohttp.web_server:Server": ("connections", "request_factory", "request_handler", "requests_count"),
    "aiohttp.web_response:StreamResponse": ("force_close",),
    "aiohttp.web_ws:WebSocketResponse": ("_waiting", "_writer", "send_frame"),
}
"""What is used of aiohttp's classes, as seen in aiohttp 3.14: attributes, by the module and the name of the class.

``Application._make_request`` takes the class of requests as ``_cls``.
"""

EMPTY_LINE: Final = b"\r\n\r\n"


class FollowedParser:
    """Stands in front of a parser of requests, to know whether anything is left in it."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._feed_data = parser.feed_data
        # Asked once for each request: found here, it costs no call of `__getattr__`.
        if hasattr(parser, "message_consumed"):
            self.message_consumed = parser.message_consumed
        # The end of all bytes that it was fed, however they were cut into pieces.
        self._end = b""
        # The body of the last request that it has found.
        self._body: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> Any:
        self._end = data[-len(EMPTY_LINE) :] if len(data) >= len(EMPTY_LINE) else (self._end + data)[-len(EMPTY_LINE) :]
        found = self._feed_data(data)
        if found[0]:
            self._body = found[0][-1][1]
        return found

    @property
    def is_empty(self) -> bool:
        """Whether all that it was fed is known to be complete requests; False says nothing."""
        return not self._end or (self._end == EMPTY_LINE and self._body is not None and self._body.is_eof())


class AiohttpTransfer(UnreadOnly):
    """Moves connections between two requests, and before the first one. How long they may be idle begins anew."""

    moves_between_requests = True

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        if not isinstance(protocol, web.RequestHandler):
            return None
        if not isinstance(protocol._parser, FollowedParser):  # noqa: SLF001 - aiohttp's
            return None
        return Release(kind=IDLE) if _is_idle(protocol) else None


def make_movable(server: GatedServer) -> None:
    """Let the connections move that a server accepts from now on."""
    make = server.protocol_factory

    def make_followed() -> asyncio.BaseProtocol:
        protocol: Any = make()
        protocol._parser = FollowedParser(protocol._parser)  # noqa: SLF001 - aiohttp's
        return protocol  # type: ignore[no-any-return]

    server.adapt(protocol_factory=make_followed, transfer=AiohttpTransfer(make_followed))


def missing_seams(app: web.Application) -> list[str]:
    """Return what an application, or this release of aiohttp, does not have of what finds requests under way."""
    missing = [] if hasattr(web.Request, "_prepare_hook") else ["Request._prepare_hook"]
    if "_cls" not in inspect.signature(app._make_request).parameters:  # noqa: SLF001 - aiohttp's
        missing.append("Application._make_request(_cls=)")
    needed = ("_current_request", "_request_handler", "_task_handler")
    return [*missing, *(f"RequestHandler.{name}" for name in needed if not hasattr(web.RequestHandler, name))]


def find_request(protocol: Any) -> web.BaseRequest | None:
    """Return the request that a protocol has at this moment."""
    request: web.BaseRequest | None = protocol._current_request  # noqa: SLF001 - aiohttp's
    return request


def find_connection(protocol: Any) -> ServerConnection | None:
    """Return the connection of a protocol; None if its client has gone, or it is a WebSocket's by now."""
    return None if protocol.transport is None else connection_of(protocol.transport)


def stays(request: web.Request) -> bool:
    """Say whether the connection of a request stays here when it is answered."""
    return request.body_exists or not will_move()


def has_next_request(request: web.Request) -> bool:
    """Say whether whole requests have come behind this one."""
    protocol: Any = request.protocol
    try:
        return bool(protocol._messages) or count_unread(protocol.transport.get_extra_info("socket").fileno()) > 0  # noqa: SLF001 - aiohttp's
    except (OSError, ValueError, AttributeError):
        # It is closed, and may have no socket any more.
        return False


def _is_idle(protocol: Any) -> bool:
    waiter = protocol._waiter  # noqa: SLF001 - aiohttp's
    is_waiting = waiter is not None and not waiter.done() and not protocol._messages  # noqa: SLF001 - aiohttp's
    is_other = protocol._upgraded or protocol._payload_parser is not None  # noqa: SLF001 - aiohttp's
    has_more = protocol._message_tail  # noqa: SLF001 - aiohttp's
    is_ending = protocol._close or protocol._force_close or not protocol._keepalive  # noqa: SLF001 - aiohttp's
    # A parser that was paused may hold back whole requests.
    is_busy = protocol._request_in_progress or protocol._buffer_paused  # noqa: SLF001 - aiohttp's
    is_empty = protocol._parser.is_empty  # noqa: SLF001 - aiohttp's
    return bool(is_waiting and is_empty and not (is_other or has_more or is_ending or is_busy))
