"""An anchor and its workers: one pid for ever, workers that are replaced, and a service that does not notice."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from ecdysis_async.cli import client
from ecdysis_async.cli.output import Exit
from tests.scenarios.anchor.harness import AnchoredService, Watchdog
from tests.scenarios.handoff.harness import PATIENCE_SECONDS, Clients, Conversation
from tests.scenarios.handoff.test_hardships import LEAK

pytestmark = pytest.mark.main_python_only

Run = Callable[..., AnchoredService]

# What a release does that fails in one slot only: the one that comes second, once it is told to.
FAILS_IN_THE_SECOND = """
if ecdysis.generation == 2:
    try:
        os.mkdir("first")
    except FileExistsError:
        await wait()
        raise RuntimeError("a broken release")
"""

# No descriptor can be had any more, whatever is closed; and then again.
NO_ROOM = """
import resource
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
"""
ROOM = "resource.setrlimit(resource.RLIMIT_NOFILE, limits)"


@pytest.mark.timeout(600)  # some fifty interpreters start, one after the other
def test_ten_roll_outs_under_load_with_a_kill_and_an_upgrade_in_between(run_anchor: Run) -> None:
    """They lose nothing, and leave nothing behind; and the anchor stays small."""
    service = run_anchor(workers=4, handoffs={"probation": 0})
    anchor = service.anchor
    assert service.pid_file.read_text() == f"{anchor}\n"
    descriptors = 0
    with Clients(service.address) as clients:
        before = service.workers()
        for number in range(2, 12):
            if number == 4:
                # The worker that is asked for its successor first, in the middle of it.
                service.arm("predecessor", "pausing", "kill-self")
            if number == 7:
                client.upgrade(service.control, lambda event: None)
            report = service.roll_out("drained" if number % 2 else "settled")
            after = service.workers()
            assert (report["outcome"], report["generation"]) == ("settled", number)
            assert len(after) == len(report["workers"]) == 4
            assert not set(after.values()) & set(before.values())
            if number != 4:
                assert {each["outcome"] for each in report["workers"]} == {"settled"}
                assert {each["successor_pid"] for each in report["workers"]} == set(after.values())
                assert report["drain"]["cut"] == 0
            before = after
            if number == 3:
                service.wait_until(lambda: len(service.status()["workers"]) == 4, "the old ones do not leave")
                descriptors = service.descriptors()
        for pid in before.values():
            clients.wait_for(pid)
    assert clients.refused == []
    # The killed one may have had a connection.
    assert len(clients.lost) <= 1
    service.configure(at_start="os._exit(1)")
    service.fail_to_roll_out()
    service.wait_until(lambda: len(service.status()["workers"]) == 4, "the old ones do not leave")
    found = service.status()
    assert (found["generation"], found["anchor"]["upgrades"], found["pid"]) == (11, 1, anchor)
    assert {each["generation"] for each in found["workers"]} == {11}
    # The connection of the last command may not be closed on the anchor's side yet.
    service.wait_until(lambda: service.descriptors() <= descriptors, "descriptors are left")
    assert {child.pid for child in psutil.Process(anchor).children()} == set(before.values())
    assert service.proportional_bytes() < 25_000_000


def test_a_release_that_fails_in_one_slot_is_taken_back_in_all(run_anchor: Run) -> None:
    service = run_anchor(at_start=FAILS_IN_THE_SECOND)
    service.expected_blemishes = ("Traceback (most",)
    before = service.workers()
    with Clients(service.address) as clients, ThreadPoolExecutor() as executor:
        failing = executor.submit(service.fail_to_roll_out)
        service.wait_for("waiting")
        # The worker of the new release that serves already is in the middle of a request.
        (new,) = set(service.workers().values()) - set(before.values())
        clients.wait_for(new)
        with service.hold(new) as busy:
            with pytest.raises(client.CommandFailed, match="workers are being started or replaced"):
                client.upgrade(service.control, lambda event: None)
            service.release()
            failure = failing.result()
            assert failure.code is Exit.ROLLED_BACK
            assert "a broken release" in str(failure)
            assert service.workers() == before
            assert service.workers("draining") == {0: new}
            for pid in before.values():
                clients.wait_for(pid)
            assert busy.say("go on").answer()["pid"] == new
    service.wait_for_death(new)
    assert (clients.refused, clients.lost) == ([], [])
    assert service.status()["generation"] == 1
    assert service.status()["last_report"]["lost"] == 0
    # And another time, with a release that is sound.
    service.configure(at_start="")
    assert service.roll_out()["generation"] == 2


def test_a_restart_ends_the_probation_of_the_one_before(run_anchor: Run) -> None:
    service = run_anchor(workers=2, handoffs={"probation": 3600})
    with Clients(service.address) as clients:
        assert service.roll_out("serving")["generation"] == 2
        assert service.status()["restart"]["generation"] == 2
        assert service.roll_out("serving")["generation"] == 3
        assert service.status()["generation"] == 2
        service.signal(service.anchor, signal.SIGHUP)
        service.wait_until(lambda: service.status()["generation"] == 3, "the signal is not followed")
        service.wait_until(lambda: service.status()["last_report"]["outcome"] == "serving", "the roll-out stands still")
        # A worker that is on probation itself asks for the next.
        assert service.ask("restart", until="serving")["generation"] == 5
        assert service.status()["generation"] == 4
        clients.wait_for(service.wait_for_workers(lambda found: len(found) == 2)[0])
    assert (clients.refused, clients.lost) == ([], [])


def test_a_restart_waits_for_a_worker_that_stands_still_on_probation_and_says_so(run_anchor: Run) -> None:
    service = run_anchor(workers=1, handoffs={"probation": 3600})
    (old,) = service.workers().values()
    assert service.roll_out("serving")["generation"] == 2
    service.signal(old, signal.SIGSTOP)
    service.wait_until_stopped(old)
    waits: queue.Queue[str] = queue.Queue()
    with ThreadPoolExecutor(1) as executor:
        restart = executor.submit(
            client.restart, service.control, "serving", lambda event: waits.put(str(event.get("waiting_for")))
        )
        while "to settle, whose probation this one has ended" not in (wait := waits.get(timeout=PATIENCE_SECONDS)):
            assert wait == "None", wait  # the first word says that it is accepted
        with pytest.raises(client.CommandFailed, match="is in progress"):
            service.roll_out()
        service.signal(old, signal.SIGCONT)
        assert restart.result(PATIENCE_SECONDS)["report"]["generation"] == 3
    assert service.status()["generation"] == 2


# A defect that shows with the second worker of a roll-out, while a file says so.
DEFECT = """
import os
from ecdysis_async._anchor import rollout

