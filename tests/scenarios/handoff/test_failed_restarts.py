"""Restarts that come to nothing: what the caller learns, and that the old generation serves as if nothing had been."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.scenarios.handoff.harness import SERVICE, TIME_IS_UP, Clients, Service

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]

HOSTILE = Path(__file__).with_name("hostile.py")

START_FAILURES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "exit 0": ({"at_import": "sys.exit(0)"}, "start", "exit status 0", ""),
    "exit 1": ({"at_import": "sys.exit(1)"}, "start", "exit status 1", ""),
    "exit with a message": ({"at_import": "sys.exit('no licence')"}, "start", "exit status 1", "no licence"),
    "import error": ({"at_import": "import missing_module"}, "start", "status 1", "No module named 'missing_module'"),
    "segmentation fault": ({"at_import": "os.kill(os.getpid(), 11)"}, "start", "killed by SIGSEGV", ""),
    "exit 0 within the block": ({"at_start": "sys.exit(0)"}, "initialise", "SystemExit: 0", ""),
    "exit 1 within the block": ({"at_start": "sys.exit(1)"}, "initialise", "SystemExit: 1", ""),
    "exception": ({"at_start": "raise OSError('no database')"}, "initialise", "OSError: no database", ""),
    "stop before ready": ({"at_start": "ecdysis.stop()"}, "initialise", "told to stop before it served", ""),
}


@pytest.mark.backends("uvloop", "trio")
def test_a_successor_that_ends_before_it_is_ready(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    first = service.pids[0]
    with Clients(service.address) as clients:
        for settings, phase, text, stderr in START_FAILURES.values():
            service.configure(**{"at_import": "", "at_start": "", **settings})
            failure = service.fail_to_restart()
            assert (failure["error"], failure["phase"]) == ("SuccessorFailed", phase), failure["text"]
            assert text in failure["text"]
            assert stderr in failure["stderr"]
        service.configure(at_import="", at_start="")
        clients.wait_for(first)
        second = service.restart("settled")["successor_pid"]
        clients.wait_for(second)
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == [first, second]
    # The traceback of an import error is in the error, and was passed on to the log as well.
    service.wait_for_log("No module named 'missing_module'")
    # A process that ends before it enters its Ecdysis leaves the channel, which it never asked for, to the interpreter.
    unclosed = ("Exception ignored in: <socket.socket", "ResourceWarning: unclosed <socket.socket")
    service.expected_blemishes = ("Traceback (most", *unclosed)


@pytest.mark.backends("asyncio", "trio")
def test_hostile_successors(backend: str, run_service: Run, tmp_path: Path) -> None:
    """Whatever comes over the channel: a typed error, everything closed, and the old generation serves."""
    mode = tmp_path / "mode"
    arguments = [sys.executable, "-W", "error", str(SERVICE), str(tmp_path / "settings.json")]
    command = [sys.executable, "-S", str(HOSTILE), *arguments]
    service = run_service(backend, ecdysis={"command": command, "ready_timeout": 60}, limits={"END_GRACE_SECONDS": 3})
    first = service.pids[0]
    before = facts(first)
    for name, cause in (
        ("garbage", "GarbledFrame"),
        ("truncated", "TruncatedFrame"),
        ("closed", "ChannelClosed"),
        ("oversized", "FrameTooLarge"),
        ("no JSON", "GarbledFrame"),
        ("descriptor missing", "DescriptorMismatch"),
        ("descriptor too many", "DescriptorMismatch"),
        ("no descriptors", "GarbledFrame"),
        ("more descriptors than HELLO has", "GarbledFrame"),
        ("no pid", "GarbledFrame"),
        ("endless pid", "GarbledFrame"),
        ("unknown version", "VersionMismatch"),
        ("no version", "GarbledFrame"),
        ("unknown message", "UnknownMessage"),
        ("hello twice", "GarbledFrame"),
        ("ready first", None),
        ("ready without names", "GarbledFrame"),
        ("serving before commit", None),
        ("counters that are no memory", None),
        ("counters that are too short", None),
    ):
        mode.write_text(name, encoding="utf-8")
        failure = service.fail_to_restart()
        error = "RolledBack" if name.startswith("counters") else "SuccessorFailed"
        assert (failure["error"], failure["cause"]) == (error, cause), (name, failure["text"])
        assert service.ask()["pid"] == first
    # At the first look there may have been more than usual: a connection that was about to be closed.
    service.wait_until(
        lambda: all(count <= before[name] for name, count in facts(first).items()),
        f"{facts(first)}, and it was {before}",
    )
    mode.write_text("service", encoding="utf-8")
    assert service.restart("settled")["generation"] == 2


@pytest.mark.backends("anyio", "trio")
def test_a_successor_that_says_nothing(backend: str, run_service: Run, tmp_path: Path) -> None:
    (tmp_path / "mode").write_text("nothing at all", encoding="utf-8")
    service = run_service(backend, ecdysis={"command": [sys.executable, "-S", str(HOSTILE)], "ready_timeout": 0.5})
    failure = service.fail_to_restart()
    assert (failure["error"], failure["phase"]) == ("ReadyTimeout", "start")
    assert "does its command run this service?" in failure["text"]


@pytest.mark.backends("asyncio", "trio")
def test_a_start_that_takes_too_long(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"ready_timeout": 600})
    service.configure(at_start="print('looking for the database', file=sys.stderr, flush=True)\nawait wait()")
    with service.begin("restart", until="serving") as asking:
        service.wait_for("waiting")
        service.run(TIME_IS_UP)
        failure = asking.answer()
    assert (failure["error"], failure["phase"]) == ("ReadyTimeout", "initialise")
    assert "raise ready_timeout" in failure["text"]
    assert failure["stderr"].endswith("looking for the database")


@pytest.mark.backends("asyncio", "trio")
def test_a_command_that_appears_later(backend: str, run_service: Run, tmp_path: Path) -> None:
    program = tmp_path / "program"
    service = run_service(backend, ecdysis={"command": [str(program)]})
    failure = service.fail_to_restart()
    assert (failure["error"], failure["phase"], failure["cause"]) == ("SpawnFailed", "start", "FileNotFoundError")
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -W error {SERVICE} {tmp_path / 'settings.json'}\n")
    failure = service.fail_to_restart()
    assert (failure["error"], failure["cause"]) == ("SpawnFailed", "PermissionError")
    program.chmod(0o700)
    assert service.restart("settled")["outcome"] == "settled"


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_no_descriptors_left(backend: str, run_service: Run) -> None:
    """At each number of descriptors that are left: an error, or a restart that works, and never a generation less."""
    service = run_service(backend)
    first = service.pids[0]
    with service.begin("hello") as control:
        control.answer()

        def run(code: str) -> object:
            return control.say("run", code=code).answer()

        # A connection that asks, and is there already: an accept would be what fails.
        run("import resource, errno")
        limits = json.dumps(run("resource.getrlimit(resource.RLIMIT_NOFILE)"))
        for spare in range(12):
            count = f"len(os.listdir('/proc/self/fd')) - 1 + {spare}"
            run(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({count}, {limits}[1]))")
            answer = control.say("restart", until="serving").answer()
            run(f"resource.setrlimit(resource.RLIMIT_NOFILE, {limits})")
            if "outcome" in answer:
                break
            if answer["cause"] == "OSError" and answer["error"] != "SpawnFailed":
                # The successor, which is asked first for everything that goes wrong, has no part in this.
                assert f"this generation (pid {first}) could not go on" in answer["text"]
                assert "ulimit -n" in answer["text"]
            assert answer["error"] in ("SpawnFailed", "SuccessorFailed", "RestartError"), answer
            assert control.say("hello").answer()["pid"] == first
            assert service.ask()["pid"] == first
        else:
            service.restart()
        assert spare > 1
    assert service.ask()["generation"] == 2
    service.expected_blemishes = ("Traceback (most",)


@pytest.mark.backends("asyncio", "trio")
def test_a_pid_file_that_cannot_be_written(backend: str, run_service: Run, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    service = run_service(backend, ecdysis={"pid_file": str(directory / "pid")})
    first = service.pids[0]
    assert (directory / "pid").read_text() == f"{first}\n"
    moved = directory.rename(tmp_path / "moved")
    failure = service.fail_to_restart()
    assert (failure["error"], failure["phase"]) == ("SuccessorFailed", "initialise")
    assert "the pid file" in failure["text"]
    assert "cannot be written" in failure["text"]
    assert service.ask()["pid"] == first
    moved.rename(directory)
    service.expected_blemishes = ("Traceback (most",)
    second = service.restart("settled")["successor_pid"]
    service.wait_until(lambda: (directory / "pid").read_text() == f"{second}\n", "the pid file has not moved")
    service.stop()
    assert list(directory.iterdir()) == []


@pytest.mark.backends("asyncio", "trio")
def test_a_first_generation_without_pid_file_does_not_serve(backend: str, run_service: Run, tmp_path: Path) -> None:
    service = run_service(backend, ecdysis={"pid_file": str(tmp_path / "missing" / "pid")}, serves=False)
    assert service.wait_for_death(service.pids[0]) == 1
    assert "create its directory" in service.log
    service.expected_blemishes = ("Traceback (most",)


def facts(pid: int) -> dict[str, int]:
    """Count what a failed restart could leave in its process."""
    process = psutil.Process(pid)
    return {"descriptors": process.num_fds(), "children": len(process.children())}
