"""What values may be: read from text and from what TOML holds, with what would be right where they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ecdysis_async._config.parsing import (
    did_you_mean,
    number_of,
    one_of,
    optional,
    or_off,
    parse_cert_reqs,
    parse_mode,
    parse_seconds,
    parse_settings,
    parse_size,
    parse_switch,
    parse_target,
    several,
)


@pytest.mark.parametrize(
    ("parse", "value", "result"),
    [
        (parse_seconds, "1.5", 1.5),
        (parse_size, "1.5 KiB", 1536),
        (parse_size, 512, 512),
        (parse_mode, "0o660", 0o660),
        (parse_switch, "Yes", True),
        (parse_cert_reqs, 2, "required"),
        (parse_target, "a.b:c.d", "a.b:c.d"),
        (or_off(parse_seconds), False, None),
        (or_off(parse_seconds), "3", 3.0),
        (optional(parse_seconds), None, None),
        (one_of("uvloop", "trio"), "TRIO", "trio"),
        (number_of(0, "requests"), "0", 0),
        (several(parse_seconds), "1, 2 1", (1.0, 2.0)),
        (parse_settings, "a-b=1 c='d e'", {"a_b": "1", "c": "d e"}),
    ],
)
def test_what_is_read_is_read_again_as_it_is(parse: Callable[[Any], Any], value: Any, result: Any) -> None:
    assert parse(value) == result
    assert parse(parse(value)) == result


@pytest.mark.parametrize(
    ("parse", "value", "text"),
    [
        (parse_seconds, True, "a number of seconds is needed, 0 or more, not True"),
        (parse_seconds, "inf", "a number of seconds is needed"),
        (parse_size, True, "a size is needed"),
        (parse_size, "0M", "a size is needed"),
        (parse_mode, True, "permissions are octal digits"),
        (parse_switch, 1, "on or off is needed, not 1"),
        (number_of(1, "workers"), 1.5, "a number of workers is needed, 1 or more, not 1.5"),
        (one_of("uvloop", "trio"), "uvlop", "it is one of uvloop, trio, and not 'uvlop': did you mean 'uvloop'?"),
        (several(parse_seconds), 3, "a list is needed, not 3"),
        (parse_settings, 3, "a table, or a list of NAME=VALUE, is needed, not 3"),
        (parse_size, "9" * 400, "a size is needed"),
        (parse_target, "main", "did you mean main:app"),
    ],
)
def test_what_would_be_right_is_said(parse: Callable[[Any], Any], value: Any, text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at below
        parse(value)
    assert text in str(caught.value)


def test_did_you_mean() -> None:
    assert did_you_mean(["a"]) == ": did you mean 'a'?"
    assert did_you_mean([]) == ""
