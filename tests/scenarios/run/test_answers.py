"""What a command answers is so: who serves after a restart that has failed, also where that is nobody."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.scenarios.run.commands import call, get, running, wait_until, write_app

pytestmark = pytest.mark.main_python_only

QUICK = ("--bind", "127.0.0.1:0", "--probation", "0.2")


def test_a_restart_that_fails_says_which_generation_serves_and_whether_one_does(tmp_path: Path) -> None:
    path = tmp_path / "main.py"
    write_app(path, "one")
    with running(tmp_path, *QUICK) as run:
        port = run.find_port()
        path.write_text("raise OSError('no database')\n", encoding="utf-8")
        done = call("restart", "--control", run.control, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"generation 1 (pid {run.process.pid}) serves on"
        assert get(port) == (200, "one")
        # The only worker dies, and no other one can start: there is nobody who serves on.
        (worker,) = run.status()["workers"]
        psutil.Process(worker["pid"]).send_signal(signal.SIGKILL)
        wait_until(lambda: run.status()["state"] == "starting", "somebody serves")
        done = call("restart", "--control", run.control, "--json", cwd=tmp_path)
        assert done.returncode == 3
        assert json.loads(done.stdout)["serving"] is None
        done = call("restart", "--control", run.control, cwd=tmp_path)
        assert done.returncode == 3
        assert f"nobody serves: the service (pid {run.process.pid}) is starting" in done.stderr
        # Once it can, it does.
        write_app(path, "two")
        assert call("restart", "--control", run.control, cwd=tmp_path).returncode == 0
        assert get(port) == (200, "two")
