"""``ecdysis prove`` as a process: on services that lose nothing, on some with a fault each, and on those of others."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ports import find_free_port
from tests.scenarios.run.harness import ECDYSIS, PROJECT, running

APPS = "tests.scenarios.proving.apps"
IN_PROJECT = ("--app-dir", str(PROJECT))
# How fast a service is, is no matter of most tests, and nothing that a busy machine could tell.
QUICK = ("--between", "0.7", "--rate", "50", "--max-slowdown", "100")
ONE = ("--restarts", "1", "--no-broken", "--no-kill-successor", "--no-kill-predecessor")

GOOD, BAD, USAGE, INTERRUPTED = 0, 1, 2, 130

pytestmark = pytest.mark.main_python_only


def prove(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run the command to its end; return exit code and output."""
    done = subprocess.run(
        [*ECDYSIS, "prove", *arguments],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout + done.stderr


def judge(*arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Return exit code, verdict and the whole output."""
    code, output = prove(*arguments, "--json", **environment)
    verdict: dict[str, Any] = next(json.loads(line) for line in output.splitlines() if line.startswith("{"))
    return code, verdict, output


def test_a_service_that_loses_nothing_over_restarts_and_faults(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, verdict, output = judge(
        *("--restarts", "1", *QUICK, "--html", str(page), f"{APPS}:good", *IN_PROJECT, "--server-option"),
        "ws=websockets-sansio",
    )
    assert (code, verdict["verdict"]) == (GOOD, "good"), output
    assert verdict["failures"] == verdict["notes"] == []
    assert set(verdict["kinds"]) == {"new", "kept", "slow", "upload", "websocket"}
    names = [step["name"] for step in verdict["steps"]]
    assert names == ["restart 1", "2: broken release", "3: successor killed", "4: predecessor killed"]
    restart, broken, successor, predecessor = verdict["steps"]
    assert [step["code"] for step in verdict["steps"]] == [0, 1, 1, 0]
    assert "broken on purpose" in broken["message"]
    assert restart["accept_gap"] is not None
    assert 0 < restart["first_answer"] < restart["seconds"]
    assert successor["killed"] != predecessor["killed"]
    assert 0 < verdict["memory"]["steady"] < verdict["memory"]["restarts"]
    assert verdict["latency"]["steady"]["p50"] <= verdict["latency"]["steady"]["p999"]
    assert verdict["requests"] > verdict["latency"]["faults"]["count"] > 0
    assert "Nothing was lost" in page.read_text()


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("asgi_app:app", ()),
        ("asgi_app:app", ("--server", "hypercorn", "--loop", "asyncio")),
        ("asgi_app:app", ("--workers", "2")),
    ],
    ids=["uvicorn", "hypercorn", "workers"],
)
def test_the_example(target: str, options: tuple[str, ...]) -> None:
    code, output = prove(*ONE, *QUICK, target, "--app-dir", "examples", *options)
    assert code == GOOD, output
    assert output.rstrip().endswith("verdict: nothing was lost")
    assert re.search(r"^restart 1 +settled, .*accept gap .* new code answered after", output, re.MULTILINE)
    assert re.search(r"^steady +[\d,]+ +[\d.]+ ms +[\d.]+ ms +[\d.]+ ms +[\d.]+ ms$", output, re.MULTILINE)


def test_an_aiohttp_application() -> None:
    code, verdict, output = judge(*ONE, *QUICK, "tests.scenarios.run.apps:make_aiohttp", *IN_PROJECT, "--factory")
    assert (code, verdict["failures"]) == (GOOD, []), output
    assert verdict["steps"][0]["first_answer"] is not None
    # It has no POST, and no WebSockets.
    assert [note.partition(":")[0] for note in verdict["notes"]] == ["no uploads", "no WebSockets"]


def test_websockets_that_move(tmp_path: Path) -> None:
    requests = tmp_path / "requests.toml"
    requests.write_text('[[request]]\nkind = "websocket"\nrate = 40\nconnections = 8\n')
    arguments = ("--requests", str(requests), "websocket_echo:app", "--app-dir", "examples")
    code, verdict, output = judge(*ONE, *QUICK, *arguments, "--server-option", "ws=websockets-sansio")
    assert (code, verdict["failures"]) == (GOOD, []), output
    assert verdict["closed_by_server"] == {"announced": 0, "idle": 0, "busy": 0}
    assert set(verdict["kinds"]) == {"websocket"}


def test_a_service_that_loses_one_percent() -> None:
    code, verdict, output = judge(*ONE, *QUICK, "--rate", "120", f"{APPS}:lossy", *IN_PROJECT)
    assert (code, verdict["verdict"]) == (BAD, "bad"), output
    assert {failure["class"] for failure in verdict["failures"]} == {"wrong status"}
    assert "status 500 instead of 200" in verdict["examples"][0]["text"]


def test_a_service_that_closes_idle_connections_at_a_restart() -> None:
    code, verdict, output = judge(*ONE, *QUICK, f"{APPS}:hasty", *IN_PROJECT, "--server", "main")
    assert code == BAD, output
    found = {failure["class"] for failure in verdict["failures"]}
    assert "idle connection closed without notice" in found
    assert found <= {"idle connection closed without notice", "closed without an answer", "connection reset"}
    assert {failure["phase"] for failure in verdict["failures"]} == {"restart 1"}
    assert verdict["closed_by_server"]["idle"] > 0
    assert any("no answer names its generation" in note for note in verdict["notes"])


def test_a_service_whose_second_generation_is_slower(tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    arguments = (*ONE, "--between", "3", "--rate", "80", f"{APPS}:make_slower", *IN_PROJECT, "--factory")
    code, verdict, output = judge(*arguments, FIRST=first)
    assert code == BAD, output
    assert {failure["class"] for failure in verdict["failures"]} == {"slower generation"}
    # What was answered late on a busy machine is told besides.
    told = next(each["text"] for each in verdict["examples"] if "slower" in each["text"])
    assert re.search(r"generation 2 is [\d.]+ times slower than generation 1 in", told)
    assert "(--max-slowdown 2)" in told


@pytest.mark.backends("asyncio")
async def test_a_service_that_runs_already(tmp_path: Path) -> None:
    async with running(
        tmp_path, "asgi_app:app", "--app-dir", str(PROJECT / "examples"), "--bind", "127.0.0.1:0"
    ) as run:
        await run.find_port()
        code, output = prove("--restarts", "1", *QUICK, "--control", str(tmp_path / "control"))
        assert code == GOOD, output
        assert "no answer names its generation" in output
        assert "restart 1 " in output and "killed" not in output


def test_workers_of_uvicorn_for_comparison() -> None:
    """Its restart closes connections that are idle, and some that are not."""
    port = find_free_port()
    uvicorn = f"{sys.executable} -m uvicorn --workers 2 --app-dir examples --port {port} asgi_app:app"
    code, verdict, output = judge(
        *("--restarts", "1", "--between", "1", "--connections", "30", "--rate", "100", "--max-slowdown", "100"),
        *("--command", uvicorn, "--restart-command", "kill -HUP {pid}", "--url", f"http://127.0.0.1:{port}/"),
    )
    assert (code, verdict["steps"][0]["code"]) == (BAD, 0), output
    # Which of the two it is depends on whether the client was just asking.
    found = {failure["class"] for failure in verdict["failures"]}
    assert found & {"idle connection closed without notice", "connection reset"}
    # It ends a worker before it starts another one: more memory than before is not needed.
    assert min(verdict["memory"]["steady"], verdict["memory"]["restarts"]) > 0


def test_a_service_that_ends_meanwhile(tmp_path: Path) -> None:
    command = [*ECDYSIS, "prove", *ONE, "--between", "2", "--log", str(tmp_path / "log"), "asgi_app:app"]
    with subprocess.Popen(
        [*command, "--app-dir", "examples"], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert "restart 1" in lines[1]
        [anchor] = psutil.Process(process.pid).children()[:1]
        for each in [anchor, *anchor.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        output = process.stdout.read()
    assert process.returncode == BAD, output
    assert "connection refused" in output
    assert "restart 1: it failed" in output


def test_it_is_interrupted() -> None:
    command = [*ECDYSIS, "prove", *ONE, "--between", "30", "asgi_app:app", "--app-dir", "examples"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            output = process.stdout.read()
            process.wait()
        finally:
            process.kill()
    assert (process.returncode, output) == (INTERRUPTED, "\necdysis: interrupted: nothing is proved\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--restarts", "0", "asgi_app:app", "--no-broken", "--no-kill-successor", "--no-kill-predecessor"), "nothing"),
        (("asgi_ap:app", "--app-dir", "examples"), "there is no module 'asgi_ap'"),
        (("asgi_app:ap", "--app-dir", "examples"), "did you mean 'app'"),
        (("asgi_app:app", "--app-dir", "examples", "--wrokers", "2"), "--wrokers"),
        (("--workers", "2", "asgi_app:app"), "there is no such option of `ecdysis prove`"),
        (("--control", "/nowhere/control", "--no-broken"), "/nowhere/control"),
        (("--restart-command", "no-such-program", "--url", "http://127.0.0.1:9/"), "no-such-program"),
        (("--restart-command", "true", "--url", "http://127.0.0.1:9/"), "nothing listens at http://127.0.0.1:9/"),
        (("--restart-command", "true", "--url", "http://example.org/"), "the load goes to loopback only"),
        (("asgi_app:app", "--app-dir", "examples", "--websocket-path", "/ws"), "websocket /ws: "),
        (("asgi_app:app", "--app-dir", "examples", "--bind", "unix:/tmp/nobody.sock"), "listens on no TCP address"),
        (("asgi_app:app", "--requests", "README.md"), "README.md: "),
        (("asgi_app:app", "--requests", sys.executable), "this is no TOML file"),
        (("asgi_app:app", "--header", "nonsense"), "write NAME: VALUE"),
        (("asgi_app:app", "--html", "/nowhere/page.html"), "there is no directory /nowhere"),
        (("asgi_app:app", "--log", "/"), "/ is a directory"),
        (("asgi_app:app", "--connections", "-1"), "at least one is needed"),
        (("--command", "a 'b", "--restart-command", "true", "--url", "http://127.0.0.1:9/"), "No closing quotation"),
        (("websocket_echo:app", "--app-dir", "examples"), "status 500: say by --path what the service answers"),
        (
            ("--command", "no-such-program", "--restart-command", "true", "--url", "http://127.0.0.1:9/"),
            "no-such-program",
        ),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], words: str) -> None:
    code, output = prove(*arguments)
    assert code == USAGE, output
    assert words in output
    assert "Traceback (most" not in output
    assert output.count("ecdysis: ") >= 1
