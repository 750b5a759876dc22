"""What one process of a service holds at a time: never two, and soon another one, whatever becomes of the first."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.scenarios.run.commands import APP, PATIENCE_SECONDS, call, make_environment, running, taking_over, wait_until

# The body takes note of when it is in; ending takes it a moment, in which nobody else may begin.
HOLD = """
import os, time
import anyio
from ecdysis_async import exclusive

def note(word):
    with open("held", "a") as file:
        file.write(f"{word} {os.getpid()} {time.monotonic()}\\n")

async def hold():
    async with exclusive("scheduler"):
        note("begin")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            note("end")
"""

ASGI = (
    HOLD
    + """
import contextlib
TEXT = b"here"
"""
    + APP.replace(
        "while True:",
        """async with anyio.create_task_group() as group:
          group.start_soon(hold)
          while True:""",
    )
    .replace("            message", "              message")
    .replace('            await send({"type": message', '              await send({"type": message')
    .replace("            if message", "              if message")
    .replace("                return\n", "                group.cancel_scope.cancel()\n                return\n")
)

MAIN = (
    HOLD
    + """
async def app(ecdysis):
    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        await ecdysis.serve_forever()
"""
)

# Dies as soon as it serves.
DIES = MAIN.replace("await ecdysis.serve_forever()", "await ecdysis.ready()\n        os._exit(1)")

OWN = (
    HOLD
    + """
import sys
import ecdysis_async
from ecdysis_async import Ecdysis
from main import app

async def main():
    async with Ecdysis(control_socket=os.path.abspath("control"), probation=0.2, drain_timeout=5) as ecdysis:
        await app(ecdysis)

if sys.argv[1] == "trio":
    import trio
    trio.run(main)
else:
    ecdysis_async.run(main, loop=sys.argv[1])
