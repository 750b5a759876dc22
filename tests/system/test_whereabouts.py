"""Where the application of a process stands that was asked: in a call, or in a task that waits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecdysis_async._system.stacks import ask_for_stacks
from ecdysis_async._system.whereabouts import find_place, leave_application

PROJECT = Path(__file__).resolve().parents[2]

BEGIN = "from ecdysis_async._system.stacks import hear_questions; hear_questions()\n"
BLOCKED = """import time
def connect():
    print("here", flush=True); time.sleep(600)
connect()
"""
ON_ASYNCIO = """import asyncio
async def connect():
    print("here", flush=True)
    await asyncio.sleep(600)
asyncio.run(connect())
"""
ON_TRIO = ON_ASYNCIO.replace("asyncio.run(connect())", "trio.run(connect)").replace("asyncio", "trio")


@pytest.mark.parametrize(
    ("program", "place"),
    [(BLOCKED, "4 (connect)"), (ON_ASYNCIO, "5 (connect)"), (ON_TRIO, "5 (connect)")],
    ids=["blocked", "asyncio", "trio"],
)
def test_the_line_of_the_application_is_found(program: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "service.py"
    path.write_text(BEGIN + program, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(PROJECT)}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        # A loop may not have begun to wait when it is asked first.
        while find_place(stacks := ask_for_stacks(process.pid) or "") != f"{path}:{place}":
            assert process.poll() is None
        told = leave_application(stacks)
        assert f'File "{path}"' in told
        assert told.startswith(("Main thread (most recent call first):\n", "Task "))
        process.kill()


def test_frames_of_what_runs_an_application_are_left_out() -> None:
    stacks = (
        "Thread 0x1 (most recent call first):\n"
        '  File "/srv/app/other.py", line 7 in run\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "<frozen runpy>", line 88 in _run_code\n'
        f'  File "{PROJECT}/ecdysis_async/cli/run.py", line 42 in serve\n\n'
        "Task serve:\n"
        '  File "/srv/app/main.py", line 3 in connect\n'
        f'  File "{PROJECT}/ecdysis_async/cli/worker.py", line 4 in _serve\n'
    )
    assert find_place(stacks) == "/srv/app/main.py:3 (connect)"
    assert leave_application(stacks) == 'Task serve:\n  File "/srv/app/main.py", line 3 in connect'
    assert find_place("nothing of that kind") is None
    assert leave_application("") == ""
