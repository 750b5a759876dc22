"""The history is written by several processes, is bounded, and harms no service, whatever is in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async._system import history as module
from ecdysis_async._system.history import FORMER_SUFFIX, SUFFIX, History, Note, append

NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f"app.sock{SUFFIX}"


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    opened = History()
    opened.open(str(path))
    opened.write_from_now_on()
    yield opened
    opened.close()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line]


def test_a_note_is_a_line_for_nobody_else(history: History, path: Path) -> None:
    history.note(Note.STATE, restart="r", state="serving")
    history.flush()
    (line,) = read(path)
    assert (line["v"], line["kind"], line["pid"], line["restart"]) == (1, "state", os.getpid(), "r")
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_written_before_it_is_opened_and_after_it_is_closed(path: Path) -> None:
    history = History()
    history.note(Note.BEGUN)
    history.open(str(path))
    history.write_from_now_on()
    history.note(Note.ENDED)
    history.close()
    history.note(Note.BEGUN)
    history.flush()
    assert [line["kind"] for line in read(path)] == ["ended"]


def test_what_comes_before_anything_happens_is_kept_for_then(path: Path) -> None:
    history = History()
    history.open(str(path))
    history.note(Note.BEGUN)
    history.flush()
    assert not path.exists()
    history.write_from_now_on()
    history.note(Note.ENDED)
    history.close()
    assert [line["kind"] for line in read(path)] == ["begun", "ended"]


def test_a_service_to_which_nothing_happens_leaves_nothing(path: Path) -> None:
    history = History()
    history.open(str(path))
    history.note(Note.BEGUN)
    history.close()
    assert not path.exists()


def test_a_thread_is_there_only_while_lines_wait(history: History) -> None:
    history.note(Note.BEGUN)
    history.flush()
    assert history._writer is None or not history._writer.is_alive()


def test_processes_write_one_after_the_other(path: Path) -> None:
    program = """if True:
        import sys
        from ecdysis_async._system.history import Note, history
        history.open(sys.argv[1])
        history.write_from_now_on()
        for number in range(200):
            history.note(Note.STATE, number=number, text="x" * 500)
    """
    processes = [subprocess.Popen([sys.executable, "-c", program, str(path)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    numbers: dict[int, list[int]] = {}
    for line in read(path):
        numbers.setdefault(line["pid"], []).append(line["number"])
    assert list(numbers.values()) == [list(range(200))] * 3


def test_a_full_file_is_set_aside_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    for number in range(100):
        append(str(path), json.dumps({"number": number}).encode() + b"\n")
    former = path.with_name(f"app.sock{FORMER_SUFFIX}")
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, former.name]
    assert max(path.stat().st_size, former.stat().st_size) < 1100
    numbers = [line["number"] for line in [*read(former), *read(path)]]
    assert numbers == list(range(numbers[0], 100))


def test_half_a_line_of_a_killed_writer_costs_no_other(path: Path) -> None:
    path.write_bytes(b'{"v": 1, "at": 1')
    append(str(path), b'{"v": 2}\n')
    assert path.read_bytes().splitlines()[-1] == b'{"v": 2}'


@pytest.mark.parametrize("what", ["a directory", "a FIFO", "a link", "no directory"])
def test_whatever_is_in_its_place_is_left_alone(what: str, path: Path, history: History) -> None:
    other = path.with_name("other")
    other.write_text("precious")
    match what:
        case "a directory":
            path.mkdir()
        case "a FIFO":
            os.mkfifo(path)
        case "a link":
            path.symlink_to(other)
        case "no directory":
            history.open(str(path.parent / "gone" / path.name))
    history.note(Note.BEGUN)
    history.flush()
    assert other.read_text() == "precious"


# An application that forks has threads as well, and what runs the tests has some.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_writes_nothing(history: History, path: Path) -> None:
    if (pid := os.fork()) == 0:
        history.note(Note.BEGUN)
        os._exit(0)
    os.waitpid(pid, 0)
    history.note(Note.ENDED)
    history.flush()
    assert [line["kind"] for line in read(path)] == ["ended"]


def test_of_a_long_text_its_end_is_kept(history: History, path: Path) -> None:
    history.note(Note.OUTCOME, report={"error": "x" * 100_000 + "end"})
    history.flush()
    assert read(path)[0]["report"]["error"].endswith("end")
    assert path.stat().st_size < 10_000


# It may write, and then gives up its rights, as a service does that was started by root.
DROPS = f"""
import logging, os, sys
from ecdysis_async._system.history import History, Note
logging.basicConfig()
history = History()
history.open(sys.argv[1])
history.write_from_now_on()
if os.geteuid() == 0:
    os.setuid({NOBODY})
for _ in range(2):
    history.note(Note.BEGUN)
    history.flush()
"""


def test_that_it_may_not_be_written_any_more_is_told_once(path: Path) -> None:
    path.parent.chmod(0o500)
    done = subprocess.run(
        [sys.executable, "-c", DROPS, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    path.parent.chmod(0o700)
    [line] = done.stderr.splitlines()
    assert f"cannot be written to {path}, and `ecdysis explain` will lack it: Permission denied (user " in line
    assert "own the directory of the control socket" in line
    assert not path.exists()
