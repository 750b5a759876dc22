"""SIGKILL and SIGSTOP of either side at every step of the protocol: who serves then, and whether it works again.

One service goes through all cases of a kind, so that each can be had on every loop: that the next case finds it in
order is what shows that it works again. The case that ends a service comes last.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.handoff.harness import TIME_IS_UP, Clients, Conversation, Lost, Service

Run = Callable[..., Service]

pytestmark = [
    # The one of anyio is asyncio's loop, and has the same supervisor.
    pytest.mark.backends("asyncio", "uvloop", "trio"),
    # When a signal hits a process, the versions differ by asyncio only.
    pytest.mark.main_python_only(but=("asyncio",)),
]

SETTINGS: dict[str, Any] = {
    # No test waits for the deadline of a drain; a former generation may stand still for as long as the test wants.
    "ecdysis": {"probation": 0.1, "drain_timeout": 600},
    "limits": {"PAUSE_SECONDS": 30.0, "SERVING_SECONDS": 30.0, "END_GRACE_SECONDS": 0.3},
}

# The successor is gone, or does not move: this generation goes on as if nothing had been asked, or comes back.
KILLED = [
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
]
STOPPED = [
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


# On uvloop tests/faults shows it, message by message.
@pytest.mark.backends("asyncio", "trio")
@pytest.mark.parametrize("failures", [KILLED, STOPPED], ids=["killed", "stopped"])
def test_a_lost_successor_costs_the_restart_only(
    backend: str, failures: list[tuple[str, str, str, set[tuple[str, str]]]], run_service: Run
) -> None:
    service = run_service(backend, **SETTINGS)
    first = service.pids[0]
    with Clients(service.address) as clients:
        with service.begin("hello") as control:
            control.answer()
            for side, state, action, outcomes in failures:
                lost = list(clients.lost)
                with armed(service, side, state, action) as asking:
                    target = service.wait_for("fault")["target"]
                    if action.startswith("stop"):
                        service.wait_until_stopped(target)
                        if ("RolledBack", "commit") in outcomes:
                            service.wait_for("predecessor", state="committing")
                        control.say("run", code=TIME_IS_UP).answer()
                    failure = asking.answer()
                assert (failure["error"], failure["phase"]) in outcomes
                clients.wait_for(first)
                outcome = "rolled back" if failure["error"] == "RolledBack" else "failed"
                assert service.run("ecdysis.last_report.outcome") == outcome
                # Only what the successor had accepted may be lost, and only to its death.
                assert len(clients.lost) - len(lost) <= (outcome == "rolled back")
            lost = list(clients.lost)
        clients.wait_for(service.restart("settled")["successor_pid"])
    assert (clients.refused, clients.lost) == ([], lost)
    assert service.accepting_turns()[0] == first
    end_by(service, "predecessor", "settled", "kill-peer")


# The predecessor is dead, and had handed its sockets over: the successor completes its start and serves.
PROMOTIONS = [
    ("predecessor", "spawning", "kill-self"),
    ("predecessor", "initialising", "kill-self"),
    ("predecessor", "pausing", "kill-self"),
    ("predecessor", "committing", "kill-self"),
    ("predecessor", "probation", "kill-self"),
    ("predecessor", "settled", "kill-self"),
    ("successor", "greeting", "kill-peer"),
    ("successor", "initialising", "kill-peer"),
    ("successor", "waiting", "kill-peer"),
    ("successor", "opening", "kill-peer"),
    ("successor", "probation", "kill-peer"),
    ("successor", "settled", "kill-peer"),
]


@pytest.mark.backends("asyncio", "trio")
def test_a_dead_predecessor_costs_nothing(backend: str, run_service: Run) -> None:
    service = run_service(backend, **SETTINGS)
    newest = service.pids[0]
    with Clients(service.address) as clients:
        for number, (side, state, action) in enumerate(PROMOTIONS, start=2):
            lost = list(clients.lost)
            with armed(service, side, state, action) as asking:
                service.wait_for("fault", target=newest)
                assert service.wait_for_death(newest) == -signal.SIGKILL
                with contextlib.suppress(Lost):
                    asking.answer()
            newest = service.wait_for("ready", generation=number)["pid"]
            service.wait_for("successor", state="settled", pid=newest)
            clients.wait_for(newest)
            # What the dead one had accepted.
            assert len(clients.lost) - len(lost) <= 1
        lost = list(clients.lost)
        report = service.restart("settled")
        assert (report["outcome"], report["predecessor_pid"]) == ("settled", newest)
        clients.wait_for(report["successor_pid"])
    assert (clients.refused, clients.lost) == ([], lost)
    end_by(service, "successor", "settled", "kill-self")


def test_a_predecessor_that_dies_while_its_successor_imports_costs_nothing(
    backend: str, run_service: Run, tmp_path: Path
) -> None:
    """Clients wait in the queues meanwhile, of each listener; nobody is refused."""
    path = str(tmp_path / "socket")
    listeners = [["listen_tcp", ["127.0.0.1", 0], {"name": name}] for name in ("web", "admin")]
    listeners.append(["listen_unix", [path], {}])
    service = run_service(backend, **SETTINGS, listeners=listeners)
    (first,) = service.pids
    # More than a pipe holds that nobody reads.
    service.configure(at_import="block(); print('imported ' * 30_000, file=sys.stderr)")
    with contextlib.ExitStack() as stack:
        with service.begin("restart", until="settled") as asking:
            second = service.wait_for("blocked")["pid"]
            service.signal(first, signal.SIGKILL)
            assert service.wait_for_death(first) == -signal.SIGKILL
            with pytest.raises(Lost):
                asking.answer()
        waiting = [stack.enter_context(Conversation(address)).say("hello") for address in service.addresses]
        service.configure(at_import="")
        service.release()
        assert [each.answer() for each in waiting] == [{"generation": 2, "pid": second}] * 3
    service.wait_for("successor", state="settled", pid=second)
    service.wait_until(lambda: service.log.count("imported ") == 30_000, "what it has written is lost")
    report = service.restart("settled")
    assert (report["outcome"], report["predecessor_pid"]) == ("settled", second)
    assert report["inherited"] == ["web", "admin", f"unix:{path}"]
    service.stop()


def test_where_a_stash_is_made_first_the_import_begins_with_nothing(backend: str, run_service: Run) -> None:
    service = run_service(backend, **SETTINGS, at_start='ecdysis.stash("state", lambda: b"state", "start")')
    end_by(service, "predecessor", "spawning", "kill-self")


LATE = "ecdysis.listen_tcp('127.0.0.1', 0, name='late').getsockname()[1]"


def test_a_listener_that_is_opened_while_the_successor_imports_goes_along(backend: str, run_service: Run) -> None:
    service = run_service(backend, **SETTINGS)
    service.configure(at_import="block()", at_start=f"tell('late', port={LATE})")
    with service.begin("hello") as control, service.begin("restart", until="settled") as asking:
        control.answer()
        service.wait_for("blocked")
        port = control.say("run", code=LATE).answer()
        service.configure(at_import="")
        service.release()
        assert asking.answer()["outcome"] == "settled"
    assert service.wait_for("late")["port"] == port
    service.stop()


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


def test_a_stopped_predecessor_stalls_the_restart(backend: str, run_service: Run) -> None:
    service = run_service(backend, **SETTINGS)
    turns = [service.pids[0]]
    for side, state, action, reached in STALLS:
        former = turns[-1]
        with armed(service, side, state, action) as asking:
            service.wait_for("fault", target=former)
            service.wait_until_stopped(former)
            service.wait_for("successor", state=reached)
            with Conversation(service.address, timeout=0.05) as impatient, pytest.raises(Lost, match="timed out"):
                impatient.say("hello").answer()
            with service.begin("hello") as patient:
                service.signal(former, signal.SIGCONT)
                assert patient.answer()["pid"] in service.pids
            report = asking.answer()
        assert report["outcome"] == "settled"
        turns.append(report["successor_pid"])
        service.wait_for("successor", state="settled", pid=turns[-1])
        assert service.ask()["pid"] == turns[-1]
        assert service.accepting_turns() == turns
        assert service.wait_for_death(former) == 0
    end_by(service, "successor", "settled", "kill-self")


# The one that does not move is not needed: the other one serves.
LATE_STALLS = [
    ("predecessor", "probation", "stop-self"),
    ("predecessor", "settled", "stop-self"),
    ("successor", "opening", "stop-peer"),
    ("successor", "probation", "stop-peer"),
    ("successor", "settled", "stop-peer"),
]


def test_a_predecessor_that_stops_after_the_commit_is_not_missed(backend: str, run_service: Run) -> None:
    service = run_service(backend, **SETTINGS)
    turns = [service.pids[0]]
    with Clients(service.address) as clients:
        for number, (side, state, action) in enumerate(LATE_STALLS, start=2):
            former = turns[-1]
            with armed(service, side, state, action) as asking:
                service.wait_for("fault", target=former)
                service.wait_until_stopped(former)
                turns.append(service.wait_for("ready", generation=number)["pid"])
                # Not by the clients: the former one may have stopped with the one connection they have open.
                assert service.ask()["pid"] == turns[-1]
                service.signal(former, signal.SIGCONT)
                assert asking.answer()["outcome"] == "settled"
            service.wait_for("successor", state="settled", pid=turns[-1])
            assert service.wait_for_death(former) == 0
            clients.wait_for(turns[-1])
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == turns
    end_by(service, "predecessor", "settled", "kill-peer")


# A successor that serves and does not move is no dead one: its clients wait for it, and nobody accepts in its place.
FROZEN_SUCCESSORS = [
    ("predecessor", "probation", "stop-peer"),
    ("predecessor", "settled", "stop-peer"),
    ("successor", "settled", "stop-self"),
]


def test_clients_wait_for_a_successor_that_stops(backend: str, run_service: Run) -> None:
    service = run_service(backend, **SETTINGS)
    turns = [service.pids[0]]
    with Clients(service.address) as clients:
        for number, (side, state, action) in enumerate(FROZEN_SUCCESSORS, start=2):
            with armed(service, side, state, action) as asking:
                turns.append(asking.answer()["successor_pid"])
            service.wait_for("fault", target=turns[-1])
            service.wait_until_stopped(turns[-1])
            assert service.wait_for_death(turns[-2]) == 0
            with service.begin("hello") as patient:
                service.signal(turns[-1], signal.SIGCONT)
                assert patient.answer() == {"generation": number, "pid": turns[-1]}
            service.wait_for("successor", state="settled", pid=turns[-1])
            clients.wait_for(turns[-1])
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == turns


@contextlib.contextmanager
def armed(service: Service, side: str, state: str, action: str) -> Iterator[Conversation]:
    """Ask for a restart in which that happens."""
    # A failure is the one of the last case that is printed.
    print(f"{side} {state} {action}")  # noqa: T201
    # It tells of its last state, and then looks whether something shall happen there: which is over when it answers.
    service.ask()
    service.forget_events()
    service.arm(side, state, action)
    with service.begin("restart", until="settled") as asking:
        yield asking


def end_by(service: Service, side: str, state: str, action: str) -> None:
    """Nobody has the sockets, or the only one who may accept is dead: that is the end, and nothing is left behind."""
    with armed(service, side, state, action) as asking:
        fault = service.wait_for("fault")
        with contextlib.suppress(Lost):
            asking.answer()
    service.wait_for_end()
    (other,) = {*service.pids[-2:]} - {fault["target"]}
    # A generation that has drained ends well; one that was left alone before it served has failed.
    assert service.statuses[other] == (0 if state == "settled" else 1)
