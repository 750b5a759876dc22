"""Where a generation stands, in words and as data."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.host import AcceptingHost
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._management.status import (
    counted,
    describe_failed_restart,
    describe_listeners,
    describe_process,
    describe_restart,
    describe_wait,
)
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.errors import SuccessorFailed
from ecdysis_async.settings import Settings
from tests.planes import a_plane


def test_one_and_many() -> None:
    assert [counted(number, "connection") for number in (0, 1, 2)] == ["0 connections", "1 connection", "2 connections"]


def test_of_a_failed_restart_the_first_and_the_last_line_are_told() -> None:
    error = SuccessorFailed("it exited with status 1\nand so on", stderr="Traceback:\n  File x\nOSError: no database\n")
    assert describe_failed_restart(error) == "the last restart failed: it exited with status 1 … OSError: no database"
    assert describe_failed_restart(SuccessorFailed("it exited")) == "the last restart failed: it exited"


WAITS = {
    PredecessorState.SPAWNING: "generation 2 (pid 42) to start, for 1.5 s so far",
    PredecessorState.INITIALISING: "generation 2 (pid 42) to get ready, for 1.5 s so far",
    PredecessorState.PAUSING: "the end of accepting here",
    PredecessorState.COMMITTING: "generation 2 (pid 42) to accept, for 1.5 s so far",
    PredecessorState.PROBATION: "generation 2 (pid 42), on probation for 3.5 s more",
    PredecessorState.ABORTING: "generation 2 (pid 42) to end, because the restart has failed",
    PredecessorState.RECALLING: "generation 2 (pid 42) to give the sockets back",
    PredecessorState.REVERTING: "generation 2 (pid 42) to end, because it has failed",
    PredecessorState.STOPPING: "generation 2 (pid 42) to end, because the service stops",
}


@pytest.mark.backends("asyncio")
@pytest.mark.parametrize("state", PredecessorState)
async def test_what_a_restart_waits_for(backend: str, state: PredecessorState) -> None:
    async with a_plane() as plane:
        generation = Generation(1, Settings(probation=5), AcceptingHost(plane), GenerationLog(1))
        handover = PredecessorSide(generation, lambda handover: None)
        handover.state = state
        handover.report.successor_pid = 42
        waits = describe_wait(handover, None, phase_seconds=1.5, connections=0, deadline_seconds=None)
        assert waits == WAITS.get(state)
        restart = describe_restart(handover, phase_seconds=1.5)
        assert (restart is None) == state.final
        assert restart is None or restart["phase"] == state.value


def test_a_drain_is_waited_for_before_anything_else() -> None:
    assert describe_wait(None, None, phase_seconds=0, connections=2, deadline_seconds=3.4) == (
        "2 connections, deadline in 3 s"
    )
    assert describe_wait(None, None, phase_seconds=0, connections=2, deadline_seconds=None) is None


def test_an_address_is_the_real_one(tmp_path: Path) -> None:
    registry = Registry()
    try:
        tcp = registry.obtain(Internet("127.0.0.1", 0), name="web")
        unix = registry.obtain(Unix(str(tmp_path / "socket")))
        listeners = {each["name"]: each for each in describe_listeners(registry.entries)}
        assert listeners["web"]["address"] == f"127.0.0.1:{tcp.sock.getsockname()[1]}"
        assert listeners[unix.name] == {"name": unix.name, "address": str(tmp_path / "socket"), "kind": "unix"}
        if socket.has_ipv6:
            registry.obtain(Internet("::1", 0), name="six")
            assert describe_listeners(registry.entries)[-1]["address"].startswith("[::1]:")
    finally:
        registry.close(unlink=True)


def test_no_value_of_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    told = describe_process()
    assert "DATABASE_PASSWORD" in told["environment"]
    assert "secret" not in str(told)
    assert str(os.getcwd()) in str(told)
