"""What is written to stderr: nothing of a successor's is lost on its way, and a message of the command is whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import anyio
import pytest

from ecdysis_async._system.stderr import StderrTail, _write

PROGRAM = """
from ecdysis_async._system import stderr
stderr.say("two lines\\nof one message")
stderr.write_lines("another")
"""


async def wait_for(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    seen = ""
    with anyio.fail_after(60):
        while text not in seen:
            await anyio.sleep(0.001)
            seen += capfd.readouterr().err


async def test_what_was_taken_off_the_pipe_is_written_though_nobody_waits(
    backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await _write(b"the last words")
    assert scope.cancelled_caught
    await wait_for("the last words", capfd)


async def test_it_is_passed_on_until_somebody_else_does(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    tail = StderrTail()
    try:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(tail.run)
            os.write(tail.write_end, b"first\n")
            await wait_for("first", capfd)
            tail.stop()
        os.write(tail.write_end, b"second\n")
        tail.read_rest()
        assert tail.read() == "first\nsecond"
        await tail.pass_rest_on()
        await wait_for("second", capfd)
    finally:
        tail.close_write_end()
        tail.close()


@pytest.mark.parametrize("without_reason", [False, True])
async def test_lines_of_the_log_are_left_out_and_a_reason_where_it_is_told_otherwise(*, without_reason: bool) -> None:
    tail = StderrTail()
    try:
        os.write(
            tail.write_end, b"ecdysis: there is no such option\nINFO [generation 2, pid 7, restart a1] serves\nhello\n"
        )
        tail.read_rest()
        assert tail.read(without_reason=without_reason) == "\n".join(
            [*([] if without_reason else ["ecdysis: there is no such option"]), "hello"]
        )
    finally:
        tail.close_write_end()
        tail.close()


def test_a_message_is_one_write() -> None:
    """However Python's streams are buffered: several processes write there, each between two writes of another."""
    reader, writer = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with reader:
        with writer:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            subprocess.run([sys.executable, "-c", PROGRAM], check=True, stderr=writer.fileno(), env=environment)
        # A record is what one write has written.
        assert [reader.recv(1000) for _ in range(3)] == [b"ecdysis: two lines\nof one message\n", b"another\n", b""]


def test_a_message_that_has_no_place_to_go_ends_nothing() -> None:
    command = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-c", PROGRAM]
    subprocess.run(command, check=True)
