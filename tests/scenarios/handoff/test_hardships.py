"""What goes wrong around a handoff: a stderr that breaks or is stuck, a command in between, no thread to be had."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import SERVICE, Clients, Conversation, Refused, Service
from tests.scenarios.handoff.test_restarts import CANCELLABLE_RESTART, SLOW_PAUSE

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]

FIRST = ["listen_tcp", ["127.0.0.1", 0], {}]


@pytest.mark.backends("asyncio", "trio")
def test_a_successor_writes_to_stderr_while_its_predecessor_dies(backend: str, run_service: Run) -> None:
    """The pipe that stands in the place of its stderr does not break with the predecessor, before it is told."""
    service = run_service(backend)
    first = service.pids[0]
    service.configure(
        at_start="block()\nfor _ in range(100):\n    print('alone', file=sys.stderr, flush=True)\nawait anyio.sleep(0)"
    )
    with service.begin("restart", until="settled"):
        second = service.wait_for("blocked")["pid"]
        service.signal(first, signal.SIGKILL)
        assert service.wait_for_death(first) == -signal.SIGKILL
        # Its loop has not turned since, so it knows nothing of the death.
        service.release()
    assert service.wait_for("ready", generation=2)["pid"] == second
    assert service.ask()["pid"] == second
    service.wait_until(lambda: service.log.count("alone") == 100, "what it wrote is lost")
    service.configure(at_start="")
    assert service.restart("settled")["generation"] == 3


HELPER = """
import subprocess
code = "import sys; [print(f'helped {line}', file=sys.stderr, flush=True) for line in sys.stdin]"
helper = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, text=True)
"""


@pytest.mark.backends("uvloop", "anyio")
def test_a_process_started_before_ready_writes_on_when_the_predecessor_is_gone(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    first = service.pids[0]
    service.configure(at_start=HELPER)
    service.restart("settled")
    assert service.wait_for_death(first) == 0
    service.run("print('once', file=helper.stdin, flush=True)")
    service.wait_for_log("helped once")
    assert service.run("helper.communicate('twice')\nhelper.returncode") == 0
    service.wait_for_log("helped twice")


@pytest.mark.backends("anyio", "trio")
def test_a_promotion_closes_what_nobody_claims(backend: str, run_service: Run, tmp_path: Path) -> None:
    """The dead one cannot answer there any more: refused at once is better than queued for ever."""
    path = tmp_path / "old.sock"
    service = run_service(
        backend,
        listeners=[FIRST, ["listen_tcp", ["127.0.0.1", 0], {"name": "old"}], ["listen_unix", [str(path)], {}]],
    )
    first, old = service.pids[0], service.addresses[1]
    service.configure(listeners=[FIRST], at_start="await wait()")
    with service.begin("restart", until="settled"):
        service.wait_for("waiting")
        service.signal(first, signal.SIGKILL)
        service.wait_for("successor", state="orphaned")
        service.release()
    second = service.wait_for("ready", generation=2)["pid"]
    assert service.ask()["pid"] == second
    service.wait_for_log("nobody claims old")
    for address in (old, str(path)):
        with pytest.raises(Refused):
            Conversation(address)
    assert not path.exists()
    service.configure(at_start="")
    assert service.restart("settled")["inherited"] == ["tcp:127.0.0.1:0"]


# Its stderr is a pipe from now on that is full, and that nobody reads; its log would stop it, as it would any program.
STUCK = """
import logging
logging.disable()
reading, writing = os.pipe()
os.set_blocking(writing, False)
try:
    while True:
        os.write(writing, b" " * 4096)
except BlockingIOError:
    os.set_blocking(writing, True)
former = os.dup(2)
os.dup2(writing, 2)
os.close(writing)
None
"""

FREE = """
os.dup2(former, 2)
os.close(former)
os.set_blocking(reading, False)
while True:
    try:
        await anyio.wait_readable(reading)
        if not os.read(reading, 65536):
            break
    except BlockingIOError:
        pass
