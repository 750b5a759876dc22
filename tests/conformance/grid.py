"""The framework grid: what the clients of each framework see of restarts.

``python -m tests.conformance.grid`` prints a table, and ``nox -s grid`` does the same. Each application runs on
`ecdysis run`, under plain requests and under the client that is characteristic of it, and is restarted several times.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import importlib.metadata
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.conformance.service import Service, serving

__all__: list[str] = []

# After how many seconds an answer is taken for lost.
LOST_SECONDS = 60.0

# How long a client rests after each answer, seconds: the load shall not be the news.
PAUSE_SECONDS = 0.01

# How long a client rests after a failure, seconds.
FAILURE_SECONDS = 0.2


@dataclass(slots=True)
class Tally:
    """What one client has seen.

    Attributes:
        exchanges: how many answers, events or echoes have come.
        failures: what has gone wrong that no client is prepared for.
        ends: how its connections have ended, and how often.
    """

    exchanges: int = 0
    failures: list[str] = field(default_factory=list)
    ends: collections.Counter[str] = field(default_factory=collections.Counter)


Client = Callable[[int, Tally, asyncio.Event], Coroutine[Any, Any, None]]


async def poll(port: int, tally: Tally, over: asyncio.Event, *paths: str) -> None:
    """Ask for pages, on connections that are kept and on new ones; nothing is asked twice."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=LOST_SECONDS) as kept:
        while not over.is_set():
            for path in paths or ("/",):
                with attempt(tally):
                    note(tally, await kept.get(path))
                    async with httpx.AsyncClient(base_url=kept.base_url, timeout=LOST_SECONDS) as new:
                        note(tally, await new.get(path))
            await asyncio.sleep(PAUSE_SECONDS)


def note(tally: Tally, answer: httpx.Response) -> None:
    """Take note of an answer."""
    tally.exchanges += 1
    if (answer.status_code, answer.text) != (200, "ok"):
        tally.failures.append(f"{answer.status_code}: {answer.text[:80]!r}")


@contextlib.contextmanager
def attempt(tally: Tally) -> Iterator[None]:
    """Take note of what goes wrong."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the client has seen
        tally.failures.append(repr(error)[:200])


async def echo(port: int, tally: Tally, over: asyncio.Event) -> None:
    """Speak to a WebSocket; where it is closed as announced (1012), connect anew."""
    sent = 0
    while not over.is_set():
        try:
            async with connect(f"ws://127.0.0.1:{port}/ws", open_timeout=LOST_SECONDS) as websocket:
                while not over.is_set():
                    sent += 1
                    await websocket.send(str(sent))
                    answer = await asyncio.wait_for(websocket.recv(), LOST_SECONDS)
                    tally.exchanges += 1
                    if answer != str(sent):
                        tally.failures.append(f"{answer!r} instead of {sent}")
                    await asyncio.sleep(PAUSE_SECONDS)
        except ConnectionClosed as error:
            end(tally, error)
        except Exception as error:  # noqa: BLE001 - as above
            tally.failures.append(repr(error)[:200])
            await asyncio.sleep(FAILURE_SECONDS)


def end(tally: Tally, error: ConnectionClosed) -> None:
    """Take note of how a WebSocket was closed: by a word, or without."""
    if error.rcvd is None:
        tally.failures.append(f"a WebSocket has ended without a close frame: {error!r}"[:200])
    else:
        tally.ends[str(error.rcvd.code)] += 1


async def listen_to_events(port: int, tally: Tally, over: asyncio.Event) -> None:
    """Listen as a browser's EventSource does: where a stream ends, ask for what follows the last event."""
    last = 0
    async with httpx.AsyncClient(timeout=LOST_SECONDS) as client:
        while not over.is_set():
            with attempt(tally):
                begun, headers = tally.exchanges, {"Last-Event-ID": str(last)}
                async with client.stream("GET", f"http://127.0.0.1:{port}/events", headers=headers) as stream:
                    async for line in stream.aiter_lines():
                        if line.startswith("data: "):
                            number = int(line.removeprefix("data: "))
                            if number != last + 1:
                                tally.failures.append(f"event {number} after {last}")
                            last = number
                            tally.exchanges += 1
                        if over.is_set():
                            return
                # A process that leaves answers so what still comes on a connection that has not moved yet.
                tally.ends["end of the stream" if tally.exchanges > begun else "a stream without events"] += 1


