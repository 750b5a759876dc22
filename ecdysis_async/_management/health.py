"""The health endpoints: the few lines of HTTP/1.1 by which a load balancer, or Kubernetes, asks how a service is.

``GET`` or ``HEAD`` of ``/live`` is answered by 200 for as long as this process lives. ``/ready`` is answered by 200, or
by 503 with the reason in one line. Further pages may be served beside them, such as ``/metrics``. A connection has one
request. All that a client can take is bounded: places, bytes,
time.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import anyio
import anyio.abc

from ecdysis_async._accepting.gated_socket import (
    EXHAUSTED_PAUSE_SECONDS,
    AcceptingEnded,
    GatedSocket,
    accept_connection,
)
from ecdysis_async._system.descriptors import EXHAUSTED

__all__ = ["HealthServer", "Page"]

logger = logging.getLogger("ecdysis_async")

# How many clients are heard at once. One more takes the place of the client that has been there for longest.
MAX_CLIENTS = 32

# How long a request and its headers may be, bytes, and how long all of a connection may take, seconds.
MAX_HEAD_BYTES = 8 * 1024
CLIENT_SECONDS = 5.0

# For how long, and up to how many bytes, a client that has its answer is read on. Closing before that would reset the
# connection, and take the answer from the client.
REST_SECONDS = 1.0
MAX_REST_BYTES = 64 * 1024

MAX_REASON_CHARACTERS = 500

METHODS: Final = ("GET", "HEAD")
REQUEST_PARTS = 3


@dataclass(frozen=True, slots=True)
class Page:
    """What one path is answered with.

    Attributes:
        content_type: what the text is.
        text: the text.
        headers: further headers of the response.
    """

    content_type: str
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """A response.

    Attributes:
        status: the status line without the version.
        page: its body.
    """

    status: str
    page: Page

    @classmethod
    def of_line(cls, status: str, text: str, **headers: str) -> Answer:
        """Return a response whose body is a line of text."""
        return cls(status, Page("text/plain; charset=utf-8", f"{text}\n", headers))

    def to_bytes(self, *, with_body: bool) -> bytes:
        """Return it as it is sent. The answer to HEAD tells of a body that does not follow."""
        body = self.page.text.encode()
        lines = [
            f"HTTP/1.1 {self.status}",
            f"Content-Type: {self.page.content_type}",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
            *(f"{name}: {value}" for name, value in self.page.headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + (body if with_body else b"")


class HealthServer:
    """Answers on a listening socket, which stays its owner's.

    Args:
        sock: a socket that listens already; or one behind the gate, which is answered on while that stands open.
        why_not_ready: returns why the service is not ready, or None if it is. It must not block.
        pages: makes what further paths are answered with, by the path.

    Attributes:
        paths: what is answered.
    """

    def __init__(
        self,
        sock: socket.socket | GatedSocket,
        why_not_ready: Callable[[], str | None],
        pages: Mapping[str, Callable[[], Awaitable[Page]]] | None = None,
    ) -> None:
        if isinstance(sock, socket.socket):
            sock.setblocking(False)
        self._sock = sock
        self._why_not_ready = why_not_ready
        self._pages = pages or {}
        self.paths = ["/live", "/ready", *self._pages]
        # The clients that are heard, the oldest first.
        self._clients: dict[socket.socket, anyio.CancelScope] = {}

    async def run(self) -> None:
        """Answer until this is cancelled; nothing that a client does ends it."""
        async with anyio.create_task_group() as task_group:
            while (client := await self._accept()) is not None:
                if len(self._clients) >= MAX_CLIENTS:
                    self._make_room()
                # The client is noted before its task, which may have its first turn only after many more have come.
                scope = self._clients[client] = anyio.CancelScope(deadline=anyio.current_time() + CLIENT_SECONDS)
                task_group.start_soon(self._serve, client, scope)

    async def _accept(self) -> socket.socket | None:
        """Return the next client, or None where none will come any more."""
        if isinstance(self._sock, GatedSocket):
            try:
                return await self._sock.take(accept_connection)
            except AcceptingEnded:
                return None
        while True:
            await anyio.wait_readable(self._sock)
            try:
                return accept_connection(self._sock)
            except BlockingIOError:
                continue  # another process, which shares the socket, was faster
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                # A descriptor of this server's can be freed at once. Other ones are freed later.
                if not self._make_room():
                    await anyio.sleep(EXHAUSTED_PAUSE_SECONDS)

    def _make_room(self) -> bool:
        """Let the oldest client go; say whether there was one."""
        for client in self._clients:
            self._clients.pop(client).cancel()
            return True
        return False

    async def _serve(self, client: socket.socket, scope: anyio.CancelScope) -> None:
        try:
            with client, scope:
                await self._answer(client)
        except OSError as error:
            logger.debug("a client of the health endpoints is let go: %r", error)
        except Exception:
            logger.exception("a request to the health endpoints failed")
        finally:
            self._clients.pop(client, None)

    async def _answer(self, client: socket.socket) -> None:
        head = await _receive_head(client)
        if not head:
            return  # somebody has looked whether the port is open
        method, answer = await self._choose(head)
        await _send(client, answer.to_bytes(with_body=method != "HEAD"))
        client.shutdown(socket.SHUT_WR)
        with anyio.move_on_after(REST_SECONDS):
            left = MAX_REST_BYTES
            while left > 0 and (data := await _receive(client)):
                left -= len(data)

    async def _choose(self, head: bytes) -> tuple[str, Answer]:
        if len(head) > MAX_HEAD_BYTES:
            return "", Answer.of_line("400 Bad Request", f"no more than {MAX_HEAD_BYTES} bytes are read")
        line = head.partition(b"\n")[0].rstrip(b"\r").decode("latin-1")
        parts = line.split(" ")
        if len(parts) != REQUEST_PARTS or not parts[2].startswith("HTTP/1.") or not _is_whole(head):
            return "", Answer.of_line("400 Bad Request", "this is no request: GET /ready HTTP/1.1 is one")
        method, target, _ = parts
        path = target.partition("?")[0]
        if path not in self.paths:
            return method, Answer.of_line("404 Not Found", f"there is {' and '.join(self.paths)}")
        if method not in METHODS:
            text = f"ask by {' or '.join(METHODS)}"
            return method, Answer.of_line("405 Method Not Allowed", text, Allow=", ".join(METHODS))
        if path == "/live":
            return method, Answer.of_line("200 OK", "alive")
        if (make_page := self._pages.get(path)) is not None:
            try:
                return method, Answer("200 OK", await make_page())
            except Exception:
                logger.exception("%s cannot be answered", path)
                return method, Answer.of_line("500 Internal Server Error", "it cannot be told: see the log")
        try:
            reason = self._why_not_ready()
        except Exception:
            logger.exception("it cannot be told whether the service is ready")
            reason = "it cannot be told: see the log"
        if reason is None:
            return method, Answer.of_line("200 OK", "ready")
        return method, Answer.of_line("503 Service Unavailable", " ".join(reason.split())[:MAX_REASON_CHARACTERS])


def _is_whole(head: bytes) -> bool:
    return b"\r\n\r\n" in head or b"\n\n" in head


async def _receive_head(client: socket.socket) -> bytes:
    """Return what a client sent until the empty line, its end, or the limit."""
    head = b""
    while not _is_whole(head) and len(head) <= MAX_HEAD_BYTES and (data := await _receive(client)):
        head += data
    return head


async def _receive(client: socket.socket) -> bytes:
    while True:
        try:
            return client.recv(MAX_HEAD_BYTES)
        except BlockingIOError:
            await anyio.wait_readable(client)


async def _send(client: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[client.send(data) :]
        except BlockingIOError:
            await anyio.wait_writable(client)
