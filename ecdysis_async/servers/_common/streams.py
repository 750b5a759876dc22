"""Answers that last until their server stops, as others have built them: each is told that its generation leaves.

Applications have the event ``ecdysis.draining`` for their own. What stands here are libraries that look for the end of
another server: without a word their clients would wait for the drain's deadline, and be cut.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

from ecdysis_async._system.own_log import logger

__all__ = ["SEAMS", "end_streams"]

SEAMS = {
    "sse_starlette.sse:AppStatus": ("enable_automatic_graceful_drain", "should_exit"),
    "engineio.async_socket:AsyncSocket": ("poll", "queue"),
    "engineio.packet:Packet": ("packet_type",),
}
"""What is used of them, as seen in sse-starlette 3.7 and python-engineio 4.15: attributes, by module and class."""


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


def _answer_polls() -> None:
    """Answer each long poll with a packet that means nothing: the client polls anew, and finds the next generation.

    That one does not know the session, and the client begins another one at once. A packet that closes the session
    would keep some clients from coming back.
    """
    sockets, packets = sys.modules.get("engineio.async_socket"), sys.modules.get("engineio.packet")
    asynchronous = sys.modules.get("asyncio")
    if sockets is None or packets is None or asynchronous is None:
        return
    for task in asynchronous.all_tasks():
        for waiting in _find_objects(task, "poll"):
            if isinstance(waiting, sockets.AsyncSocket):
                waiting.queue.put_nowait(packets.Packet(packets.NOOP))


def _find_objects(task: asyncio.Task[Any], method: str) -> Iterator[Any]:
    """Return the objects in whose method of a name a task waits."""
    coroutine: Any = task.get_coro()
    while coroutine is not None and (frame := getattr(coroutine, "cr_frame", None)) is not None:
        if frame.f_code.co_name == method and "self" in frame.f_locals:
            yield frame.f_locals["self"]
        coroutine = coroutine.cr_await