os.close(reading)
logging.disable(logging.NOTSET)
"""

QUIET = "import logging\nlogging.disable()\nfor _ in range(50):\n    os.write(2, b'x' * 1000)\n"


@pytest.mark.backends("asyncio", "trio")
def test_a_stuck_stderr_stops_neither_a_failure_nor_a_rollback(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"probation": 60})
    first = service.pids[0]
    with service.begin("hello") as control:
        control.answer()

        def count() -> int:
            return int(control.say("run", code="len(os.listdir('/proc/self/fd'))").answer())

        control.say("run", code=STUCK).answer()
        before = count()
        service.configure(at_import=QUIET, at_start="os.write(2, b'last word'); raise OSError('no database')")
        failure = control.say("restart", until="settled").answer()
        assert (failure["error"], failure["phase"]) == ("SuccessorFailed", "initialise")
        # Which stands in the pipe behind what cannot be passed on.
        assert "last word" in failure["text"]
        assert service.ask()["pid"] == first
        service.configure(at_start="os.write(2, b'y' * 10000)")
        control.say("restart", until="settled")
        second = service.wait_for("ready", generation=2)["pid"]
        service.signal(second, signal.SIGKILL)
        assert control.answer()["error"] == "RolledBack"
        assert service.ask()["pid"] == first
        # Neither restart still waits for somebody to read.
        service.wait_until(lambda: count() == before, f"{count()} descriptors, and it was {before}")
        control.say("run", code=FREE).answer()
    service.configure(at_import="", at_start="")
    assert service.restart("serving")["outcome"] == "serving"


# What is spawned starts the service and waits for it, but ends by itself as soon as it is told.
WRAPPER = '{python} & service=$!; trap "exit 0" USR1; wait $service; exit 7'


@pytest.mark.backends("uvloop", "trio")
def test_a_wrapper_that_ends_before_what_it_started(backend: str, run_service: Run, tmp_path: Path) -> None:
    """Its end is not the successor's; and a restart that breaks down ends the one that speaks before it is undone."""
    python = f"{sys.executable} -W error {SERVICE} {tmp_path / 'settings.json'}"
    service = run_service(backend, ecdysis={"command": ["sh", "-c", WRAPPER.format(python=python)], "probation": 60})
    first = service.pids[0]
    with Clients(service.address) as clients, service.begin("hello") as control:
        control.answer()
        second = control.say("restart", until="serving").answer()["successor_pid"]
        wrapper = service.wait_for("started", pid=second)["parent"]
        assert wrapper != first
        clients.wait_for(second)
        service.signal(wrapper, signal.SIGUSR1)
        service.wait_for_death(wrapper)
        clients.wait_for(second)
        control.say(
            "run", code="ecdysis._life.handover.before_event = None\necdysis._life.handover.post('whatever')"
        ).answer()
        service.wait_for_death(second)
        clients.wait_for(first)
        assert control.say("run", code="str(ecdysis.last_report.error)").answer().startswith("the restart broke down")
        report = control.say("restart", until="serving").answer()
        clients.wait_for(report["successor_pid"])
    assert clients.refused == []
    assert service.accepting_turns() == [first, second, first, report["successor_pid"]]
    service.expected_blemishes = ("Traceback (most",)


