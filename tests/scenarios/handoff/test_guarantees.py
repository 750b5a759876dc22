"""The guarantees of the design, one by one, each on a real service under a client that never stops asking."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.scenarios.handoff.harness import Clients, Conversation, Lost, Service

Run = Callable[..., Service]

every_loop = pytest.mark.backends("asyncio", "uvloop", "anyio", "trio")


@every_loop
def test_nobody_is_refused_and_one_generation_accepts_at_a_time(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    with Clients(service.address) as clients:
        for generation in range(2, 7):
            report = service.restart()
            assert (report["outcome"], report["generation"]) == ("serving", generation)
            assert service.ask() == {"generation": generation, "pid": report["successor_pid"]}
            clients.wait_for(report["successor_pid"])
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == service.pids == list(dict.fromkeys(clients.answers))
    service.stop()


@every_loop
def test_what_was_accepted_is_answered_by_whom_it_reached(backend: str, run_service: Run) -> None:
    """Also where the first byte comes only after the restart is final."""
    service = run_service(backend)
    first = service.pids[0]
    with Conversation(service.address) as fresh, service.begin("hello") as idle, service.begin("hold") as busy:
        assert idle.answer()["pid"] == first
        service.wait_for("holding")
        service.restart("settled")
        for conversation in (fresh, idle, busy):
            assert conversation.say("hello").answer() == {"generation": 1, "pid": first}


@every_loop
def test_at_the_deadline_the_idle_say_goodbye_and_the_busy_are_cut(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"drain_timeout": 4})
    first = service.pids[0]
    with service.begin("hello") as idle, service.begin("hold") as busy, service.begin("hold") as finishing:
        idle.answer()
        for _ in range(2):
            service.wait_for("holding")
        service.restart("settled")
        assert finishing.say("go on").answer()["pid"] == first
        finishing.close()
        assert idle.answer() == "bye"
        assert idle.is_over()
        with pytest.raises(Lost):
            busy.answer()
    assert service.wait_for_death(first) == 0
    service.wait_for_log(f"(pid {first}) has drained")
    # Besides these three the drain met the connection that asked for the restart.
    drain = service.run("ecdysis.last_report.to_json()")["drain"]
    assert (drain["silent"], drain["cut"], drain["transferred"]) == (1, 1, 0)
    assert drain["drained"] in (1, 2)


@every_loop
def test_what_waits_in_the_queue_is_the_successors(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    service.arm("successor", "opening", "stop-self")
    with service.begin("restart", until="serving") as asking:
        second = service.wait_for("fault")["target"]
        service.wait_until_stopped(second)
        with service.begin("hello") as queued, Conversation(service.address) as silent:
            service.signal(second, signal.SIGCONT)
            assert queued.answer() == silent.say("hello").answer() == {"generation": 2, "pid": second}
        report = asking.answer()
    assert report["outcome"] == "serving"
    assert report["accept_gap"] > 0


@every_loop
def test_a_crash_during_probation_is_undone_and_counted(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"probation": 60})
    first = service.pids[0]
    for _ in range(2):
        second = service.restart()["successor_pid"]
        with service.begin("hold"), service.begin("hold"), service.begin("hold"):
            for _ in range(3):
                service.wait_for("holding", pid=second)
            service.signal(second, signal.SIGKILL)
            service.wait_for("predecessor", state="rolled back", pid=first)
        assert service.ask()["pid"] == first
        report = service.run("ecdysis.last_report.to_json()")
        assert (report["outcome"], report["lost"]) == ("rolled back", 3)
        assert "SIGKILL" in report["error"]
    # Each of the two successors accepted in its turn, and never together with the one before.
    assert service.accepting_turns() == [first, service.pids[1], first, service.pids[2], first]
    assert "rolled back" in service.log


@every_loop
def test_an_orderly_exit_during_probation_resurrects_nobody(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"probation": 60})
    first = service.pids[0]
    second = service.restart()["successor_pid"]
    service.run("ecdysis.stop()")
    service.wait_for("predecessor", state="stopped", pid=first)
    service.wait_for_end()
    assert service.statuses[first] == 0
    assert service.accepting_turns() == [first, second]


@pytest.mark.backends("asyncio", "trio")
def test_a_closed_channel_is_no_death(backend: str, run_service: Run) -> None:
    """Neither side promotes itself over a living peer; here the successor was not ready, and leaves."""
    service = run_service(backend)
    first = service.pids[0]
    service.configure(at_start="await wait()")
    with Clients(service.address) as clients, service.begin("restart", until="serving") as asking:
        second = service.wait_for("waiting")["pid"]
        service.run("ecdysis._life.handover._successor.peer.channel.close()")
        failure = asking.answer()
        assert (failure["error"], failure["phase"], failure["cause"]) == (
            "SuccessorFailed", "initialise", "ChannelClosed",
        )  # fmt: skip
        service.wait_for_death(second)
        clients.wait_for(first)
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == [first]


@every_loop
def test_there_is_one_restart_at_a_time(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"probation": 60})
    service.configure(at_start="await wait()")
    with service.begin("restart", until="serving") as asking:
        service.wait_for("waiting")
        assert service.fail_to_restart()["error"] == "RestartInProgress"
        service.release()
        assert asking.answer()["outcome"] == "serving"


@every_loop
def test_it_tells(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    first = service.pids[0]
    report = service.restart("settled")
    second = report["successor_pid"]
    assert list(report["phases"]) == ["start", "initialise", "pause", "commit", "probation"]
    assert all(seconds > 0 for seconds in report["phases"].values())
    # uvloop counts in whole milliseconds, and its clock stands still within a turn.
    assert report["phases"]["probation"] >= 0.19
    assert 0 < report["accept_gap"] < 5
    assert report | {"outcome": "settled", "generation": 2, "predecessor_pid": first, "error": None} == report
    assert (report["inherited"], report["created"], report["unclaimed"]) == (["tcp:127.0.0.1:0"], [], [])
    assert report["id"] in service.log
    # The new generation knows what it came from, and how the old one's drain ended.
    service.wait_for_death(first)
    service.wait_for_log(f"(pid {first}) has drained")
    known = service.run("ecdysis.last_report.to_json()")
    assert known["id"] == report["id"]
    assert known["phases"]["drain"] > 0
    assert service.run("[ecdysis.generation, ecdysis.is_successor, ecdysis.predecessor_pid]") == [2, True, first]
    assert service.run("ecdysis_async.current() is ecdysis")
    assert service.run("ecdysis.state.value") == "serving"
    assert second == service.newest()