def begin_replacing(sockets, slot, *arguments):
    if slot.index == 1 and os.path.exists("defect"):
        raise TypeError("a defect")
    begin(sockets, slot, *arguments)

begin, rollout.begin_replacing = rollout.begin_replacing, begin_replacing
"""


def test_a_release_that_does_not_start_changes_nothing_and_a_defect_of_the_anchor_neither(run_anchor: Run) -> None:
    service = run_anchor(workers=2, at_anchor=DEFECT)
    service.expected_blemishes = ("Traceback (most",)
    before = service.workers()
    service.configure(at_start='raise RuntimeError("a broken release")')
    with Clients(service.address) as clients:
        failure = service.fail_to_roll_out()
        clients.wait_for(before[0])
    assert failure.code is Exit.FAILED
    assert failure.event is not None
    assert failure.event["error"] == "SuccessorFailed"
    assert service.workers() == before
    # A defect of the anchor's own, in the middle of a roll-out, is undone as well.
    service.configure(at_start="")
    (service.directory / "defect").touch()
    with Clients(service.address) as more:
        failure = service.fail_to_roll_out()
        more.wait_for(before[0])
    assert failure.code is Exit.ROLLED_BACK
    assert "a defect" in str(failure)
    assert service.workers() == before
    (service.directory / "defect").unlink()
    assert service.roll_out()["outcome"] == "settled"
    for each in (clients, more):
        assert (each.refused, each.lost) == ([], [])


def test_a_request_handler_restarts_the_service_and_is_answered(run_anchor: Run) -> None:
    service = run_anchor(workers=1)
    report = service.ask("restart", until="serving")
    assert (report["outcome"], len(report["workers"])) == ("serving", 1)
    service.wait_until(lambda: service.status()["restart"] is None, "it does not settle")
    service.expected_blemishes = ("Traceback (most",)
    service.configure(at_start='raise RuntimeError("a broken release")')
    failure = service.ask("restart", until="settled")
    assert (failure["error"], failure["phase"]) == ("SuccessorFailed", "initialise")
    assert "a broken release" in failure["text"]


# A request handler that waits for a restart until it is told not to.
CALLED_OFF = """
async with anyio.create_task_group() as group:
    group.start_soon(ecdysis.restart, "settled")
    while not os.path.exists("called off"):
        await anyio.sleep(0.01)
    group.cancel_scope.cancel()
