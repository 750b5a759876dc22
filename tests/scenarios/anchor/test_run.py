"""``ecdysis run``: the anchor in front of a real server."""

from __future__ import annotations

import asyncio
import http.client
import subprocess
import sys
from pathlib import Path

import pytest

from ecdysis_async.cli import client
from tests.scenarios.run.harness import PROJECT, running

pytestmark = pytest.mark.main_python_only

APPLICATION = """
import os

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    headers = [(b"content-length", str(len(str(os.getpid()))).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
"""

SERVERS = {"aiohttp", "hypercorn", "uvicorn", "websockets", "uvloop", "trio", "rich", "watchfiles", "dotenv"}


class KeptAlive:
    """A client that keeps its connection for as long as the server does."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self) -> int:
        self._connection.request("GET", "/")
        response = self._connection.getresponse()
        assert response.status == 200
        return int(response.read())

    def close(self) -> None:
        self._connection.close()


@pytest.mark.backends("asyncio")
@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"])
async def test_a_worker_is_recycled_after_so_many_requests(server: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(APPLICATION)
    limits = ("--max-requests", "50", "--max-requests-jitter", "10")
    async with running(tmp_path, "main:app", "--server", server, "--bind", "127.0.0.1:0", *limits) as run:
        port = await run.find_port()
        await asyncio.to_thread(exhaust, port, run.process.pid, str(tmp_path / "control"))
        assert not [line for line in run.lines if "ERROR" in line]


def exhaust(port: int, anchor: int, control: str) -> None:
    """Ask again and again on one connection, until the first worker is gone."""
    first = workers(control)
    kept = KeptAlive(port)
    try:
        while first & workers(control):
            for _ in range(25):
                assert kept.ask() > 0
    finally:
        kept.close()
    rollup = Path(f"/proc/{anchor}/smaps_rollup").read_text()
    (line,) = [line for line in rollup.splitlines() if line.startswith("Pss:")]
    assert int(line.split()[1]) * 1024 < 25_000_000


def workers(control: str) -> set[int]:
    return {each["pid"] for each in client.status(control)["workers"]}


def test_the_anchor_imports_no_server() -> None:
    program = (
        "import sys, ecdysis_async.cli.commands, ecdysis_async._anchor.anchor; "
        f"sys.exit(sorted({SERVERS!r} & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, stderr=subprocess.PIPE, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
