"""The pid file, and the drafts beside it."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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


@pytest.fixture
def shared() -> Iterator[Path]:
    """Make a directory that everybody may write to, as that of pytest is not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o1777)
        yield Path(name)


def run_killed(path: Path) -> Path:
    """Let a process die between its draft and the pid file, and return the draft."""
    environment = {**os.environ, "PYTHONPATH": str(Path(pid_file_module.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment) as process:
        process.wait()
    return next(path.parent.glob(f".app.pid.{process.pid}.*"))


def list_names(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir())


def test_it_comes_and_goes(path: Path) -> None:
    pid_file = PidFile(path)
    pid_file.prepare()
    [draft] = list_names(path)
    assert draft.startswith(f".app.pid.{os.getpid()}.")
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
    dead = run_killed(path).name.removeprefix(".app.pid.").partition(".")[0]
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
    # The parent of these tests may be process 1 itself.
    assert list_names(path) == sorted({*others})


def test_successors_that_tidy_up_at_once_do_not_fail(path: Path) -> None:
    run_killed(path)
    environment = {**os.environ, "PYTHONPATH": str(Path(pid_file_module.__file__).parents[2])}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment))
            for _ in range(4)
        ]
        assert [process.wait() for process in processes] == [-9] * 4
    PidFile(path).remove()
    assert list_names(path) == []


def test_everybody_may_read_it(path: Path) -> None:
    former = os.umask(0o077)
    try:
        pid_file = PidFile(path)
        pid_file.prepare()
        pid_file.publish()
    finally:
        os.umask(former)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    pid_file.remove()


def test_links_under_the_names_of_drafts_are_not_followed(path: Path) -> None:
    victim = path.with_name("victim")
    victim.write_text("precious")
    for name in (f".app.pid.{os.getpid()}", f".app.pid.{os.getpid()}.0"):
        path.with_name(name).symlink_to(victim)
    pid_file = PidFile(path)
    pid_file.prepare()
    [draft] = [each for each in path.parent.iterdir() if not each.is_symlink() and each != victim]
    # Somebody who can write there puts a link in the place of the draft.
    draft.unlink()
    draft.symlink_to(victim)
    pid_file.publish()
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert path.read_text() == f"{os.getpid()}\n"
    pid_file.remove()


@pytest.mark.parametrize("kind", ["a symbolic link", "a directory", "a FIFO"])
def test_what_is_no_file_is_left_alone(path: Path, kind: str) -> None:
    match kind:
        case "a symbolic link":
            path.symlink_to(path.with_name("elsewhere"))
        case "a directory":
            path.mkdir()
        case _:
            os.mkfifo(path)
    pid_file = PidFile(path)
    with pytest.raises(FileExistsError, match=f"{kind} is there, which is left alone"):
        pid_file.prepare()
    pid_file.remove()
    assert list_names(path) == ["app.pid"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_users_file_in_a_sticky_directory(shared: Path) -> None:
    path = shared / "app.pid"
    path.write_text("1\n")
    os.seteuid(54000)
    try:
        with pytest.raises(PermissionError, match="belongs to uid 0, who alone may replace it"):
            PidFile(path).prepare()
    finally:
        os.seteuid(0)
    assert path.read_text() == "1\n"
