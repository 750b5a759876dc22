"""``ecdysis explain`` of real services: restarts that work, that fail, that hang, and services that have died."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async._system.history import SUFFIX
from tests.scenarios.run.harness import ECDYSIS, PROJECT, by_tcp, run_command, running

pytestmark = pytest.mark.main_python_only

APP = """
import asyncio, os, time
{at_import}

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        {start_up}
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(600)
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}})
    await send({{"type": "http.response.body", "body": b"ok"}})

async def connect_to_the_database():
    await asyncio.sleep(600)
"""

MAIN = """
import asyncio, os, sys, time
import ecdysis_async, sys

async def handle(reader, writer):
    writer.write(await reader.readline())
    writer.close()

async def connect_to_the_database():
    import anyio
    await anyio.sleep(600)

async def main():
    async with ecdysis_async.Ecdysis(control_socket="app.sock", probation=0.2) as ecdysis:
        {start_up}
        await ecdysis.start_server(handle, "127.0.0.1", 0)
        print("serving", flush=True)
        await ecdysis.serve_forever()

ecdysis_async.run(main, loop=sys.argv[1])
"""


def explain(control: str | Path, *arguments: str) -> str:
    code, output = run_command("explain", "--control", str(control), *arguments)
    assert code == 0, output
    return output


def explain_as_json(control: str | Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(explain(control, "--json", *arguments))
    return found


def test_a_rollout_over_workers_and_what_breaks_it(tmp_path: Path) -> None:
    release, control = tmp_path / "release.py", tmp_path / "control"
    release.write_text(APP.format(at_import="import decimal", start_up="pass"))

    async def test() -> None:
        async with running(tmp_path, "release:app", "--port", "0", "--workers", "2", "--drain-timeout", "0.5") as run:
            port = await run.find_port()
            _, writer = await by_tcp(port)()
            writer.write(b"GET /slow?token=secret HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
            code, output = await run.restart("--until", "drained")
            assert code == 0, output
            text = await asyncio.to_thread(explain, control)
            assert "workers): settled" in text, text
            assert text.count("where the time went of worker") == 2
            assert text.count("load release:app") == text.count("lifespan start-up") == 2
            assert "cut at the deadline of the drain: GET /slow, " in text
            assert "secret" not in text

            for at_import, start_up, why in (
                ("import no_such_module", "pass", "ModuleNotFoundError: No module named 'no_such_module'"),
                ("pass", "raise RuntimeError('no such table')", "RuntimeError: no such table"),
            ):
                release.write_text(APP.format(at_import=at_import, start_up=start_up))
                code, output = await run.restart()
                assert code == 1, output
                text = await asyncio.to_thread(explain, control)
                assert "why it failed in the phase 'initialise'" in text, text
                assert why in text
            writer.close()
            found = await asyncio.to_thread(explain_as_json, control)
            id = found["restarts"][0]["id"]
            assert f"restart {id}" in await asyncio.to_thread(explain, control, id[:8])

    asyncio.run(test())
    # The service has ended, and is explained.
    text = explain(control)
    assert text.startswith(f"no service listens on {control} now"), text
    assert "RuntimeError: no such table" in text
    assert os.stat(f"{control}{SUFFIX}").st_mode & 0o777 == 0o600


@contextmanager
def serving(directory: Path, loop: str) -> Iterator[subprocess.Popen[str]]:
    """Run a plain program as a service; yield its first process."""
    command = [sys.executable, "program.py", loop]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PWD": str(directory), "XDG_RUNTIME_DIR": str(directory)}
    environment["RUNTIME_DIRECTORY"] = str(directory)
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        try:
            yield process
        finally:
            run_command("stop", "--control", str(directory / "app.sock"))
            process.kill()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("way", ["awaits", "blocks"])
def test_a_start_that_hangs_is_explained_while_it_does(loop: str, way: str, tmp_path: Path) -> None:
    program, control = tmp_path / "program.py", tmp_path / "app.sock"
    source = MAIN if loop != "trio" else MAIN.replace("ecdysis_async.run(main, loop=sys.argv[1])", TRIO)
    if loop == "trio":
        source = source.replace('await ecdysis.start_server(handle, "127.0.0.1", 0)', "pass")
    program.write_text(source.format(start_up="pass"))
    with serving(tmp_path, loop):
        hangs = "await connect_to_the_database()" if way == "awaits" else "time.sleep(600)"
        # It says that it is there; then it hangs.
        program.write_text(source.format(start_up=f"open('hangs', 'w').close(); {hangs}"))
        restart = subprocess.Popen(
            [*ECDYSIS, "restart", "--control", str(control)], stdout=subprocess.PIPE, cwd=PROJECT
        )
        with restart:
            while not (tmp_path / "hangs").exists() and restart.poll() is None:
                time.sleep(0.01)
            found = explain_as_json(control)
            restart.kill()
        (wait,) = found["waits"]
        assert "waits for generation 2" in wait["text"]
        assert "to get ready" in wait["text"]
        place = "in connect_to_the_database" if way == "awaits" else "in main"
        assert place in wait["stack"], wait
        assert found["restarts"][-1]["outcome"] == "in progress"
        os.kill(wait["pid"], signal.SIGKILL)


TRIO = """
import trio
trio.run(main)
"""


def test_a_death_without_a_word_is_named(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(MAIN.format(start_up="pass"))
    with serving(tmp_path, "asyncio") as process:
        code, output = run_command("restart", "--control", str(tmp_path / "app.sock"))
        assert code == 0, output
        found = explain_as_json(tmp_path / "app.sock")
        process.wait()
        os.kill(found["restarts"][0]["successor"], signal.SIGKILL)
        while (text := explain(tmp_path / "app.sock")).startswith("no service listens") is False:
            pass
    assert "generation 2) has ended without a word" in text


def test_trace_and_page_are_written(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(MAIN.format(start_up="pass"))
    with serving(tmp_path, "asyncio"):
        run_command("restart", "--control", str(tmp_path / "app.sock"))
        files = ("--html", str(tmp_path / "page.html"), "--trace", str(tmp_path / "trace.json"))
        text = explain(tmp_path / "app.sock", *files)
    assert "\x1b" not in text
    assert "</html>" in (tmp_path / "page.html").read_text()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"hello", "listeners", "ready", "commit", "serving", "settled"} <= {event["name"] for event in events}


def test_what_is_not_there_is_told_with_its_exit_code(tmp_path: Path) -> None:
    code, output = run_command("explain", "--control", str(tmp_path / "gone"))
    assert (code, output) == (3, f"ecdysis: no service has the control socket {tmp_path / 'gone'}, or has had it\n")
    nowhere = {"XDG_RUNTIME_DIR": str(tmp_path), "RUNTIME_DIRECTORY": str(tmp_path), "ECDYSIS_CONTROL": ""}
    (tmp_path / f"one{SUFFIX}").write_text("")
    code, output = run_command("explain", "no-such-id", "--control", str(tmp_path / "one"), **nowhere)
    assert code == 2
    assert "has no restart no-such-id in its history" in output
