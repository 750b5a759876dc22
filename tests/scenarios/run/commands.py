"""``ecdysis run`` in a directory of its own, started and stopped here, and asked from outside."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil

from ecdysis_async.cli import client

PROJECT = Path(__file__).resolve().parents[3]
ECDYSIS = [sys.executable, "-W", "error", "-m", "ecdysis_async.cli"]

PATIENCE_SECONDS = 60.0

# A command may wait for a service that starts several processes, on a machine that has other work.
COMMAND_SECONDS = 240.0

APP = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(TEXT))]})
    await send({"type": "http.response.body", "body": TEXT})
"""


def write_app(path: Path, text: str, before: str = "") -> None:
    """Save an application that answers with a text; in one step, as editors do."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(f"TEXT = {text.encode()!r}\n{before}\n{APP}", encoding="utf-8")
    draft.replace(path)


def call(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*ECDYSIS, *arguments],
        cwd=cwd,
        env=make_environment(cwd, environment),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def make_environment(cwd: Path, more: dict[str, str]) -> dict[str, str]:
    """Return the environment of a command that is called in a directory, through symlinks or not, as by a shell."""
    return {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1", "PWD": str(cwd), **more}


def get(port: int, path: str = "/") -> tuple[int, str]:
    """Make one request on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)) as connection:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read().decode()


def wait_until(is_so: Callable[[], object], otherwise: str) -> None:
    """Wait for something that nobody tells."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


class Running:
    """A service that runs.

    Attributes:
        process: the one that was started.
        control: its control socket.
    """

    def __init__(
        self, cwd: Path, log: Path, control: str, *arguments: str, says_control: bool = True, **environment: str
    ) -> None:
        self.control = control
        self._log = log
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [*ECDYSIS, "run", "main:app", "--no-access-log", *arguments, *(("--control", control) * says_control)],
                cwd=cwd,
                env=make_environment(cwd, environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern: str, number: int = 1) -> str:
        """Wait for the nth place in the log that fits; return its first group, or all of it."""
        wait_until(lambda: len(re.findall(pattern, self.log)) >= number, f"no {pattern!r} in\n{self.log}")
        found: str = re.findall(pattern, self.log)[number - 1]
        return found

    def find_port(self) -> int:
        return int(self.wait_for(r"serving on .*?127\.0\.0\.1:(\d+)"))

    def status(self) -> Any:
        return client.status(self.control)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)


@contextlib.contextmanager
def running(
    cwd: Path, *arguments: str, directory: Path | None = None, says_control: bool = True, **environment: str
) -> Iterator[Running]:
    """Run ``main:app`` of a directory; stop it, unless that is done.

    Where its command line does not say where its control socket is, its configuration has to.
    """
    directory = directory or cwd
    control = str(directory / "control")
    run = Running(cwd, directory / "log", control, *arguments, says_control=says_control, **environment)
    try:
        yield run
        if run.process.poll() is None:
            run.process.terminate()
            assert run.wait() == 0
    finally:
        print(run.log)  # noqa: T201 - pytest shows it with a failure
        left = [run.process.pid] if run.process.poll() is None else []
        with contextlib.suppress(psutil.NoSuchProcess):
            left += [child.pid for child in psutil.Process(run.process.pid).children(recursive=True)]
        for pid in reversed(left):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        run.process.wait()


@contextlib.contextmanager
def taking_over(
    former: Running, cwd: Path, *arguments: str, directory: Path | None = None, **environment: str
) -> Iterator[Running]:
    """Run a newcomer, with the control socket of the one that it takes over."""
    log = (directory or cwd) / "log"
    given = ("--takeover", former.control, *arguments)
    newcomer = Running(cwd, log, former.control, *given, says_control=True, **environment)
    try:
        yield newcomer
        if newcomer.process.poll() is None:
            newcomer.process.terminate()
            assert newcomer.wait() == 0
    finally:
        print(newcomer.log)  # noqa: T201 - pytest shows it with a failure
        newcomer.process.kill()
        newcomer.process.wait()


class Visitors:
    """A client in a thread of its own, whose every request must be answered.

    Attributes:
        answers: what was answered.
        failures: what was not.
    """

    def __init__(self, port: int) -> None:
        self.answers: list[str] = []
        self.failures: list[str] = []
        self._port = port
        self._stopping = threading.Event()
        self._asking = threading.Lock()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stopping.wait(0.02):
            with self._asking:
                try:
                    status, text = get(self._port)
                    assert status == 200, status
                    self.answers.append(text)
                except (OSError, http.client.HTTPException, AssertionError) as error:
                    self.failures.append(repr(error))

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Ask nothing meanwhile: a process that is killed takes along what it has not answered yet."""
        with self._asking:
            yield

    def wait_for(self, text: str) -> None:
        """Wait until this is answered, from now on."""
        seen = len(self.answers)
        wait_until(lambda: text in self.answers[seen:], f"only {set(self.answers[seen:])}, {self.failures[:3]}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def end(self) -> None:
        """Visit no more."""
        self._stopping.set()
        self._thread.join()

    def __exit__(self, *exception: object) -> None:
        self.end()
