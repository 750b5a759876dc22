"""The sockets and the TLS context of the options, and what is said where they cannot be had."""

from __future__ import annotations

import logging
import socket
import ssl
from pathlib import Path

import pytest
import trustme

from ecdysis_async._accepting.data_plane import activate, deactivate
from ecdysis_async._config.options import Options
from ecdysis_async._sockets.addresses import parse_address
from ecdysis_async.errors import StartupError
from ecdysis_async.servers._common.listening import is_access_logged, make_ssl_context, open_sockets
from tests.planes import a_plane


async def test_each_address_has_a_socket_that_the_registry_knows(tmp_path: Path) -> None:
    addresses = ("127.0.0.1:0", f"unix:{tmp_path}/socket")
    async with a_plane() as plane:
        activate(plane)
        try:
            sockets = await open_sockets(Options("module:app", bind=tuple(map(parse_address, addresses))))
        finally:
            deactivate()
        assert [sock.family for sock in sockets] == [socket.AF_INET, socket.AF_UNIX]
        assert [entry.sock for entry in plane.registry.entries] == sockets


async def test_an_address_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = parse_address(f"127.0.0.1:{other.getsockname()[1]}")
        async with a_plane() as plane:
            activate(plane)
            try:
                with pytest.raises(StartupError, match="in use"):
                    await open_sockets(Options("module:app", bind=(address,)))
            finally:
                deactivate()


def test_no_certificate_means_no_tls() -> None:
    assert make_ssl_context(Options("module:app")) is None


def test_tls_as_the_options_say(tmp_path: Path) -> None:
    certificate = tmp_path / "both.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(certificate)
    context = make_ssl_context(Options("module:app", certfile=str(certificate)))
    assert context is not None
    assert context.verify_mode is ssl.CERT_NONE


def test_a_certificate_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.pem"
    certificate.write_text("this is no certificate")
    with pytest.raises(StartupError, match="TLS cannot be served with"):
        make_ssl_context(Options("module:app", certfile=str(certificate)))


@pytest.mark.parametrize(("level", "is_logged"), [(logging.INFO, True), (logging.WARNING, False)])
def test_an_access_log_that_nobody_sees_is_not_written(
    level: int, *, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(level, "some.access"):
        assert is_access_logged(Options("module:app", access_log=True), "some.access") is is_logged
        assert not is_access_logged(Options("module:app", access_log=False), "some.access")