group.cancel_scope.cancelled_caught
"""


def test_a_restart_that_a_request_handler_calls_off(run_anchor: Run) -> None:
    service = run_anchor(workers=2)
    before = service.workers()
    service.configure(at_start="await wait()")
    with service.begin("run", code=CALLED_OFF) as asking:
        service.wait_for("waiting")
        (service.directory / "called off").touch()
        assert asking.answer() is True
    service.wait_until(lambda: service.status()["restart"] is None, "it goes on")
    assert service.status()["last_report"]["outcome"] == "failed"
    assert service.workers() == before
    service.configure(at_start="")
    assert service.roll_out()["outcome"] == "settled"


def test_a_first_start_that_fails(run_anchor: Run) -> None:
    service = run_anchor(serves=False, at_start='raise RuntimeError("a broken release")')
    service.expected_blemishes = ("Traceback (most",)
    service.wait_for_death(service.anchor)
    assert service.statuses[service.anchor] == 3
    assert "RuntimeError: a broken release" in service.log.partition("the service does not start")[2]


def test_a_worker_that_is_killed_is_replaced(run_anchor: Run) -> None:
    service = run_anchor(workers=2)
    before = service.workers()
    with Clients(service.address) as clients:
        service.signal(before[1], signal.SIGKILL)
        after = service.wait_for_workers(lambda found: len(found) == 2 and found[1] != before[1])
        clients.wait_for(after[1])
    assert after[0] == before[0]
    assert clients.refused == []
    # At most the one connection that the dead worker had accepted.
    assert len(clients.lost) <= 1


def test_a_worker_that_crashes_at_every_start_is_retried_ever_more_slowly(run_anchor: Run) -> None:
    planted = "from ecdysis_async._anchor import pool; pool.HEALTHY_SECONDS = 600"
    service = run_anchor(workers=2, at_anchor=planted)
    service.expected_blemishes = ("Traceback (most",)
    before = service.workers()
    service.configure(at_start='tell("crashed"); raise RuntimeError("it crashes")')
    with Clients(service.address) as clients:
        begun = time.monotonic()
        service.signal(before[0], signal.SIGKILL)
        for _ in range(3):
            service.wait_for("crashed")
        # 0.25 s after the kill, for it had not served for long; then 0.5 s, then 1 s.
        assert time.monotonic() - begun > 1.75
        clients.wait_for(before[1])
        service.configure(at_start="")
        service.wait_for_workers(lambda found: len(found) == 2)
    assert clients.refused == []
    assert len(clients.lost) <= 1


@pytest.mark.parametrize("state", ["initialising", "pausing", "probation"])
def test_the_old_worker_is_killed_in_the_middle_of_a_roll_out(state: str, run_anchor: Run) -> None:
    service = run_anchor(workers=1)
    service.arm("predecessor", state, "kill-self")
    before = service.workers()
    with Clients(service.address) as clients:
        report = service.roll_out()
        for pid in service.workers().values():
            clients.wait_for(pid)
    assert report["outcome"] == "settled"
    assert not set(service.workers().values()) & set(before.values())
    assert clients.refused == []
    assert len(clients.lost) <= 1


def test_a_hung_worker_is_replaced_and_a_stopped_one_too(run_anchor: Run, watchdog: Watchdog) -> None:
    """Even where all of them hang at a time, systemd has no reason to start the service anew."""
    service = run_anchor(workers=2, plan={"hang_timeout": 4})
    before = service.workers()
    for pid in before.values():
        service.signal(pid, signal.SIGSTOP)
        service.wait_until_stopped(pid)
    count = watchdog.count
    service.wait_for_log("its loop has not turned")
    # Some ten times, where nothing else runs on this machine.
    assert watchdog.count - count > 1
    after = service.wait_for_workers(lambda found: len(found) == 2 and not set(found.values()) & set(before.values()))
    with Conversation(service.address) as conversation:
        hung = conversation.say("hello").answer()["pid"]
        conversation.say("run", code="block()")
        found = service.wait_for_workers(lambda found: len(found) == 2 and hung not in found.values())
    assert len(set(found.values()) & set(after.values())) == 1


def test_a_slow_request_is_no_hang(run_anchor: Run) -> None:
    service = run_anchor(workers=1, plan={"hang_timeout": 4})
    before = service.workers()
    # Longer than the limit: a busy thread, and a request that waits.
    service.run("import time; await anyio.to_thread.run_sync(time.sleep, 5)")
    service.run("await anyio.sleep(1)")
    assert service.workers() == before


def test_a_worker_is_recycled_after_so_many_requests(run_anchor: Run) -> None:
    service = run_anchor(workers=2, plan={"max_requests": 60, "max_requests_jitter": 20})
    before = service.workers()
    with Clients(service.address) as clients:
        service.wait_for_workers(lambda found: len(found) == 2 and not set(found.values()) & set(before.values()))
    assert (clients.refused, clients.lost) == ([], [])
    assert service.status()["generation"] == 1


def test_a_worker_that_grows_is_recycled(run_anchor: Run) -> None:
    service = run_anchor(workers=1, plan={"max_rss": 150_000_000})
    (before,) = service.workers().values()
    service.run("global ballast; ballast = bytearray(os.urandom(1)) * 160_000_000; None")
    service.wait_for_workers(lambda found: len(found) == 1 and before not in found.values())


def test_more_and_fewer_workers(run_anchor: Run) -> None:
    service = run_anchor(workers=1)
    with Clients(service.address) as clients:
        service.signal(service.anchor, signal.SIGTTIN)
        service.wait_for_workers(lambda found: len(found) == 2)
        for _ in range(3):
            service.signal(service.anchor, signal.SIGTTOU)
        service.wait_for_workers(lambda found: len(found) == 1)
        service.wait_until(lambda: len(service.status()["workers"]) == 1, "it does not leave")
    assert (clients.refused, clients.lost) == ([], [])


def test_a_control_socket_that_somebody_removes_is_made_anew(run_anchor: Run) -> None:
    service = run_anchor(workers=1)
    directory = Path(service.control).parent
    shutil.rmtree(directory)
    service.wait_for_log("was removed: the directory of the control socket")
    directory.mkdir(mode=0o700)
    service.wait_for_log("is there again")
    assert service.status()["state"] == "serving"
    # And another time, the path alone.
    os.unlink(service.control)
    service.wait_until(lambda: service.log.count("is there again") == 2, "it is not made anew")
    assert service.roll_out()["generation"] == 2
    assert {each.name for each in directory.iterdir()} == {"control", "control.lock", "control.history"}


def test_workers_are_replaced_where_the_working_directory_was_deleted(run_anchor: Run, tmp_path: Path) -> None:
    """The command of the workers is found from anywhere; of one that is not, `ecdysis restart` names the directory."""
    gone = tmp_path / "gone"
    service = run_anchor(workers=1, before=("/bin/sh", "-c", f'mkdir "{gone}" && cd "{gone}" && exec "$@"', "sh"))
    gone.rmdir()
    assert service.roll_out()["generation"] == 2
    (worker,) = service.workers().values()
    service.signal(worker, signal.SIGKILL)
    service.wait_for_workers(lambda found: len(found) == 1 and worker not in found.values())


def test_workers_open_a_socket_between_them(run_anchor: Run) -> None:
    service = run_anchor(workers=2, opens=False)
    listeners = service.status()["listeners"]
    assert [each["kind"] for each in listeners] == ["tcp"]
    # One that a new release adds, one that it drops, and one that it closes again itself.
    service.configure(
        listeners=[["listen_tcp", ["127.0.0.1", 0], {"name": "another"}]],
        at_start="ecdysis.listen_tcp('127.0.0.1', 0, name='closed').close()",
    )
    with Clients(service.address):
        report = service.roll_out()
    assert report["created"] == ["another"]
    assert [each["name"] for each in service.status()["listeners"]] == ["another"]
    service.addresses = service.wait_for("ready", generation=2)["addresses"]
    assert service.ask()["generation"] == 2
    # Where there is no room for it, the roll-out fails, and nobody leaves.
    before = service.workers()
    with contextlib.ExitStack() as stack:
        controls = [stack.enter_context(service.talk_to(pid)) for pid in before.values()]
        for control in controls:
            control.say("run", code=NO_ROOM).answer()
        failure = service.fail_to_roll_out()
        assert failure.code is Exit.FAILED
        assert "too many open files" in str(failure)
        for control in controls:
            control.say("run", code=ROOM).answer()
    assert service.workers() == before
    assert service.roll_out()["generation"] == 3


def test_an_anchor_without_room_for_descriptors_fails_the_roll_out_alone(run_anchor: Run) -> None:
    service = run_anchor(workers=1)
    before = service.workers()
    anchor = psutil.Process(service.anchor)
    _, hard = anchor.rlimit(psutil.RLIMIT_NOFILE)
    # What the worker sends has no room there; its control socket could not even be asked.
    anchor.rlimit(psutil.RLIMIT_NOFILE, (3, hard))
    failure = service.ask("restart", until="settled")
    assert "too many open files" in failure["text"]
    anchor.rlimit(psutil.RLIMIT_NOFILE, (hard, hard))
    assert service.workers() == before
    assert service.roll_out()["generation"] == 2


def test_a_worker_whose_line_is_broken_leaves(run_anchor: Run) -> None:
    service = run_anchor(workers=1)
    before = service.workers()[0]
    with service.begin("hold") as busy:
        service.wait_for("holding")
        service.run("os.write(ecdysis._life.management._link.fileno(), b'no frame at all')")
        after = service.wait_for_workers(lambda found: found.keys() == {0} and found[0] != before)
        # And an upgrade of the anchor waits until it has.
        begun = threading.Event()
        with ThreadPoolExecutor(1) as executor:
            upgrade = executor.submit(client.upgrade, service.control, lambda event: begun.set())
            assert begun.wait(PATIENCE_SECONDS)
            assert busy.say("go on").answer()["pid"] == before
            assert upgrade.result(PATIENCE_SECONDS)["anchor"]["upgrades"] == 1
    service.wait_for_death(before)
    assert service.workers() == after


def test_signals_to_the_whole_group_stop_it_once_and_force_it_at_the_second_time(run_anchor: Run) -> None:
    service = run_anchor(workers=2, handoffs={"drain_timeout": 600}, ecdysis={"drain_timeout": 600})
    with service.begin("hold") as busy:
        service.wait_for("holding")
        for _ in range(2):
            for pid in (service.anchor, *service.workers().values()):
                service.signal(pid, signal.SIGINT)
            service.wait_for_log("stopping")
        with pytest.raises(Exception, match="the answer ends"):
            busy.answer()
    service.wait_for_end()
    assert service.statuses[service.anchor] == 0


def test_the_workers_leave_when_the_anchor_is_killed(run_anchor: Run) -> None:
    service = run_anchor(workers=2)
    workers = service.workers()
    with service.begin("hold") as busy:
        service.wait_for("holding")
        service.signal(service.anchor, signal.SIGKILL)
        service.wait_for_log("the anchor of this worker is gone")
        # They have answered before.
        assert busy.say("go on").answer()["pid"] in workers.values()
    for pid in workers.values():
        service.wait_for_death(pid)
    service.pid_file.unlink()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_worker_without_a_descriptor_left_is_replaced(run_anchor: Run, loop: str) -> None:
    service = run_anchor(workers=1, loop=loop)
    before = service.workers()
    with service.begin("run", code=LEAK) as conversation:
        assert conversation.answer() is None
        assert service.roll_out()["unanswered"] == []
        assert conversation.say("hello").answer()["pid"] == before[0]
    assert service.roll_out("drained")["outcome"] == "settled"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("hangs", [False, True])
def test_the_next_start_has_the_port_while_workers_of_a_dead_anchor_drain(
    run_anchor: Run, loop: str, *, hangs: bool
) -> None:
    """The workers still answer, one of them may hang, and none of them keeps the port."""
    service = run_anchor(workers=2, loop=loop)
    workers = service.workers()
    with service.talk_to(workers[0]) as hung, service.hold(workers[1]) as busy:
        if hangs:
            hung.say("run", code="block()")
            service.wait_for("blocked", pid=workers[0])
        service.signal(service.anchor, signal.SIGKILL)
        with bind_soon(service.address) as newcomer:
            with Conversation(service.address):
                newcomer.accept()[0].close()
            assert service.is_alive(workers[1])
            assert busy.say("go on").answer()["pid"] == workers[1]
        if hangs:
            service.release()
    for pid in workers.values():
        service.wait_for_death(pid)
    service.pid_file.unlink()


def test_a_lone_worker_that_hangs_keeps_no_port_from_the_next_start(run_anchor: Run) -> None:
    """Its exit deadline ends it in the end, though it never learns that its anchor is dead."""
    ecdysis = {"drain_timeout": 0.5, "exit_timeout": 0.5}
    service = run_anchor(workers=1, ecdysis=ecdysis)
    service.expected_blemishes = ("is ended by force",)
    (worker,) = service.workers().values()
    with Conversation(service.address) as hung:
        hung.say("run", code="block()")
        service.wait_for("blocked", pid=worker)
        service.signal(service.anchor, signal.SIGKILL)
        with bind_soon(service.address):
            service.wait_for_death(worker)
    service.wait_for_log("thread MainThread at")
    service.pid_file.unlink()


def bind_soon(address: tuple[str, int]) -> socket.socket:
    """Listen where a service was whose anchor is dead, as soon as that is possible."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return socket.create_server(tuple(address))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def test_the_anchor_is_upgraded_in_place(run_anchor: Run) -> None:
    service = run_anchor(workers=2)
    with Clients(service.address) as clients:
        before = service.workers()
        found = client.upgrade(service.control, lambda event: None)
        assert (found["pid"], found["anchor"]["upgrades"]) == (service.anchor, 1)
        # The same workers, and all that is done with them goes on.
        assert service.workers() == before
        for pid in before.values():
            clients.wait_for(pid)
        assert service.roll_out("drained")["generation"] == 2
        after = service.workers()
        assert not set(after.values()) & set(before.values())
        assert client.upgrade(service.control, lambda event: None)["generation"] == 2
        service.signal(service.anchor, signal.SIGTTIN)
        service.wait_for_workers(lambda found: len(found) == 3)
    assert (clients.refused, clients.lost) == ([], [])
    # Nothing is inherited that was not meant to be: a killed worker is seen.
    service.signal(after[0], signal.SIGKILL)
    service.wait_for_workers(lambda found: len(found) == 3 and found[0] != after[0])


