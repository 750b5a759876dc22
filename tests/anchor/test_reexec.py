"""The state of an anchor that is executed anew: sealed, handed on by its marker, and restored as it was."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ecdysis_async._anchor import reexec
from ecdysis_async._anchor.pool import Slot, Worker, WorkerPool, WorkerState
from ecdysis_async._ipc.worker_link import WorkerLink
from ecdysis_async._system.claims import ANCHOR_CHECK_MARKER, ANCHOR_MARKER
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import Process


@pytest.fixture
def crew() -> Iterator[WorkerPool]:
    ours, theirs = socket.socketpair()
    with theirs:
        worker = Worker(3, Process(os.getpid(), os.pidfd_open(os.getpid())), WorkerLink(ours), born=5.0)
        worker.state, worker.requests, worker.environment = WorkerState.SERVING, 7, {"A": "b"}
        yield WorkerPool(2, [Slot(0, [worker], failures=1, retry_at=9.0), Slot(4)])
        worker.line.close()
        worker.process.close()


def make_state(crew: WorkerPool) -> dict[str, Any]:
    described, _ = reexec.describe_crew(crew)
    return {"crew": described, "last_report": None, "sockets": {"service": {"descriptions": [], "descriptors": []}}}


def mark(descriptor: int) -> str:
    found = os.fstat(descriptor)
    return f"{descriptor}:{found.st_dev}:{found.st_ino}"


def test_a_crew_is_restored_as_it_was(crew: WorkerPool) -> None:
    described, descriptors = reexec.describe_crew(crew)
    (worker,) = crew
    assert descriptors == [worker.process.pidfd, worker.line.fileno()]
    for each in described["workers"]:
        each["pidfd"], each["line"] = os.dup(each["pidfd"]), os.dup(each["line"])
    restored = reexec.restore_crew(json.loads(json.dumps(described)))
    (twin,) = restored
    try:
        assert restored.target == 2
        assert [(slot.index, slot.failures, slot.retry_at) for slot in restored.slots] == [(0, 1, 9.0), (4, 0, 0.0)]
        for name in ("generation", "born", "pid", "state", "requests", "request_limit", "environment"):
            assert getattr(twin, name) == getattr(worker, name)
        assert not os.get_inheritable(twin.line.fileno())
    finally:
        twin.line.close()
        twin.process.close()


def test_a_state_is_sealed_and_claimed_once(crew: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = reexec.seal(make_state(crew))
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"x", 0)
    monkeypatch.setenv(ANCHOR_MARKER, mark(memory))
    found = reexec.claim()
    assert found is not None
    assert not found.is_check
    reexec.try_state(found.state)
    assert reexec.claim() is None


def test_a_state_that_cannot_be_read_is_refused(crew: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reexec, "FORMAT", 2)
    memory = reexec.seal(make_state(crew))
    monkeypatch.setattr(reexec, "FORMAT", 1)
    monkeypatch.setenv(ANCHOR_CHECK_MARKER, mark(memory))
    with pytest.raises(reexec.UpgradeFailed, match="format 2"):
        reexec.claim()
    with pytest.raises(KeyError):
        reexec.try_state({"crew": {"workers": []}})


def test_a_marker_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ANCHOR_MARKER, "0:1:2")
    with pytest.raises(reexec.UpgradeFailed, match="something else"):
        reexec.claim()


def test_new_code_that_fails_is_quoted() -> None:
    memory = reexec.seal({})
    try:
        launch = Launch((sys.executable, "-c", "raise SystemExit('not today')"), None, dict(os.environ))
        with pytest.raises(reexec.UpgradeFailed, match="not today"):
            reexec.check(launch, memory, 60)
        with pytest.raises(reexec.UpgradeFailed, match="could not be tried"):
            reexec.check(Launch(("/no/such/program",), None, {}), memory, 60)
        reexec.check(Launch((sys.executable, "-c", ""), None, dict(os.environ)), memory, 60)
    finally:
        os.close(memory)


def test_an_exec_that_fails_leaves_everything_as_it_was(crew: WorkerPool) -> None:
    _, descriptors = reexec.describe_crew(crew)
    memory = reexec.seal({})
    directory = os.getcwd()
    try:
        with reexec.blocked_signals(), pytest.raises(reexec.UpgradeFailed, match="/no/such/program"):
            reexec.execute(Launch(("/no/such/program",), "/", {}), memory, descriptors)
        assert os.getcwd() == directory
        assert not any(map(os.get_inheritable, [memory, *descriptors]))
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & reexec.SIGNALS
    finally:
        os.close(memory)


def test_signals_that_nobody_acted_upon_come_again() -> None:
    heard: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    try:
        # As C writes them; a NUL is what Python's own handler adds.
        os.write(write_end, bytes([signal.SIGUSR1, 0]))
        reexec.repeat_signals(read_end)
        assert heard == [signal.SIGUSR1]
    finally:
        os.close(write_end)
        signal.signal(signal.SIGUSR1, former)
