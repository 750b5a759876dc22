"""The command, run as a process against real services: what it prints, and each of its exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async.cli import client
from ecdysis_async.cli.progress import Lines, Progress
from ecdysis_async.report import Outcome, Phase, RestartReport
from tests.scenarios.handoff.harness import PATIENCE_SECONDS, PROJECT, Service, running

pytestmark = pytest.mark.newest_python_only

Run = Callable[..., Service]

COMMAND = [sys.executable, "-W", "error", "-m", "ecdysis_async.cli"]

# Those who seek a verdict that nobody knows shall not seek it for ten seconds.
IMPATIENT = [
    sys.executable,
    "-W",
    "error",
    "-c",
    "from ecdysis_async.cli import client, main; client.VERDICT_SECONDS = client.SILENCE_SECONDS = 1.5; main()",
]

SERVING, FAILED, USAGE, NO_SERVICE, IN_PROGRESS, ROLLED_BACK, UNKNOWN, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a default directory of this test's own, for services and commands alike."""
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return directory / "ecdysis"


@pytest.fixture
def run_service(tmp_path: Path) -> Iterator[Run]:
    """Run services, each with a control socket of the default directory."""
    with contextlib.ExitStack() as stack:

        def run(loop: str, name: str = "api", **settings: Any) -> Service:
            directory = tmp_path / f"service {name}"
            directory.mkdir()
            options = {"control_socket": name, **settings.pop("ecdysis", {})}
            return stack.enter_context(running(directory, loop, ecdysis=options, **settings))

        yield run


def call(*arguments: str, command: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


def begin(*arguments: str, command: list[str] = COMMAND) -> subprocess.Popen[str]:
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_a_restart_shows_its_phases(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    done = call("restart")
    assert (done.returncode, done.stderr) == (SERVING, "")
    phases = re.findall(r"^  (\w+) +[\d.]+ ms$", done.stdout, re.MULTILINE)
    assert phases == ["start", "initialise", "pause", "commit", "probation"]
    second = service.newest()
    assert f"waiting for generation 2 (pid {second}), on probation for" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"generation 2 (pid {second}) serves: settled, accept gap ")


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
    process = begin("restart", command=IMPATIENT)
    service.wait_for("waiting")
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
    process = begin("restart", command=[each.replace("= 1.5", "= 3600") for each in IMPATIENT])
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
    processes = {name: begin(name, command=IMPATIENT) for name in ("status", "stop", "restart")}
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
    assert output.splitlines()[0] == f"pid {service.pids[0]} stops"
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
def test_watch_on_a_terminal(backend: str, run_service: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same table is drawn again and again, and says what is new."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    service = run_service(backend)
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, "status", "--watch"], stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    output = b""
    for text in (f"generation 1 (pid {service.pids[0]}): serving, up", "generation 2 (pid "):
        while text.encode() not in output:
            output += os.read(ours, 65536)
        if service.newest() == service.pids[0]:
            service.restart("settled")
    process.send_signal(signal.SIGINT)
    # EIO: nobody writes to it any more.
    with contextlib.suppress(OSError):
        while data := os.read(ours, 65536):
            output += data
    os.close(ours)
    assert process.wait(60) == INTERRUPTED
    assert b"\x1b[2K" in output, "nothing is drawn over"
    assert b"Traceback" not in output


def phase(waiting_for: str, report: RestartReport | None = None, *waits: str) -> dict[str, Any]:
    """Make an event as a service tells it while it restarts, or stops."""
    workers = [{"slot": slot, "waiting_for": wait} for slot, wait in enumerate(waits)]
    told = report.to_json() if report is not None else None
    return {"event": "phase", "waiting_for": waiting_for, "workers": workers, "report": told}


def test_a_roll_out_is_told_in_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """In a log nobody wants each step of each worker; and what all of them took is a sum, which has to be complete."""
    progress, report = Progress(Lines()), RestartReport("1d", 2, 10)
    progress.show({"event": "accepted", "id": "1d", "pid": 10})
    for number in (1, 2):
        for step in ("its turn", "initialising", "pausing", "committing", "probation"):
            progress.show(phase(f"worker {number} of 2: {step}", report, f"its successor: {step}", "its turn"))
        report.phases = {Phase.START: number * 0.1, Phase.COMMIT: number * 0.001}
    report.outcome = Outcome.SERVING
    for left in ("1.0", "0.5", "0.0"):
        progress.show(phase(f"generation 2, on probation for {left} s more", report, *["the end of its probation"] * 2))
    report.outcome, report.phases[Phase.PROBATION] = Outcome.SETTLED, 1.0
    progress.show(phase("the former workers to end", report, "its end", "its end"))
    assert capsys.readouterr().out.splitlines() == [
        "restart 1d, asked of pid 10",
        "  waiting for worker 1 of 2",
        "  waiting for worker 2 of 2",
        "  start           200.0 ms",
        "  commit            2.0 ms",
        "  waiting for generation 2, on probation for 1.0 s more",
        "  probation      1000.0 ms",
        "  waiting for the former workers to end",
    ]


@pytest.mark.parametrize(("seconds", "counts"), [(math.inf, [3]), (0.0, [3, 2, 1])])
def test_a_drain_counts_down_now_and_then(
    seconds: float, counts: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(Lines(seconds))
    progress.show(phase("generation 2 to start, for 0.0 s so far"))
    progress.show(phase("generation 2 (pid 12) to start, for 0.1 s so far"))
    for left in (3, 3, 2, 1):
        progress.show(phase(f"{left} connection{'s' * (left > 1)}, deadline in {left} s"))
    assert capsys.readouterr().out.splitlines() == [
        "  waiting for generation 2 to start, for 0.0 s so far",
        *(f"  waiting for {left} connection{'s' * (left > 1)}, deadline in {left} s" for left in counts),
    ]


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


@pytest.mark.backends("asyncio")
def test_on_a_terminal(backend: str, run_service: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rich's escapes the same lines stand there, and what is waited for has moved beneath them."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    service = run_service(backend, ecdysis={"probation": 0.5})
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, "restart"], stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    output = b""
    # EIO: nobody writes to it any more.
    with contextlib.suppress(OSError):
        while data := os.read(ours, 65536):
            output += data
    os.close(ours)
    assert process.wait(60) == SERVING
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", output.decode())
    assert re.search(r"  probation +[\d.]+ ms\r\n", text)
    assert f"waiting for generation 2 (pid {service.newest()}), on probation for" in text
    assert f"generation 2 (pid {service.newest()}) serves: settled" in text.splitlines()[-1]
    assert output.count(b"\x1b[2K") > 1, "nothing has moved"


@pytest.mark.parametrize("command", ["restart", "stop", "status", "reopen-logs"])
def test_no_service(command: str, environment: Path, tmp_path: Path) -> None:
    done = call(command)
    assert (done.returncode, done.stdout) == (NO_SERVICE, "")
    assert f"no service has its control socket in {environment}, " in done.stderr
    done = call(command, "--control", "api")
    assert (done.returncode, done.stderr) == (
        NO_SERVICE,
        f"ecdysis: no service has the control socket {environment}/api\n",
    )
    # What a killed one has left.
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    assert call(command, "--control", str(path)).returncode == NO_SERVICE


@pytest.mark.backends("asyncio")
def test_several_services(backend: str, run_service: Run, environment: Path) -> None:
    run_service(backend, "api")
    # The one that is started last is ended first: both let their orphans go to this process.
    run_service(backend, "jobs")
    done = call("status")
    assert done.returncode == USAGE
    assert done.stderr.splitlines()[1:] == [f"  --control {environment}/{name}" for name in ("api", "jobs")]
    assert call("status", "--control", "jobs").returncode == SERVING


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


@contextlib.contextmanager
def answering(path: Path, answers: list[bytes]) -> Iterator[None]:
    """Listen there, and answer to each connection with the next of these, and nothing else."""

    def serve() -> None:
        for answer in answers:
            sock, _ = listener.accept()
            # Who has only looked whether somebody is there is gone already.
            with sock, contextlib.suppress(OSError):
                sock.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE_SECONDS)
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize("command", ["restart", "stop", "status"])
@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ([b"HTTP/1.1 400\r\n"], USAGE),
        ([b"[]\n"], USAGE),
        ([b"", b""], UNKNOWN),
        ([b'{"event": "error", "message": "no"}\n'], FAILED),
    ],
)
def test_somebody_else_listens(command: str, answers: list[bytes], code: int, tmp_path: Path) -> None:
    """What answers is no service, ends without a word, or refuses: no traceback, and never "it serves"."""
    with answering(tmp_path / "other", answers):
        done = call(command, "--control", str(tmp_path / "other"))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("ecdysis: ")
    assert done.stderr.count("\n") == 1


