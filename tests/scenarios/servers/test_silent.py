"""``serve`` without ``ready``: it announces readiness by itself, or says that nothing is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios import programs

PROGRAM = Path(__file__).with_name("silent.py")


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_the_body_that_serves_is_ready_by_itself(loop: str, tmp_path: Path) -> None:
    ended = programs.run(tmp_path, PROGRAM, "body", LOOP=loop)
    assert (ended.status, ended.output, ended.log) == (0, "hello\n", "")


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_task_that_serves_leaves_readiness_to_the_program_and_says_so(loop: str, tmp_path: Path) -> None:
    ended = programs.run(tmp_path, PROGRAM, "task", LOOP=loop)
    assert (ended.status, ended.output) == (0, "State.STARTING\nhello\n")
    assert ended.log.count("serve() was called 1 s ago, and nothing is accepted") == 1
