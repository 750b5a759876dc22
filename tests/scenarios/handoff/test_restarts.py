"""Asking for a restart, and what the new process is: until=, cancellation, commands, environments, stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import SERVICE, TIME_IS_UP, Clients, Conversation, Service

Run = Callable[..., Service]

# Planted in a generation: a restart that can be called off, asked for by nobody who is tracked.
CANCELLABLE_RESTART = """
async def restart_in_background(until):
    await wait()
    with scope:
        tell("restarted", report=(await ecdysis.restart(until)).to_json())
    if scope.cancelled_caught:
        tell("cancelled")

scope = anyio.CancelScope()
ecdysis._task_group.start_soon(restart_in_background, "%s")
None
"""

# The next pause of a generation waits for the test.
SLOW_PAUSE = """
async def slow_pause(**options):
    ecdysis._gate.pause = pause
    await wait()
    await pause(**options)

pause = ecdysis._gate.pause
ecdysis._gate.pause = slow_pause
"""


@pytest.mark.backends("asyncio", "uvloop", "anyio", "trio")
def test_until_drained(backend: str, run_service: Run) -> None:
    service = run_service(backend, at_start=CANCELLABLE_RESTART % "drained")
    service.wait_for("waiting")
    first = service.pids[0]
    with service.begin("hold") as busy:
        service.wait_for("holding")
        service.release()
        service.wait_for("predecessor", state="settled", pid=first)
        assert busy.say("go on").answer()["pid"] == first
    report = service.wait_for("restarted", pid=first)["report"]
    assert report["outcome"] == "settled"
    assert report["phases"]["drain"] > 0
    assert (report["drain"]["drained"], report["drain"]["cut"]) == (1, 0)


@pytest.mark.backends("asyncio", "trio")
def test_a_connection_cannot_wait_for_its_own_end(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    failure = service.fail_to_restart("drained")
    assert failure["error"] == "RuntimeError"
    assert "would wait for itself" in failure["text"]
    assert service.ask()["generation"] == 1
    code = "try:\n    await ecdysis.restart('soon')\nexcept ValueError as error:\n    text = str(error)\ntext"
    assert "'soon'" in service.run(code)


@pytest.mark.backends("asyncio", "trio")
def test_the_times_that_restart_returns(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"probation": 60})
    with service.begin("restart", until="settled") as settled:
        service.wait_for("ready", generation=2)
        # A restart of the successor ends the probation; `settled` is answered then, and `serving` at once.
        report = service.restart("serving")
        assert (report["outcome"], report["generation"]) == ("serving", 3)
        assert settled.answer()["outcome"] == "settled"


@pytest.mark.backends("asyncio", "trio")
def test_not_ready(backend: str, run_service: Run) -> None:
    """A generation that does not serve yet cannot be restarted; once it serves, it can."""
    code = """
try:
    await ecdysis.restart()
except ecdysis_async.NotReady as error:
    tell("not ready", text=str(error))