def test_an_upgrade_that_fails_changes_nothing(run_anchor: Run) -> None:
    service = run_anchor(workers=1)
    before = service.workers()
    plan = service._settings["plan"]
    service.configure(plan={**plan, "no_such_thing": 1})
    with pytest.raises(client.CommandFailed, match="no_such_thing") as failure:
        client.upgrade(service.control, lambda event: None)
    assert failure.value.code is Exit.FAILED
    service.configure(plan=plan)
    assert service.workers() == before
    assert service.roll_out()["generation"] == 2


# After the check, and before the new code opens anything, the control socket's directory becomes unsafe.
SPOILS_THE_DIRECTORY = """
import os
if "ECDYSIS_ANCHOR" in os.environ:
    os.chmod(os.path.dirname(SETTINGS["control"]), 0o770)
"""


def test_what_cannot_be_opened_after_the_check_is_missing_and_heals(run_anchor: Run) -> None:
    service = run_anchor(workers=1, at_anchor=SPOILS_THE_DIRECTORY)
    with ThreadPoolExecutor() as executor, Clients(service.address) as clients:
        (worker,) = service.workers().values()
        upgrade = executor.submit(client.upgrade, service.control, lambda event: None)
        service.wait_until(lambda: "goes on without the control socket" in service.log, "it misses nothing")
        clients.wait_for(worker)
        os.chmod(os.path.dirname(service.control), 0o700)
        # The verdict is told by the new code, as soon as it can be asked.
        found = upgrade.result(PATIENCE_SECONDS)
        service.wait_until(lambda: "is there again" in service.log, "it does not heal")
    assert (found["pid"], found["anchor"]["upgrades"]) == (service.anchor, 1)
    assert service.status()["anchor"]["missing"] == {}
    assert service.roll_out()["generation"] == 2
    assert (clients.refused, clients.lost) == ([], [])


