"""A short run of each target of the fuzzer; ``nox -s fuzz`` is the long one."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing.targets import TARGETS


@pytest.mark.main_python_only
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_it(name: str) -> None:
    """The inputs are the same in each run."""
    with TARGETS[name]() as target:

        @settings(
            derandomize=True, database=None, deadline=None, max_examples=200, suppress_health_check=[*HealthCheck]
        )
        @given(st.binary(max_size=400))
        def attack(data: bytes) -> None:
            target(data)

        attack()
