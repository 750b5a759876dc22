"""The last restarts of a service that has ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._management.ledger import RECENT, Ledger, Reason
from ecdysis_async._management.recent import read_recent
from ecdysis_async._system.history import FORMER_SUFFIX, SUFFIX, Note, history
from ecdysis_async.report import Phase
from tests.management.test_ledger import make_report


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """Open the history of this process."""
    path = str(tmp_path / "control") + SUFFIX
    history.open(path)
    history.write_from_now_on()
    yield path
    history.close()


def test_they_are_read_as_the_ledger_has_them(path: str) -> None:
    ledger = Ledger()
    report = make_report("a")
    ledger.note_restart(report, Reason.NONE, 1010.0)
    ledger.note_restart(make_report("b"), Reason.READY_TIMEOUT, 1020.0)
    report.phases[Phase.DRAIN] = 7.0
    ledger.note_drain(report)
    history.flush()
    assert read_recent(path) == ledger.recent
    assert [each["id"] for each in ledger.recent] == ["a", "b"]
    for number in range(RECENT):
        ledger.note_restart(make_report(str(number)), Reason.NONE, 1030.0)
    history.flush()
    Path(path).rename(path.removesuffix(SUFFIX) + FORMER_SUFFIX)
    ledger.note_restart(make_report("last"), Reason.NONE, 1040.0)
    history.flush()
    assert read_recent(path) == ledger.recent


def test_what_is_torn_or_something_else_is_left_out(path: str) -> None:
    assert read_recent(path) == []
    history.note(Note.BEGUN, role="service", words='"short"')
    history.flush()
    with Path(path).open("ab") as file:
        file.write(b'{"v":1,"kind":"counted","short":\n{"v":1,"kind":"counted","short":[]}\n"short"\n')
    assert read_recent(path) == []