def test_who_leaves_without_a_word_is_followed_by_somebody_who_is_asked(tmp_path: Path) -> None:
    """An anchor that is executed anew drops whom it has accepted and not answered."""
    with answering(tmp_path / "control", [b"", b'{"event": "reopened", "handlers": 3}\n']):
        done = call("reopen-logs", "--control", str(tmp_path / "control"))
    assert (done.returncode, done.stdout) == (SERVING, "reopened 3 log files\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.backends("asyncio")
def test_another_user(backend: str, run_service: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_service(backend)
    # From within, because the directories above belong to root alone.
    directory = tmp_path / "run" / "ecdysis"
    monkeypatch.chdir(directory)
    directory.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(client.CommandFailed, match="may not be used by uid 65534") as caught:
            client.status("api")
    finally:
        os.seteuid(0)
    assert caught.value.code == FAILED


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


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--socket", "--bind=localhost:8000"], "with --socket say an IP address"),
        (["--pid-file=/nowhere/app.pid"], "there is no directory /nowhere: make it, or use /run/app"),
        (["--control=/nowhere/control"], "there is no directory /nowhere"),
        (["--user=nobody\nExecStartPre=/bin/false"], "say a user's name or number"),
        (["--name=-x"], "letters, digits"),
        (["--name=app.service"], "without .service at the end"),
        ([f"--name={300 * 'x'}"], "up to 200 letters"),
    ],
)
def test_a_unit_that_could_not_work_is_not_printed(tmp_path: Path, options: list[str], complaint: str) -> None:
    command = [*COMMAND, "unit", "app:main", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert complaint in result.stderr


def test_a_mere_name_of_a_control_socket_is_the_same_in_the_whole_unit(tmp_path: Path) -> None:
    command = [*COMMAND, "unit", "app:main", "--control=admin"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert text.count("/run/app/admin") == 2
    assert "admin" not in text.replace("/run/app/admin", "")
