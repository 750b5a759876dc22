"""Log files that are moved away while they are written to."""

from __future__ import annotations

import logging
import logging.handlers
import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import anyio
import pytest

from ecdysis_async._system import log_files
from ecdysis_async._system.log_files import on_reopen_logs, reopen_logs, reopen_logs_of_application


@pytest.fixture
def logger(request: pytest.FixtureRequest) -> Iterator[logging.Logger]:
    """Return a logger of this test's own, whose handlers are closed at its end."""
    logger = logging.getLogger(f"logs.{request.node.name}")
    logger.propagate = False
    yield logger
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


@pytest.mark.parametrize("mode", ["a", "w"])
def test_a_file_that_was_moved(mode: str, logger: logging.Logger, tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    logger.addHandler(logging.FileHandler(path, mode))
    logger.warning("one")
    assert reopen_logs() == 0
    path.rename(tmp_path / "old")
    assert reopen_logs() == 1
    # Another process has been faster, and what it has written stays.
    path.write_text("theirs\n")
    logger.warning("two")
    assert ((tmp_path / "old").read_text(), path.read_text()) == ("one\n", "theirs\ntwo\n")
    assert reopen_logs() == 0


def test_a_file_that_was_removed(logger: logging.Logger, tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    logger.addHandler(logging.FileHandler(path))
    path.unlink()
    assert reopen_logs() == 1
    logger.warning("two")
    assert path.read_text() == "two\n"


def test_a_file_on_a_full_disk(logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its close raised, as it flushes once more: the service ended, or logged to a closed file from then on.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    path = tmp_path / "app.log"
    path.symlink_to("/dev/full")
    handler = logging.FileHandler(path)
    logger.addHandler(handler)
    logger.warning("one")
    former = handler.stream
    assert former is not None
    path.unlink()
    assert reopen_logs() == 1
    assert former.closed
    logger.warning("two")
    assert path.read_text() == "two\n"


def test_a_path_that_cannot_be_seen_any_more(
    logger: logging.Logger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As it is for a service that was root when it opened it; here because a file stands where its directory was.
    directory, moved = tmp_path / "logs", tmp_path / "moved"
    directory.mkdir()
    logger.addHandler(logging.FileHandler(directory / "app.log"))
    logger.addHandler(logging.FileHandler(tmp_path / "other.log"))
    directory.rename(moved)
    directory.touch()
    (tmp_path / "other.log").unlink()
    assert reopen_logs() == 1, "one costs another its turn"
    assert f"the log file {directory}/app.log cannot be opened anew" in caplog.text
    logger.warning("two")
    assert (moved / "app.log").read_text() == (tmp_path / "other.log").read_text() == "two\n"
    directory.unlink()
    directory.mkdir()
    assert reopen_logs() == 1
    logger.warning("three")
    assert (directory / "app.log").read_text() == "three\n"


def test_what_has_no_file_yet(logger: logging.Logger, tmp_path: Path) -> None:
    logger.addHandler(logging.FileHandler(tmp_path / "app.log", delay=True))
    logger.addHandler(logging.StreamHandler())
    assert reopen_logs() == 0
    assert not (tmp_path / "app.log").exists()


def test_a_file_behind_others(logger: logging.Logger, tmp_path: Path) -> None:
    direct = logging.FileHandler(tmp_path / "direct.log")
    logger.addHandler(logging.handlers.MemoryHandler(1, target=direct))
    logger.addHandler(direct)
    behind = logging.FileHandler(tmp_path / "behind.log")
    handler = logging.handlers.QueueHandler(queue.SimpleQueue())
    logger.addHandler(handler)
    try:
        (tmp_path / "direct.log").unlink()
        assert reopen_logs() == 1, "each is counted once"
        if sys.version_info >= (3, 12):  # earlier a queue does not know its listener
            handler.listener = logging.handlers.QueueListener(handler.queue, behind)
            (tmp_path / "behind.log").unlink()
            assert reopen_logs() == 1
    finally:
        behind.close()


# From Python 3.14 on a queue of loguru starts multiprocessing's resource tracker, which stays to the process' end.
@pytest.mark.main_python_only
@pytest.mark.parametrize("enqueue", [False, True])
def test_a_file_of_loguru(enqueue: bool, tmp_path: Path) -> None:
    loguru = pytest.importorskip("loguru").logger
    path = tmp_path / "app.log"
    number = loguru.add(path, mode="w", format="{message}", enqueue=enqueue)
    silent = loguru.add(tmp_path / "silent.log", delay=True, filter=lambda record: False)
    try:
        loguru.info("one")
        loguru.complete()
        assert reopen_logs() == 0
        path.rename(tmp_path / "old")
        path.write_text("theirs\n")
        assert reopen_logs() == 1
        loguru.info("two")
        loguru.complete()
        assert ((tmp_path / "old").read_text(), path.read_text()) == ("one\n", "theirs\ntwo\n")
    finally:
        loguru.remove(number)
        loguru.remove(silent)


def test_a_loguru_that_is_built_otherwise(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "loguru", ModuleType("loguru"))
    assert reopen_logs() == 0
    assert "this release of loguru does not show its log files" in caplog.text


async def test_the_application_opens_its_own_files_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_files, "_reopeners", [])
    told = []

    @on_reopen_logs
    def reopen() -> None:
        told.append("plain")

    @on_reopen_logs
    def fail() -> None:
        raise OSError("no room")

    @on_reopen_logs
    async def reopen_later() -> None:
        told.append("async")

    assert await reopen_logs_of_application() == 2
    assert told == ["plain", "async"]
    assert "a log file of the application's own was not opened anew" in caplog.text
    assert "no room" in caplog.text
    reopen()


async def test_a_function_of_the_application_that_hangs_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    monkeypatch.setattr(log_files, "_reopeners", [anyio.sleep_forever, lambda: None])
    monkeypatch.setattr(log_files, "REOPEN_SECONDS", 0.05)
    with anyio.fail_after(60):
        assert await reopen_logs_of_application() == 1
    assert "was not opened anew" in caplog.text
    assert "TimeoutError" in caplog.text
