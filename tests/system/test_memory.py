"""How much memory this process uses."""

from __future__ import annotations

import psutil

from ecdysis_async._system.memory import resident_bytes


def test_it_is_what_others_see() -> None:
    found = resident_bytes()
    assert found is not None
    assert 0.5 < found / psutil.Process().memory_info().rss < 2
