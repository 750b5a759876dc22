"""What an anchor is to run."""

from __future__ import annotations

import pytest

from ecdysis_async._anchor.config import BEAT_SECONDS, BEATS_PER_HANG, AnchorConfig


@pytest.mark.parametrize(
    ("hang_timeout", "beat"), [(None, BEAT_SECONDS), (3600, BEAT_SECONDS), (1, 1 / BEATS_PER_HANG)]
)
def test_a_worker_tells_of_itself_often_enough_for_a_hang_to_be_found(hang_timeout: float | None, beat: float) -> None:
    assert AnchorConfig({}, hang_timeout=hang_timeout).beat_seconds == beat