async def call_by_socketio(port: int, tally: Tally, over: asyncio.Event) -> None:
    """Use the client of Socket.IO, which connects anew by itself."""
    import socketio

    # Its rests grow up to here, seconds.
    client = socketio.AsyncClient(reconnection_delay=0.1, reconnection_delay_max=0.5)
    client.on("disconnect", lambda reason: tally.ends.update([str(reason)]))
    await client.connect(f"http://127.0.0.1:{port}", transports=["websocket"])
    sent = 0
    while not over.is_set():
        sent += 1
        try:
            answer = await client.call("echo", sent, timeout=1)
        except (socketio.exceptions.SocketIOError, ConnectionError):
            # What was on its way when the connection ended is said anew, as Socket.IO guarantees no delivery.
            tally.ends["said anew"] += 1
            await asyncio.sleep(FAILURE_SECONDS)
            continue
        tally.exchanges += 1
        if answer != sent:
            tally.failures.append(f"{answer!r} instead of {sent}")
        await asyncio.sleep(PAUSE_SECONDS)
    await client.disconnect()


async def subscribe(port: int, tally: Tally, over: asyncio.Event) -> None:
    """Subscribe by GraphQL (graphql-transport-ws); where that ends, subscribe to what follows."""
    last = 0
    while not over.is_set():
        try:
            url = f"ws://127.0.0.1:{port}/graphql/"
            async with connect(url, subprotocols=["graphql-transport-ws"], open_timeout=LOST_SECONDS) as websocket:  # type: ignore[list-item] # a NewType of str
                await websocket.send(json.dumps({"type": "connection_init"}))
                query = {"query": f"subscription {{ count(after: {last}) }}"}
                await websocket.send(json.dumps({"id": "1", "type": "subscribe", "payload": query}))
                async for text in websocket:
                    message = json.loads(text)
                    if message["type"] == "next":
                        number = message["payload"]["data"]["count"]
                        if number != last + 1:
                            tally.failures.append(f"{number} after {last}")
                        last = number
                        tally.exchanges += 1
                    elif message["type"] != "connection_ack":
                        tally.failures.append(f"{message['type']}")
                    if over.is_set():
                        return
                tally.ends[str(websocket.close_code)] += 1
        except ConnectionClosed as error:
            end(tally, error)
        except Exception as error:  # noqa: BLE001 - as above
            tally.failures.append(repr(error)[:200])
            await asyncio.sleep(FAILURE_SECONDS)


async def call_tools(port: int, tally: Tally, over: asyncio.Event) -> None:
    """Call a tool by the client of MCP, again and again in one session."""
    from mcp.client.client import Client as McpClient

    while not over.is_set():
        with attempt(tally):
            async with McpClient(f"http://127.0.0.1:{port}/mcp") as client:
                sent = 0
                while not over.is_set():
                    sent += 1
                    result = await client.call_tool("echo", {"text": str(sent)})
                    tally.exchanges += 1
                    if result.is_error or result.content[0].text != str(sent):
                        tally.failures.append(f"{result!r}"[:200])
                    await asyncio.sleep(PAUSE_SECONDS)


async def poll_django(port: int, tally: Tally, over: asyncio.Event) -> None:
    """Ask for a view that runs in a thread, and for one that does not."""
    await poll(port, tally, over, "/", "/threaded")


@dataclass(frozen=True, slots=True)
class Row:
    """One framework.

    Attributes:
        package: on PyPI.
        module: of the application.
        client: the characteristic one.
        what: it does, in words.
        duty: what the client has to do at a restart.
    """

    package: str
    module: str
    client: Client
    what: str
    duty: str


