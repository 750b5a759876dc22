"""The report of a roll-out: the restarts of its workers, put together."""

from __future__ import annotations

from ecdysis_async import DrainCount, Outcome, Phase, RestartReport
from ecdysis_async._anchor.rollout import sum_up


def make_report(**facts: object) -> RestartReport:
    return RestartReport("id", 2, 100, 101, **facts)  # type: ignore[arg-type]


def test_what_comes_one_after_the_other_adds_up_and_what_is_parallel_does_not() -> None:
    whole = make_report()
    workers = [
        make_report(
            phases={Phase.START: 1.0, Phase.PROBATION: 3.0, Phase.DRAIN: 4.0},
            accept_gap=0.1,
            lost=1,
            drain=DrainCount(drained=1, silent=2, transferred=3, cut=4),
            inherited=["a", "b"],
        ),
        make_report(phases={Phase.START: 2.0, Phase.DRAIN: 1.0}, accept_gap=0.2, lost=2, inherited=["b", "c"]),
        make_report(drain=DrainCount(drained=10)),
    ]
    sum_up(whole, workers)
    assert whole.phases == {Phase.START: 3.0, Phase.DRAIN: 4.0}
    assert (whole.accept_gap, whole.lost) == (0.2, 3)
    assert whole.drain == DrainCount(drained=11, silent=2, transferred=3, cut=4)
    assert whole.inherited == ["a", "b", "c"]
    assert whole.workers == workers


def test_it_travels_as_json_with_all_its_workers() -> None:
    whole = make_report(outcome=Outcome.SETTLED)
    sum_up(whole, [make_report(outcome=Outcome.SETTLED, created=["x"]), make_report()])
    assert RestartReport.from_json(whole.to_json()) == whole
    # As an older release has written it.
    body = whole.to_json()
    del body["workers"]
    assert RestartReport.from_json(body).workers == []


def test_a_roll_out_in_which_nothing_has_happened_yet() -> None:
    whole = make_report()
    sum_up(whole, [])
    assert (whole.phases, whole.accept_gap, whole.drain) == ({}, None, DrainCount())
