"""The pid file, and the drafts beside it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecdysis_async._management import pid_file as pid_file_module
from ecdysis_async._management.pid_file import PidFile

# What a successor does that is killed before it has published.
KILLED = """
import os, pathlib, signal, sys
from ecdysis_async._management.pid_file import PidFile
PidFile(pathlib.Path(sys.argv[1])).prepare()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "app.pid"


def run_killed(path: Path) -> Path:
    """Let a process die between its draft and the pid file, and return the draft."""
    environment = {**os.environ, "PYTHONPATH": str(Path(pid_file_module.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment) as process:
        process.wait()
    return path.with_name(f".app.pid.{process.pid}")


def list_names(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir())


def test_it_comes_and_goes(path: Path) -> None:
    pid_file = PidFile(path)
    pid_file.prepare()
    assert list_names(path) == [f".app.pid.{os.getpid()}"]
    pid_file.publish()
    assert list_names(path) == ["app.pid"]
    assert path.read_text() == f"{os.getpid()}\n"
    pid_file.remove()
    assert list_names(path) == []


def test_one_that_names_another_process_stays(path: Path) -> None:
    path.write_text("1\n")
    PidFile(path).remove()
    assert path.read_text() == "1\n"


def test_a_directory_that_is_missing_is_told(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="create its directory"):
        PidFile(path.parent / "missing" / "app.pid").prepare()


@pytest.mark.parametrize("does", ["prepare", "remove"])
def test_drafts_of_the_dead_are_removed(path: Path, does: str) -> None:
    drafts = [run_killed(path)]
    assert drafts[0].exists()
    # The second one prepares, and so removes the first one's already.
    drafts.append(run_killed(path))
    assert not drafts[0].exists()
    pid_file = PidFile(path)
    getattr(pid_file, does)()
    assert not drafts[1].exists()
    pid_file.discard()
    assert list_names(path) == []


def test_what_is_no_draft_of_a_dead_process_stays(path: Path) -> None:
    dead = run_killed(path).name.removeprefix(".app.pid.")
    others = [
        f".app.pid.{os.getppid()}",
        ".app.pid.1",
        ".app.pid.",
        f".app.pid.{dead}.bak",
        ".app.pid.99999999999999999999",
        f".app2.pid.{dead}",
        f"app.pid.{dead}",
    ]
    for name in others:
        path.with_name(name).touch()
    PidFile(path).remove()
    assert list_names(path) == sorted(others)


def test_successors_that_tidy_up_at_once_do_not_fail(path: Path) -> None:
    dead = int(run_killed(path).name.removeprefix(".app.pid."))
    drafts = [path.with_name(f".app.pid.{dead}")]
    environment = {**os.environ, "PYTHONPATH": str(Path(pid_file_module.__file__).parents[2])}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment))
            for _ in range(4)
        ]
        drafts += [path.with_name(f".app.pid.{process.pid}") for process in processes]
        assert [process.wait() for process in processes] == [-9] * 4
    PidFile(path).remove()
    assert not any(draft.exists() for draft in drafts)
