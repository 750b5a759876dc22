"""A whole service behaves as a simple model of it: a few short sequences; ``python -m tests.faults.model`` has more."""

from __future__ import annotations

import pytest

from tests.faults.model import MODELS, explore

pytestmark = pytest.mark.main_python_only


@pytest.mark.parametrize("name", MODELS)
def test_a_service_does_as_its_model(name: str) -> None:
    explore(MODELS[name], 2, 5, derandomize=True)