# The new code is executed only when a worker has said something that is not heard yet.
WAITS_FOR_A_WORD = """
import os, time
from ecdysis_async._anchor.upgrade import Upgrade

def is_at_rest(self):
    open("executing", "w").close()
    while not os.path.exists("said"):
        time.sleep(0.01)
    return look(self)

look, Upgrade._is_at_rest = Upgrade._is_at_rest, is_at_rest
"""


def test_a_stop_in_the_moment_of_an_upgrade_is_not_lost(run_anchor: Run) -> None:
    service = run_anchor(workers=1, at_anchor=WAITS_FOR_A_WORD)
    with ThreadPoolExecutor() as executor, service.begin("hold") as busy:
        service.wait_for("holding")
        failing = executor.submit(client.upgrade, service.control, lambda event: None)
        service.wait_until((service.directory / "executing").exists, "it is not upgraded")
        service.run("ecdysis.stop(); await ecdysis._life.management.finish(); open('said', 'w').close()")
        with pytest.raises(client.CommandFailed, match="the service is being stopped"):
            failing.result()
        busy.say("go on").answer()
    service.wait_for_end()
    assert service.statuses[service.anchor] == 0


def test_who_queues_at_a_stop_is_answered(run_anchor: Run) -> None:
    """By one of the workers, which have a single queue; and whoever comes later is refused, and not reset."""
    service = run_anchor(workers=2)
    pids = set(service.workers().values())
    for pid in pids:
        service.signal(pid, signal.SIGSTOP)
        service.wait_until_stopped(pid)
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(service.begin("hello")) for _ in range(6)]
        service.signal(service.anchor, signal.SIGTERM)
        service.wait_for_log("stopping")
        for pid in pids:
            service.signal(pid, signal.SIGCONT)
        for conversation in waiting:
            assert conversation.answer()["pid"] in pids
            conversation.close()
    service.wait_for_end()
    assert service.statuses[service.anchor] == 0


def test_who_queues_at_a_stop_on_what_a_new_release_has_opened_is_answered(run_anchor: Run) -> None:
    """Although its roll-out is not final, and never will be."""
    service = run_anchor(workers=1, handoffs={"probation": 3600})
    another = ["listen_tcp", ["127.0.0.1", 0], {"name": "another"}]
    service.configure(listeners=[["listen_tcp", ["127.0.0.1", 0], {}], another])
    service.roll_out("serving")
    address = service.wait_for("ready", generation=2)["addresses"][1]
    (new,) = service.workers().values()
    service.signal(new, signal.SIGSTOP)
    service.wait_until_stopped(new)
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(Conversation(address).say("hello")) for _ in range(3)]
        service.signal(service.anchor, signal.SIGTERM)
        service.wait_until(lambda: service.status()["last_report"]["outcome"] == "stopped", "it goes on")
        assert "another" in [each["name"] for each in service.status()["listeners"]]
        service.signal(new, signal.SIGCONT)
        for conversation in waiting:
            assert conversation.answer()["pid"] == new
            conversation.close()
    service.wait_for_end()
    assert service.statuses[service.anchor] == 0
