"""Answers that last until their server stops, by other libraries: a restart ends them, and does not cut them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
from pathlib import Path

import pytest

from tests.scenarios.run.harness import PATIENCE_SECONDS, running

pytestmark = pytest.mark.main_python_only

APP = """
import asyncio
import engineio
from sse_starlette import EventSourceResponse

polls = engineio.ASGIApp(engineio.AsyncServer(async_mode="asgi"))

async def count():
    for number in range(1000):
        yield {"data": str(number)}
        await asyncio.sleep(0.05)

async def app(scope, receive, send):
    if scope["type"] == "http" and scope["path"] == "/events":
        await EventSourceResponse(count())(scope, receive, send)
    else:
        await polls(scope, receive, send)
"""


def begin(port: int, path: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    connection.request("GET", path)
    return connection


def read(connection: http.client.HTTPConnection) -> tuple[int, str]:
    """Return status and body."""
    with contextlib.closing(connection), connection.getresponse() as answer:
        return answer.status, answer.read().decode()


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"])
def test_streams_end_at_the_drain(server: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(APP)

    async def test() -> None:
        async with running(tmp_path, "program:app", "--port", "0", "--server", server, "--drain-timeout", "60") as run:
            port = await run.find_port()
            events = begin(port, "/events")
            stream = await asyncio.to_thread(events.getresponse)
            assert stream.readline() == b"data: 0\r\n"
            path = "/engine.io/?EIO=4&transport=polling"
            status, body = await asyncio.to_thread(read, begin(port, path))
            assert (status, body[0]) == (200, "0")
            path += f"&sid={json.loads(body[1:])['sid']}"
            poll = begin(port, path)
            code, output = await run.restart("--until", "drained")
            assert code == 0, output
            assert ", 0 cut" in output
            # The stream has ended, and the poll has its answer, long before the drain's deadline: both are whole.
            await asyncio.to_thread(stream.read)
            assert await asyncio.to_thread(read, poll) == (200, "6")
            # The new generation knows nothing of the session, which the client begins anew then.
            status, _ = await asyncio.to_thread(read, begin(port, path))
            assert status == 400
            events.close()

    asyncio.run(test())
