"""Scheme and client as trusted proxies say them; what other peers say is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from ecdysis_async.servers._common.forwarded import Forwarded, Trusted


def test_trusted_proxies() -> None:
    trusted = Trusted("10.0.0.0/8, ::1,proxy")
    assert "10.1.2.3" in trusted and "::1" in trusted and "proxy" in trusted
    assert "127.0.0.1" not in trusted and "unix" not in trusted
    assert "127.0.0.1" in Trusted(None) and "192.0.2.7" not in Trusted(None)
    assert "anybody" in Trusted("*")
    # The last one that is no proxy of ours is the client: what stands before it, the client may have written.
    assert trusted.find_client("1.1.1.1, 192.0.2.7, 10.1.2.3") == "192.0.2.7"
    assert trusted.find_client("10.0.0.1, 10.0.0.2") == "10.0.0.1"
    assert trusted.find_client(" ") is None


@pytest.mark.parametrize(
    ("client", "headers", "scheme", "expected"),
    [
        (("127.0.0.1", 1), {"x-forwarded-proto": "https", "x-forwarded-for": "192.0.2.1"}, "https", ("192.0.2.1", 0)),
        (("127.0.0.1", 1), {"x-forwarded-for": "192.0.2.1, 127.0.0.1"}, "http", ("192.0.2.1", 0)),
        (("127.0.0.1", 1), {"x-forwarded-proto": "gopher"}, "http", ("127.0.0.1", 1)),
        (("127.0.0.1", 1), {"host": "localhost"}, "http", ("127.0.0.1", 1)),
        (("192.0.2.9", 1), {"x-forwarded-proto": "https", "x-forwarded-for": "192.0.2.1"}, "http", ("192.0.2.9", 1)),
        # Over a Unix socket.
        (None, {"x-forwarded-for": "192.0.2.1"}, "http", ("192.0.2.1", 0)),
    ],
)
async def test_an_application_sees_the_client_that_a_trusted_proxy_names(
    client: tuple[str, int] | None, headers: dict[str, str], scheme: str, expected: tuple[str, int] | None
) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["scheme"], scope["client"]))

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "scheme": "http", "client": client, "headers": pairs}
    await Forwarded(app, None)(scope, None, None)
    assert seen == [(scheme, expected)]
