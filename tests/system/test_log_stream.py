"""Log lines for a reader that hangs: nobody waits for it, nothing is out of order, and what is lost is counted."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

from ecdysis_async._system import log_stream
from ecdysis_async._system.log_stream import PatientHandler

PIPE_SIZE = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """Make a small pipe: the reader's end, and the stream of the log."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    with open(writing, "w") as stream:
        yield reading, stream
    os.close(reading)


def make_record(text: str) -> logging.LogRecord:
    return logging.LogRecord("name", logging.INFO, "path", 1, text, None, None)


def read_all(reading: int) -> list[str]:
    with open(reading, closefd=False) as file:
        return file.read().splitlines()


def fill(handler: PatientHandler, count: int) -> None:
    for number in range(count):
        handler.handle(make_record(f"{number:04} {'x' * 95}"))


def wait_for_writer(handler: PatientHandler) -> None:
    if (writer := handler._writer) is not None:
        writer.join(60)


def test_nobody_waits_and_nothing_is_lost_or_out_of_order(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe
    handler = PatientHandler(stream)
    # Far more than the pipe holds, and nobody reads.
    fill(handler, 400)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(read_all(reading)))
    reader.start()
    wait_for_writer(handler)
    handler.handle(make_record("last"))
    # The pipe may still be full.
    wait_for_writer(handler)
    stream.close()
    reader.join()
    assert [line[:4] for line in found] == [*(f"{number:04}" for number in range(400)), "last"]
    handler.close()


def test_what_is_lost_is_counted(pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, stream = pipe
    monkeypatch.setattr(log_stream, "MAX_LINES", 10)
    handler = PatientHandler(stream)
    fill(handler, 400)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(read_all(reading)))
    reader.start()
    wait_for_writer(handler)
    stream.close()
    reader.join()
    kept = [line for line in found if "xxx" in line]
    # It may be said more than once: as often as everything that waited was written.
    lost = [int(line.split()[0]) for line in found if "were lost" in line]
    assert lost
    assert len(kept) + sum(lost) == 400
    handler.close()


def test_the_end_waits_for_a_reader_only_for_a_moment(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, stream = pipe
    monkeypatch.setattr(log_stream, "CLOSE_SECONDS", 0.01)
    handler = PatientHandler(stream)
    fill(handler, 400)
    writer = handler._writer
    handler.close()
    assert writer is not None
    assert writer.is_alive()
    while writer.is_alive():
        os.read(reading, 65536)
        writer.join(0.01)


def test_a_stream_without_a_descriptor_is_written_at_once() -> None:
    stream = io.StringIO()
    PatientHandler(stream).handle(make_record("hello"))
    assert stream.getvalue() == "hello\n"
