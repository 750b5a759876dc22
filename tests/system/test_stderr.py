"""What a successor writes to stderr before it is ready: nothing of it is lost on its way."""

from __future__ import annotations

import os

import anyio
import pytest

from ecdysis_async._system.stderr import StderrTail, _write


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
        assert tail.text == "first\nsecond"
        await tail.pass_rest_on()
        await wait_for("second", capfd)
    finally:
        tail.close_write_end()
        tail.close()
