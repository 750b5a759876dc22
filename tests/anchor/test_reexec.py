"""The state of an anchor that is executed anew: sealed, handed on by its marker, and restored as it was."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ecdysis_async._anchor import reexec
from ecdysis_async._anchor.config import AnchorConfig
from ecdysis_async._anchor.pool import Slot, Worker, WorkerPool
from ecdysis_async._anchor.state import AnchorState
from ecdysis_async._ipc.worker_link import WorkerLink
from ecdysis_async._system.claims import ANCHOR_CHECK_MARKER, ANCHOR_MARKER
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import Process
from ecdysis_async.report import State

CONFIG = AnchorConfig({})


@pytest.fixture
def known() -> Iterator[AnchorState]:
    ours, theirs = socket.socketpair()
    with theirs:
        worker = Worker(3, Process(os.getpid(), os.pidfd_open(os.getpid())), WorkerLink(ours), born=5.0)
        worker.state, worker.requests, worker.environment = State.SERVING, 7, {"A": "b"}
        yield AnchorState(CONFIG, WorkerPool(2, [Slot(0, [worker]), Slot(4)]))
        worker.link.close()
        worker.process.close()


def make_body(known: AnchorState) -> dict[str, Any]:
    body, _ = known.describe()
    return {**body, "sockets": {"service": {"descriptions": [], "descriptors": []}}}


def mark(descriptor: int) -> str:
    found = os.fstat(descriptor)
    return f"{descriptor}:{found.st_dev}:{found.st_ino}"


def test_a_state_is_sealed_and_claimed_once(known: AnchorState, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = reexec.seal(make_body(known))
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"x", 0)
    monkeypatch.setenv(ANCHOR_MARKER, mark(memory))
    found = reexec.claim()
    assert found is not None
    assert not found.is_check
    reexec.try_state(CONFIG, found.state)
    assert reexec.claim() is None


def test_a_state_that_cannot_be_read_is_refused(known: AnchorState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reexec, "FORMAT", 2)
    memory = reexec.seal(make_body(known))
    monkeypatch.setattr(reexec, "FORMAT", 1)
    monkeypatch.setenv(ANCHOR_CHECK_MARKER, mark(memory))
    with pytest.raises(reexec.UpgradeFailed, match="format 2"):
        reexec.claim()
    with pytest.raises(KeyError):
        reexec.try_state(CONFIG, {"crew": {"workers": []}})


@pytest.mark.parametrize("marker", ["0:1:2", "", "1", "9" * 30 + ":1:1", "-1:0:0"])
def test_a_marker_of_something_else_is_ignored(marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ANCHOR_MARKER, marker)
    assert reexec.claim() is None
    assert ANCHOR_MARKER not in os.environ


def test_new_code_that_fails_is_quoted() -> None:
    memory = reexec.seal({})
    try:
        launch = Launch((sys.executable, "-c", "raise SystemExit('not today')"), None, dict(os.environ))
        with pytest.raises(reexec.UpgradeFailed, match="not today"):
            reexec.check(launch, memory, 60)
        with pytest.raises(reexec.UpgradeFailed, match=r"could not be tried: cannot start .* is not there any more"):
            reexec.check(Launch(("/no/such/program",), None, {}), memory, 60)
        reexec.check(Launch((sys.executable, "-c", ""), None, dict(os.environ)), memory, 60)
    finally:
        os.close(memory)


def test_an_exec_that_fails_leaves_everything_as_it_was(known: AnchorState) -> None:
    _, descriptors = known.describe()
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
