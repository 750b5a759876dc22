"""What cannot be served is told in one place, clearly; and what serves already goes on."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path

import pytest

from tests.scenarios.run.harness import HERE, by_tcp, get, run_command, running

pytestmark = pytest.mark.main_python_only

GOOD = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        {start_up}
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}})
    await send({{"type": "http.response.body", "body": b"ok"}})
"""


@pytest.mark.parametrize(("server", "loop"), [("uvicorn", "uvloop"), ("hypercorn", "trio")])
def test_a_broken_release_is_told_and_the_old_one_serves(server: str, loop: str, tmp_path: Path) -> None:
    release = tmp_path / "release.py"
    release.write_text(GOOD.format(start_up="pass"))

    async def test() -> None:
        async with running(tmp_path, "release:app", "--port", "0", "--server", server, "--loop", loop) as run:
            port = await run.find_port()
            for number, (text, error) in enumerate(
                (
                    ("import sys\ndef f(:", "SyntaxError: "),
                    (GOOD.format(start_up="[][1]"), "IndexError: list index out of range"),
                ),
                1,
            ):
                release.write_text(text)
                code, output = await run.restart()
                assert code == 1, output
                assert f"release:app cannot start: {error}" in output
                # The application's own lines, once, and nobody else's: in the answer, and in the log.
                assert output.count(f'File "{release}", line ') == output.count("  File ") == 1, output
                await run.wait_for(re.escape(f'File "{release}", line '), number)
                assert "\n".join(run.lines).count(f'File "{release}", line ') == number
                assert await get(by_tcp(port)) == "ok"
            release.write_text(GOOD.format(start_up="pass"))
            code, output = await run.restart()
            assert code == 0, output
            assert await get(by_tcp(port)) == "ok"

    asyncio.run(test())


@pytest.mark.parametrize(
    ("arguments", "expected", "code"),
    [
        (["apps"], "TARGET is MODULE:ATTRIBUTE, and not 'apps': did you mean apps:app?", 2),
        (["apps:asgi", "--workers", "none"], "--workers: a number of workers is needed", 2),
        (["apps:asgi", "--drain-timout", "3"], "No such option", 2),
        (["app:asgi"], "there is no module 'app'", 3),
        (["apps:asgi", "--server-option", "timeout_keep_alve=3"], "did you mean 'timeout_keep_alive'?", 2),
        (["apps:asgi", "--server", "hypercorn", "--server-option", "backlog_x=1"], "hypercorn has no option", 2),
        (["apps:asgi", "--fd", "99"], "passed no socket 99", 3),
        (["apps:asgi", "--certfile", str(HERE / "apps.py")], "TLS cannot be served with", 3),
    ],
)
def test_what_cannot_start_says_why(arguments: list[str], expected: str, code: int) -> None:
    where = [] if "--fd" in arguments else ["--port", "0"]
    found, output = run_command("run", *arguments, *where, "--app-dir", str(HERE), "--control", "off")
    assert expected in output, output
    assert found == code, output
    assert "Traceback" not in output
    assert output.count(expected) == 1 or code != 2, output


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, output = run_command("run", "apps:asgi", "--app-dir", str(HERE), "--port", port, "--control", "off")
    assert code == 3, output
    assert f"cannot bind 127.0.0.1:{port}: Address already in use" in output
    assert "Traceback" not in output


DESERTER = """
async def main(ecdysis):
    await ecdysis.ready()
    # From now on it does not even start.
    open("deserter.py", "w").write("1 / 0")
"""


def test_a_program_that_leaves_unasked_is_told_and_awaited(tmp_path: Path) -> None:
    (tmp_path / "deserter.py").write_text(DESERTER)

    async def test() -> None:
        async with running(tmp_path, "deserter:main", "--port", "0") as run:
            await run.wait_for(r"worker 0 \(pid \d+\) has left, and nobody has told it to: exit status 0")
            # The first one waits for a moment; that it has been tried, and what for, is told as well.
            await run.wait_for(r"worker 0 does not start \(again in [\d.]+ s\): .*ZeroDivisionError")
            code, output = await asyncio.to_thread(run_command, "status", "--control", str(tmp_path / "control"))
            assert code == 0
            assert output.splitlines()[0].startswith(f"generation 1 (pid {run.process.pid}): starting, "), output

    asyncio.run(test())