"""
)


class Holders:
    """Who has held it, and when."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "held"

    def read(self) -> list[tuple[str, int, float]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [(word, int(pid), float(when)) for word, pid, when in (line.split() for line in lines)]

    def wait_for_another(self, *former: int) -> int:
        """Wait until somebody else has it than those; return that process."""

        def find() -> int | None:
            notes = self.read()
            return notes[-1][1] if notes and notes[-1][0] == "begin" and notes[-1][1] not in former else None

        wait_until(find, f"nobody but {former} has it: {self.read()}")
        found = find()
        assert found is not None
        return found

    def check(self, *killed: int) -> None:
        """See that no two have had it at a time; those who were killed could not say that they let go."""
        holder = None
        for word, pid, when in self.read():
            if word == "begin":
                assert holder is None or holder in killed, (holder, pid, when, self.read())
                holder = pid
            else:
                assert holder == pid, self.read()
                holder = None


@pytest.fixture
def holders(tmp_path: Path) -> Holders:
    return Holders(tmp_path)


@pytest.mark.main_python_only
@pytest.mark.parametrize(
    ("source", "options"),
    [
        (ASGI, ("--loop", "asyncio", "--workers", "3")),
        (ASGI, ("--loop", "trio", "--workers", "2")),
        (MAIN, ("--loop", "uvloop", "--workers", "2")),
    ],
    ids=["uvicorn-asyncio", "hypercorn-trio", "main-uvloop"],
)
def test_one_of_all_workers_and_generations_has_it(
    tmp_path: Path, holders: Holders, source: str, options: tuple[str, ...]
) -> None:
    """It is passed on at a restart, after the holder was killed, and not before; the anchor's end changes nothing."""
    (tmp_path / "main.py").write_text(source)
    with running(tmp_path, "--bind", "127.0.0.1:0", "--probation", "0.2", "--drain-timeout", "5", *options) as run:
        run.wait_for("[23] workers serving")
        first = holders.wait_for_another()
        workers = len(run.status()["workers"])
        wait_until(lambda: len(run.status()["exclusive"]) == workers, f"{run.status()['exclusive']}")
        assert [each["pid"] for each in run.status()["exclusive"] if each["is_held"]] == [first]
        done = call("restart", "--control", run.control, cwd=tmp_path)
        assert done.returncode == 0, done
        second = holders.wait_for_another(first)
        assert second in {each["pid"] for each in run.status()["workers"] if each["generation"] == 2}
        os.kill(second, signal.SIGKILL)
        third = holders.wait_for_another(second)
        assert call("restart", "--anchor", "--control", run.control, cwd=tmp_path).returncode == 0
        run.wait_for("upgraded")
        assert call("restart", "--control", run.control, cwd=tmp_path).returncode == 0
        holders.wait_for_another(second, third)
        assert "StartupError" not in run.log
        assert "was never retrieved" not in run.log
    holders.check(second)
    assert holders.read()[-1][0] == "end"


@pytest.mark.main_python_only
@pytest.mark.parametrize("when", ["start", "probation"])
def test_a_release_that_fails_leaves_it_where_it_was(tmp_path: Path, holders: Holders, when: str) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    with running(tmp_path, "--workers", "2", "--probation", "600", "--drain-timeout", "5") as run:
        run.wait_for("2 workers serving")
        first = holders.wait_for_another()
        (tmp_path / "main.py").write_text("raise RuntimeError('broken')\n" if when == "start" else MAIN)
        with ThreadPoolExecutor() as executor:
            restart = executor.submit(call, "restart", "--control", run.control, cwd=tmp_path)
            if when == "probation":
                wait_until(lambda: "on probation" in str(run.status()["waiting_for"]), "it is not on probation")
                dies = next(each["pid"] for each in run.status()["workers"] if each["generation"] == 2)
                os.kill(dies, signal.SIGKILL)
            assert restart.result().returncode == (1 if when == "start" else 5)
        assert [word for word, _, _ in holders.read()] == ["begin"]
        assert holders.wait_for_another() == first
    holders.check()


@contextlib.contextmanager
def running_own(directory: Path, loop: str) -> Iterator[str]:
    """Run a program of one's own, without an anchor; return its control socket, and stop whatever is left of it."""
    (directory / "main.py").write_text(MAIN)
    (directory / "own.py").write_text(OWN)
    control, log = str(directory / "control"), directory / "log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "own.py", loop],
            cwd=directory,
            env=make_environment(directory, {}),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        yield control
        assert call("stop", "--control", control, cwd=directory).returncode == 0
    finally:
        print(log.read_text())  # noqa: T201 - pytest shows it with a failure
        for pid in {pid for _, pid, _ in Holders(directory).read()} | {process.pid}:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        process.wait(PATIENCE_SECONDS)


@pytest.mark.main_python_only
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_without_an_anchor_it_goes_from_generation_to_generation(tmp_path: Path, holders: Holders, loop: str) -> None:
    """A successor waits while it is on probation, and where that fails, nothing has changed hands."""
    with running_own(tmp_path, loop) as control:
        first = holders.wait_for_another()
        assert call("restart", "--control", control, cwd=tmp_path).returncode == 0
        second = holders.wait_for_another(first)
        (tmp_path / "main.py").write_text(DIES)
        assert call("restart", "--control", control, cwd=tmp_path).returncode in (1, 5)
        assert holders.wait_for_another() == second
        (tmp_path / "main.py").write_text(MAIN)
        assert call("restart", "--control", control, cwd=tmp_path).returncode == 0
        holders.wait_for_another(first, second)
    holders.check()
    assert len(holders.read()) == 6


@pytest.mark.main_python_only
def test_a_newcomer_that_takes_the_service_over_gets_it(tmp_path: Path, holders: Holders) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    with running(tmp_path, "--probation", "0.2", "--drain-timeout", "5") as run:
        first = holders.wait_for_another()
        with taking_over(run, tmp_path, "--probation", "0.2", "--drain-timeout", "5"):
            holders.wait_for_another(first)
            assert run.wait() == 0
    holders.check()


START_UP = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        exclusive = scope["state"]["ecdysis.exclusive"]
        await receive()
        async with exclusive("database"):
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
"""
START_UP_OF_MAIN = """
from ecdysis_async import exclusive

async def app(ecdysis):
    async with exclusive("database"):
        await ecdysis.serve_forever()
"""


@pytest.mark.main_python_only
@pytest.mark.parametrize("source", [START_UP, START_UP_OF_MAIN], ids=["asgi", "main"])
def test_a_start_up_that_would_wait_for_ever_fails_and_says_why(tmp_path: Path, source: str) -> None:
    """What an application keeps for as long as it serves cannot be passed to one that is to serve first."""
    (tmp_path / "main.py").write_text(source)
    with running(tmp_path, "--probation", "0.2", "--drain-timeout", "5", "--ready-timeout", "30") as run:
        run.wait_for("1 worker serving")
        done = call("restart", "--control", run.control, cwd=tmp_path)
        assert done.returncode == 1
        pid = run.status()["workers"][0]["pid"]
        assert f"waits for exclusive('database'), which pid {pid} (generation 1) has held" in done.stderr
        assert "--one-at-a-time" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.main_python_only
def test_what_workers_do_once_each_in_their_start_up_they_do_one_after_the_other(
    tmp_path: Path, holders: Holders
) -> None:
    (tmp_path / "main.py").write_text(
        HOLD
        + """
async def app(ecdysis):
    async with ecdysis.exclusive("migration"):
        note("begin")
        await anyio.sleep(0.3)
        note("end")
    await ecdysis.serve_forever()
"""
    )
    with running(tmp_path, "--workers", "4", "--probation", "0.2") as run:
        run.wait_for("4 workers serving")
    holders.check()
    assert len(holders.read()) == 8


@pytest.mark.main_python_only
def test_the_start_after_the_anchor_was_killed_waits_for_what_is_left_of_the_service(
    tmp_path: Path, holders: Holders
) -> None:
    """A worker that has lost its anchor ends, and takes its time for the clean-up."""
    slow = MAIN.replace("await anyio.sleep(0.05)", "await anyio.sleep(3)")
    assert slow != MAIN
    (tmp_path / "main.py").write_text(slow)
    with running(tmp_path, "--drain-timeout", "10") as run:
        run.wait_for("1 worker serving")
        first = holders.wait_for_another()
        run.process.kill()
        run.wait()
        with running(tmp_path, "--drain-timeout", "10") as anew:
            holders.wait_for_another(first)
            anew.wait_for("1 worker serving", 2)
    holders.check()
    assert not (tmp_path / "control.exclusive").exists()
