"""What the log of a service says of its restarts: who asked, how each ended, under one id in every process."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.scenarios.run.commands import call, get, running, write_app

pytestmark = pytest.mark.main_python_only

QUICK = ("--bind", "127.0.0.1:0", "--probation", "0.2")
VERDICT = r"restart (\w{12})\] the restart (begins|is settled|has failed)"


def test_each_restart_has_two_lines_and_one_id_whoever_asked_for_it(tmp_path: Path) -> None:
    path = tmp_path / "main.py"
    write_app(path, "one")
    with running(tmp_path, *QUICK, "--workers", "3", "--log-level", "debug") as run:
        run.find_port()
        assert call("restart", "--control", run.control, cwd=tmp_path).returncode == 0
        run.process.send_signal(signal.SIGHUP)
        run.wait_for("the restart is settled: generation 3")
        path.write_text("raise OSError('no database')\n", encoding="utf-8")
        assert call("restart", "--control", run.control, cwd=tmp_path).returncode == 1
        by_command, by_signal, failed = (
            (lines[0], lines[1]) for lines in zip(*[iter(re.findall(VERDICT, run.log))] * 2, strict=True)
        )
        assert [by_command[0][1], by_command[1][1]] == ["begins", "is settled"]
        assert [failed[0][1], failed[1][1]] == ["begins", "has failed"]
        ids = {by_command[0][0], by_signal[0][0], failed[0][0]}
        assert len(ids) == 3
        # Every line of a process that speaks of a restart has the id that the command has printed; so have workers.
        assert set(re.findall(r"restart ([0-9a-f]{12})", run.log)) == ids
        for id in ids:
            assert {"anchor", "generation"} <= set(re.findall(rf"\[(\w+)[^]]*, restart {id}\]", run.log))
        assert re.search(r"asked for by `ecdysis restart` \(pid \d+, uid \d+\)", run.log)
        assert "asked for by SIGHUP" in run.log
        assert re.search(r"ERROR .*the restart has failed, and generation 3 serves on: .*OSError: no database", run.log)
        assert "serves; start" in run.log
        assert f"(3 workers, {tmp_path.resolve()}" in run.log


def test_many_workers_restart_in_few_lines(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "one")
    with running(tmp_path, *QUICK, "--workers", "4") as run:
        run.find_port()
        before = run.log.count("\n")
        for _ in range(2):
            assert call("restart", "--control", run.control, cwd=tmp_path).returncode == 0
        assert run.log.count("\n") - before <= 10


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ("import time\ntime.sleep(600)\n", r"main.py:2 \(<module>\)"),
        ("import asyncio\nasync def connect(): await asyncio.sleep(600)\n", r"main.py:2 \(connect\)"),
    ],
    ids=["import", "start-up"],
)
def test_a_start_that_takes_too_long_tells_where_it_stood(body: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "main.py"
    write_app(path, "one")
    with running(tmp_path, *QUICK, "--workers", "1", "--ready-timeout", "10") as run:
        port = run.find_port()
        waits = "    if scope['type'] == 'lifespan': await connect()\n" if "connect" in body else ""
        path.write_text(f"{body}async def app(scope, receive, send):\n{waits or '    pass'}\n", encoding="utf-8")
        done = call("restart", "--control", run.control, cwd=tmp_path)
        assert done.returncode == 1
        assert re.search(rf"not ready within 10 seconds and was ended: it stood at \S*{place}", done.stderr)
        assert "--ready-timeout" in done.stderr
        # The application's words, and none of this library's.
        assert "ecdysis_async: " not in done.stderr
        assert re.search(r"  \|   File .*, line 2 in", done.stderr)
        assert re.search(rf"ERROR .*the restart has failed.*it stood at \S*{place}", run.log)
        assert get(port) == (200, "one")


def test_a_configuration_of_the_application_does_not_silence_the_verdict(tmp_path: Path) -> None:
    silencing = "import logging.config\nlogging.config.dictConfig({'version': 1})\n"
    write_app(tmp_path / "main.py", "one", silencing)
    with running(tmp_path, *QUICK, "--log-level", "debug") as run:
        run.find_port()
        assert call("restart", "--control", run.control, cwd=tmp_path).returncode == 0
        run.wait_for(r"\[generation 2, pid \d+, restart \w+\]")


# A lifespan of which the server knows no more than that it has not ended.
HANGS = """
import anyio
async def close_the_pool():
    await anyio.sleep(600)
async def lifespan(receive, send):
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await close_the_pool()
async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    await lifespan(receive, send)
"""


@pytest.mark.parametrize(("server", "loop"), [("uvicorn", "asyncio"), ("uvicorn", "uvloop"), ("hypercorn", "trio")])
def test_what_has_kept_a_worker_is_the_applications_line_and_nothing_else(
    server: str, loop: str, tmp_path: Path
) -> None:
    (tmp_path / "main.py").write_text(HANGS, encoding="utf-8")
    limits = ("--drain-timeout", "0.5", "--exit-timeout", "0.5")
    with running(tmp_path, *QUICK, "--server", server, "--loop", loop, *limits) as run:
        run.find_port()
        run.process.terminate()
        assert run.wait() == 0
        kept = run.wait_for(r"ended by force \(--exit-timeout\); it was kept by (.*)")
        assert re.fullmatch(rf"task \S+: app, in close_the_pool at {tmp_path}/main\.py:4", kept), kept
