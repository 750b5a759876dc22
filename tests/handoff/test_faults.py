"""SIGKILL and SIGSTOP of either side at every step of the protocol: who serves then, and whether it works again."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.handoff.harness import Clients, Conversation, Lost, Service

Run = Callable[..., Service]

LOOPS = ("asyncio", "uvloop", "anyio", "trio")

ECDYSIS = {"probation": 0.3, "drain_timeout": 5}

LIMITS = {"PAUSE_SECONDS": 30.0, "SERVING_SECONDS": 30.0, "END_GRACE_SECONDS": 0.3}

# What the clock would say, at a moment that the test knows: no limit is then too short for a busy machine.
TIME_IS_UP = "ecdysis._handover.post(ecdysis._handover.timed_out)"


def on_loops_in_turn(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Give each case one loop, and another one on each Python: what is tested is the protocol, which all share."""
    loops = itertools.islice(itertools.cycle(LOOPS), sys.version_info.minor % len(LOOPS), None)
    return [
        pytest.param(loop, *case, id="-".join([*map(str, case[:3]), loop]))
        for loop, case in zip(loops, cases, strict=False)
    ]


# The successor is gone, or does not move: this generation goes on as if nothing had been asked, or comes back.
FAILURES = [
    ("successor", "greeting", "kill-self", {("SuccessorFailed", "start")}),
    ("successor", "initialising", "kill-self", {("SuccessorFailed", "initialise")}),
    ("successor", "waiting", "kill-self", {("SuccessorFailed", "initialise")}),
    ("successor", "opening", "kill-self", {("RolledBack", "commit")}),
    ("successor", "probation", "kill-self", {("RolledBack", "commit")}),
    ("predecessor", "spawning", "kill-peer", {("SuccessorFailed", "start")}),
    ("predecessor", "initialising", "kill-peer", {("SuccessorFailed", "initialise")}),
    # Whether the pause ends before or after the death is seen is up to the kernel.
    ("predecessor", "pausing", "kill-peer", {("SuccessorFailed", "pause"), ("RolledBack", "commit")}),
    ("predecessor", "committing", "kill-peer", {("RolledBack", "commit")}),
    ("predecessor", "probation", "kill-peer", {("RolledBack", "probation")}),
    ("successor", "greeting", "stop-self", {("ReadyTimeout", "start")}),
    ("successor", "initialising", "stop-self", {("ReadyTimeout", "initialise")}),
    ("successor", "waiting", "stop-self", {("ReadyTimeout", "initialise")}),
    ("successor", "opening", "stop-self", {("RolledBack", "commit")}),
    ("successor", "probation", "stop-self", {("RolledBack", "commit")}),
    ("predecessor", "spawning", "stop-peer", {("ReadyTimeout", "start")}),
    ("predecessor", "initialising", "stop-peer", {("ReadyTimeout", "initialise")}),
    ("predecessor", "pausing", "stop-peer", {("RolledBack", "commit")}),
    ("predecessor", "committing", "stop-peer", {("RolledBack", "commit")}),
]


@pytest.mark.parametrize(("loop", "side", "state", "action", "outcomes"), on_loops_in_turn(FAILURES))
def test_a_lost_successor_costs_the_restart_only(
    loop: str, side: str, state: str, action: str, outcomes: set[tuple[str, str]], run_service: Run
) -> None:
    service = run_service(loop, ecdysis=ECDYSIS, limits=LIMITS)
    first = service.pids[0]
    with Clients(service.address) as clients, service.begin("hello") as control:
        control.answer()
        service.arm(side, state, action)
        with service.begin("restart", until="settled") as asking:
            if action.startswith("stop"):
                service.wait_until_stopped(service.wait_for("fault")["target"])
                if ("RolledBack", "commit") in outcomes:
                    service.wait_for("predecessor", state="committing")
                control.say("run", code=TIME_IS_UP).answer()
            failure = asking.answer()
        assert (failure["error"], failure["phase"]) in outcomes
        clients.wait_for(first)
        lost = list(clients.lost)
        assert service.run("ecdysis.last_report.outcome") == (
            "rolled back" if failure["error"] == "RolledBack" else "failed"
        )
        report = service.restart("settled")
        clients.wait_for(report["successor_pid"])
    assert clients.refused == []
    # Only what the successor had accepted may be lost, and only to its death; the second restart costs nothing.
    assert len(lost) <= (failure["error"] == "RolledBack")
    assert clients.lost == lost


# The predecessor is dead, and had handed its sockets over: the successor completes its start and serves.
PROMOTIONS = [
    ("predecessor", "pausing", "kill-self"),
    ("predecessor", "committing", "kill-self"),
    ("predecessor", "probation", "kill-self"),
    ("predecessor", "settled", "kill-self"),
    ("successor", "initialising", "kill-peer"),
    ("successor", "waiting", "kill-peer"),
    ("successor", "opening", "kill-peer"),
    ("successor", "probation", "kill-peer"),
    ("successor", "settled", "kill-peer"),
]


@pytest.mark.parametrize(("loop", "side", "state", "action"), on_loops_in_turn(PROMOTIONS))
def test_a_dead_predecessor_costs_nothing(loop: str, side: str, state: str, action: str, run_service: Run) -> None:
    service = run_service(loop, ecdysis=ECDYSIS, limits=LIMITS)
    first = service.pids[0]
    with Clients(service.address) as clients:
        service.arm(side, state, action)
        with service.begin("restart", until="settled") as asking:
            service.wait_for("fault", target=first)
            assert service.wait_for_death(first) == -signal.SIGKILL
            with contextlib.suppress(Lost):
                asking.answer()
        second = service.wait_for("ready", generation=2)["pid"]
        clients.wait_for(second)
        lost = list(clients.lost)
        report = service.restart("settled")
        assert (report["outcome"], report["predecessor_pid"], report["generation"]) == ("settled", second, 3)
        clients.wait_for(report["successor_pid"])
    assert clients.refused == []
    # What the dead one had accepted.
    assert len(lost) <= 1
    assert clients.lost == lost


