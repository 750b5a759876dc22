"""`on_worker_exit`: what the application is told of workers that have ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.scenarios.run.commands import get, running, wait_until, write_app
from tests.scenarios.run.harness import run_command

pytestmark = pytest.mark.main_python_only

HOOK = """
import os
import ecdysis_async

@ecdysis_async.on_worker_exit
def fail(ended):
    raise ValueError("a hook that fails keeps no other one")

@ecdysis_async.on_worker_exit
async def note(ended: ecdysis_async.WorkerExit):
    with open("ended", "a") as file:
        file.write(f"{ended.pid} {ended.worker} {ended.generation} {ended.returncode} {ended.was_expected}\\n")
"""


@pytest.mark.parametrize("options", [("--workers", "2"), ("--server", "hypercorn", "--loop", "trio")])
def test_a_worker_that_serves_is_told_once_of_each_end(options: tuple[str, ...], tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "one", HOOK)
    ended = tmp_path / "ended"
    ended.touch()
    bind = ("--bind", "127.0.0.1:0", "--probation", "0", "--drain-timeout", "5")
    with running(tmp_path, *bind, *options) as run:
        assert get(run.find_port()) == (200, "one")
        run.wait_for(r"workers? serving on")
        before = [each["pid"] for each in run.status()["workers"]]
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: ended.read_text().count("\n") >= 1, "nobody is told of the crash")
        # Where it was the only one, the next one is told.
        assert ended.read_text() == f"{before[0]} 0 1 -9 False\n"
        wait_until(
            lambda: len({each["pid"] for each in run.status()["workers"]} - {before[0]}) == len(before),
            "it is not followed",
        )
        replaced = sorted(each["pid"] for each in run.status()["workers"])
        code, output = run_command("restart", "--until", "drained", "--control", run.control)
        assert code == 0, output
        wait_until(lambda: ended.read_text().count("\n") >= 1 + len(before), "nobody is told of the former release")
        told = sorted(line.split() for line in ended.read_text().splitlines()[1:])
        assert sorted(int(pid) for pid, *_ in told) == replaced
        assert {tuple(each[2:]) for each in told} == {("1", "0", "True")}
        assert run.log.count("on_worker_exit has failed") == 1 + len(before)
    # At the end of the service nobody is left.
    assert ended.read_text().count("\n") == 1 + len(before)
