"""`ecdysis reopen-logs` reaches whatever files the application writes: its own, loguru's, those of `logging`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.scenarios.run.commands import get, running, wait_until
from tests.scenarios.run.harness import run_command

pytestmark = pytest.mark.main_python_only

APP = """
import os
import ecdysis_async
from loguru import logger

logger.add("loguru.log", format="{message}")
own = open("own.log", "a", buffering=1)
by_key = open("key.log", "a", buffering=1)

@ecdysis_async.on_reopen_logs
async def reopen():
    global own
    own.close()
    own = open("own.log", "a", buffering=1)

def reopen_by_key():
    global by_key
    by_key.close()
    by_key = open("key.log", "a", buffering=1)

is_registered = False

async def app(scope, receive, send):
    global is_registered
    assert scope["type"] == "http"
    if not is_registered:
        is_registered = True
        scope["state"]["ecdysis.on_reopen_logs"](reopen_by_key)
    line = scope["path"]
    logger.info(line)
    print(line, file=own)
    print(line, file=by_key)
    if line == "/held":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        import anyio
        while not os.path.exists("let-go"):
            await anyio.sleep(0.01)
        print("held", file=own)
        await send({"type": "http.response.body", "body": b"1"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
    await send({"type": "http.response.body", "body": b"1"})
"""
FILES = ("loguru.log", "own.log", "key.log")


@pytest.mark.parametrize("options", [("--server", "uvicorn"), ("--server", "hypercorn", "--loop", "trio")])
def test_files_of_the_application(options: tuple[str, ...], tmp_path: Path) -> None:
    """Each is opened anew in the generation that serves, and in one that drains."""
    (tmp_path / "main.py").write_text(APP, encoding="utf-8")
    with (
        running(tmp_path, "--bind", "127.0.0.1:0", "--probation", "0", *options) as run,
        ThreadPoolExecutor() as client,
    ):
        port = run.find_port()
        held = client.submit(get, port, "/held")
        wait_until(lambda: "/held" in (tmp_path / "key.log").read_text(), "the request does not come")
        code, output = run_command("restart", "--control", run.control)
        assert code == 0, output
        get(port, "/one")
        for name in FILES:
            (tmp_path / name).rename(tmp_path / f"{name}.1")
        code, output = run_command("reopen-logs", "--control", run.control)
        # The old generation, and the new one.
        assert (code, output.strip()) == (0, "reopened 6 log files")
        get(port, "/two")
        (tmp_path / "let-go").touch()
        held.result()
        for name in FILES:
            assert (tmp_path / f"{name}.1").read_text().split() == ["/held", "/one"]
            assert (tmp_path / name).read_text().split() == ["/two", *(["held"] if name == "own.log" else [])]
