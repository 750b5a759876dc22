"""Who waits for whom at this moment is found in the history, and in what the service says."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._explaining.now import Wait, add_stacks, find_deaths, find_waits, is_alive, trim
from ecdysis_async._explaining.story import tell_stories

from .histories import begin, fail, line, records


def find(directory: Path, lines: list[dict[str, object]], status: object = None) -> list[Wait]:
    read = records(directory, lines)
    return find_waits(read, tell_stories(read), status)  # type: ignore[arg-type] # some are wrong on purpose


@pytest.fixture
def other() -> Iterator[int]:
    """Yield the pid of another process."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_predecessor_waits_for_its_successor(tmp_path: Path, other: int) -> None:
    (wait,) = find(tmp_path, begin(os.getpid(), other, time.monotonic()))
    assert wait.pid == other
    assert wait.text.startswith(
        f"restart r1: generation 1 (pid {os.getpid()}) waits for generation 2 (pid {other}) to get ready"
    )


def test_who_is_dead_is_waited_for_by_nobody(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert find(tmp_path, begin(os.getpid(), process.pid)) == []
    assert find(tmp_path, begin(process.pid, os.getpid())) == []


def test_what_is_over_is_waited_for_by_nobody(tmp_path: Path, other: int) -> None:
    lines = begin(os.getpid(), other) + fail()
    for each in lines:
        each["pid"] = {11: os.getpid(), 12: other}.get(each["pid"], each["pid"])
    assert find(tmp_path, lines) == []


def test_a_service_that_does_not_answer_is_asked_by_its_pid(tmp_path: Path, other: int) -> None:
    lines = [line(1, other, "begun", role="service", generation=1)]
    (wait,) = find(tmp_path, lines, "it says nothing")
    assert (wait.pid, wait.text.endswith("it says nothing")) == (other, True)


def test_a_silent_worker_is_waited_for(tmp_path: Path) -> None:
    workers = [{"pid": 5, "slot": 0, "silence": 0.4}, {"pid": 6, "slot": 1, "silence": 7.0}, {"pid": None}]
    (wait,) = find(tmp_path, [], {"workers": workers})
    assert (wait.pid, "worker 1" in wait.text) == (6, True)


def test_a_worker_that_does_not_get_ready_is_waited_for(tmp_path: Path) -> None:
    workers = [{"pid": 5, "slot": 0, "state": "starting", "uptime": 9.0}, {"pid": 6, "slot": 1, "state": "serving"}]
    (wait,) = find(tmp_path, [], {"workers": workers})
    assert (wait.pid, wait.text) == (5, "the service waits for worker 0 (pid 5) to get ready, for 9.0 s now")


def test_a_drain_tells_whom_it_waits_for(tmp_path: Path) -> None:
    pid, at = os.getpid(), time.monotonic() - 2
    lines = [
        line(at, pid, "drain", connections=3, seconds=30),
        line(at + 1, pid, "waits", connections=1, requests=["GET /slow, 9.0 s old"]),
    ]
    (wait,) = find(tmp_path, lines)
    assert wait.details == ["it waits for GET /slow, 9.0 s old"]
    assert find(tmp_path, [*lines, line(at + 2, pid, "ended")]) == []


def test_a_death_without_a_word_is_named(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    begun = line(1, process.pid, "begun", role="anchor", generation=4)
    worker = line(1.5, process.pid + 1, "begun", role="worker", generation=4)
    (death,) = find_deaths(records(tmp_path, [begun, worker]))
    assert death.startswith(f"the anchor (pid {process.pid}, generation 4) has ended without a word")
    assert find_deaths(records(tmp_path, [begun, line(2, process.pid, "ended")])) == []


def test_a_zombie_is_not_alive() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(process.pid)
    assert is_alive(os.getpid())
    process.wait()


def test_stacks_are_asked_of_those_that_hang() -> None:
    waits = [Wait(5, "hangs"), Wait(6, "probation", is_asked=False)]
    add_stacks(waits, lambda pid: f"stack of {pid}")
    assert [wait.stack for wait in waits] == ["stack of 5", None]


def test_threads_of_libraries_are_left_out() -> None:
    library = 'Thread 0x1:\n  File "/usr/lib/python3.13/threading.py", line 1 in run'
    own = 'Thread 0x2:\n  File "/srv/app.py", line 1 in poll'
    main = 'Current thread 0x3:\n  File "/usr/lib/python3.13/selectors.py", line 1 in select'
    assert trim(f"{library}\n\n{own}\n\n{main}") == own
    assert trim(library) == library
    runner = '  File "/usr/lib/python3.13/asyncio/runners.py", line 1 in run\n  File "/srv/app.py", line 9 in <module>'
    blocked = 'Current thread 0x3:\n  File "/srv/app.py", line 2 in crunch'
    assert trim(f"{blocked}\n{runner}") == blocked
    assert trim(f"{main}\n{runner}") == main
