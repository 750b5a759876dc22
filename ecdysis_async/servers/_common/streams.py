"""Answers that last until their server stops, as others have built them: each is told that its generation leaves.

Applications have the event ``ecdysis.draining`` for their own. What stands here are libraries that look for the end of
another server: without a word their clients would wait for the drain's deadline, and be cut.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

from ecdysis_async._system.own_log import logger
from ecdysis_async._system.tasks import all_tasks

__all__ = ["SEAMS", "end_streams"]

SEAMS = {
    "sse_starlette.sse:AppStatus": ("enable_automatic_graceful_drain", "should_exit"),
    "sse_starlette.sse:EventSourceResponse": ("_stream_response", "active", "background"),
    "engineio.async_socket:AsyncSocket": ("poll", "queue"),
    "engineio.packet:Packet": ("packet_type",),
}
"""What is used of them, as seen in sse-starlette 3.7 and python-engineio 4.15: attributes, by module and class."""

Send = Callable[[dict[str, Any]], Awaitable[None]]

# The end of a body (ASGI, HTTP & WebSocket message format).
LAST: Final[dict[str, Any]] = {"type": "http.response.body", "body": b"", "more_body": False}


def end_streams() -> None:
    """Let event streams of sse-starlette end, and long polls of Engine.IO (Socket.IO) be answered.

    Nothing is imported. What is built otherwise than :data:`SEAMS` says is left to the drain's deadline.
    """
    try:
        _end_event_streams()
        _answer_polls()
    except Exception as error:  # noqa: BLE001 - a drain goes on, whatever an application has loaded
        logger.warning("streams of the application are not told that this generation leaves: %r", error)


def _end_event_streams() -> None:
    """Set what sse-starlette sets where uvicorn handles a signal: its streams end within half a second."""
    sse = sys.modules.get("sse_starlette.sse")
    if sse is None or not getattr(sse.AppStatus, "enable_automatic_graceful_drain", True):
        return
    sse.AppStatus.should_exit = True
    # Releases before 2.2 have an event besides, once a stream was begun.
    event = getattr(sse.AppStatus, "should_exit_event", None)
    if event is not None:
        event.set()
    _complete_event_streams(sse.EventSourceResponse, sse.AppStatus)


def _complete_event_streams(kind: Any, status: Any) -> None:
    """Let event streams end as whole answers: sse-starlette stops in the middle of the body, which clients take ill.

    Streams that are asked for from now on, on connections that are still there, are empty: their clients ask anew.
    Where somebody takes back what sse-starlette was told, as the tests of an application do, they are streams again.
    """
    call = kind.__call__

    async def answer_without_events(response: Any, scope: Mapping[str, Any], receive: Any, send: Send) -> None:
        if not status.should_exit or scope["type"] != "http":  # the refusal of a WebSocket
            await call(response, scope, receive, send)
            return
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send(dict(LAST))
        if response.background is not None:
            await response.background()

    kind.__call__ = answer_without_events
    for task in all_tasks():
        for variables in _find_variables(task, "_stream_response"):
            response = variables.get("self")
            if isinstance(response, kind) and hasattr(response, "active") and "send" in variables:
                response.background = functools.partial(_complete, response, variables["send"], response.background)


async def _complete(response: Any, send: Send, background: Callable[[], Awaitable[None]] | None) -> None:
    """Send the end of a stream that was stopped, and go on with what sse-starlette does behind it."""
    # It is not active where the stream has ended by itself, or its client has gone.
    if response.active:
        response.active = False
        await send(dict(LAST))
    if background is not None:
        await background()


def _answer_polls() -> None:
    """Answer each long poll with a packet that means nothing: the client polls anew, and finds the next generation.

    That one does not know the session, and the client begins another one at once. A packet that closes the session
    would keep some clients from coming back.
    """
    sockets, packets = sys.modules.get("engineio.async_socket"), sys.modules.get("engineio.packet")
    if sockets is None or packets is None:
        return
    for task in all_tasks():
        for variables in _find_variables(task, "poll"):
            waiting = variables.get("self")
            if isinstance(waiting, sockets.AsyncSocket):
                waiting.queue.put_nowait(packets.Packet(packets.NOOP))


def _find_variables(task: asyncio.Task[Any], method: str) -> Iterator[Mapping[str, Any]]:
    """Return the variables of each method of a name in which a task waits."""
    coroutine: Any = task.get_coro()
    while coroutine is not None and (frame := getattr(coroutine, "cr_frame", None)) is not None:
        if frame.f_code.co_name == method:
            yield frame.f_locals
        coroutine = coroutine.cr_await
