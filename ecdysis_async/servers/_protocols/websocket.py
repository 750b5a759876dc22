"""How a WebSocket moves to a successor between two messages, whichever server speaks for it, and what it takes along.

The successor replays the handshake: the same request gives the same subprotocol and extensions. The response, which the
client has had already, is swallowed. The WebSocket takes along the state that the application offers. If messages are
compressed with a context, it also takes along the last bytes that the client has sent, because the client goes on
referring to them. Sending begins with a fresh context, as it may at any message.
"""

from __future__ import annotations

import abc
import asyncio
import base64
import contextlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from websockets.extensions.base import Extension
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Response

from ecdysis_async._connections.parcel import Refused, Release, Transferable
from ecdysis_async.servers._common.goodbye import RESTARTING
from ecdysis_async.servers._common.transfer import Transfer

from .frames import FollowsFrames, FrameFollower
from .http import WEBSOCKET

__all__ = [
    "GOODBYE",
    "MovingWebSocket",
    "MutedTransport",
    "WebSocketState",
    "WindowFollower",
    "negotiated",
]

GOODBYE: Final = Frame(Opcode.CLOSE, Close(RESTARTING, "the service restarts").serialize()).serialize(mask=False)
"""The last frame of a WebSocket that was taken over and cannot go on: the client comes back, as without a transfer."""


class WindowFollower(FrameFollower):
    """Follows the bytes of a client, and what its compression may refer to."""

    def __init__(self) -> None:
        super().__init__()
        self._window = b""

    @property
    def window(self) -> bytes:
        """The last decompressed bytes, as many as the client can refer to."""
        return self._window

    def follow(self, extensions: Sequence[Extension]) -> None:
        """Remember the bytes that are decompressed from now on."""
        for extension in extensions:
            if isinstance(extension, PerMessageDeflate) and not extension.remote_no_context_takeover:
                extension.decode = self._remembering(extension.decode, 1 << extension.remote_max_window_bits)  # type: ignore[method-assign]

    def restore(self, extensions: Sequence[Extension], window: bytes) -> None:
        """Let a fresh decompressor go on where the predecessor's ended, and remember its bytes."""
        self._window = window
        for extension in extensions:
            if window and isinstance(extension, PerMessageDeflate) and not extension.remote_no_context_takeover:
                extension.decoder = zlib.decompressobj(wbits=-extension.remote_max_window_bits, zdict=window)
        self.follow(extensions)

    def _remembering(self, decode: Callable[..., Frame], size: int) -> Callable[..., Frame]:
        def decode_and_remember(frame: Frame, *, max_size: int | None = None) -> Frame:
            decoded = decode(frame, max_size=max_size)
            # A frame that was not compressed comes back as it is.
            if decoded is not frame:
                self._window = (self._window + bytes(decoded.data))[-size:]
            return decoded

        return decode_and_remember


def negotiated(response: Response) -> list[list[str]]:
    """Return the extensions and the subprotocol that the response to a handshake has settled."""
    return [response.headers.get_all(name) for name in ("Sec-WebSocket-Extensions", "Sec-WebSocket-Protocol")]


@dataclass(frozen=True, slots=True)
class WebSocketState:
    """The part of a WebSocket that moves beside its descriptor.

    Attributes:
        request: the request of its handshake.
        settled: the extensions and the subprotocol of the response; see :func:`negotiated`.
        window: the last decompressed bytes; see :class:`WindowFollower`.
        state: the application's.
    """

    request: bytes
    settled: list[list[str]]
    window: bytes
    state: Any

    def release(self) -> Release:
        """Pack it."""
        window = base64.b64encode(self.window).decode()
        return Release([self.request.decode("latin-1"), self.settled, window, self.state], kind=WEBSOCKET)

    @classmethod
    def unpack(cls, release: Release) -> WebSocketState:
        """Read it.

        Raises:
            Refused: this release does not know such a WebSocket.
        """
        match release.state:
            case [str(request), [list(_), list(_)] as settled, str(window), state, *_]:
                # No text in latin-1, or none in base64.
                with contextlib.suppress(ValueError):
                    return cls(request.encode("latin-1"), settled, base64.b64decode(window), state)
        raise Refused("this release does not understand what the WebSocket brings along")


class MutedTransport:
    """Stands before a transport and swallows the response, while the handshake is replayed.

    Args:
        real: the transport; nothing is written to it.
        give_up: called if the application refuses the connection.
    """

    def __init__(self, real: asyncio.Transport, give_up: Callable[[], None]) -> None:
        self.real = real
        self._give_up = give_up

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def write(self, data: bytes) -> None:
        """Swallow a response, which the client has had already."""

    def write_eof(self) -> None:
        """Give the connection up: the application ends it."""
        self._give_up()

    def close(self) -> None:
        """Give the connection up: the application closes it."""
        self._give_up()


