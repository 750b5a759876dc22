"""The report as it travels: also from a release that knows more, or less, than this one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ecdysis_async.report import DrainCount, Outcome, Phase, RestartReport


@pytest.fixture
def body() -> dict[str, Any]:
    """Make a report as it comes over a channel."""
    report = RestartReport(
        "abc",
        2,
        4711,
        successor_pid=4712,
        started_at=1.5,
        outcome=Outcome.SETTLED,
        phases={Phase.START: 0.25, Phase.DRAIN: 3.0},
        accept_gap=0.001,
        inherited=["tcp:127.0.0.1:80"],
        drain=DrainCount(drained=3, cut=1),
    )
    found: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    return found


def test_it_arrives_as_it_was_sent(body: dict[str, Any]) -> None:
    report = RestartReport.from_json(body)
    assert json.loads(json.dumps(report.to_json())) == body
    assert report.outcome is Outcome.SETTLED
    assert list(report.phases) == [Phase.START, Phase.DRAIN]
    assert report.drain == DrainCount(drained=3, cut=1)


def test_what_a_newer_release_adds_is_left_out(body: dict[str, Any]) -> None:
    expected = RestartReport.from_json(body)
    body["phases"] = {"transfer": 0.1, **body["phases"], "applause": [1, 2]}
    body["drain"]["parked"] = "some"
    body["mood"] = {"good": True}
    assert RestartReport.from_json(body) == expected


def test_what_an_older_release_does_not_count_is_none(body: dict[str, Any]) -> None:
    del body["drain"]["transferred"], body["drain"]["silent"], body["unclaimed"], body["hurried"]
    report = RestartReport.from_json(body)
    assert report.drain == DrainCount(drained=3, cut=1)
    assert report.unclaimed == report.hurried == []


@pytest.mark.parametrize(("error", "expected"), [(None, Outcome.IN_PROGRESS), ("no", Outcome.FAILED)])
def test_an_unknown_outcome_claims_nothing_final(body: dict[str, Any], error: str | None, expected: Outcome) -> None:
    report = RestartReport.from_json(body | {"outcome": "moulted", "error": error})
    assert report.outcome is expected
    assert str(report).startswith(f"restart abc to generation 2: {expected}")


@pytest.mark.parametrize(
    "garbage",
    [
        {"phases": 1},
        {"phases": ["start"]},
        {"phases": {"start": "soon"}},
        {"drain": None},
        {"drain": {"cut": "some"}},
        {"drain": {"cut": float("inf")}},
        {"outcome": ["settled"]},
    ],
)
def test_garbage_is_no_report(body: dict[str, Any], garbage: dict[str, Any]) -> None:
    with pytest.raises((KeyError, OverflowError, TypeError, ValueError)):
        RestartReport.from_json(body | garbage)


def test_an_error_without_words_is_told(body: dict[str, Any]) -> None:
    assert "failed" in str(RestartReport.from_json(body | {"outcome": Outcome.FAILED, "error": ""}))


@pytest.mark.parametrize("missing", ["id", "generation", "outcome", "phases", "drain"])
def test_a_report_that_lacks_what_every_release_tells(body: dict[str, Any], missing: str) -> None:
    del body[missing]
    with pytest.raises((KeyError, TypeError)):
        RestartReport.from_json(body)
