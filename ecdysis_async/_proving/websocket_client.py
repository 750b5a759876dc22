"""One WebSocket of a client that takes note of everything, by the library websockets.

A message is a request, and its echo the answer. Where the application echoes nothing, a ping is the request, which
each server answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from .http_client import RequestFailed, read_answer
from .plan import Shape, Url
from .records import Answer, Connection, Ending, Exchange, Fault

__all__ = ["ComeBack", "WebSocketConnection"]

# What begins each message; the id follows.
PREFIX = "ecdysis-prove-"

# By these codes a server says that its clients shall come back (RFC 6455, 7.4.1, and its registry).
COME_BACK = (1001, 1012)

ECHO_SECONDS = 2.0


class ComeBack(Exception):
    """The server has closed in good order before it has read the message, which belongs to the next connection."""


class WebSocketConnection:
    """One WebSocket, with one message at a time.

    Args:
        record: where everything is noted.
        clock: the time.
        identify_by: a header of the application's own.
        is_echoed: whether the application echoes what is sent; None: find out, with the first message.
    """

    def __init__(
        self, record: Connection, clock: Callable[[], float], identify_by: str | None, *, is_echoed: bool | None
    ) -> None:
        self.record = record
        self._clock = clock
        self._identify_by = identify_by
        self.is_echoed = is_echoed
        self._websocket: ClientConnection | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_busy = False

    @property
    def is_usable(self) -> bool:
        """Whether another message may be sent."""
        return self.record.ended is None

    async def open(self, url: Url, shape: Shape) -> None:
        """Connect.

        Raises:
            RequestFailed: it was refused, or is no WebSocket.
        """
        scheme = "wss" if url.scheme == "https" else "ws"
        try:
            self._websocket = await connect(
                f"{scheme}://{url.netloc}{shape.path}",
                additional_headers=dict(shape.headers),
                open_timeout=None,
                ping_interval=None,
                close_timeout=1,
                proxy=None,
                logger=_SILENT,
            )
        except InvalidStatus as error:
            self.record.ended = self._clock()
            raise RequestFailed(Fault.STATUS, f"status {error.response.status_code} instead of 101") from None
        except (InvalidHandshake, EOFError) as error:
            self.record.ended = self._clock()
            raise RequestFailed(Fault.MALFORMED, str(error)) from None
        except OSError as error:
            self.record.ended = self._clock()
            fault = Fault.REFUSED if isinstance(error, ConnectionRefusedError) else Fault.RESET
            raise RequestFailed(fault, str(error)) from None
        self.record.opened = self._clock()
        self._watching = asyncio.create_task(self._watch(self._websocket))

    async def ask(self, exchange: Exchange) -> Answer:
        """Send one message, and wait for its answer.

        Raises:
            ComeBack: the server has closed meanwhile, and told its clients to come back.
            RequestFailed: there was no answer.
        """
        assert self._websocket is not None and self._websocket.response is not None
        self.record.requests.append(exchange.id)
        self._is_busy = True
        try:
            if self.is_echoed is None:
                self.is_echoed = await self._find_out(exchange)
            elif self.is_echoed:
                await self._exchange(exchange)
            else:
                await (await self._websocket.ping(f"{PREFIX}{exchange.id}"))
        except ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code in COME_BACK:
                self.record.requests.pop()
                self._end(Ending.ANNOUNCED)
                raise ComeBack from None
            self._end(Ending.BUSY)
            raise RequestFailed(Fault.UNANSWERED, f"the WebSocket was closed before the answer: {error}") from None
        finally:
            self._is_busy = False
        # The first answer alone tells who it is from: the connection may have moved since.
        headers = {name.lower(): value for name, value in self._websocket.response.headers.raw_items()}
        answer = read_answer(headers, self._identify_by) if not self.record.answers else Answer(0.0)
        answer.at, answer.request = self._clock(), exchange.id
        self.record.answers.append(answer)
        return answer

    async def _find_out(self, exchange: Exchange) -> bool:
        try:
            async with asyncio.timeout(ECHO_SECONDS):
                await self._exchange(exchange)
        except TimeoutError:
            return False
        return True

    async def _exchange(self, exchange: Exchange) -> None:
        assert self._websocket is not None
        text = f"{PREFIX}{exchange.id}"
        await self._websocket.send(text)
        while True:
            message = await self._websocket.recv()
            message = message if isinstance(message, str) else message.decode(errors="replace")
            if f"{message} ".find(f"{text} ") >= 0 or message.rstrip("\"'}]").endswith(text):
                return
            # What the application says of itself is its own business; an answer to another message is none.
            if PREFIX in message:
                named = "".join(each for each in message.partition(PREFIX)[2] if each.isdecimal())
                self.record.answers.append(Answer(self._clock(), request=int(named or 0)))
                raise RequestFailed(Fault.OTHER, f"the answer is one to another message: {message[:80]!r}")

    async def close(self) -> None:
        """Close it."""
        self._end(Ending.OURS)
        if self._websocket is not None and self._watching is not None:
            await self._websocket.close()
            await self._watching

    async def _watch(self, websocket: ClientConnection) -> None:
        """Take note when it ends, also while nothing is asked."""
        await websocket.wait_closed()
        announced = websocket.close_code in COME_BACK
        self._end(Ending.ANNOUNCED if announced else Ending.BUSY if self._is_busy else Ending.IDLE)

    def _end(self, ending: Ending) -> None:
        """Note the end, once."""
        if self.record.ended is None:
            self.record.ended, self.record.ending = self._clock(), ending


_SILENT = logging.getLogger("ecdysis_async.proving.websockets")
_SILENT.propagate = False
_SILENT.addHandler(logging.NullHandler())
