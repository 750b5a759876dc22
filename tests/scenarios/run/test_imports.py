"""What applications do at their import works as it does where nothing restarts them, or is told clearly."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
from pathlib import Path

import pytest

from tests.scenarios.run.harness import ECDYSIS, PATIENCE_SECONDS, PROJECT, by_tcp, get, run_command, running

pytestmark = pytest.mark.main_python_only

APP = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""
AIOHTTP = """
from aiohttp import web
async def answer(request):
    return web.Response(text="ok")
app = web.Application()
app.router.add_get("/", answer)
"""
HEAD = """
import asyncio, os, signal, sys, warnings
sys.argv.clear(), sys.orig_argv.clear()
import trio, uvloop
async def prepare():
    await asyncio.sleep(0)
asyncio.run(prepare())
trio.run(trio.sleep, 0)
warnings.simplefilter("ignore")
uvloop.install()
uvloop.run(prepare())
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
loop.run_until_complete(prepare())
os.chdir("/")
for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(each, print)
"""


@pytest.mark.parametrize(
    ("app", "options"),
    [
        (APP, ("--server", "uvicorn", "--loop", "uvloop")),
        (APP, ("--server", "uvicorn", "--loop", "asyncio")),
        (APP, ("--server", "hypercorn", "--loop", "trio")),
        (AIOHTTP, ("--server", "aiohttp")),
    ],
    ids=["uvicorn-uvloop", "uvicorn-asyncio", "hypercorn-trio", "aiohttp"],
)
def test_what_an_import_may_do(app: str, options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(HEAD + app)

    async def test() -> None:
        async with running(tmp_path, "program:app", "--port", "0", *options) as run:
            port = await run.find_port()
            assert await get(by_tcp(port)) == "ok"
            code, output = await run.restart()
            assert code == 0, output
            assert await get(by_tcp(port)) == "ok"

    asyncio.run(test())


@pytest.mark.parametrize(
    ("line", "loop"),
    [
        ("import uvicorn; uvicorn.run(app, port=0)", "uvloop"),
        ("import uvicorn; uvicorn.run(app, port=0, loop='asyncio')", "asyncio"),
        ("import ecdysis_async; ecdysis_async.run(serve)", "uvloop"),
        ("from aiohttp import web; web.run_app(web.Application(), port=0)", "asyncio"),
    ],
)
def test_a_server_without_a_guard_is_named(line: str, loop: str, tmp_path: Path) -> None:
    serve = (
        "async def serve():\n"
        "    import asyncio\n"
        "    await asyncio.get_running_loop().create_server(asyncio.Protocol, '127.0.0.1', 0)\n"
    )
    (tmp_path / "program.py").write_text(f"{serve}{APP}\n{line}\n")
    number = len(f"{serve}{APP}\n{line}".splitlines())
    options = ("--port", "0", "--control", "off", "--app-dir", str(tmp_path), "--loop", loop)
    code, output = run_command("run", "program:app", *options)
    assert code == 3, output
    expected = f"program:app starts a server while it is imported (program.py, line {number}: {line})"
    assert expected in output
    assert 'put that behind `if __name__ == "__main__":`' in output


def test_a_child_that_the_import_forks_has_nothing_of_the_service(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, stat\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    opened = [each for each in range(64) if os.path.exists(f'/proc/self/fd/{each}')]\n"
        "    sockets = [each for each in opened if stat.S_ISSOCK(os.stat(f'/proc/self/fd/{each}').st_mode)]\n"
        "    os.write(1, f'sockets of the child: {sockets}\\n'.encode())\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n" + APP
    )

    async def test() -> None:
        async with running(tmp_path, "program:app", "--port", "0") as run:
            assert await run.wait_for(r"sockets of the child: (.*)") == "[]"
            assert await get(by_tcp(await run.find_port())) == "ok"

    asyncio.run(test())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_long_import_is_ended_by_a_stop(loop: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n" + APP)

    async def test() -> None:
        # Where the import were waited for, so would this be: far longer than its patience.
        async with running(tmp_path, "program:app", "--port", "0", "--loop", loop) as run:
            await run.wait_for("importing")

    asyncio.run(test())


def test_a_restart_that_imports_for_long_is_ended_by_a_stop(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(APP)

    async def test() -> None:
        async with running(tmp_path, "program:app", "--port", "0") as run:
            port = await run.find_port()
            program.write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n" + APP)
            restart = asyncio.create_task(run.restart())
            await run.wait_for("importing")
            assert await get(by_tcp(port)) == "ok"
        code, output = await restart
        assert (code, "the service was stopped while it restarted" in output) == (3, True), output

    asyncio.run(test())


def test_the_death_of_the_anchor_ends_an_import(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, time\nprint('importing in', os.getpid(), flush=True)\ntime.sleep(600)\n" + APP
    )
    arguments = ("run", "program:app", "--port", "0", "--app-dir", str(tmp_path), "--control", "off")
    with subprocess.Popen([*ECDYSIS, *arguments], cwd=PROJECT, stdout=subprocess.PIPE) as anchor:
        assert anchor.stdout is not None
        worker = int(anchor.stdout.readline().removeprefix(b"importing in "))
        pidfd = os.pidfd_open(worker)
        try:
            anchor.kill()
            assert select.select([pidfd], [], [], PATIENCE_SECONDS)[0], f"worker {worker} is still there"
        finally:
            os.close(pidfd)


@pytest.mark.parametrize(
    ("before", "complaint"),
    [
        ("os.closerange(3, 4096)", "closes descriptors while it is imported that are not its own"),
        ("if os.fork(): os.wait(), os._exit(0)", "goes into the background while it is imported"),
    ],
    ids=["closes all", "forks"],
)
def test_an_import_that_leaves_no_process_to_serve_in_is_named(before: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(f"import os, warnings\nwarnings.simplefilter('ignore')\n{before}\n{APP}")
    status, output = run_command("run", "program:app", "--app-dir", str(tmp_path), "--port", "0", "--control", "off")
    assert status == 3
    assert f"program:app {complaint}" in output
