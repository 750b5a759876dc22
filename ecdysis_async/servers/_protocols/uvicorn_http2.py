"""The goodbye of uvicorn's connections of HTTP/2, which its zttp protocols serve.

Seams, as seen in uvicorn 0.54 and zttp: of ``ServerState`` ``connections``; of ``ZttpH2Protocol`` ``conn``, ``cycles``,
``flush``, ``handle_request`` and ``transport``; ``Connection.close``, which sends a GOAWAY and goes on, and
``has_pending_send``.
"""

from __future__ import annotations

from typing import Any, Final

from uvicorn.server import ServerState

from ecdysis_async.servers._common.goodbye import Goodbye
from ecdysis_async.servers._common.http2 import ANY_STREAM, Http2Connection, Http2Goodbyes, write_goaway

__all__ = ["follow_http_2", "is_http_2"]

# RFC 9113, 7: "the stream was refused prior to performing any application processing".
REFUSED_STREAM: Final = 7


def is_http_2(protocol: Any) -> bool:
    """Say whether a protocol of uvicorn's speaks HTTP/2."""
    return hasattr(protocol, "cycles")


def follow_http_2(goodbye: Goodbye, state: ServerState) -> None:
    """Let the connections of HTTP/2 of one server have their goodbyes."""
    known: dict[Any, _Http2Connection] = {}

    def find() -> list[Http2Connection]:
        nonlocal known
        protocols = [protocol for protocol in state.connections if is_http_2(protocol)]
        known = {protocol: known.get(protocol) or _Http2Connection(protocol) for protocol in protocols}
        return list(known.values())

    Http2Goodbyes(goodbye, find)


class _Http2Connection(Http2Connection):
    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._is_refused = False

    @property
    def is_idle(self) -> bool:
        return not self._protocol.cycles and not self._protocol.conn.has_pending_send()

    @property
    def is_over(self) -> bool:
        return bool(self._protocol.transport.is_closing())

    async def announce(self) -> None:
        # uvicorn writes whole frames at a time, so that one more may stand between two.
        if not self._is_refused:
            self._write(write_goaway(ANY_STREAM))

    async def refuse(self) -> None:
        if self._is_refused:
            return
        self._is_refused = True
        self._protocol.handle_request = self._refuse_request
        # Names the last stream, which zttp knows.
        self._protocol.conn.close()
        self._write(self._protocol.conn.data_to_send())

    async def close(self) -> None:
        if not self.is_over:
            self._protocol.transport.close()

    def _write(self, data: bytes) -> None:
        if not self.is_over:
            self._protocol.transport.write(data)

    def _refuse_request(self, request: Any) -> None:
        # uvicorn sends it, with all else, when it has handled what was received.
        self._protocol.conn.stream(request.stream_id).reset(REFUSED_STREAM)
