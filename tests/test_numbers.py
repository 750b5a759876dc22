"""What the pages say that was measured is what the files of results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.load import Failure, Outcome
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.measuring import timeline, usage_between
from benchmarks.peers.results import Latency, Run
from benchmarks.peers.sampler import Sample, Usage

pytestmark = pytest.mark.main_python_only

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = sorted((PROJECT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("name", report.PAGES)
def test_numbers_of_a_page_are_those_of_the_results(name: str) -> None:
    page = (PROJECT / "docs" / name).read_text()
    assert report.put_into(name, page) == page, "run `python -m benchmarks.report` and commit the pages"


def test_other_tables_of_the_numbers_page_have_no_numbers() -> None:
    page = (PROJECT / "docs" / "numbers.md").read_text()
    for part in report.PAGES["numbers.md"]:
        page = re.sub(f"<!-- {part} -->.*<!-- end of {part} -->", "", page, flags=re.DOTALL)
    cells = [cell.strip() for line in page.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert cells
    assert [cell for cell in cells if re.match(r"[-+]?\d", cell)] == []


def test_a_page_without_a_place_for_the_results_is_refused() -> None:
    with pytest.raises(ValueError, match="peers"):
        report.put_into("numbers.md", "# A page\n")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_name_the_machine_and_the_day_and_no_path(path: Path) -> None:
    text = path.read_text()
    assert re.search(r'"machine": "CPython 3\.\d+\.\d+, Linux [\d.]+, \d+ cores', text)
    assert re.search(r'"date": "\d{4}-\d\d-\d\d"', text)
    assert not re.search(r'[" ]/(home|root|tmp|work|usr)/', text)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = report.read_peers()
    run.save(tmp_path / "peers.json")
    assert Run.read(tmp_path / "peers.json") == run


def test_a_row_of_the_peers_is_told_from_each_other() -> None:
    rows = [(peer.name, peer.how) for peer in PEERS]
    assert len(set(rows)) == len(rows)
    assert any(peer.is_ours and peer.is_quick for peer in PEERS)


def test_requests_are_drawn_where_they_were_made() -> None:
    outcomes = [
        Outcome(99.0, 0.1, 1, None),  # before the time line
        Outcome(99.51, 0.001, 1, None),
        Outcome(99.53, 0.003, 1, None),
        Outcome(100.01, 0.2, None, Failure.RESET),
        Outcome(100.51, 0.004, 2, None),
    ]
    line = timeline(outcomes, 100.0, 101.0, 2)
    assert len(line.worst) == 30
    assert (line.worst[0], line.old[0], line.failed[0]) == (3.0, 2, 0)
    assert (line.worst[10], line.failed[10]) == (0.0, 1)
    assert (line.worst[20], line.new[20], line.old[20]) == (4.0, 1, 0)


def test_what_processes_use_is_added_up_until_they_were_last_seen() -> None:
    samples = [
        Sample(1.0, {10: Usage(5.0, 100, 20.0)}),
        Sample(2.0, {10: Usage(5.5, 110, 20.0), 11: Usage(0.5, 30, 15.0)}),
        Sample(3.0, {11: Usage(0.75, 40, 25.0)}),
    ]
    usage = usage_between(samples, 1.5, 3.5)
    assert (usage.cpu, usage.switches, usage.peak, usage.left) == (1.25, 50, 35.0, 2.0)


def test_percentiles_of_nothing_are_written_as_none() -> None:
    assert Latency.of([]) == Latency(0, 0.0, 0.0, 0.0, 0.0)
    assert Latency.of([0.001, 0.002]) == Latency(2, 1.0, 2.0, 2.0, 2.0)