CONNECT_ANEW = "connect anew at 1012"
ROWS = (
    Row("starlette", "starlette_app", echo, "WebSocket", CONNECT_ANEW),
    Row("fastapi", "fastapi_app", echo, "WebSocket", CONNECT_ANEW),
    Row("litestar", "litestar_app", echo, "WebSocket", CONNECT_ANEW),
    Row("quart", "quart_app", echo, "WebSocket", CONNECT_ANEW),
    Row("sanic", "sanic_app", echo, "WebSocket (ASGI)", CONNECT_ANEW),
    Row("django", "django_app", poll_django, "polling, threads", "nothing"),
    Row("sse-starlette", "sse_starlette_app", listen_to_events, "event stream", "ask anew with Last-Event-ID"),
    Row("python-socketio", "socketio_app", call_by_socketio, "its own client", "say anew what was not acknowledged"),
    Row("strawberry-graphql", "strawberry_app", subscribe, "GraphQL subscription", "subscribe anew at 1012"),
    Row("mcp", "mcp_app", call_tools, "streamable HTTP", "nothing"),
)


async def measure(row: Row, restarts: int, seconds: float) -> tuple[Tally, Tally, Service]:
    """Restart one application under both of its clients; return what they have seen, and the service."""
    pages, own, over = Tally(), Tally(), asyncio.Event()
    options = ("--probation", "0.5", "--drain-timeout", "5", "--websocket-close", "together", "--no-access-log")
    async with serving(f"{row.module}:app", *options) as service:
        async with asyncio.TaskGroup() as clients:
            clients.create_task(poll(service.port, pages, over))
            clients.create_task(row.client(service.port, own, over))
            try:
                await settle(own, seconds)
                for _ in range(restarts):
                    await service.restart("drained")
                    await settle(own, seconds)
            finally:
                over.set()
        return pages, own, service


async def settle(tally: Tally, seconds: float) -> None:
    """Let the client do some work in peace: at least one exchange, and for so many seconds."""
    begun, before = time.monotonic(), tally.exchanges
    while tally.exchanges == before or time.monotonic() - begun < seconds:
        if time.monotonic() - begun > LOST_SECONDS:
            raise RuntimeError(f"the client hears nothing any more: {tally}")
        await asyncio.sleep(0.01)


async def run(names: list[str], restarts: int, seconds: float) -> AsyncIterator[tuple[Row, Tally, Tally, Service]]:
    """Yield what came of each row."""
    for row in ROWS:
        if not names or row.package in names:
            yield row, *await measure(row, restarts, seconds)


async def main() -> int:
    """Print a table; return 0 where nothing has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="packages; all of them where none is named")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="between two restarts")
    arguments = parser.parse_args()
    logging.disable()
    sys.stdout.write(
        "| framework | restarts | requests | failed | its client | exchanges | failed | closed | the client |\n"
        "|---|--:|--:|--:|---|--:|--:|---|---|\n"
    )
    failures: list[str] = []
    async for row, pages, own, service in run(arguments.names, arguments.restarts, arguments.seconds):
        ends = ", ".join(f"{count} by {name}" for name, count in sorted(own.ends.items())) or "0"
        name = f"{row.package} {importlib.metadata.version(row.package)}"
        cut = sum(report["drain"]["cut"] for report in service.reports)
        failures += [f"{row.package}: {each}" for each in (*pages.failures, *own.failures)]
        failures += [f"{row.package}: {cut} requests were cut"] if cut else []
        sys.stdout.write(
            f"| {name} | {len(service.reports)} | {pages.exchanges:,} | {len(pages.failures)} | {row.what} "
            f"| {own.exchanges:,} | {len(own.failures)} | {ends} | {row.duty} |\n"
        )
        sys.stdout.flush()
    sys.stdout.writelines(f"\n{each}\n" for each in failures)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
