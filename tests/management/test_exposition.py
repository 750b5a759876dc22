"""The text format of metrics, read by the library that others read it with."""

from __future__ import annotations

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ecdysis_async._management.exposition import Family, Histogram, Type, counter, gauge, write


def read(*families: Family) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the numbers of a text, by their names and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(write(families))
        for sample in family.samples
    }


def test_what_is_written_is_read() -> None:
    requests = counter("ecdysis_requests_total", "Requests.")
    requests.add(3, slot=0)
    requests.add(2**53, slot=1)
    state = gauge("ecdysis_state", 'A "state" with a \\ and\na second line.')
    state.add(0.25, listener='unix:/run/"a"\\b\nc')
    empty = gauge("ecdysis_empty", "Nothing.")
    assert read(requests, state, empty) == {
        ("ecdysis_requests_total", (("slot", "0"),)): 3,
        ("ecdysis_requests_total", (("slot", "1"),)): 2**53,
        ("ecdysis_state", (("listener", 'unix:/run/"a"\\b\nc'),)): 0.25,
    }


def test_a_histogram_counts_what_is_below_each_bound() -> None:
    histogram = Histogram((0.1, 1))
    for seconds in (0.05, 0.1, 0.5, 7):
        histogram.observe(seconds)
    family = Family("ecdysis_gap_seconds", Type.HISTOGRAM, "How long.")
    family.add_histogram(histogram, phase="start")
    found = {name: value for (name, labels), value in read(family).items() if "le" not in dict(labels)}
    assert found == {"ecdysis_gap_seconds_sum": pytest.approx(7.65), "ecdysis_gap_seconds_count": 4}
    buckets = {dict(labels)["le"]: value for (_, labels), value in read(family).items() if "le" in dict(labels)}
    assert buckets == {"0.1": 2, "1": 3, "+Inf": 4}


def test_a_histogram_of_another_release_is_added() -> None:
    former, later = Histogram((0.2, 1, 10)), Histogram((0.1, 1, 5))
    for seconds in (0.1, 0.7, 7, 70):
        former.observe(seconds)
    later.observe(0.1)
    later.add(former.to_json())
    assert later.counts == [1, 2, 0, 2]
    assert later.sum == pytest.approx(77.9)
    with pytest.raises(ValueError, match="zip"):
        later.add({"bounds": [1], "counts": [1], "sum": 1})


def test_numbers_are_written_as_others_write_them() -> None:
    family = gauge("ecdysis_x", "X.")
    for value in (1.0, 1e-7, math.inf, 1.5):
        family.add(value)
    assert [line.split()[1] for line in write([family]).splitlines()[2:]] == ["1", "1e-07", "+Inf", "1.5"]