class MovingWebSocket(Transferable, FollowsFrames, asyncio.Protocol, abc.ABC):
    """Lets a server's WebSocket move while its application waits for a message, and has offered a state.

    It stands in front of the server's own protocol, which has ``transport``, ``response`` and ``logger``.

    Attributes:
        ecdysis_transfer: where the application offers the state.
    """

    inbound: WindowFollower
    transport: Any
    response: Response
    logger: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ecdysis_transfer = Transfer()
        # What it has brought along, until the handshake is replayed and the application has accepted it again.
        self._carried: WebSocketState | None = None
        # Set when it is known whether it moves; None unless it is on its way.
        self._verdict: asyncio.Event | None = None
        self._request_bytes = b""
        self.inbound = WindowFollower()
        self._is_followed = False
        # The bytes that the client sends while the handshake is replayed.
        self._unread: list[bytes] = []

    # What differs from server to server

    @property
    @abc.abstractmethod
    def _is_opening(self) -> bool:
        """Whether the request of the handshake has not come completely."""

    @property
    @abc.abstractmethod
    def _is_idle(self) -> bool:
        """Whether it is open, its application waits for a message, and nothing was received for it or is being sent."""

    @property
    @abc.abstractmethod
    def _is_read_paused(self) -> bool:
        """Whether reading is paused until the application has dealt with what was read."""

    @property
    @abc.abstractmethod
    def _extensions(self) -> Sequence[Extension]:
        """The extensions that were negotiated."""

    # How it moves

    def resume(self, release: Release) -> None:
        """Go on with a WebSocket of the predecessor, as soon as there is a transport.

        Raises:
            Refused: this release does not know such a WebSocket.
        """
        self._carried = WebSocketState.unpack(release)
        self.ecdysis_transfer = Transfer(self._carried.state)

    def release_connection(self) -> Release | None:
        """Give it away between two messages: the last one was dealt with, and nothing of the next one has come."""
        if not self._is_idle or not self.inbound.is_between_messages:
            return None
        # A WebSocket that is half taken over looks as if it was idle.
        if self._carried is not None or self._verdict is not None or not self.ecdysis_transfer.is_offered:
            return None
        settled, state = negotiated(self.response), self.ecdysis_transfer.state()
        carried = WebSocketState(self._request_bytes, settled, self.inbound.window, state)
        self._verdict = asyncio.Event()
        return carried.release()

    def keep_connection(self) -> None:
        """Go on: it has not moved."""
        self._decide()

    async def wait_for_verdict(self) -> None:
        """Wait while it is on its way: nothing may be sent once the successor has begun."""
        if self._verdict is not None:
            await self._verdict.wait()

    # What the loop calls

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self._carried is not None:
            self.transport = MutedTransport(transport, self._give_up)
            self._request_bytes = self._carried.request
            super().data_received(self._request_bytes)

    def data_received(self, data: bytes) -> None:
        if self._carried is not None:
            # uvloop reads as soon as a connection is made, even if reading was paused before.
            self._unread.append(data)
            self._real_transport.pause_reading()
            return
        if self._is_opening:
            self._request_bytes += data
        else:
            if not self._is_followed:
                self._is_followed = True
                self.inbound.follow(self._extensions)
            self.inbound.feed(data)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unmute()
        self._decide()
        super().connection_lost(exc)

    # How it is resumed

    @property
    def _real_transport(self) -> Any:
        return self.transport.real if isinstance(self.transport, MutedTransport) else self.transport

    def _unmute(self) -> None:
        self._carried = None
        self.transport = self._real_transport

    def _go_on(self) -> None:
        """Let the client be heard, if the application has accepted it as the predecessor's did."""
        if self._carried is None:
            return
        if negotiated(self.response) != self._carried.settled:
            self.logger.warning("a WebSocket of the predecessor's is accepted otherwise here: it has to come back")
            self._give_up()
            return
        self._is_followed = True
        self.inbound.restore(self._extensions, self._carried.window)
        self._unmute()
        unread, self._unread = self._unread, []
        for data in unread:
            self.data_received(data)
        if unread and not self._is_read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def _give_up(self) -> None:
        """Close a WebSocket that was taken over, and that the application refuses or accepts otherwise."""
        if self._carried is not None:
            self._unmute()
            self.transport.write(GOODBYE)
            self.transport.close()

    def _decide(self) -> None:
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            verdict.set()
