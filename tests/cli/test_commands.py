"""The command, run as a process against real services: what it prints, and each of its exit codes."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.cli.commands import (
    FAILED,
    IN_PROGRESS,
    INTERRUPTED,
    NO_SERVICE,
    ROLLED_BACK,
    SERVING,
    UNKNOWN,
    USAGE,
    Run,
    begin,
    call,
    end,
    with_patience,
)

pytestmark = pytest.mark.main_python_only


@pytest.mark.backends("asyncio")
def test_a_restart_until_it_has_drained(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    with service.begin("hold") as held:
        service.wait_for("holding")
        process = begin("restart", "--until", "drained")
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any("waiting for 1 connection, deadline in " in line for line in lines)
        held.say("hello")
        held.answer()
        held.close()
    code, output, errors = end(process)
    assert (code, errors) == (SERVING, "")
    assert "; connections: 1 drained, 0 silent, 0 transferred, 0 cut" in output.splitlines()[-1]


@pytest.mark.backends("asyncio")
def test_json(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"probation": 60})
    done = call("restart", "--until", "serving", "--json")
    [event] = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, done.stderr, event["event"]) == (SERVING, "", "done")
    assert (event["report"]["outcome"], event["report"]["successor_pid"]) == ("serving", service.newest())
    service.configure(at_import="sys.exit('no licence')")
    # The channel that it never asked for is left to the interpreter.
    service.expected_blemishes = ("Exception ignored in: <socket.socket", "ResourceWarning: unclosed <socket.socket")
    done = call("restart", "--json")
    [event] = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, done.stderr, event["error"]) == (FAILED, "", "SuccessorFailed")
    service.configure(at_import="")
    done = call("status", "--json")
    [status] = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, status["generation"], status["last_report"]["outcome"]) == (SERVING, 2, "failed")
    done = call("stop", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (SERVING, {"event": "done"})
    done = call("stop", "--json")
    assert (done.returncode, json.loads(done.stdout)["event"]) == (NO_SERVICE, "error")


@pytest.mark.backends("uvloop", "trio")
def test_a_restart_that_fails(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    service.expected_blemishes = ("Traceback (most",)
    service.configure(at_start="print('connecting', file=sys.stderr)\nraise OSError('no database')")
    done = call("restart")
    assert done.returncode == FAILED
    assert re.search(r"^ecdysis: the successor \(pid \d+\) failed: Traceback", done.stderr)
    assert "OSError: no database" in done.stderr
    assert "  | connecting" in done.stderr
    assert service.ask()["generation"] == 1


@pytest.mark.backends("asyncio", "trio")
def test_a_restart_that_is_rolled_back(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"probation": 60})
    service.arm("successor", "probation", "kill-self")
    done = call("restart")
    assert done.returncode == ROLLED_BACK
    assert re.search(r"was killed by SIGKILL while (committing|on probation)", done.stderr)
    assert service.ask()["generation"] == 1


@pytest.mark.backends("asyncio", "trio")
def test_a_second_restart(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    service.configure(at_start="await wait()")
    first = begin("restart")
    service.wait_for("waiting")
    done = call("restart")
    assert done.returncode == IN_PROGRESS
    assert "is in progress (initialising)" in done.stderr
    service.release()
    assert end(first)[0] == SERVING


@pytest.mark.backends("asyncio", "trio")
def test_the_predecessor_dies_and_the_successor_serves(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    service.configure(at_start="await wait()")
    process = begin("restart")
    service.wait_for("waiting")
    service.signal(service.pids[0], signal.SIGKILL)
    service.wait_for_death(service.pids[0])
    service.release()
    code, output, errors = end(process)
    assert (code, errors) == (SERVING, "")
    assert f"generation 2 (pid {service.newest()}) serves" in output.splitlines()[-1]


@pytest.mark.backends("asyncio")
def test_the_predecessor_dies_while_it_drains(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"drain_timeout": 60})
    with service.begin("hold"):
        service.wait_for("holding")
        process = begin("restart", "--until", "drained")
        service.wait_for("successor", state="settled")
        service.signal(service.pids[0], signal.SIGKILL)
        assert end(process)[0] == SERVING


@pytest.mark.backends("asyncio", "trio")
def test_nobody_knows_the_outcome(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    service.configure(at_start="await wait()")
    process = begin("restart", command=with_patience(VERDICT=1.5))
    service.wait_for("waiting")
    # The predecessor could hear of that death, and tell that the restart has failed, before it dies itself.
    service.signal(service.pids[0], signal.SIGSTOP)
    for pid in reversed(service.pids):
        service.signal(pid, signal.SIGKILL)
    code, _, errors = end(process)
    assert code == UNKNOWN
    assert "nobody knows what became of restart" in errors


@pytest.mark.backends("asyncio")
def test_it_does_not_keep_systemd_from_starting_the_service_anew(
    backend: str, run_service: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = run_service(backend)
    service.configure(at_start="await wait()")
    monkeypatch.setenv("MAINPID", str(service.pids[0]))
    process = begin("restart", command=with_patience(VERDICT=3600))
    service.wait_for("waiting")
    # The successor, which starts still, might serve some time; but systemd is going to end it.
    service.signal(service.pids[0], signal.SIGKILL)
    assert end(process)[0] == UNKNOWN
    successor = service.newest()
    service.signal(successor, signal.SIGKILL)
    service.wait_for_death(successor)


@pytest.mark.backends("asyncio")
def test_a_service_that_hangs(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    service.signal(service.pids[0], signal.SIGSTOP)
    service.wait_until_stopped(service.pids[0])
    impatient = with_patience(VERDICT=1.5, SILENCE=1.5)
    processes = {name: begin(name, command=impatient) for name in ("status", "stop", "restart")}
    for name, process in processes.items():
        code, _, errors = end(process)
        assert code == UNKNOWN, name
        assert "it has said nothing for " in errors
    # What waited in its queue is heard now: it stops.
    service.signal(service.pids[0], signal.SIGCONT)
    service.wait_for_end()


@pytest.mark.backends("asyncio")
def test_a_stop_in_the_middle_of_a_restart(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    service.configure(at_start="await wait()")
    process = begin("restart")
    service.wait_for("waiting")
    assert call("stop").returncode == SERVING
    code, _, errors = end(process)
    assert (code, errors) == (NO_SERVICE, "ecdysis: the service was stopped while it restarted\n")
    service.wait_for_end()


@pytest.mark.backends("asyncio")
def test_interrupted(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    service.configure(at_start="await wait()")
    process = begin("restart")
    service.wait_for("waiting")
    process.send_signal(signal.SIGINT)
    code, _, errors = end(process)
    assert code == INTERRUPTED
    assert "the restart goes on without being watched: see `ecdysis status`" in errors
    service.release()
    service.wait_for("successor", state="settled")
    assert service.ask()["generation"] == 2


def test_stop(backend: str, run_service: Run, environment: Path) -> None:
    service = run_service(backend)
    with service.begin("hold") as held:
        service.wait_for("holding")
        process = begin("stop")
        service.wait_for("finished")
        held.say("hello")
        held.answer()
        held.close()
    code, output, errors = end(process)
    assert (code, errors) == (SERVING, "")
    assert output.splitlines()[0].endswith(f"(pid {service.pids[0]}) stops")
    assert output.splitlines()[-1] == "stopped"
    # Nothing is left, and whoever starts it again at once finds everything free.
    assert not service.is_alive(service.pids[0])
    assert list(environment.iterdir()) == []


@pytest.mark.backends("asyncio", "trio")
def test_status(backend: str, run_service: Run, environment: Path) -> None:
    service = run_service(backend, ecdysis={"probation": 60})
    host, port = service.address
    assert call("restart", "--until", "serving").returncode == SERVING
    service.configure(at_start="await wait()")
    process = begin("restart", "--until", "serving")
    service.wait_for("waiting")
    with service.begin("hello") as client:
        client.answer()
        done = call("status")
    assert (done.returncode, done.stderr) == (SERVING, "")
    _, second, third = service.pids
    text = done.stdout
    assert text.startswith(f"generation 2 (pid {second}): serving, up ")
    assert "  connections  1\n" in text
    assert f"  listening    {environment}/api (unix)\n               {host}:{port} (tcp)\n" in text
    assert re.search(
        rf"^  restart      \w+ to generation 3 \(pid {third}\): initialising, for \d+\.\d s$", text, re.MULTILINE
    )
    assert f"  waiting for  generation 3 (pid {third}) to get ready, for " in text
    service.release()
    assert end(process)[0] == SERVING


@pytest.mark.backends("asyncio", "trio")
def test_watch_over_a_restart(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    process = begin("status", "--watch", "--json")
    assert process.stdout is not None
    generations = (json.loads(line)["generation"] for line in process.stdout)
    assert next(generations) == 1
    assert service.restart("settled")["generation"] == 2
    # Looking on holds no drain.
    service.wait_for_death(service.pids[0])
    assert next(each for each in generations if each != 1) == 2
    process.send_signal(signal.SIGINT)
    assert (end(process)[0], end(process)[2]) == (INTERRUPTED, "")


@pytest.mark.backends("asyncio")
def test_reopen_logs(backend: str, run_service: Run) -> None:
    run_service(backend)
    done = call("reopen-logs")
    assert (done.returncode, done.stdout, done.stderr) == (SERVING, "reopened 0 log files\n", "")
    done = call("reopen-logs", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (SERVING, {"event": "reopened", "handlers": 0})


@pytest.mark.backends("asyncio")
def test_watch_ends_with_the_service(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    process = begin("status", "--watch")
    assert process.stdout is not None
    assert "serving" in process.stdout.readline()
    service.stop()
    code, _, errors = end(process)
    assert (code, errors.startswith("ecdysis: no service has the control socket")) == (NO_SERVICE, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["restart", "--until", "nonsense"],
        ["status", "--control", "@abstract"],
        ["dance"],
        ["restart", "more"],
    ],
)
def test_usage(arguments: list[str]) -> None:
    assert call(*arguments).returncode == USAGE


def test_without_click() -> None:
    program = "import sys; sys.modules['click'] = None; from ecdysis_async.cli import main; main()"
    done = call("status", command=[sys.executable, "-W", "error", "-c", program])
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr == "ecdysis: the command needs click: pip install 'ecdysis_async[cli]'\n"


@pytest.mark.backends("asyncio")
def test_without_rich(backend: str, run_service: Run) -> None:
    run_service(backend)
    program = "import sys; sys.modules['rich'] = None; sys.stdout.isatty = lambda: True\n"
    program += "from ecdysis_async.cli import main; main()"
    done = call("restart", command=[sys.executable, "-W", "error", "-c", program])
    assert (done.returncode, done.stderr) == (SERVING, "")
    assert "  probation " in done.stdout


@pytest.mark.parametrize("module", ["ecdysis_async", "ecdysis_async.cli"])
def test_the_package_is_the_command(module: str) -> None:
    done = call("--help", command=[sys.executable, "-W", "error", "-m", module])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ecdysis ")


def test_help_tells_the_exit_codes() -> None:
    done = call("restart", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for code in ("0 the new generation serves", "5 rolled back", "6 the outcome is unknown"):
        assert code in text