# Nobody has the sockets, or the only one who may accept is dead: that is the end, and nothing is left behind.
ENDS = [
    ("predecessor", "spawning", "kill-self"),
    ("predecessor", "initialising", "kill-self"),
    ("successor", "greeting", "kill-peer"),
    ("successor", "settled", "kill-self"),
    ("predecessor", "settled", "kill-peer"),
]


@pytest.mark.parametrize(("loop", "side", "state", "action"), on_loops_in_turn(ENDS))
def test_the_death_of_the_only_holder_ends_the_service(
    loop: str, side: str, state: str, action: str, run_service: Run
) -> None:
    service = run_service(loop, ecdysis=ECDYSIS, limits=LIMITS)
    service.arm(side, state, action)
    with service.begin("restart", until="settled") as asking:
        dead = service.wait_for("fault")["target"]
        with contextlib.suppress(Lost):
            asking.answer()
    service.wait_for_end()
    others = [service.statuses[pid] for pid in service.pids if pid != dead]
    # A generation that has drained ends well; one that was left alone before it served has failed.
    assert others == [0 if state == "settled" else 1]


# Nothing is promoted over a predecessor that does not move, and it finds everything as it was.
STALLS = [
    ("predecessor", "spawning", "stop-self", "greeting"),
    ("predecessor", "initialising", "stop-self", "greeting"),
    ("predecessor", "pausing", "stop-self", "waiting"),
    ("predecessor", "committing", "stop-self", "waiting"),
    ("successor", "greeting", "stop-peer", "greeting"),
    ("successor", "initialising", "stop-peer", "waiting"),
    ("successor", "waiting", "stop-peer", "waiting"),
]


@pytest.mark.parametrize(("loop", "side", "state", "action", "reached"), on_loops_in_turn(STALLS))
def test_a_stopped_predecessor_stalls_the_restart(
    loop: str, side: str, state: str, action: str, reached: str, run_service: Run
) -> None:
    service = run_service(loop, ecdysis=ECDYSIS, limits=LIMITS)
    first = service.pids[0]
    service.arm(side, state, action)
    with service.begin("restart", until="settled") as asking:
        service.wait_for("fault", target=first)
        service.wait_until_stopped(first)
        service.wait_for("successor", state=reached)
        with Conversation(service.address, timeout=0.05) as impatient, pytest.raises(Lost, match="timed out"):
            impatient.say("hello").answer()
        with service.begin("hello") as patient:
            service.signal(first, signal.SIGCONT)
            assert patient.answer()["pid"] in service.pids
        report = asking.answer()
    assert (report["outcome"], report["generation"]) == ("settled", 2)
    assert service.ask()["pid"] == report["successor_pid"]
    assert service.accepting_turns() == [first, report["successor_pid"]]


# The one that does not move is not needed: the other one serves.
LATE_STALLS = [
    ("predecessor", "probation", "stop-self"),
    ("predecessor", "settled", "stop-self"),
    ("successor", "opening", "stop-peer"),
    ("successor", "probation", "stop-peer"),
    ("successor", "settled", "stop-peer"),
]


@pytest.mark.parametrize(("loop", "side", "state", "action"), on_loops_in_turn(LATE_STALLS))
def test_a_predecessor_that_stops_after_the_commit_is_not_missed(
    loop: str, side: str, state: str, action: str, run_service: Run
) -> None:
    service = run_service(loop, ecdysis=ECDYSIS, limits=LIMITS)
    first = service.pids[0]
    with Clients(service.address) as clients:
        service.arm(side, state, action)
        with service.begin("restart", until="settled") as asking:
            service.wait_for("fault", target=first)
            service.wait_until_stopped(first)
            second = service.wait_for("ready", generation=2)["pid"]
            clients.wait_for(second)
            service.signal(first, signal.SIGCONT)
            assert asking.answer()["outcome"] == "settled"
        service.wait_for_death(first)
        clients.wait_for(second)
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == [first, second]


# A successor that serves and does not move is no dead one: its clients wait for it, and nobody accepts in its place.
FROZEN_SUCCESSORS = [
    ("predecessor", "probation", "stop-peer"),
    ("predecessor", "settled", "stop-peer"),
    ("successor", "settled", "stop-self"),
]


@pytest.mark.parametrize(("loop", "side", "state", "action"), on_loops_in_turn(FROZEN_SUCCESSORS))
def test_clients_wait_for_a_successor_that_stops(
    loop: str, side: str, state: str, action: str, run_service: Run
) -> None:
    service = run_service(loop, ecdysis=ECDYSIS, limits=LIMITS)
    first = service.pids[0]
    with Clients(service.address) as clients:
        service.arm(side, state, action)
        report = service.restart("settled")
        second = report["successor_pid"]
        service.wait_for("fault", target=second)
        service.wait_until_stopped(second)
        assert service.wait_for_death(first) == 0
        with service.begin("hello") as patient:
            service.signal(second, signal.SIGCONT)
            assert patient.answer() == {"generation": 2, "pid": second}
        clients.wait_for(second)
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == [first, second]
