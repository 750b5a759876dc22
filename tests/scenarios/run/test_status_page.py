"""The live page of a service, in a real browser, while the service restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.ports import find_free_port
from tests.scenarios.run.commands import PATIENCE_SECONDS, call, get, running, wait_until, write_app
from tests.scenarios.servers import programs

pytestmark = [pytest.mark.main_python_only, pytest.mark.backends("asyncio")]

LANES = "[...document.querySelectorAll('#lanes text')].map((each) => each.textContent)"


class Tab:
    """A page in a browser that is looked into over the DevTools protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self.complaints: list[str] = []
        self._connection = connection
        self._numbers = itertools.count(1)

    async def _call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        await self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self._connection.recv())
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == number:
                return message["result"]

    async def go(self, url: str) -> None:
        for domain in ("Log", "Runtime", "Page"):
            await self._call(f"{domain}.enable")
        await self._call("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        return (await self._call("Runtime.evaluate", expression=expression, returnByValue=True))["result"].get("value")

    async def wait_for(self, expression: str) -> None:
        """Wait until something is so."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not await self.evaluate(expression):  # noqa: ASYNC110 - a page tells nobody
                    await asyncio.sleep(0.05)
        except TimeoutError:
            body = await self.evaluate("document.body.innerText")
            raise AssertionError(f"not so: {expression}\n{body}\n{self.complaints}") from None


@contextlib.asynccontextmanager
async def browsing(directory: Path) -> AsyncIterator[Tab]:
    """Run a browser."""
    profile = directory / "browser"
    command = programs.browser(directory, "about:blank", "--remote-debugging-port=0")
    with programs.running(command, directory):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (profile / "DevToolsActivePort").exists():  # noqa: ASYNC110 - nor does a browser
                await asyncio.sleep(0.05)
        port = (profile / "DevToolsActivePort").read_text().splitlines()[0]

        def find() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE_SECONDS) as response:
                found: str = next(
                    each["webSocketDebuggerUrl"] for each in json.load(response) if each["type"] == "page"
                )
                return found

        async with connect(await asyncio.to_thread(find), max_size=None, proxy=None) as connection:
            yield Tab(connection)


def test_the_last_restarts_outlive_the_anchor(tmp_path: Path) -> None:
    """By the state that an anchor hands on, and by the history of a service that was killed."""
    write_app(tmp_path / "main.py", "ok")
    health = find_free_port()
    options = ("--bind", "127.0.0.1:0", "--probation", "0.1", "--status-page", "--health-bind", f"127.0.0.1:{health}")

    def list_restarts() -> list[dict[str, Any]]:
        status, text = get(health, "/status.json")
        assert status == 200
        restarts: list[dict[str, Any]] = json.loads(text)["restarts"]
        return restarts

    with running(tmp_path, *options) as run:
        run.find_port()
        assert list_restarts() == []
        assert call("restart", "--until", "drained", "--control", run.control, cwd=tmp_path).returncode == 0
        restarts = list_restarts()
        assert [(each["outcome"], each["generation"]) for each in restarts] == [("settled", 2)]
        assert {"start", "initialise", "drain"} <= set(restarts[0]["phases"])
        assert call("restart", "--anchor", "--control", run.control, cwd=tmp_path).returncode == 0
        wait_until(lambda: run.status()["anchor"]["upgrades"] == 1, "it is not upgraded")
        assert list_restarts() == restarts
        run.process.kill()
        run.process.wait()
    (tmp_path / "log").unlink()
    with running(tmp_path, *options) as run:
        run.find_port()
        assert list_restarts() == restarts


async def test_it_shows_a_restart_while_it_goes_on(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "ok")
    health = find_free_port()
    # Old and new are there side by side for as long as a browser needs on a busy machine to show them.
    options = ("--bind", "127.0.0.1:0", "--probation", "10", "--drain-timeout", "5", "--workers", "2", "--status-page")
    with running(tmp_path, *options, "--health-bind", f"127.0.0.1:{health}") as run:
        port = await asyncio.to_thread(run.find_port)
        async with browsing(tmp_path) as tab:
            await tab.go(f"http://127.0.0.1:{health}/")
            await tab.wait_for("document.getElementById('headline').textContent === 'Generation 1: serving'")
            await tab.wait_for("document.getElementById('facts').textContent.includes('2 workers')")
            assert await tab.evaluate("document.getElementById('restarts').textContent") == "none yet"
            # A connection moves its bar.
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"ok")
            await tab.wait_for("[...document.querySelectorAll('.fill')].some((each) => each.style.width === '100%')")
            restart = asyncio.create_task(asyncio.to_thread(call, "restart", "--control", run.control, cwd=tmp_path))
            # Old and new side by side, while it goes on.
            await tab.wait_for("document.getElementById('wait').textContent.includes('restart')")
            await tab.wait_for("document.querySelectorAll('.bar.paused').length >= 1")
            assert len({line for line in await tab.evaluate(LANES) if line.startswith("worker")}) >= 3
            assert (await restart).returncode == 0
            await tab.wait_for("document.getElementById('headline').textContent === 'Generation 2: serving'")
            await tab.wait_for("document.querySelectorAll('.restart .phase').length >= 5")
            assert (await tab.evaluate("document.querySelector('.restart b').textContent")) == "settled"
            # A release that fails is shown, and not what it has written.
            write_app(tmp_path / "main.py", "ok", "raise RuntimeError('hunter2')")
            failed = await asyncio.to_thread(call, "restart", "--control", run.control, cwd=tmp_path)
            assert failed.returncode == 1
            await tab.wait_for("document.querySelectorAll('.restart').length === 2")
            text = await tab.evaluate("document.getElementById('restarts').textContent")
            assert text.startswith("failed (successor failed) to generation 3")
            assert "hunter2" not in await tab.evaluate("document.documentElement.innerHTML")
            writer.close()
            # The policy has forbidden nothing of its own, and would forbid anything else.
            assert tab.complaints == []
            await tab.evaluate("document.body.appendChild(document.createElement('img')).src = 'http://127.0.0.1:1/'")
            await tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<b style=\"color: red\">x</b>')")
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not any("Content Security Policy" in each for each in tab.complaints):
                    await tab.evaluate("true")
