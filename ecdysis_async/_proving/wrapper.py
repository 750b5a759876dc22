"""What `ecdysis prove TARGET` serves: the user's own target, each of whose answers names the process it is from.

It runs in the workers of the service, as a factory of `ecdysis run`. It can also refuse to start, as a release that is
broken would. An `async def main(ecdysis)`, and a handler of the library websockets, are served as they are.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ecdysis_async._config.target import Kind, call_factory, find_kind, load
from ecdysis_async._service.ecdysis import current

from .settings import (
    APP_DIR_VARIABLE,
    BROKEN_VARIABLE,
    FACTORY_VARIABLE,
    GENERATION_HEADER,
    PID_HEADER,
    PLAIN_VARIABLE,
    REQUEST_HEADER,
    TARGET_VARIABLE,
)

__all__ = ["BrokenOnPurpose"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ANSWERS = ("http.response.start", "websocket.accept")


class BrokenOnPurpose(Exception):
    """This release does not start, so that it can be seen what that does to the clients of the former one."""


def __getattr__(name: str) -> Any:
    """Return the factory of what is to be served, ``release``: the application is imported now, as any other would be.

    Raises:
        BrokenOnPurpose: this release shall not start.
        StartupError: there is no such target.
    """
    if name != "release":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    environment = os.environ
    if os.path.exists(environment[BROKEN_VARIABLE]):
        raise BrokenOnPurpose("this release is broken on purpose, by `ecdysis prove`")
    found = load(environment[TARGET_VARIABLE], app_dir=environment[APP_DIR_VARIABLE])
    return functools.partial(_make, found)


async def _make(found: Any) -> Any:
    environment, target = os.environ, os.environ[TARGET_VARIABLE]
    app = await call_factory(found, target) if FACTORY_VARIABLE in environment else found
    if PLAIN_VARIABLE in environment:
        return app
    match find_kind(app, target):
        case Kind.ASGI:
            return Named(app)
        case Kind.AIOHTTP:
            app.on_response_prepare.append(name_response)
    return app


class Named:
    """An ASGI application each of whose answers says who it is from, and to which request."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection, one request, or the lifespan."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        wanted = REQUEST_HEADER.encode()
        request = next((value for name, value in scope["headers"] if name.lower() == wanted), None)

        async def send_named(message: Message) -> None:
            if message["type"] in ANSWERS:
                added = [(name.encode(), value.encode()) for name, value in describe(request)]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self._app(scope, receive, send_named)


async def name_response(request: Any, response: Any) -> None:
    """Add the same to a response of aiohttp."""
    named = request.headers.get(REQUEST_HEADER)
    response.headers.extend(describe(named.encode() if named is not None else None))


def describe(request: bytes | None) -> list[tuple[str, str]]:
    """Return the headers of an answer to a request."""
    headers = [(PID_HEADER, str(os.getpid()))]
    with contextlib.suppress(LookupError):  # served by something else, in a test of the application
        headers.append((GENERATION_HEADER, str(current().generation)))
    return [*headers, (REQUEST_HEADER, request.decode("latin-1"))] if request is not None else headers
