"""One HTTP/1.1 connection of a client that takes note of everything: also of what it has not asked for.

What comes is parsed by h11. What it means is decided elsewhere (rules.py).
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable, Iterator
from typing import cast

import h11

from .plan import Shape, Url
from .records import Answer, Connection, Ending, Exchange, Fault
from .settings import GENERATION_HEADER, PID_HEADER, REQUEST_HEADER

__all__ = ["HttpConnection", "RequestFailed", "read_answer"]

# In how many pieces a slow client sends its head, and an upload its body.
HEAD_PIECES = 2
BODY_PIECES = 4


class RequestFailed(Exception):
    """A request without an answer."""

    def __init__(self, fault: Fault, detail: str = "") -> None:
        super().__init__(detail or str(fault))
        self.fault = fault
        self.detail = detail


class HttpConnection(asyncio.Protocol):
    """One connection, with one request at a time.

    Args:
        record: where everything is noted.
        clock: the time.
        identify_by: a header of the application's own.
    """

    def __init__(self, record: Connection, clock: Callable[[], float], identify_by: str | None) -> None:
        self.record = record
        self._clock = clock
        self._identify_by = identify_by
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._head: h11.Response | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._is_announced = False
        self._lost = asyncio.Event()

    @property
    def is_usable(self) -> bool:
        """Whether another request may be sent."""
        return self.record.ended is None and self._http.our_state is h11.IDLE and not self._is_announced

    async def open(self, url: Url, shape: Shape) -> None:
        """Connect.

        Raises:
            RequestFailed: it was refused.
        """
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: self, url.host, url.port, ssl=_trust_all() if url.scheme == "https" else None
            )
        except OSError as error:
            self.record.ended = self._clock()
            raise RequestFailed(_fault_of(error), str(error)) from None
        except asyncio.CancelledError:
            # uvloop closes a connection that was made in that very moment, and tells the protocol nothing of it.
            self._lost.set()
            raise

    async def ask(self, exchange: Exchange, shape: Shape, url: Url) -> Answer:
        """Send one request, in pieces where that is its kind, and wait for the answer.

        Raises:
            RequestFailed: there was none.
        """
        self._answer = asyncio.get_running_loop().create_future()
        self.record.requests.append(exchange.id)
        try:
            for piece, pause in self._encode(exchange, shape, url):
                if self._answer.done():
                    break  # the server has had enough
                if self._transport is not None:
                    self._transport.write(piece)
                if pause:
                    begun = self._clock()
                    await asyncio.wait((self._answer,), timeout=pause)
                    exchange.delay += self._clock() - begun
            return await self._answer
        finally:
            if self._answer.done() and not self._answer.cancelled():
                self._answer.exception()  # seen, also where the waiting was cancelled in that very moment
            self._answer = None

    def _encode(self, exchange: Exchange, shape: Shape, url: Url) -> Iterator[tuple[bytes, float]]:
        """Return the pieces of a request, each with the pause behind it."""
        headers = [("host", url.netloc), (REQUEST_HEADER, str(exchange.id)), *shape.headers]
        if shape.body:
            headers += [("content-length", str(shape.body)), ("content-type", "application/octet-stream")]
        head = self._send(h11.Request(method=shape.method, target=shape.path, headers=headers))
        is_slow = shape.kind in ("slow", "upload")
        # Random numbers of a load are no secret.
        pause = random.uniform(0, shape.seconds) if is_slow else 0.0  # noqa: S311
        if shape.body:
            yield head, 0.0
            size = -(-shape.body // BODY_PIECES) if is_slow else shape.body
            for start in range(0, shape.body, size):
                is_last = start + size >= shape.body
                piece = self._send(h11.Data(data=b"x" * min(size, shape.body - start)))
                yield piece, 0.0 if is_last else pause / BODY_PIECES
            yield self._send(h11.EndOfMessage()), 0.0
            return
        head += self._send(h11.EndOfMessage())
        if is_slow:
            middle = len(head) // HEAD_PIECES
            yield head[:middle], pause
            head = head[middle:]
        yield head, 0.0

    def _send(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> bytes:
        try:
            return self._http.send(event) or b""
        except h11.LocalProtocolError as error:  # the server has closed, or answered, in the middle of it
            raise RequestFailed(Fault.UNANSWERED, str(error)) from None

    async def close(self) -> None:
        """Close it, and wait until it is closed."""
        if self.record.ended is None:
            self._end(Ending.OURS)
        if self._transport is not None:
            # All that was to be sent was sent, or matters no more.
            self._transport.abort()
            await self._lost.wait()

    # What asyncio tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.record.opened = self._clock()

    def data_received(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            self._read()
        except (h11.RemoteProtocolError, h11.LocalProtocolError) as error:
            self._is_announced = True  # it is of no use any more
            self._fail(Fault.MALFORMED, str(error))

    def connection_lost(self, error: Exception | None) -> None:
        self._lost.set()
        if self.record.ended is not None:
            return
        if self._answer is None:
            self._end(Ending.ANNOUNCED if self._is_announced else Ending.IDLE)
            return
        if error is None:
            # The end of a body that nothing else delimits.
            try:
                self._http.receive_data(b"")
                self._read()
            except h11.RemoteProtocolError:
                pass  # in the middle of an answer, or before it: told below
        if self._answer.done():
            self._end(Ending.ANNOUNCED)
            return
        self._end(Ending.BUSY)
        if self._head is not None:
            self._fail(Fault.TRUNCATED, "the connection ended in the middle of the answer")
        elif error is not None:
            self._fail(_fault_of(error), str(error))
        else:
            self._fail(Fault.UNANSWERED, "the connection was closed before the answer")

    def _read(self) -> None:
        while True:
            event = self._http.next_event()
            match event:
                case h11.Response():
                    self._head = event
                case h11.EndOfMessage():
                    self._deliver()
                case h11.InformationalResponse() | h11.Data():
                    pass
                case _:  # there is no more, or it waits for this client
                    return

    def _deliver(self) -> None:
        assert self._head is not None
        headers = {name.decode(): value.decode("latin-1") for name, value in self._head.headers}
        answer = read_answer(headers, self._identify_by)
        answer.at, answer.status = self._clock(), self._head.status_code
        self._head = None
        self.record.answers.append(answer)
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        elif self._http.our_state is not h11.SEND_BODY:
            self._is_announced = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def _fail(self, fault: Fault, detail: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(RequestFailed(fault, detail))

    def _end(self, ending: Ending) -> None:
        self.record.ended, self.record.ending = self._clock(), ending


def read_answer(headers: dict[str, str], identify_by: str | None) -> Answer:
    """Read from an answer's headers, in lower case, who has answered what."""

    def number(name: str) -> int | None:
        value = headers.get(name, "")
        return int(value) if value.isdecimal() else None

    return Answer(
        at=0.0,
        request=number(REQUEST_HEADER),
        pid=number(PID_HEADER),
        generation=number(GENERATION_HEADER),
        release=headers.get(identify_by.lower()) if identify_by is not None else None,
    )


def _fault_of(error: Exception) -> Fault:
    match error:
        case ConnectionRefusedError():
            return Fault.REFUSED
        case ConnectionResetError() | BrokenPipeError() | ConnectionAbortedError():
            return Fault.RESET
        case TimeoutError():
            return Fault.TIMEOUT
    return Fault.OTHER


def _trust_all() -> ssl.SSLContext:
    """Trust any certificate: on loopback there is nobody in between."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
