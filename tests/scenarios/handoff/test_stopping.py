"""Stops: in each phase of a restart, by signal, to one process or to all; and how a generation leaves its block."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import PROJECT, Clients, Conversation, Lost, Service

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]

every_loop = pytest.mark.backends("asyncio", "uvloop", "anyio", "trio")

# The next opening of a generation's sockets waits for the test.
SLOW_OPENING = """
async def slow_open():
    ecdysis._gate.open = open_now
    await wait()
    await open_now()

open_now = ecdysis._gate.open
ecdysis._gate.open = slow_open
"""

SLOW_PAUSE = """
async def slow_pause(**options):
    ecdysis._gate.pause = pause_now
    await wait()
    await pause_now(**options)

pause_now = ecdysis._gate.pause
ecdysis._gate.pause = slow_pause
"""


@every_loop
def test_a_clean_stop(backend: str, run_service: Run) -> None:
    """Busy ones finish, idle ones say goodbye at the deadline, and the status is 0."""
    service = run_service(backend, ecdysis={"drain_timeout": 5})
    first = service.pids[0]
    with service.begin("hold") as busy, service.begin("hello") as idle:
        idle.answer()
        service.wait_for("holding")
        service.signal(first, signal.SIGTERM)
        service.wait_for("finished")
        assert busy.say("go on").answer()["pid"] == first
        assert (idle.answer(), busy.answer()) == ("bye", "bye")
    service.wait_for_end()
    assert service.statuses == {first: 0}


@every_loop
def test_a_second_signal_makes_the_deadline_now(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"drain_timeout": 600})
    first = service.pids[0]
    with service.begin("hold") as busy, service.begin("hello") as idle:
        idle.answer()
        service.wait_for("holding")
        service.signal(first, signal.SIGINT)
        service.wait_for("finished")
        service.signal(first, signal.SIGINT)
        assert idle.answer() == "bye"
        with pytest.raises(Lost):
            busy.answer()
    service.wait_for_end()
    assert service.statuses == {first: 0}


@every_loop
def test_a_stop_waits_for_older_generations_and_a_second_signal_hurries_them(backend: str, run_service: Run) -> None:
    """Nobody of a service that has stopped lives."""
    service = run_service(backend, ecdysis={"drain_timeout": 600})
    first, held = service.pids[0], []
    with contextlib.ExitStack() as stack:
        for generation in (1, 2):
            held.append(stack.enter_context(service.begin("hold")))
            service.wait_for("holding", generation=generation)
            service.restart("settled")
        newest = service.newest()
        service.signal(newest, signal.SIGTERM)
        service.wait_for_log("waiting for older generations to end: generation 1")
        assert held[0].say("go on").answer()["pid"] == first
        held[0].close()
        assert service.wait_for_death(first) == 0
        assert service.is_alive(newest)
        service.signal(newest, signal.SIGTERM)
        with pytest.raises(Lost):
            held[1].answer()
    service.wait_for_end()
    assert "the service is to stop at once: the deadline of this one is now; open connections: 1" in service.log
    assert set(service.statuses.values()) <= {0, None}


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_signal_that_comes_while_the_application_has_stopped_its_service_ends_the_process(
    loop: str, run_service: Run
) -> None:
    service = run_service(loop, ecdysis={"drain_timeout": 60, "exit_timeout": 0.5})
    (only,) = service.pids
    service.run("import threading, time; threading.Thread(target=time.sleep, args=(600,), name='poller').start()")
    with service.begin("hold") as busy:
        service.wait_for("holding")
        # The program may have more to do, and so nothing would end the process by force.
        service.run("ecdysis.stop()")
        service.wait_for("finished")
        service.signal(only, signal.SIGTERM)
        service.wait_until(lambda: service.log.count("stopping") == 2, "it does not hear of the signal")
        assert busy.say("go on").answer()["pid"] == only
    assert service.wait_for_death(only) == 0
    assert "thread poller" in service.log


LAST_WORDS = "the database is left as it was"

PHASES = {
    "spawning": {"at_import": "block()"},
    "initialising": {
        "at_start": f"try:\n    await wait()\nfinally:\n    print({LAST_WORDS!r}, file=sys.stderr, flush=True)"
    },
    "pausing": {},
    "committing": {"at_start": SLOW_OPENING},
    "probation": {},
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("whom", ["predecessor", "successor", "group"])
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_stop_during_a_restart(loop: str, phase: str, whom: str, run_service: Run) -> None:
    """Whoever is told stops the service, except a successor that does not serve yet: that only fails the restart."""
    if loop == ("asyncio" if whom == "predecessor" else "trio") and phase in ("spawning", "probation"):
        pytest.skip("the loops take turns: what is tested is the protocol, which they share")
    service = run_service(loop, ecdysis={"probation": 60}, at_start=SLOW_PAUSE if phase == "pausing" else "")
    first = service.pids[0]
    service.configure(**{"at_start": "", **PHASES[phase]})  # type: ignore[arg-type]
    with service.begin("restart", until="settled") as asking:
        blocked = {"spawning": "blocked", "probation": "ready"}.get(phase, "waiting")
        service.wait_for(blocked, **({"generation": 2} if phase == "probation" else {}))
        second = service.newest()
        if phase == "probation":
            service.wait_for("predecessor", state="probation")
        if whom == "group":
            os.killpg(first, signal.SIGTERM)
        else:
            service.signal(first if whom == "predecessor" else second, signal.SIGTERM)
        is_failure = whom == "successor" and phase in ("spawning", "initialising", "pausing")
        if phase == "committing":
            service.release()
        elif phase == "pausing":
            if whom != "predecessor":
                service.wait_for_death(second)
            service.release()
        answer = asking.answer()
    if is_failure:
        assert answer["error"] == "SuccessorFailed"
        assert service.ask()["pid"] == first
        service.configure(at_start="", at_import="")
        assert service.restart()["generation"] == 2
        return
    # Of a signal to all, the successor may be the first one to be heard of.
    assert answer["error"] in (
        {"RestartWhileDraining", "SuccessorFailed"} if whom == "group" else {"RestartWhileDraining"}
    )
    service.wait_for_end()
    assert service.statuses[first] == 0
    if phase == "initialising":
        assert LAST_WORDS in service.log


@every_loop
def test_a_stop_while_the_first_generation_starts_does_not_wait_for_that(
    backend: str, run_service: Run, tmp_path: Path
) -> None:
    start = "try:\n    await wait()\nfinally:\n    tell('cleaned up')"
    path = tmp_path / "socket"
    service = run_service(backend, serves=False, at_start=start, listeners=[["listen_unix", [str(path)], {}]])
    service.wait_for("waiting")
    service.signal(service.pids[0], signal.SIGTERM)
    assert service.wait_for_death(service.pids[0]) == 0
    # Nothing but the start-up is cut short, and nothing is left behind.
    for event in ("cleaned up", "left"):
        service.wait_for(event)
    assert not path.exists()
    assert "without ready()" not in service.log


@every_loop
def test_signals_restart(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    with Clients(service.address) as clients:
        for number, name in enumerate(("SIGHUP", "SIGUSR2"), start=2):
            service.signal(service.newest(), signal.Signals[name])
            pid = service.wait_for("ready", generation=number)["pid"]
            clients.wait_for(pid)
            service.wait_for("successor", state="settled", pid=pid)
        service.configure(at_start="raise OSError('no database')")
        service.signal(service.newest(), signal.SIGHUP)
        service.wait_for_log("the restart has failed")
        clients.wait_for(pid)
    assert (clients.refused, clients.lost) == ([], [])
    service.expected_blemishes = ("Traceback (most",)


@every_loop
def test_a_restart_while_draining(backend: str, run_service: Run) -> None:
    # The first one has to drain for as long as two others take to start.
    service = run_service(backend, ecdysis={"drain_timeout": 600})
    with Conversation(service.address) as old:
        assert old.say("hello").answer()["generation"] == 1
        service.restart("settled")
        assert old.say("restart", until="serving").answer()["error"] == "RestartWhileDraining"
        # The newest one is free to.
        assert service.restart("settled")["generation"] == 3
        assert old.say("hello").answer()["generation"] == 1


@pytest.mark.backends("asyncio", "trio")
def test_a_drain_waits_for_tracked_work(backend: str, run_service: Run) -> None:
    work = """