@pytest.mark.backends("asyncio", "uvloop", "anyio", "trio")
def test_a_restart_where_no_thread_can_be_had(backend: str, run_service: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    # A stack larger than the address space: each attempt to start a thread fails, as it does at the limit of tasks.
    service = run_service(
        backend,
        at_import="import threading\nthreading.stack_size(1 << 47)",
        ecdysis={"pid_file": str(tmp_path / "pid"), "control_socket": str(run / "control"), "command": None},
    )
    code = "try:\n    threading.Thread().start()\nexcept RuntimeError as error:\n    text = str(error)\ntext"
    assert service.run(code) == "can't start new thread"
    with Clients(service.address) as clients:
        clients.wait_for(service.pids[0])
        service.configure(at_start="raise OSError('no database')")
        assert service.fail_to_restart()["error"] == "SuccessorFailed"
        service.configure(at_start="")
        second = service.restart("settled")["successor_pid"]
        clients.wait_for(second)
    assert (clients.refused, clients.lost) == ([], [])
    service.wait_until(lambda: (tmp_path / "pid").read_text() == f"{second}\n", "the pid file has not moved")
    service.expected_blemishes = ("Traceback (most",)


# As it is where no descriptor can be had: its gate does not open again. What has ended has nothing to open.
NO_WAY_BACK = """
async def cannot_open():
    if ecdysis._gate.state.value != "ended":
        tell("cannot open")
        raise OSError(24, "Too many open files")

ecdysis._gate.open = cannot_open
"""


# The stop comes when the restart is about to be over, and not yet.
STOP_AT_THE_DEATH = """
from ecdysis_async._handoff.successor_process import SuccessorProcess

async def bury_and_stop(self):
    await bury(self)
    ecdysis.stop()

bury = SuccessorProcess.collect_exit
SuccessorProcess.collect_exit = bury_and_stop
"""


@pytest.mark.backends("asyncio", "trio")
@pytest.mark.parametrize("is_late", [True, False])
def test_a_stop_is_heard_while_a_generation_cannot_accept_again(backend: str, is_late: bool, run_service: Run) -> None:
    service = run_service(backend)
    first = service.pids[0]
    service.run(CANCELLABLE_RESTART % "serving" + SLOW_PAUSE + NO_WAY_BACK + ("" if is_late else STOP_AT_THE_DEATH))
    service.wait_for("waiting", pid=first)
    service.release()
    second = service.wait_for("successor", state="waiting")["pid"]
    service.wait_for("waiting", pid=first)
    service.run("scope.cancel()")
    service.wait_for("predecessor", state="aborting", pid=first)
    service.release()
    service.wait_for("cannot open", pid=first)
    # Nor does it keep the successor from being ended.
    service.wait_for_death(second)
    if is_late:
        service.wait_for("predecessor", state="failed", pid=first)
        service.wait_for("cannot open", pid=first)
        service.signal(first, signal.SIGTERM)
    assert service.wait_for_death(first) == 0
    assert service.log.count("cannot accept again yet") == 1
    service.expected_blemishes = ("Traceback (most",)


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_a_restart_that_a_blocked_loop_does_not_hear_of_says_so(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    with service.begin("run", code="block()") as conversation:
        service.wait_for("blocked")
        service.signal(service.pids[0], signal.SIGHUP)
        service.wait_for_log("and SIGHUP waits for it: the main thread stands at ")
        assert "(block)" in service.log
        service.release()
        assert conversation.answer() is None
        service.wait_for("ready", generation=2)


# A leak: every descriptor that this process may have is in use.
LEAK = """
import contextlib, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
kept = []
with contextlib.suppress(OSError):
    while True:
        kept.append(os.open(os.devnull, os.O_RDONLY))
"""


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_a_restart_helps_where_no_descriptor_is_left(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    with service.begin("run", code=LEAK) as conversation:
        assert conversation.answer() is None
        service.signal(service.pids[0], signal.SIGHUP)
        service.wait_for("ready", generation=2)
        assert conversation.say("hello").answer()["generation"] == 1
    assert service.wait_for_death(service.pids[0]) == 0
    assert service.restart("settled")["generation"] == 3


@pytest.mark.backends("asyncio", "trio")
def test_a_service_restarts_whose_working_directory_was_deleted(backend: str, run_service: Run, tmp_path: Path) -> None:
    """Its program is found from anywhere. The second generation was started where there is no directory any more."""
    gone = tmp_path / "gone"
    program = [sys.executable, "-W", "error", str(SERVICE), str(tmp_path / "settings.json")]
    service = run_service(
        backend, command=["/bin/sh", "-c", f'mkdir "{gone}" && cd "{gone}" && exec "$@"', "sh", *program]
    )
    gone.rmdir()
    with Clients(service.address) as clients:
        for generation in (2, 3):
            assert service.restart("settled")["generation"] == generation
    assert (clients.refused, clients.lost) == ([], [])
    assert service.run("os.readlink('/proc/self/cwd')").endswith(" (deleted)")
    service.stop()
