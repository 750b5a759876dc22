"""`ecdysis run --one-at-a-time` as a unit: a reload and a restart of the unit say what is true, and clients wait."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ports import find_free_port
from tests.scenarios.run.commands import Visitors, write_app
from tests.scenarios.systemd.harness import NAME, Unit
from tests.scenarios.systemd.machine import PROJECT

pytestmark = pytest.mark.main_python_only

# As an embedded database does it: who comes second fails, at the import.
ONLY_ONE = """
import fcntl, os
database = open(os.environ["STATE_DIRECTORY"] + "/database", "a")
fcntl.flock(database, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


def release(root: Path, number: int, text: str, more: str = "") -> None:
    """Deploy a release: a directory of its own, to which the link moves."""
    (root / str(number)).mkdir()
    write_app(root / str(number) / "main.py", text, ONLY_ONE + more)
    (root / "next").symlink_to(str(number))
    (root / "next").replace(root / "current")


def test_a_reload_tells_whether_the_new_release_serves_and_the_former_one_comes_back(
    unit: Unit, tmp_path: Path
) -> None:
    machine, port = unit.machine, find_free_port()
    release(tmp_path, 1, "one")
    place = ("env", "-C", f"{tmp_path}/current", f"PWD={tmp_path}/current", f"PYTHONPATH={PROJECT}")
    options = (f"--bind=127.0.0.1:{port}", "--one-at-a-time", "--probation=0.3", "--drain-timeout=2", "--no-access-log")
    command = (sys.executable, "-m", "ecdysis_async.cli", "unit", "main:app", "--name=app", *options)
    machine.run(*place, *command, f"--output={machine.units}")
    unit.keep_log()
    unit.systemctl("start")
    anchor = unit.main_pid
    with Visitors(port) as visitors:
        visitors.wait_for("one")
        release(tmp_path, 2, "two")
        unit.reload()
        visitors.wait_for("two")
        # It does not start: the reload fails, and what was deployed before serves again, though the link has moved.
        release(tmp_path, 3, "three", "import missing_module")
        assert machine.fails("systemctl", "reload", NAME)
        visitors.wait_for("two")
        assert "missing_module" in unit.show("StatusText")
        assert (unit.show("ActiveState"), unit.show("SubState")) == ("active", "running")
        release(tmp_path, 4, "four")
        unit.reload()
        visitors.wait_for("four")
        assert "missing_module" not in unit.show("StatusText")
        assert (unit.main_pid, unit.show("NRestarts")) == (anchor, "0")
        # The store keeps the socket while the unit is stopped and started.
        release(tmp_path, 5, "five")
        unit.systemctl("restart")
        visitors.wait_for("five")
    assert visitors.failures == []
    assert "BlockingIOError" not in unit.log
    unit.systemctl("stop")
    assert (unit.show("Result"), unit.show("ExecMainStatus")) == ("success", "0")
