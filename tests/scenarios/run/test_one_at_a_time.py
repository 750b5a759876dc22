"""`ecdysis run --one-at-a-time`: the old release leaves first, nobody is refused, and a failure brings it back."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.ports import find_free_port
from tests.scenarios.run.commands import Visitors, call, running, taking_over, wait_until, write_app

pytestmark = pytest.mark.main_python_only

# As an embedded database does it: who comes second fails, also at the import.
ONLY_ONE = """
import fcntl, os, time
database = open(os.environ["DATABASE"], "a")
fcntl.flock(database, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""

QUICK = ("--bind", "127.0.0.1:0", "--drain-timeout", "5", "--probation", "0.5")

# It serves, and its first request is its end.
DIES = """
class Deadly(bytes):
    def __len__(self):
        os._exit(1)
TEXT = Deadly()
"""


def release(directory: Path, name: str, text: str, before: str = ONLY_ONE) -> None:
    """Deploy a release: a directory of its own, to which the link moves."""
    (directory / name).mkdir()
    write_app(directory / name / "main.py", text, before)
    (directory / "next").symlink_to(name)
    (directory / "next").replace(directory / "current")


def test_an_old_release_leaves_first_and_comes_back_where_the_new_one_fails(tmp_path: Path) -> None:
    release(tmp_path, "1", "one")
    database = str(tmp_path / "database")
    with running(tmp_path / "current", *QUICK, "--one-at-a-time", directory=tmp_path, DATABASE=database) as run:
        with Visitors(run.find_port()) as visitors:

            def restart() -> tuple[int, str]:
                done = call("restart", "--control", run.control, cwd=tmp_path)
                return done.returncode, done.stdout + done.stderr

            release(tmp_path, "2", "two")
            # Someone is connected, and has nothing to say: the workers that have left tell what became of it.
            with socket.create_connection(("127.0.0.1", run.find_port())):
                status, told = restart()
            assert status == 0, told
            assert re.search(r"; connections: \d+ drained, [1-9]\d* silent, 0 transferred, 0 cut$", told, re.MULTILINE)
            assert "1 worker leaves first (--one-at-a-time), with " in run.log
            visitors.wait_for("two")
            # It does not start; and what was deployed before serves again, though the link has moved.
            release(tmp_path, "3", "three", ONLY_ONE + "import missing_module\n")
            status, told = restart()
            assert status == 1, told
            assert "missing_module" in told
            assert "the former release was started again" in told
            visitors.wait_for("two")
            # A worker that crashes is followed by the same release.
            pid = run.status()["workers"][0]["pid"]
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: pid not in {each["pid"] for each in run.status()["workers"]}, "it lives")
            visitors.wait_for("two")
            # It dies on probation, and that is told by the exit status.
            release(tmp_path, "4", "four", ONLY_ONE + DIES)
            status, told = restart()
            assert status == 5, told
            visitors.wait_for("two")
            release(tmp_path, "5", "five")
            assert restart()[0] == 0
            visitors.wait_for("five")
        # Two processes have died with a request each, perhaps.
        assert len(visitors.failures) <= 2, visitors.failures
        # Those that failed are no generation of the service.
        assert run.status()["generation"] == 3


def test_what_is_missing_fails_before_anything_changes(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "one", ONLY_ONE)
    program = tmp_path / "serve"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -m ecdysis_async.cli run main:app\n")
    program.chmod(0o755)
    database = str(tmp_path / "database")
    command = ("--command", str(program))
    with running(tmp_path, *QUICK, "--one-at-a-time", *command, DATABASE=database) as run:
        run.wait_for("1 worker serving")
        pid = run.status()["workers"][0]["pid"]
        program.unlink()
        done = call("restart", "--control", run.control, cwd=tmp_path)
        assert done.returncode == 1
        assert str(program) in done.stderr
        assert run.status()["workers"][0]["pid"] == pid


def test_workers_are_recycled_one_after_the_other_and_all_leave_before_a_release_starts(tmp_path: Path) -> None:
    """Each takes note of when it was there: those of two releases never at a time."""
    note = """
import atexit, os, time
def note(word):
    with open(os.environ["DATABASE"], "a") as file:
        file.write(f"{word} {RELEASE} {os.getpid()} {time.monotonic()}\\n")
note("begin")
atexit.register(note, "end")
"""
    release(tmp_path, "1", "one", "RELEASE = 1" + note)
    database = tmp_path / "database"
    options = ("--workers", "2", "--one-at-a-time", "--max-requests", "10")
    with running(tmp_path / "current", *QUICK, *options, directory=tmp_path, DATABASE=str(database)) as run:
        with Visitors(run.find_port()) as visitors:
            run.wait_for("--max-requests")
            wait_until(lambda: database.read_text().count("begin 1") > 2, "nobody is recycled")
            # A worker that is recycled from now on runs what was deployed before, until the restart.
            release(tmp_path, "2", "two", "RELEASE = 2" + note)
            assert call("restart", "--control", run.control, cwd=tmp_path).returncode == 0
            visitors.wait_for("two")
        assert visitors.failures == []
    here: dict[str, str] = {}
    for line in database.read_text().splitlines():
        word, number, pid, _ = line.split()
        if word == "begin":
            assert all(each == number for each in here.values()), database.read_text()
            here[pid] = number
        else:
            del here[pid]


@pytest.mark.parametrize("is_one_at_a_time", [False, True])
def test_a_port_that_the_old_release_has_is_told_with_the_remedy(tmp_path: Path, is_one_at_a_time: bool) -> None:
    port = find_free_port()
    listen = f"import socket\nmetrics = socket.create_server(('127.0.0.1', {port}))\nprint('metrics', metrics)"
    write_app(tmp_path / "main.py", "one", listen)
    with running(tmp_path, *QUICK, *(("--one-at-a-time",) if is_one_at_a_time else ())) as run:
        run.find_port()
        pid = run.status()["workers"][0]["pid"]
        done = call("restart", "--control", run.control, cwd=tmp_path)
        if is_one_at_a_time:
            assert done.returncode == 0, done
            return
        assert done.returncode == 1
        assert f"Port {port} is taken by pid {pid} (" in done.stderr
        assert "of this service" in done.stderr
        assert "--one-at-a-time" in done.stderr
        assert "ecdysis_async.exclusive" in done.stderr


def test_a_takeover_and_a_saved_file_let_the_old_release_end_first(tmp_path: Path) -> None:
    """What only one may have open is never open twice, whoever starts the new release."""
    path, database = tmp_path / "main.py", str(tmp_path / "database")
    write_app(path, "one", ONLY_ONE)
    options = (*QUICK, "--one-at-a-time")
    with running(tmp_path, *options, DATABASE=database) as former, Visitors(former.find_port()) as visitors:
        visitors.wait_for("one")
        write_app(path, "two", ONLY_ONE)
        log = tmp_path / "newcomer"
        log.mkdir()
        with taking_over(former, tmp_path, *options, "--reload", directory=log, DATABASE=database) as newcomer:
            assert former.wait() == 0
            visitors.wait_for("two")
            newcomer.wait_for("watching ")
            write_app(path, "three", ONLY_ONE)
            visitors.wait_for("three")
            write_app(path, "broken", ONLY_ONE + "import missing_module\n")
            # What it was is overwritten, so that it does not come back: clients wait for the next save.
            newcomer.wait_for(r"the restart has failed, and nobody serves: .*missing_module")
            write_app(path, "four", ONLY_ONE)
            visitors.wait_for("four")
            assert visitors.failures == []
            assert "BlockingIOError" not in former.log + newcomer.log
