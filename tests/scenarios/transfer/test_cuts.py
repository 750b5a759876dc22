"""A restart at every byte position of a stream of requests: the answers are those of a server that never restarts."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.scenarios.servers.clients import HOST
from tests.scenarios.servers.harness import PATIENCE_SECONDS, find_blemishes, running

pytestmark = pytest.mark.main_python_only

SETTINGS = {"probation": 0.3, "drain_timeout": 10}

# Their bytes are so many clients at a time.
REQUESTS = 4

POLL_SECONDS = 0.01


# aiohttp's connections stay after a request with a body, and their clients are told.
SHAPES = {"aiohttp-moving": ("GET",)}


def make_requests(source: random.Random, shapes: Sequence[str]) -> list[bytes]:
    """Make requests of all shapes: without a body, with one, and with one in chunks."""
    requests = []
    for number in range(REQUESTS):
        path = f"/echo/{number}{'x' * source.randrange(8)}"
        body = bytes(source.choices(b"abc\r\n 01", k=source.randrange(1, 20)))
        match source.choice(shapes):
            case "GET":
                requests.append(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            case "length":
                head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
                requests.append(head.encode() + body)
            case "chunks":
                head = f"POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
                requests.append(b"%s%x\r\n%s\r\n0\r\n\r\n" % (head.encode(), len(body), body))
    return requests


async def wait_for_connections(pid: int, count: int) -> None:
    """Wait until a process has so many clients."""
    process = psutil.Process(pid)
    # No event here tells what another process has.
    while sum(each.status == psutil.CONN_ESTABLISHED for each in process.net_connections("tcp")) < count:  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS)


async def read_answers(reader: asyncio.StreamReader) -> list[str]:
    """Return status and body of each response; who has answered differs, and the date."""
    answers = []
    for _ in range(REQUESTS):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        status, *lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        assert headers.get("connection") != "close"
        body = (await reader.readexactly(int(headers["content-length"]))).decode()
        answers.append(f"{status} {body.partition(' ')[2]}")
    return answers


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("server", ["uvicorn-moving", "uvicorn-h11-moving", "aiohttp-moving"])
def test_a_restart_at_any_byte_changes_no_answer(server: str, loop: str, tmp_path: Path) -> None:
    asyncio.run(restart_everywhere(server, loop, tmp_path))


async def restart_everywhere(server: str, loop: str, directory: Path) -> None:
    source = random.Random(f"{server} {loop}")
    requests = make_requests(source, SHAPES.get(server, ("GET", "length", "chunks")))
    stream = b"".join(requests)
    boundaries = {0, *itertools.accumulate(map(len, requests))}
    async with running(server, loop, directory, settings=SETTINGS, is_main=True) as service:

        async def talk(cut: int) -> list[str]:
            reader, writer = await asyncio.open_connection(HOST, service.port)
            try:
                writer.write(stream[:cut])
                connected.release()
                await settled.wait()
                if cut in boundaries:
                    # Idle, and so to be moved as it is; the others go on before the predecessor has looked at them.
                    await moved.wait()
                # Once more in two pieces: some of it comes while its connection is on its way.
                middle = source.randint(cut, len(stream))
                writer.write(stream[cut:middle])
                await asyncio.sleep(source.random() * 0.02)
                writer.write(stream[middle:])
                return await read_answers(reader)
            finally:
                writer.close()

        connected, settled, moved = asyncio.Semaphore(0), asyncio.Event(), asyncio.Event()
        settled.set()
        moved.set()
        expected = await talk(len(stream))
        settled.clear()
        moved.clear()
        assert all(f"200 ok {number}" in answer for number, answer in enumerate(expected))
        async with asyncio.timeout(2 * PATIENCE_SECONDS), asyncio.TaskGroup() as task_group:
            tasks = [task_group.create_task(talk(cut)) for cut in range(len(stream) + 1)]
            for _ in range(len(tasks) + 1):
                await connected.acquire()
            answer = await service.restart()
            assert answer.get("outcome") == "settled", answer
            settled.set()
            await service.wait_for_generations(2)
            await wait_for_connections(service.pids[-1], len(boundaries))
            moved.set()
        wrong = [cut for cut, task in enumerate(tasks) if task.result() != expected]
        assert not wrong
        await service.wait_for_ends(1)
    report = service.reports[service.pids[0]]
    assert report is not None
    assert report.drain.cut == 0
    # Those of whose next request nothing had come, at least; others when they were answered.
    assert report.drain.transferred >= len(boundaries)
    assert find_blemishes(directory) == []
