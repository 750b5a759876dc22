"""A history is read, whatever else stands in it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from ecdysis_async._explaining.records import find_histories, read
from ecdysis_async._system.history import FORMER_SUFFIX, SUFFIX, Note

from .histories import begin, line, records, write


def test_both_files_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    path = write(tmp_path, [line(2, 11, "begun")])
    Path(path + FORMER_SUFFIX).write_text(json.dumps(line(1, 11, "ended")) + "\n")
    assert [record.kind for record in read(path)] == [Note.ENDED, Note.BEGUN]


def test_what_is_torn_or_unknown_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, [line(2, 11, "begun")])
    with open(path + SUFFIX, "a") as file:
        file.write('\n{"v": 1, "at"\n[]\n7\n\n')
        file.write(json.dumps(line(3, 11, "kind of a later release")) + "\n")
        file.write(json.dumps({**line(4, 11, "begun"), "v": 2}) + "\n")
        file.write("[" * 100_000 + "\n")
        file.writelines(json.dumps(line(at, 11, "begun")) + "\n" for at in (math.nan, math.inf, -1e300, 1e300))
        file.write(json.dumps({**line(5, 11, "begun"), "clock": math.inf}) + "\n")
        file.writelines(json.dumps({**line(6, 11, "begun"), key: math.inf}) + "\n" for key in ("pid", "v"))
    assert len(read(path)) == 1


def test_nothing_moves_the_cursor(tmp_path: Path) -> None:
    (record,) = records(tmp_path, [line(1, 11, "outcome", stderr="\x1b[31mred\x1b[0m\x1b]0;title\x07")])
    assert record.text("stderr") == "red\\x1b]0;title\\x07"


def test_facts_of_another_type_are_none(tmp_path: Path) -> None:
    (record,) = records(tmp_path, [line(1, 11, "spawned", child="12", begun=True, end=10**400, restart=None)])
    assert record.seconds("end") is None
    assert (record.number("child"), record.seconds("begun"), record.restart) == (None, None, "")


def test_without_a_history_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(str(tmp_path / "app.sock"))


def test_histories_are_found_the_newest_first(tmp_path: Path) -> None:
    for name, at in (("old", 1000), ("new", 2000)):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, begin())
        os.utime(path + SUFFIX, (at, at))
    directories = [str(tmp_path / "old"), str(tmp_path / "gone"), str(tmp_path / "new")]
    assert find_histories(directories) == [str(tmp_path / name / "app.sock") for name in ("new", "old")]
