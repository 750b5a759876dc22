"""Settings that could not work are refused where they are given, not by the first restart."""

from __future__ import annotations

from typing import Any

import pytest

from ecdysis_async.settings import Settings


@pytest.mark.parametrize(
    ("given", "error", "expected"),
    [
        ({"environment": {"PORT": 8000}}, TypeError, r"variable PORT of environment is text, not int.*str\("),
        ({"environment": {"PORT": None}}, TypeError, "not NoneType"),
        ({"environment": {8000: "PORT"}}, TypeError, "name of a variable in environment is text, not int"),
        ({"environment": {"A=B": "c"}}, ValueError, "'A=B' cannot name a variable"),
        ({"environment": {"": "c"}}, ValueError, "'' cannot name a variable"),
        ({"environment": {"A\0": "b"}}, ValueError, "NUL"),
        ({"environment": {"A": "b\0"}}, ValueError, "variable A of environment contains a NUL"),
        ({"command": ("service", 8000)}, TypeError, "an argument of command is text, not int"),
        ({"command": ("service", b"x")}, TypeError, "not bytes"),
        ({"command": ("service", "x\0")}, ValueError, "an argument of command contains a NUL"),
    ],
)
def test_what_no_process_can_be_started_with(given: dict[str, Any], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        Settings(**given)


def test_the_value_of_a_variable_is_not_shown() -> None:
    with pytest.raises(ValueError, match="NUL") as raised:
        Settings(environment={"TOKEN": "secret\0"})
    assert "secret" not in str(raised.value)


def test_text_is_accepted() -> None:
    settings = Settings(command=("service", "", "a=b"), environment={"A": "", "B": "c=d"})
    assert settings.environment == {"A": "", "B": "c=d"}