async def work():
    try:
        async with ecdysis.track():
            await wait()
            tell("work", done=ecdysis.draining.is_set())
    except ecdysis_async.DrainInterrupt:
        tell("work", done=None)
ecdysis._task_group.start_soon(work)
None
"""
    service = run_service(backend, at_start=work)
    first = service.pids[0]
    service.wait_for("waiting")
    assert service.run("ecdysis.connections") == 2
    service.configure(at_start="", ecdysis={"drain_timeout": 0.2})
    service.restart("settled")
    service.wait_for("finished", pid=first)
    assert service.is_alive(first)
    service.release()
    assert service.wait_for("work", pid=first)["done"] is True
    assert service.wait_for_death(first) == 0
    service.run(work)
    service.wait_for("waiting")
    service.signal(service.newest(), signal.SIGTERM)
    assert service.wait_for("work")["done"] is None
    service.wait_for_end()


@pytest.mark.backends("asyncio", "trio")
def test_a_crash_before_settling_is_undone_and_after_it_is_one(backend: str, run_service: Run) -> None:
    crash = "async def crash():\n    raise RuntimeError('a bug')\necdysis._task_group.start_soon(crash)\nNone"
    service = run_service(backend, ecdysis={"probation": 60})
    first = service.pids[0]
    with service.begin("restart", until="settled") as asking:
        service.wait_for("ready", generation=2)
        service.run(crash)
        failure = asking.answer()
    assert (failure["error"], failure["phase"]) == ("RolledBack", "probation")
    assert service.ask()["pid"] == first
    service.run(crash)
    service.wait_for_end()
    assert service.statuses[first] == 1
    service.expected_blemishes = ("Traceback (most",)


BLOCKS = """
import signal, sys, threading, warnings, logging, anyio, os
from ecdysis_async import Ecdysis, current
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
class Mine(Exception): pass
async def main():
    former = {each: signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    async with Ecdysis() as ecdysis:
        assert current() is ecdysis
    print("left")
    try:
        async with Ecdysis() as ecdysis:
            await ecdysis.ready()
            raise Mine
    except Mine as error:
        print("itself", error.__context__)
    try:
        async with Ecdysis() as ecdysis:
            await ecdysis.ready()
            raise ExceptionGroup("two", [Mine(), Mine()])
    except* Mine as group:
        print("group", len(group.exceptions))
    assert former == {each: signal.getsignal(each) for each in former}
    try:
        current()
    except LookupError as error:
        print("nobody")
    with anyio.CancelScope() as scope:
        async with Ecdysis() as ecdysis:
            await ecdysis.ready()
            scope.cancel()
            await ecdysis.finished()
    print("cancelled", scope.cancelled_caught)
def run():
    anyio.run(main, backend=sys.argv[1])
signal.signal(signal.SIGUSR2, lambda *_: None)
run()
print("thread")
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.backends("asyncio", "trio")
def test_leaving_the_block(backend: str, tmp_path: Path) -> None:
    """A single exception leaves as itself, former handlers come back, and off the main thread there are none."""
    script = tmp_path / "blocks.py"
    script.write_text(BLOCKS)
    process = subprocess.run(
        [sys.executable, "-W", "error", script, backend],
        env={**os.environ, "PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = ["left", "itself None", "group 2", "nobody", "cancelled True"]
    assert process.stdout.splitlines() == [*lines, "thread", *lines], process.stderr
    warnings = process.stderr.splitlines()
    assert all(line.startswith("WARNING") for line in warnings), process.stderr
    assert sum("is left without ready()" in line for line in warnings) == 2
    assert sum("off the main thread" in line for line in warnings) == 4
    assert len(warnings) == 6
