"""The library's logger: it says who speaks, and an application's logging configuration does not silence it."""

from __future__ import annotations

import logging
import logging.config
import os
from collections.abc import Iterator

import pytest

from ecdysis_async._system.own_log import Speaker, let_speak, logger


@pytest.fixture(autouse=True)
def _silence_afterwards() -> Iterator[None]:
    yield
    let_speak(None)


def test_a_line_that_names_no_speaker_is_the_process_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ecdysis_async"):
        let_speak(Speaker("generation 2", "0123456789ab"))
        logging.getLogger("ecdysis_async").info("%d files", 3)
        let_speak(None)
        logger.info("nobody speaks")
    assert caplog.messages == [f"[generation 2, pid {os.getpid()}, restart 0123456789ab] 3 files", "nobody speaks"]
    assert vars(caplog.records[0])["restart_id"] == "0123456789ab"


def test_a_configuration_that_disables_existing_loggers_does_not_mean_this_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = logging.getLogger("tests.own_log")
    try:
        logging.config.dictConfig({"version": 1})
        assert other.disabled
        with caplog.at_level(logging.INFO, "ecdysis_async"):
            logger.info("still here")
        assert caplog.messages == ["still here"]
    finally:
        # The configuration has disabled every logger that there was.
        for each in logging.Logger.manager.loggerDict.values():
            if isinstance(each, logging.Logger):
                each.disabled = False
