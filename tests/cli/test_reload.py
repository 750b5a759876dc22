"""Which files `--reload` watches, and which changes are reasons for a restart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from watchfiles import Change

from ecdysis_async.cli import reload
from ecdysis_async.cli.reload import PROOF_SECONDS, Causes, Wanted


class Clock:
    """A clock that is set by hand, and writes files at its time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)
        os.utime(path, (self.now, self.now))


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


def restart(clock: Clock, causes: Causes, *, during: Callable[[], object] = lambda: None) -> None:
    """Restart, for a second, in the middle of which something is done."""
    causes.begin()
    clock.now += 0.5
    during()
    clock.now += 0.5
    causes.end()
    clock.now += 0.2


def test_a_file_that_each_start_writes_ends_the_loop(
    tmp_path: Path, clock: Clock, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generated, other = tmp_path / "generated.py", tmp_path / "main.py"
    causes = Causes()

    def generate() -> None:
        clock.write(generated, f"STAMP = {clock.now}")

    clock.write(other, "0")
    assert causes.find([str(other)]) == {str(other)}
    restarts = 0
    for _ in range(50):
        clock.now += 0.2
        if causes.find([str(generated)] if generated.exists() and clock.now - generated.stat().st_mtime < 1 else []):
            restarts += 1
            restart(clock, causes, during=generate)
        elif not restarts:
            restarts = 1
            restart(clock, causes, during=generate)
    # The first one, the suspicious ones, and two that prove it.
    assert restarts == 5
    errors = capfd.readouterr().err
    assert errors.count("the service itself changes generated.py at each start") == 1
    assert "--reload-exclude generated.py" in errors
    # A change at another time counts, and so does another file that is saved while the service restarts.
    generate()
    assert causes.find([str(generated)]) == {str(generated)}

    def save_as_well() -> None:
        generate()
        clock.write(other, "1")

    restart(clock, causes, during=save_as_well)
    assert str(other) in causes.find([str(other), str(generated)])


def test_what_is_saved_during_the_proof_is_served(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "main.py"
    causes = Causes()

    def save() -> None:
        clock.write(path, str(clock.now))

    save()
    assert causes.find([str(path)]) == {str(path)}
    for expected in ({str(path)}, {str(path)}, set()):
        restart(clock, causes, during=save)
        assert causes.find([str(path)]) == expected
    clock.now += PROOF_SECONDS
    assert causes.find([]) == {str(path)}
    restart(clock, causes, during=save)
    assert causes.find([str(path)]) == set()
    clock.now += PROOF_SECONDS
    assert causes.find([]) == {str(path)}
    restart(clock, causes)
    assert causes.find([]) == set()


def test_an_editor_that_saves_all_the_time_is_no_service(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "main.py"
    causes = Causes()

    def save() -> None:
        clock.write(path, str(clock.now))

    save()
    assert causes.find([str(path)]) == {str(path)}
    # Each of these restarts comes too early for what is typed meanwhile.
    for _ in range(2):
        restart(clock, causes, during=save)
        assert causes.find([str(path)]) == {str(path)}
    restart(clock, causes, during=save)
    assert causes.find([str(path)]) == set()
    # The last of it is served as soon as nobody types any more.
    clock.now += PROOF_SECONDS
    assert causes.find([]) == {str(path)}
    restart(clock, causes)
    assert causes.find([]) == set()
    # One that goes on typing is served at once, as long as no restart goes on.
    for _ in range(5):
        save()
        assert causes.find([str(path)]) == {str(path)}
        restart(clock, causes)


def test_a_start_that_writes_what_was_there_has_changed_nothing(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "generated.py"
    clock.write(path, "STAMP = 1")
    causes = Causes()
    assert causes.find([str(path)]) == {str(path)}
    restart(clock, causes, during=lambda: clock.write(path, "STAMP = 1"))
    assert causes.find([str(path)]) == set()
    # A file that is touched is meant to restart the service.
    clock.write(path, "STAMP = 1")
    assert causes.find([str(path)]) == {str(path)}


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    causes = Causes()
    causes.begin()
    causes.end()
    assert causes.find([str(tmp_path / "gone.py")]) == {str(tmp_path / "gone.py")}