"""
    service = run_service(backend, at_start=code)
    assert "does not serve yet" in service.wait_for("not ready")["text"]
    assert service.restart("settled")["generation"] == 2
    service.wait_for("not ready", pid=service.newest())


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_cancelled_before_commit(backend: str, run_service: Run) -> None:
    """While the successor starts, and while this side pauses: called off, and the successor never got ready."""
    service = run_service(backend)
    first = service.pids[0]
    with Clients(service.address) as clients:
        for at_start, planted, reached in (("await wait()", "", "initialising"), ("", SLOW_PAUSE, "waiting")):
            service.run(CANCELLABLE_RESTART % "serving" + planted)
            service.wait_for("waiting", pid=first)
            service.configure(at_start=at_start)
            service.release()
            second = service.wait_for("successor", state=reached)["pid"]
            service.wait_for("waiting")
            service.run("scope.cancel()")
            # Only then: a pause that ended before would let the commit come first.
            service.wait_for("predecessor", state="aborting", pid=first)
            if planted:
                service.release()
            service.wait_for("cancelled", pid=first)
            service.wait_for("predecessor", state="failed", pid=first)
            service.wait_for_death(second)
            clients.wait_for(first)
        service.configure(at_start="")
        report = service.restart("settled")
        clients.wait_for(report["successor_pid"])
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == [first, report["successor_pid"]]
    service._read_events()
    assert [event["pid"] for event in service._events if event["event"] == "ready"] == [report["successor_pid"]]


@pytest.mark.backends("asyncio", "trio")
def test_cancelled_after_commit(backend: str, run_service: Run) -> None:
    """Then it only stops waiting."""
    service = run_service(backend, ecdysis={"probation": 600})
    first = service.pids[0]
    with Conversation(service.address) as control:
        control.say("run", code=CANCELLABLE_RESTART % "settled").answer()
        service.wait_for("waiting", pid=first)
        service.release()
        service.wait_for("predecessor", state="committing", pid=first)
        control.say("run", code="scope.cancel()").answer()
        service.wait_for("cancelled", pid=first)
        service.wait_for("predecessor", state="probation", pid=first)
        control.say("run", code=TIME_IS_UP).answer()
    service.wait_for("predecessor", state="settled", pid=first)
    assert service.ask()["generation"] == 2


@pytest.mark.backends("asyncio", "trio")
def test_a_wrapper_as_command(backend: str, run_service: Run, tmp_path: Path) -> None:
    """The one who speaks counts, and not the one that was spawned."""
    python = f"{sys.executable} -W error {SERVICE} {tmp_path / 'settings.json'}"
    service = run_service(backend, ecdysis={"command": ["sh", "-c", f"{python}; true"], "probation": 60})
    first = service.pids[0]
    with Clients(service.address) as clients:
        report = service.restart()
        second = service.wait_for("ready", generation=2)["pid"]
        assert report["successor_pid"] == second
        assert service.wait_for("started", pid=second)["parent"] != first
        clients.wait_for(second)
        service.signal(second, 9)
        service.wait_for("predecessor", state="rolled back", pid=first)
        clients.wait_for(first)
        report = service.restart("serving")
        clients.wait_for(report["successor_pid"])
    assert clients.refused == []


@pytest.mark.backends("asyncio", "trio")
def test_the_environment_of_the_successor(backend: str, run_service: Run, tmp_path: Path) -> None:
    env_file = tmp_path / "env"
    env_file.write_text("COLOUR=red\nSHAPE=round\n")
    service = run_service(backend, ecdysis={"env_file": str(env_file)})
    colours = "[os.environ.get('COLOUR'), os.environ.get('SHAPE')]"
    service.restart()
    assert service.run(colours) == ["red", "round"]
    env_file.write_text("COLOUR=blue\n")
    service.restart()
    assert service.run(colours) == ["blue", None]
    env_file.unlink()
    failure = service.fail_to_restart()
    assert (failure["error"], str(env_file) in failure["text"]) == ("RestartError", True)
    env_file.write_text("SHAPE=square\n")
    service.restart()
    assert service.run(colours) == [None, "square"]


@pytest.mark.backends("asyncio", "trio")
def test_the_stderr_of_the_successor(backend: str, run_service: Run) -> None:
    """Passed on until it is ready; its own from then on, so that it outlives the predecessor."""
    service = run_service(backend)
    first = service.pids[0]
    log = os.stat(service.log_path)
    identify = "[os.fstat(2).st_dev, os.fstat(2).st_ino]"
    service.configure(
        at_start=f"print('starting, on', {identify}, file=sys.stderr, flush=True)\ntell('stderr', is_at={identify})"
    )
    with service.begin("restart", until="settled") as asking:
        assert service.wait_for("stderr")["is_at"] != [log.st_dev, log.st_ino]
        assert asking.answer()["outcome"] == "settled"
    assert service.run(identify) == [log.st_dev, log.st_ino]
    assert service.wait_for_death(first) == 0
    service.run("print('alone', file=sys.stderr, flush=True)")
    # What the pipe held when it was ready it has passed on itself, in its own time.
    service.wait_for_log("starting, on")
    service.wait_for_log("alone")


@pytest.mark.backends("asyncio", "trio")
def test_grandchildren_inherit_nothing(backend: str, run_service: Run) -> None:
    """Neither marker nor descriptor: not while the successor starts, and not later."""
    look = """
import subprocess
seen = subprocess.run(
    [sys.executable, "-S", "-c", "import os; print('ECDYSIS_CHANNEL' in os.environ, os.listdir('/proc/self/fd'))"],
    capture_output=True, text=True, check=True,
).stdout
import multiprocessing
from tests.scenarios.handoff.children import list_descriptors
with multiprocessing.get_context("spawn").Pool(1) as pool:
    in_pool = pool.apply(list_descriptors)
    pool.close()
    pool.join()
tell("children", seen=seen, in_pool=in_pool)
"""
    service = run_service(backend, at_import=look, at_start=look)
    second = service.restart()["successor_pid"]
    service.run(look)
    # 0 to 2, and the one that lists them.
    for _ in range(2):
        assert service.wait_for("children", pid=service.pids[0])["seen"] == "False ['0', '1', '2', '3']\n"
    for _ in range(3):
        found = service.wait_for("children", pid=second)
        assert found["seen"] == "False ['0', '1', '2', '3']\n"
        assert not [target for target in found["in_pool"] if "socket" in target or "pidfd" in target], found
