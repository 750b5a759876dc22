"""The claims of the model in Promela hold; and where the model makes a mistake, the claim that is about it does not."""

from __future__ import annotations

import os

import pytest

from tests.models.spin import CLAIMS, DEFECTS, MODEL, SCENARIOS, find_missing, verifier

pytestmark = pytest.mark.main_python_only

# The claims would hold with ease in a model in which nothing can happen.
FEWEST_STATES = 10_000


@pytest.fixture(autouse=True)
def _programs() -> None:
    if missing := find_missing():
        what = f"{' and '.join(missing)} of Debian's packages of that name are needed"
        if os.environ.get("CI") == "true":
            pytest.fail(what, pytrace=False)
        pytest.skip(what)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_claims_hold(scenario: str) -> None:
    with verifier(scenario) as prove:
        for claim in CLAIMS:
            verdict = prove(claim)
            assert verdict.holds, verdict.output
            assert verdict.states > FEWEST_STATES


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_breaks_the_claim_that_is_about_it(defect: str) -> None:
    claim, scenario = DEFECTS[defect]
    with verifier(scenario, defect) as prove:
        assert not prove(claim).holds


def test_each_defect_and_claim_of_the_model_is_looked_at() -> None:
    text = MODEL.read_text()
    assert {word for word in text.split() if word.startswith("DEFECT_")} == {*DEFECTS, "DEFECT_"}
    assert [line.split()[1] for line in text.splitlines() if line.startswith("ltl ")] == list(CLAIMS)
