"""What a server has under way when its generation leaves, found by its own objects.

As long as nothing leaves, requests pass by unseen: whatever was written down of each would be paid by each. In the
turn of leaving, one pass over the server's tasks finds the requests that are going on.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Collection, MutableMapping
from typing import Any

from ecdysis_async._accepting.asyncio_connections import ServerConnection

__all__ = ["RequestUnderWay", "RequestsUnderWay"]


class RequestUnderWay(abc.ABC):
    """A request that began while nobody took note of it.

    Attributes:
        connection: where its client waits; None if the client has gone.
        scope: of ASGI.
    """

    def __init__(self, connection: ServerConnection | None, scope: MutableMapping[str, Any]) -> None:
        self.connection = connection
        self.scope = scope

    @abc.abstractmethod
    def say_goodbye_if(self, is_last: Callable[[], bool]) -> None:
        """Let its response say that the connection ends, if ``is_last`` says so when that response begins.

        It has no effect where the response has begun.
        """


class RequestsUnderWay(abc.ABC):
    """The requests of one server."""

    @abc.abstractmethod
    def tasks(self) -> Collection[asyncio.Task[None]]:
        """Return the tasks that the server runs at this moment, one for each request, and for each WebSocket."""

    @abc.abstractmethod
    def find(self, task: asyncio.Task[None]) -> RequestUnderWay | None:
        """Return the request of HTTP/1 that a task serves; None for a WebSocket, for HTTP/2, and before it begins.

        Raises:
            Exception: the server is not built as it was.
        """
