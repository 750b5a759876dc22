"""Takes scheme and client from what trusted proxies say, for servers that do not do that themselves."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["Forwarded", "Trusted"]

LOOPBACK = "127.0.0.1,::1"

# What a proxy says, in the names that it says it by.
HEADERS = frozenset({b"x-forwarded-proto", b"x-forwarded-for"})

# The scheme of a WebSocket, by that of its handshake.
WEBSOCKET_SCHEMES = {"http": "ws", "https": "wss"}


class Trusted:
    """The proxies that are believed.

    Args:
        hosts: addresses and networks, separated by commas; "*" trusts every peer; None trusts this machine.
    """

    def __init__(self, hosts: str | None) -> None:
        names = [each.strip() for each in (LOOPBACK if hosts is None else hosts).split(",")]
        self._is_everybody = "*" in names
        self._networks = []
        # A name that is no address: the peer of a Unix socket may be called so.
        self._names = set()
        for name in names:
            try:
                self._networks.append(ipaddress.ip_network(name))
            except ValueError:
                self._names.add(name)

    def __contains__(self, host: object) -> bool:
        if self._is_everybody or host in self._names:
            return True
        try:
            address = ipaddress.ip_address(str(host))
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    def find_client(self, forwarded_for: str) -> str | None:
        """Return the last host of a list that is no trusted proxy; the first, if all are; None if the list is empty."""
        hosts = [each.strip() for each in forwarded_for.split(",") if each.strip()]
        return next((each for each in reversed(hosts) if each not in self), hosts[0] if hosts else None)


class Forwarded:
    """Gives an ASGI application the scheme and the client that trusted proxies name.

    The headers are ``X-Forwarded-Proto`` and ``X-Forwarded-For``.

    Args:
        app: an application of ASGI 3.
        hosts: the proxies; see :class:`Trusted`.
    """

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[Any]], hosts: str | None) -> None:
        self._app = app
        self._trusted = Trusted(hosts)

    def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> Awaitable[Any]:
        # A plain function, which asks nobody about a peer that says nothing: each request comes through here.
        for name, _ in scope.get("headers", ()):
            if name in HEADERS:
                self._read(scope)
                break
        return self._app(scope, receive, send)

    def _read(self, scope: MutableMapping[str, Any]) -> None:
        if not self._is_believed(scope.get("client")):
            return
        headers = dict(scope["headers"])
        scheme = headers.get(b"x-forwarded-proto", b"").decode("latin1").strip()
        if scheme in WEBSOCKET_SCHEMES:
            scope["scheme"] = WEBSOCKET_SCHEMES[scheme] if scope["type"] == "websocket" else scheme
        host = self._trusted.find_client(headers.get(b"x-forwarded-for", b"").decode("latin1"))
        if host is not None:
            # The client's port is not known.
            scope["client"] = (host, 0)

    def _is_believed(self, client: Any) -> bool:
        # A Unix socket's peer has no address: it is trusted by the permissions of the path.
        return client is None or not client[0] or client[0] in self._trusted
