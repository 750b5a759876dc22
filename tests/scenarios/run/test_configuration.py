"""Options from everywhere reach the server, are read again at each restart, and may change then."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.scenarios.run.harness import HERE, by_tcp, get, running

pytestmark = pytest.mark.main_python_only

APP = """
import os

async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = f"{os.environ.get('COLOUR')} {scope['root_path']}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""

CONFIG = """
target = "release:app"
port = 0
root-path = "/{path}"
env-file = "env"
server = "uvicorn"
workers = 8
[server-options]
timeout-keep-alive = 20
headers = [["x-configured", "yes"]]
"""


def test_a_restart_reads_file_and_environment_again(tmp_path: Path) -> None:
    (tmp_path / "release.py").write_text(APP)
    (tmp_path / "run.toml").write_text(CONFIG.format(path="one"))
    (tmp_path / "env").write_text("COLOUR=green\n")

    async def test() -> None:
        async with running(tmp_path, "--config", "run.toml", ECDYSIS_WORKERS="1", ECDYSIS_LOOP="asyncio") as run:
            port = await run.find_port()
            assert await get(by_tcp(port)) == "green /one"
            (tmp_path / "run.toml").write_text(CONFIG.format(path="two"))
            (tmp_path / "env").write_text("OTHER=1\n")
            code, output = await run.restart()
            assert code == 0, output
            assert await get(by_tcp(port)) == "None /two"
            (tmp_path / "run.toml").write_text("drain-timout = 3\n" + CONFIG.format(path="three"))
            code, output = await run.restart()
            assert code == 1, output
            assert "there is no option 'drain-timout': did you mean 'drain-timeout'?" in output
            assert await get(by_tcp(port)) == "None /two"
            await run.wait_for("by uvicorn .* on asyncio")

    asyncio.run(test())


def test_logging_by_a_file(tmp_path: Path) -> None:
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"short": {"format": "<%(name)s> %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": "log", "formatter": "short"}},
        "root": {"handlers": ["file"], "level": "INFO"},
    }
    (tmp_path / "logging.json").write_text(json.dumps(config))

    async def test() -> None:
        arguments = ("--port", "0", "--app-dir", str(HERE), "--log-config", "logging.json")
        async with running(tmp_path, "apps:asgi", *arguments) as run:
            while "serving on" not in (log := (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""):
                await asyncio.sleep(0.05)
                assert run.process.poll() is None, run.lines
            assert "<ecdysis_async>" in log

    asyncio.run(test())
