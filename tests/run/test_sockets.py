"""Where `ecdysis run` listens, and what it speaks there: several sockets of all kinds, TLS, HTTP/2, and proxies."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
import trustme

from .harness import HERE, Open, by_path, by_tcp, get, running

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
                for _ in range(2):
                    assert [await get(each) for each in opens] == ["ok"] * 3
                    code, output = await run.restart()
                    assert code == 0, output
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


@pytest.mark.parametrize("loop", ["uvloop", "trio"])
def test_http2(loop: str, tmp_path: Path, authority: ssl.SSLContext) -> None:
    authority.set_alpn_protocols(["h2"])

    async def test() -> None:
        arguments = ("--certfile", "service.pem", "--port", "0", "--server", "hypercorn", "--loop", loop)
        async with running(tmp_path, *ASGI, *APP_DIR, *arguments) as run:
            port = int(await run.wait_for(r"serving on https://127\.0\.0\.1:(\d+)"))
            assert (await get_by_http2(by_tcp(port, authority), "/scope")).startswith("2 https ")
            code, output = await run.restart()
            assert code == 0, output
            assert await get_by_http2(by_tcp(port, authority), "/") == "ok"

    asyncio.run(test())


async def get_by_http2(open_streams: Open, path: str) -> str:
    reader, writer = await open_streams()
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    headers = [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", path)]
    connection.send_headers(1, headers, end_stream=True)
    body = b""
    try:
        while True:
            writer.write(connection.data_to_send())
            data = await reader.read(2**16)
            assert data, "the connection ended before the answer"
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
                elif isinstance(event, h2.events.StreamEnded):
                    return body.decode()
                assert not isinstance(event, h2.events.StreamReset)
    finally:
        writer.close()


@pytest.mark.parametrize(("server", "loop"), [("uvicorn", "uvloop"), ("hypercorn", "trio"), ("aiohttp", "uvloop")])
def test_what_a_trusted_proxy_says_is_believed(server: str, loop: str, tmp_path: Path) -> None:
    said = {"X_Forwarded_Proto": "https", "X_Forwarded_For": "192.0.2.7, 10.1.2.3"}

    async def ask(*arguments: str) -> str:
        more = ("--port", "0", "--server", server, "--loop", loop)
        async with running(tmp_path, *SERVERS[server], *APP_DIR, *arguments, *more) as run:
            return await get(by_tcp(await run.find_port()), "/scope", **said)

    async def test() -> None:
        trusting = ("--forwarded-allow-ips", "127.0.0.1,10.0.0.0/8")
        assert "https 192.0.2.7" in await ask(*trusting)
        assert "http 127.0.0.1" in await ask("--no-proxy-headers")

    asyncio.run(test())
