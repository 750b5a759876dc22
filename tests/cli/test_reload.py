"""Which files `--reload` watches, and which changes are reasons for a restart."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from watchfiles import Change

from ecdysis_async.cli import reload
from ecdysis_async.cli.reload import START_SECONDS, Causes, Wanted


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reload, "time", clock)
    return clock


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")


def choose(wanted: Wanted, root: Path, names: Iterable[str]) -> set[str]:
    return {name for name in names if wanted(Change.modified, str(root / name))}


FILES = (
    "main.py",
    "shop/views.py",
    "shop/index.html",
    "app.log",
    ".git/hooks/a.py",
    ".venv/lib/x.py",
    "node_modules/x/a.py",
    "env/pyvenv.cfg",
    "env/bin/activate.py",
    "lib/site-packages/x/a.py",
    "generated/a.py",
    "shop/generated_b.py",
)
PROGRAM = {"main.py", "shop/views.py", "generated/a.py", "shop/generated_b.py"}


def test_which_files_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *FILES)
    monkeypatch.chdir(tmp_path)
    root = str(tmp_path)
    assert choose(Wanted([root]), tmp_path, FILES) == PROGRAM
    assert choose(Wanted([root], ["*.html"]), tmp_path, FILES) == {*PROGRAM, "shop/index.html"}
    wanted = Wanted([root], ["*.html"], ["generated", "generated_*.py", "index.*"])
    assert choose(wanted, tmp_path, FILES) == {"main.py", "shop/views.py"}
    # A file that was named is watched whatever it is, and what stands outside is not.
    named = Wanted([str(tmp_path / "shop"), str(tmp_path / "app.log")])
    assert choose(named, tmp_path, FILES) == {"app.log", "shop/views.py", "shop/generated_b.py"}


def test_a_directory_behind_a_link(tmp_path: Path) -> None:
    make(tmp_path, "real/main.py", "real/site-packages/a.py")
    (tmp_path / "link").symlink_to("real")
    wanted = Wanted([str(tmp_path / "link")])
    assert wanted(Change.modified, str(tmp_path / "real/main.py"))
    assert wanted(Change.modified, str(tmp_path / "link/main.py"))
    # A program may be installed itself: what counts is what lies below the directory.
    assert Wanted([str(tmp_path / "real/site-packages")])(Change.modified, str(tmp_path / "real/site-packages/a.py"))


def test_a_file_that_each_start_writes_ends_the_loop(
    tmp_path: Path, clock: Clock, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written, other = str(tmp_path / "generated.py"), str(tmp_path / "main.py")
    causes = Causes()
    restarts = 0
    for number in range(10):
        Path(written).write_text(f"STAMP = {number}")
        if causes.find([written]):
            restarts += 1
            causes.restarted()
    assert restarts == 3
    errors = capfd.readouterr().err
    assert errors.count("the service itself changes generated.py at each start") == 1
    assert "--reload-exclude generated.py" in errors
    # Another file that is saved in that moment counts, and so does this one at another time.
    Path(other).write_text("1")
    assert causes.find([written, other]) == {other}
    clock.now += START_SECONDS
    assert causes.find([written]) == {written}


def test_a_start_that_writes_what_was_there_has_changed_nothing(tmp_path: Path, clock: Clock) -> None:
    path = str(tmp_path / "generated.py")
    Path(path).write_text("STAMP = 1")
    causes = Causes()
    assert causes.find([path]) == {path}
    causes.restarted()
    assert causes.find([path]) == set()
    # Who touches a file wants a restart.
    clock.now += START_SECONDS
    assert causes.find([path]) == {path}


def test_whoever_works_on_a_program_is_no_loop(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "main.py"
    causes = Causes()
    for number in range(10):
        path.write_text(str(number))
        assert causes.find([str(path)]) == {str(path)}
        causes.restarted()
        clock.now += START_SECONDS * (number % 3)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    causes = Causes()
    causes.restarted()
    assert causes.find([str(tmp_path / "gone.py")]) == {str(tmp_path / "gone.py")}
