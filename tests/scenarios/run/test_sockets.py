"""Where `ecdysis run` listens, and what it speaks there: several sockets of all kinds, TLS, HTTP/2, and proxies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from pathlib import Path
from typing import Self

import h2.config
import h2.connection
import h2.events
import pytest
import trustme

from tests.scenarios.run.harness import HERE, PATIENCE_SECONDS, Open, by_path, by_tcp, get, running

pytestmark = pytest.mark.main_python_only

ASGI, AIOHTTP = ("apps:asgi",), ("apps:make_aiohttp", "--factory")
SERVERS = {"uvicorn": ASGI, "hypercorn": ASGI, "aiohttp": AIOHTTP}
APP_DIR = ("--app-dir", str(HERE))


@pytest.fixture
def authority(tmp_path: Path) -> ssl.SSLContext:
    """Write a certificate for ``localhost``, and return what trusts it."""
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "service.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("server", SERVERS)
def test_several_sockets_of_all_kinds(server: str, tmp_path: Path) -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as passed:
            number = passed.fileno()
            arguments = ("--uds", "s", "--fd", str(number), "--unix-mode", "660", "--bind", "127.0.0.1:0")
            async with running(
                tmp_path, *SERVERS[server], *APP_DIR, *arguments, "--server", server, pass_fds=(number,)
            ) as run:
                port = int(await run.wait_for(r"serving on .*http://127\.0\.0\.1:(\d+)"))
                opens = [by_path(tmp_path / "s"), by_tcp(passed.getsockname()[1]), by_tcp(port)]
                assert (tmp_path / "s").stat().st_mode & 0o777 == 0o660
                assert [await get(each) for each in opens] == ["ok"] * 3
                code, output = await run.restart()
                assert code == 0, output
                assert [await get(each) for each in opens] == ["ok"] * 3
        assert not (tmp_path / "s").exists()

    asyncio.run(test())


@pytest.mark.parametrize("server", SERVERS)
def test_tls(server: str, tmp_path: Path, authority: ssl.SSLContext) -> None:
    async def test() -> None:
        arguments = ("--certfile", "service.pem", "--port", "0", "--server", server)
        async with running(tmp_path, *SERVERS[server], *APP_DIR, *arguments) as run:
            port = int(await run.wait_for(r"serving on https://127\.0\.0\.1:(\d+)"))
            assert await get(by_tcp(port, authority)) == "ok"
            code, output = await run.restart()
            assert code == 0, output
            assert await get(by_tcp(port, authority)) == "ok"

    asyncio.run(test())


# Longer than a restart may take on a busy machine, so that no idle connection is closed for another reason.
UVICORN_HTTP2 = ("http=zttp", "http2=true", "timeout_keep_alive=60")
HYPERCORN_HTTP2 = ("keep_alive_timeout=60",)


@pytest.mark.parametrize(
    ("server", "loop", "more"),
    [
        ("uvicorn", "asyncio", UVICORN_HTTP2),
        ("hypercorn", "uvloop", HYPERCORN_HTTP2),
        ("hypercorn", "trio", HYPERCORN_HTTP2),
    ],
)
def test_http2(server: str, loop: str, more: tuple[str, ...], tmp_path: Path, authority: ssl.SSLContext) -> None:
    authority.set_alpn_protocols(["h2"])

    async def test() -> None:
        options = [each for option in more for each in ("--server-option", option)]
        arguments = ("--certfile", "service.pem", "--port", "0", "--server", server, "--loop", loop)
        async with running(tmp_path, *ASGI, *APP_DIR, *arguments, *options) as run:
            port = int(await run.wait_for(r"serving on https://127\.0\.0\.1:(\d+)"))
            async with Http2(by_tcp(port, authority)) as client, Http2(by_tcp(port, authority)) as idle:
                assert (await client.get("/scope")).startswith("2 https ")
                assert await idle.get("/") == "ok"
                code, output = await run.restart()
                assert code == 0, output
                # They are idle, and told so at once.
                for each in (client, idle):
                    await each.wait_for_end()
                    assert each.is_told_to_leave
            async with Http2(by_tcp(port, authority)) as client:
                assert await client.get("/") == "ok"

    asyncio.run(test())


class Http2:
    """A connection of HTTP/2.

    Attributes:
        is_told_to_leave: whether a GOAWAY has come.
    """

    def __init__(self, open_streams: Open) -> None:
        self.is_told_to_leave = False
        self._open = open_streams
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await self._open()
        self._connection.initiate_connection()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._writer.close()

    async def get(self, path: str) -> str:
        """Make a request; return the body."""
        headers = [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", path)]
        self._connection.send_headers(self._connection.get_next_available_stream_id(), headers, end_stream=True)
        body = b""
        while True:
            for event in await self._receive():
                assert not isinstance(event, h2.events.StreamReset)
                if isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
                elif isinstance(event, h2.events.StreamEnded):
                    return body.decode()

    async def wait_for_end(self) -> None:
        """Wait until the server has closed the connection."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            with contextlib.suppress(EOFError):
                while True:
                    await self._receive()

    async def _receive(self) -> list[h2.events.Event]:
        self._writer.write(self._connection.data_to_send())
        if not (data := await self._reader.read(2**16)):
            raise EOFError("the connection has ended")
        events = self._connection.receive_data(data)
        self.is_told_to_leave |= any(isinstance(event, h2.events.ConnectionTerminated) for event in events)
        return events


@pytest.mark.parametrize(("server", "loop"), [("uvicorn", "uvloop"), ("hypercorn", "trio"), ("aiohttp", "uvloop")])
def test_what_a_trusted_proxy_says_is_believed(server: str, loop: str, tmp_path: Path) -> None:
    async def test() -> None:
        trusting = ("--forwarded-allow-ips", "127.0.0.1,10.0.0.0/8")
        arguments = (*SERVERS[server], *APP_DIR, *trusting, "--port", "0", "--server", server, "--loop", loop)
        async with running(tmp_path, *arguments) as run:
            open_tcp = by_tcp(await run.find_port())
            said = {"X_Forwarded_Proto": "https", "X_Forwarded_For": "192.0.2.7, 10.1.2.3"}
            assert "https 192.0.2.7" in await get(open_tcp, "/scope", **said)
            assert "http 127.0.0.1" in await get(open_tcp, "/scope")

    asyncio.run(test())
