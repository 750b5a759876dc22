"""The health endpoints: what they answer, and that nobody can keep them from answering."""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable

import anyio
import anyio.abc
import anyio.to_thread
import pytest

from ecdysis_async._management import health
from ecdysis_async._management.health import HealthServer

PATIENCE_SECONDS = 60.0


@contextlib.asynccontextmanager
async def answering(why_not_ready: Callable[[], str | None] = lambda: None) -> AsyncIterator[tuple[str, int]]:
    """Answer on a port of our own."""
    with socket.create_server(("127.0.0.1", 0)) as sock, anyio.fail_after(PATIENCE_SECONDS):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(HealthServer(sock, why_not_ready).run)
            yield sock.getsockname()
            task_group.cancel_scope.cancel()


async def say(address: tuple[str, int], data: bytes) -> bytes:
    """Send something and return all that is answered."""
    async with await anyio.connect_tcp(*address) as stream:
        await stream.send(data)
        return await read_rest(stream)


async def read_rest(stream: anyio.abc.SocketStream) -> bytes:
    answer = b""
    with contextlib.suppress(anyio.BrokenResourceError):
        async for chunk in stream:
            answer += chunk
    return answer


async def get(address: tuple[str, int], path: str, method: str = "GET") -> tuple[int, str, http.client.HTTPMessage]:
    """Ask by a client that knows HTTP well."""

    def ask() -> tuple[int, str, http.client.HTTPMessage]:
        with contextlib.closing(http.client.HTTPConnection(*address, timeout=PATIENCE_SECONDS)) as connection:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read().decode(), response.headers

    return await anyio.to_thread.run_sync(ask)


async def test_ready_or_not() -> None:
    reason: str | None = "generation 1\nis starting\r\nX-Evil: 1"
    async with answering(lambda: reason) as address:
        status, text, headers = await get(address, "/ready")
        # One line, whatever the reason holds.
        assert (status, text) == (503, "generation 1 is starting X-Evil: 1\n")
        assert (headers["X-Evil"], headers["Connection"], headers["Cache-Control"]) == (None, "close", "no-store")
        assert (await get(address, "/live"))[:2] == (200, "alive\n")
        reason = None
        assert (await get(address, "/ready?verbose"))[:2] == (200, "ready\n")
        status, text, headers = await get(address, "/ready", "HEAD")
        assert (status, text, headers["Content-Length"]) == (200, "", "6")


async def test_what_it_does_not_have() -> None:
    async with answering() as address:
        assert (await get(address, "/"))[:2] == (404, "there is /live and /ready\n")
        status, _, headers = await get(address, "/ready", "DELETE")
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert (await get(address, "/metrics", "POST"))[0] == 404


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01\r\n\r\n", b"GET /ready\r\n\r\n", b"GET  /ready HTTP/1.1\r\n\r\n", b"GET /ready HTTP/2.0\r\n\r\n"],
)
@pytest.mark.backends("asyncio", "trio")
async def test_what_is_no_request(request_bytes: bytes) -> None:
    async with answering() as address:
        assert (await say(address, request_bytes)).startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_a_request_in_pieces() -> None:
    async with answering() as address, await anyio.connect_tcp(*address) as stream:
        for piece in (b"GET /re", b"ady HTTP/1.0\r", b"\nHost: x\r\n", b"\r\n"):
            await stream.send(piece)
            await anyio.sleep(0.001)
        assert (await read_rest(stream)).startswith(b"HTTP/1.1 200 OK\r\n")


async def test_half_a_request() -> None:
    async with answering() as address, await anyio.connect_tcp(*address) as stream:
        await stream.send(b"GET /ready HTTP/1.1\r\nHost: x\r\n")
        await stream.send_eof()
        assert (await read_rest(stream)).startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_too_much_is_answered_all_the_same() -> None:
    """The answer is read, although not all that was sent has been: no reset takes it away."""
    async with answering() as address:
        for head in (b"GET /" + b"x" * 40_000, b"GET /ready HTTP/1.1\r\nX: " + b"y" * 40_000 + b"\r\n\r\n"):
            assert (await say(address, head)).startswith(b"HTTP/1.1 400 ")


async def test_who_only_looks_whether_it_is_open() -> None:
    async with answering() as address:
        for _ in range(3):
            await (await anyio.connect_tcp(*address)).aclose()
        assert (await get(address, "/live"))[0] == 200


async def test_silent_clients_keep_nobody_out() -> None:
    async with answering() as address, contextlib.AsyncExitStack() as stack:
        silent = [
            await stack.enter_async_context(await anyio.connect_tcp(*address)) for _ in range(3 * health.MAX_CLIENTS)
        ]
        for each in silent:
            await each.send(b"GET /rea")
        assert (await get(address, "/ready"))[0] == 200
        # The oldest have had to leave.
        assert await read_rest(silent[0]) == b""


async def test_a_slow_client_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CLIENT_SECONDS", 0.1)
    async with answering() as address, await anyio.connect_tcp(*address) as stream:
        await stream.send(b"GET /ready HTTP/1.1\r\n")
        assert await read_rest(stream) == b""


async def test_a_reason_that_cannot_be_had(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> str:
        raise RuntimeError("nobody knows")

    async with answering(fail) as address:
        assert (await get(address, "/ready"))[:2] == (503, "it cannot be told: see the log\n")
    assert "nobody knows" in caplog.text


@pytest.mark.backends("asyncio", "trio")
async def test_it_outlives_a_lack_of_descriptors() -> None:
    """Its own silent clients make room, and who waits meanwhile is answered."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with answering() as address, contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            stream = await stack.enter_async_context(await anyio.connect_tcp(*address))
            await stream.send(b"GET")
        with socket.socket() as last:
            last.setblocking(False)
            # The lowest that is free, and so is none.
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
            try:
                with contextlib.suppress(BlockingIOError):
                    last.connect(address)
                await anyio.wait_writable(last)
                last.send(b"GET /ready HTTP/1.1\r\n\r\n")
                await anyio.wait_readable(last)
                answer = last.recv(1024)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
