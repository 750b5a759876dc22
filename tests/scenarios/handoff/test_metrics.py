"""The metrics of a service without workers, scraped while it restarts: no counter falls."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ports import find_free_port
from tests.scenarios.run.commands import PROJECT, get, wait_until
from tests.scenarios.run.test_metrics import Scraper, is_counter, scrape, wait_for_number

PROGRAM = """
import os, pathlib, sys, threading, time, anyio, ecdysis_async
from ecdysis_async import Ecdysis
from ecdysis_async.anyio_listeners import AnyioListener

def die():
    # Once somebody has asked, and has been told what was counted.
    while not pathlib.Path("told").exists():
        time.sleep(0.01)
    os._exit(7)

async def handle(stream):
    async with stream:
        await stream.receive()
        await stream.send(b"ok")

# Until it is told to go on, or is not to wait any more.
while open("broken").read() == "waits in its imports":
    time.sleep(0.01)

async def main():
    async with Ecdysis(
        pid_file="pid",
        probation=float(open("probation").read()),
        drain_timeout=5,
        health_bind=sys.argv[1],
        metrics=True,
        control_socket=os.environ.get("CONTROL"),
        takeover=os.environ.get("TAKEOVER"),
        status_page=True,
    ) as ecdysis:
        listener = AnyioListener(ecdysis.listen_tcp("127.0.0.1", int(sys.argv[2])))
        broken = open("broken").read()
        if broken == "at the start":
            raise RuntimeError("no")
        while open("broken").read() == "waits in its start":
            pathlib.Path("greeted").touch()
            await anyio.sleep(0.01)
        if broken == "on probation":
            await ecdysis.ready()
            threading.Thread(target=die).start()
        await ecdysis.serve(handle, listener)

if sys.argv[3] == "trio":
    anyio.run(main, backend="trio")
else:
    ecdysis_async.run(main, loop=sys.argv[3])
"""


@contextlib.contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the program, and end all of its generations."""
    (directory / "program.py").write_text(PROGRAM)
    (directory / "broken").touch()
    (directory / "probation").write_text("0.2")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    first = subprocess.Popen([sys.executable, "program.py", *arguments], cwd=directory, env=environment)
    try:
        yield first
    finally:
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            last = psutil.Process(find_pid(directory))
            last.terminate()
            wait_until(lambda: last.status() == psutil.STATUS_ZOMBIE, "it does not end")
        first.kill()
        first.wait()


def find_pid(directory: Path) -> int:
    return int((directory / "pid").read_text())


def is_served(port: int) -> bool:
    """Say whether anybody listens there; the pid file is there before that, and a client would be counted."""
    return any(
        getattr(each.laddr, "port", 0) == port and each.status == "LISTEN" for each in psutil.net_connections("tcp")
    )


def visit(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(b"?")
        assert sock.recv(10) == b"ok"


@pytest.mark.main_python_only
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_no_counter_falls(tmp_path: Path, loop: str) -> None:
    health, port = find_free_port(), find_free_port()
    with serving(tmp_path, f"127.0.0.1:{health}", str(port), loop) as first:
        wait_until(lambda: first.poll() is not None or is_served(port), "it does not serve")
        assert first.poll() is None
        # Both ports are listened on before either is answered.
        wait_until(lambda: get(health, "/ready") == (200, "ready\n"), "it is not ready")
        with Scraper(health) as scraper:
            for generation, probation in ((2, 0.2), (3, 60)):
                visit(port)
                # For the restarts that this generation is going to be asked for.
                (tmp_path / "probation").write_text(str(probation))
                former = find_pid(tmp_path)
                os.kill(former, signal.SIGHUP)
                wait_for_number(health, ("ecdysis_restarts_total", "outcome=settled", "reason=none"), generation - 1)
                wait_for_number(health, ("ecdysis_restart_phase_seconds_count", "phase=drain"), generation - 1)
                wait_until(lambda: find_pid(tmp_path) != former, "the pid file does not move")  # noqa: B023 - called here
            visit(port)
            wait_for_number(health, ("ecdysis_requests_total", "slot=0"), 3)
            assert scrape(health)["ecdysis_generation",] == 3
            (tmp_path / "broken").write_text("at the start")
            os.kill(find_pid(tmp_path), signal.SIGHUP)
            wait_for_number(health, ("ecdysis_restarts_total", "outcome=failed", "reason=successor_failed"), 1)
            assert scrape(health)["ecdysis_last_restart_successful",] == 0
            (tmp_path / "broken").write_text("on probation")
            os.kill(find_pid(tmp_path), signal.SIGHUP)
            wait_for_number(health, ("ecdysis_generation",), 4)
            for _ in range(5):
                visit(port)
            wait_for_number(health, ("ecdysis_requests_total", "slot=0"), 8)
            (tmp_path / "told").touch()
            wait_for_number(health, ("ecdysis_restarts_total", "outcome=rolled_back", "reason=died_on_probation"), 1)
            assert scrape(health)["ecdysis_requests_total", "slot=0"] >= 8
            assert get(health, "/")[1].startswith("<!doctype html>")
        assert scraper.fallen == []


@pytest.mark.main_python_only
@pytest.mark.parametrize("where", ["imports", "start", "takeover"])
def test_no_counter_falls_where_the_predecessor_is_killed_before_the_commit(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    health, port = find_free_port(), find_free_port()
    arguments = (f"127.0.0.1:{health}", str(port), "asyncio")
    monkeypatch.setenv("CONTROL", str(tmp_path / "control"))
    with serving(tmp_path, *arguments) as first:
        wait_until(lambda: first.poll() is not None or is_served(port), "it does not serve")
        visit(port)
        (tmp_path / "broken").write_text("waits in its imports" if where == "imports" else "waits in its start")
        if where == "takeover":
            environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TAKEOVER": str(tmp_path / "control")}
            command = [sys.executable, "program.py", *arguments]
            newcomer = subprocess.Popen(command, cwd=tmp_path, env=environment)
            request.addfinalizer(newcomer.wait)
            request.addfinalizer(newcomer.kill)
            successor = psutil.Process(newcomer.pid)
        else:
            os.kill(first.pid, signal.SIGHUP)
            wait_until(lambda: psutil.Process(first.pid).children() != [], "there is no successor")
            [successor] = psutil.Process(first.pid).children()
        if where != "imports":
            # It has said who it is, and its predecessor has read that.
            wait_until((tmp_path / "greeted").exists, "it does not begin")
        visit(port)
        visit(port)
        wait_for_number(health, ("ecdysis_requests_total", "slot=0"), 3)
        before = scrape(health)
        first.kill()
        first.wait()
        (tmp_path / "broken").write_text("")
        wait_for_number(health, ("ecdysis_generation",), 2)
        after = scrape(health)
        wait_until(lambda: find_pid(tmp_path) == successor.pid, "the pid file does not move")
        fallen = [name for name in before if is_counter(name[0]) and after[name] < before[name]]
        assert fallen == []
        visit(port)
        wait_for_number(health, ("ecdysis_requests_total", "slot=0"), 4)
