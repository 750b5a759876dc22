"""What is shown while a command waits: in lines, and on a terminal."""

from __future__ import annotations

import contextlib
import math
import os
import pty
import re
import signal
import subprocess
from typing import Any

import pytest

from ecdysis_async.cli.progress import Lines, Progress, describe_services, describe_status, fitting_rows
from ecdysis_async.report import Outcome, Phase, RestartReport
from tests.cli.commands import (
    COMMAND,
    INTERRUPTED,
    SERVING,
    Run,
    call,
)

pytestmark = pytest.mark.main_python_only


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


def phase(waiting_for: str, report: RestartReport | None = None, *waits: str) -> dict[str, Any]:
    """Make an event as a service tells it while it restarts, or stops."""
    workers = [{"slot": slot, "waiting_for": wait} for slot, wait in enumerate(waits)]
    told = report.to_json() if report is not None else None
    return {"event": "phase", "waiting_for": waiting_for, "workers": workers, "report": told}


def test_a_roll_out_is_told_in_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """In a log nobody wants each step of each worker; and what all of them took is a sum, which has to be complete."""
    progress, report = Progress(Lines(), "/run/api.sock"), RestartReport("1d", 2, 10)
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
        "restart 1d of /run/api.sock, asked of pid 10",
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
    progress = Progress(Lines(seconds), "/run/api.sock")
    progress.show(phase("generation 2 to start, for 0.0 s so far"))
    progress.show(phase("generation 2 (pid 12) to start, for 0.1 s so far"))
    for left in (3, 3, 2, 1):
        progress.show(phase(f"{left} connection{'s' * (left > 1)}, deadline in {left} s"))
    assert capsys.readouterr().out.splitlines() == [
        "  waiting for generation 2 to start, for 0.0 s so far",
        *(f"  waiting for {left} connection{'s' * (left > 1)}, deadline in {left} s" for left in counts),
    ]


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


def test_several_services_are_a_table() -> None:
    status = {"generation": 3, "pid": 7, "state": "serving", "connections": 2, "listeners": [{"address": "[::1]:80"}]}
    why = "the service at /run/longer.sock does not answer: is it stopped?"
    found: dict[str, Any] = {"/run/a.sock": {**status, "workers": [{}, {}]}, "/run/longer.sock": why}
    assert describe_services(found).splitlines() == [
        "control socket    generation  pid  state      workers  connections  listening",
        "/run/a.sock       3           7    serving    2        2            [::1]:80",
        "/run/longer.sock                   no answer",
        why,
    ]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"stopping": {"phase": "draining", "ends_in": 19.4}}, "stopping (draining, 19 s at most)"),
        ({"stopping": {"phase": "draining", "ends_in": None}}, "stopping (draining)"),
        ({}, "stopping (draining)"),  # an older release
    ],
)
def test_a_service_that_stops_says_so_and_listens_nowhere(told: dict[str, Any], said: str) -> None:
    listener = {"name": "a", "address": "127.0.0.1:80", "kind": "tcp"}
    facts = {"generation": 3, "pid": 7, "state": "draining", "uptime": 1.0, "connections": 2, "listeners": [listener]}
    status = {**facts, "waiting_for": "2 connections", "restart": None, "draining": [], "last_report": None, **told}
    lines = describe_status(status).splitlines()
    assert lines[0] == f"generation 3 (pid 7): {said}, up 1.0 s"
    assert "  no longer on 127.0.0.1:80 (tcp)" in lines
    assert describe_services({"a": status}).splitlines()[1].split("  ")[-1] == "nowhere"
    lame = describe_status({**status, "state": "serving", "stopping": {"phase": "lame duck", "ends_in": 6.0}})
    assert lame.startswith("generation 3 (pid 7): stopping (lame duck, 6 s at most)")
    assert "  listening    127.0.0.1:80 (tcp)" in lame.splitlines()


@pytest.mark.parametrize("count", [2, 8, 64])
def test_a_watched_status_fits_a_screen_with_what_matters_first(count: int) -> None:
    workers = [
        {"slot": number, "pid": 100 + number, "generation": 2, "state": "serving", "connections": 1, "silence": 0.1}
        for number in range(count)
    ]
    workers[1] |= {"silence": 7.0}
    status = {
        "generation": 2,
        "pid": 1,
        "state": "serving",
        "uptime": 5.0,
        "connections": count,
        "listeners": [{"name": "a", "address": "127.0.0.1:1", "kind": "tcp"}],
        "waiting_for": "worker 1 (pid 101) to answer, which has been silent for 7 s",
        "restart": {"id": "0123456789ab", "generation": 3, "pid": None, "phase": "worker 1 of 64", "seconds": 7.0},
        "draining": [
            {
                "generation": 1,
                "pid": 7,
                "state": "draining",
                "connections": 3,
                "jobs": 2,
                "ends_in": 20.0,
                "serving": ["GET /slow, 3.2 s old", "2 more"],
            }
        ],
        "last_report": None,
        "workers": workers,
    }
    rows = fitting_rows(status, 22)
    lines = [f"{name}: {line}" for name, text in rows for line in text.splitlines()]
    assert len(lines) <= 22
    assert lines[0].startswith("restart: 0123456789ab to generation 3")
    assert lines[1].startswith("waiting for: worker 1 (pid 101)")
    assert lines[2] == "draining: generation 1 (pid 7): 3 connections and 2 jobs, ends within 20 s"
    assert lines[3] == "draining:   GET /slow, 3.2 s old"
    assert any(line.startswith("worker 1: ") and "has not answered for 7 s" in line for line in lines)
    if count == 64:
        assert "workers: 63 serving in generation 2" in lines
    assert "connections: " in "\n".join(lines)


def test_a_status_says_who_holds_and_who_waits_for_what_one_process_holds() -> None:
    claims = [
        {"name": "scheduler", "is_held": False, "seconds": 3.2, "slot": 0, "pid": 70},
        {"name": "scheduler", "is_held": True, "seconds": 12.4, "slot": 1, "pid": 71},
    ]
    found: dict[str, Any] = {
        "generation": 1,
        "pid": 69,
        "state": "serving",
        "uptime": 1.0,
        "connections": 0,
        "listeners": [],
        "waiting_for": None,
        "restart": None,
        "last_report": None,
        "draining": [],
        "exclusive": claims,
    }
    told = "scheduler: worker 1 (pid 71) holds it, for 12 s; worker 0 (pid 70) waits, for 3 s"
    assert told in describe_status(found)
    # A service without workers, and one of a release that does not know of it.
    found["exclusive"] = [{"name": "scheduler", "is_held": True, "seconds": 1.0}]
    assert "scheduler: pid 69 holds it, for 1 s" in describe_status(found)
    del found["exclusive"]
    assert "scheduler" not in describe_status(found)
