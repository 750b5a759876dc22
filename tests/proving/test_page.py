"""The page of a verdict, in a real browser: what it shows, in light and in dark, and that it asks for nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ecdysis_async._proving import page
from ecdysis_async._proving.plan import Kind, Step
from ecdysis_async._proving.records import (
    Answer,
    Connection,
    Ending,
    Exchange,
    Fault,
    History,
    Memory,
    Process,
    Restart,
)
from ecdysis_async._proving.verdict import judge
from tests.scenarios.servers.programs import browse

FAILURES = 3
ANSWERS = 200


def tell_a_story() -> History:
    """Return a history with a restart, a kill, some failures, and one that is excused."""
    report = {"outcome": "settled", "accept_gap": 0.002, "workers": [], "started_at": 1002.0, "predecessor_pid": 11}
    report["phases"] = {
        "start": 0.5,
        "initialise": 0.2,
        "pause": 0.001,
        "commit": 0.002,
        "probation": 1.0,
        "drain": 0.1,
    }
    history = History(began_at=1000.0, ended=10.0, generation=1)
    history.restarts = [
        Restart(Step.RESTART, 2.0, 4.0, 4.2, code=0, report=report, generation=2),
        Restart(Step.PREDECESSOR_KILLED, 6.0, 8.0, 8.0, code=0, generation=3, killed=12, killed_at=6.5),
    ]
    history.processes = [
        Process(11, 1, 0.0, 4.1, [(0.0, "serving"), (2.7, "paused"), (3.7, "draining")]),
        Process(12, 2, 2.1, 6.5, [(2.1, "starting"), (2.7, "serving")]),
        Process(13, 3, 6.4, None, [(6.4, "starting"), (7.0, "serving")]),
    ]
    history.memory = [Memory(at / 2, 50_000_000 + 30_000_000 * (4 <= at < 8)) for at in range(20)]
    for number in range(ANSWERS):
        due = number * 10 / ANSWERS
        generation = 1 if due < 2.7 else 2 if due < 6.5 else 3
        answer = Answer(due + 0.002, 200, number + 1, 10 + generation, generation)
        history.connections.append(
            Connection(number, Kind.NEW, due, due, [number + 1], [answer], due + 0.01, Ending.OURS)
        )
        history.exchanges.append(
            Exchange(number + 1, Kind.NEW, "GET /</script><b>", due, number, ended=answer.at, answer=answer)
        )
    for number in range(FAILURES):
        history.exchanges.append(Exchange(900 + number, Kind.NEW, "GET /", 3.0, ended=3.0, fault=Fault.REFUSED))
    killed = Connection(ANSWERS, Kind.KEPT, 6.0, 6.0, [990], [], 6.51, Ending.BUSY)
    history.connections.append(killed)
    history.exchanges.append(Exchange(990, Kind.KEPT, "GET /", 6.4, killed.number, ended=6.51, fault=Fault.RESET))
    return history


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(page.write(judge(tell_a_story(), 2.0), "main:app </title>"), encoding="utf-8")
    return path


@pytest.mark.main_python_only
def test_a_browser_shows_what_happened(file: Path, tmp_path: Path) -> None:
    document = browse(file, tmp_path, "--dump-dom")
    assert '<p id="verdict" class="bad">3 failures in 204 requests</p>' in document
    assert "<title>ecdysis prove: main:app &lt;/title&gt;</title>" in document
    assert len(re.findall('class="answer"', document)) == ANSWERS
    assert len(re.findall('class="failure"', document)) == FAILURES
    assert len(re.findall('class="excused-failure"', document)) == 1
    assert re.findall('class="process" data-generation="(.)"', document) == ["1", "2", "3"]
    assert len(re.findall('class="step"', document)) == len(re.findall('class="phase"', document)) - 4 == 2
    assert len(re.findall('class="killed"', document)) == 1
    assert "gen 2, pid 12: starting for 600 ms" in document
    assert "connection refused" in document


@pytest.mark.main_python_only
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_in_dark(scheme: str, file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    preference = {"light": "1", "dark": "0"}[scheme]
    browse(file, tmp_path, f"--blink-settings=preferredColorScheme={preference}", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_it_is_one_file() -> None:
    text = page.write(judge(tell_a_story(), 2.0), "main:app")
    assert "</script><b>" not in text
    assert not re.search(r"""(src|href)=|@import|url\(|fetch\(""", text)
    # The one address in it is a name, of the elements of SVG.
    assert set(re.findall(r"https?://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}


def test_of_many_answers_the_slowest_of_each_moment_are_drawn() -> None:
    exchanges = []
    for number in range(20_000):
        due = number / 1000
        exchanges.append(Exchange(number, Kind.NEW, "GET /", due, ended=due + (0.5 if number == 777 else 0.001)))
    chosen = page.choose(exchanges, 20.0)
    assert len(chosen) <= page.MAX_POINTS
    assert exchanges[777] in chosen
