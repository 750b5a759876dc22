"""The errors: what each is a kind of, and what it says."""

from __future__ import annotations

import pytest

from ecdysis_async import errors
from ecdysis_async.errors import ChannelError, DescriptorsLost, EcdysisError, HandoffAborted, RestartError, SpawnFailed


def test_each_is_listed_and_is_of_this_library() -> None:
    kinds = {
        name: each
        for name, each in vars(errors).items()
        if isinstance(each, type) and each.__module__ == errors.__name__
    }
    assert sorted(kinds) == sorted(errors.__all__)
    assert [name for name, each in kinds.items() if not issubclass(each, EcdysisError)] == ["HandoffAborted"]
    # No `except Exception` keeps a process alive that is to leave.
    assert issubclass(HandoffAborted, SystemExit)


def test_the_last_lines_of_stderr_stand_below_the_text() -> None:
    assert str(SpawnFailed("no such program")) == "no such program"
    error = RestartError("it failed", stderr="Traceback\nKeyError: 'x'")
    assert str(error) == "it failed\nlast lines of the successor's stderr:\n  | Traceback\n  | KeyError: 'x'"


def test_what_lost_its_descriptors_has_the_rest() -> None:
    with pytest.raises(ChannelError) as caught:
        raise DescriptorsLost("lost", "spawn", {"a": 1})
    assert isinstance(caught.value, DescriptorsLost)
    assert (caught.value.type, caught.value.body, DescriptorsLost("lost").body) == ("spawn", {"a": 1}, {})
