"""A service that is made to fail, seen from outside: with an anchor or without, its clients, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from ecdysis_async.cli import client
from tests.faults.points import INJECTED, PROJECT

__all__ = ["PATIENCE_SECONDS", "Answer", "Kept", "Process", "Service", "Visitor", "is_alive"]

HERE = Path(__file__).resolve().parent
PATIENCE_SECONDS = 60.0

# A client's pause between two connections.
VISIT_PAUSE_SECONDS = 0.01

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a service; its start makes sure that nobody else is taken for it."""

    pid: int
    kind: str
    started: float = field(compare=False)


def is_alive(pid: int) -> bool:
    """Say whether a process has not ended; a zombie has."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True, slots=True)
class Answer:
    """The pids that have answered, and how many answers this connection has had."""

    pid: int
    generation: int
    count: int


class Kept:
    """A connection that is kept, and has half of a request on it."""

    def __init__(self, port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)
        self._file = self._sock.makefile("rb")
        self.count = 0

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def receive(self) -> Answer | None:
        """Return the next answer; None where the connection has ended without one."""
        try:
            line = self._file.readline()
        except ConnectionError:
            return None
        if not line.endswith(b"\n"):
            return None
        self.count += 1
        return Answer(*map(int, line.split()))

    def ask(self, data: bytes = b"hello\n") -> Answer | None:
        """Send a request, and return its answer as :meth:`receive`."""
        try:
            self.send(data)
        except ConnectionError:
            return None
        return self.receive()

    def close(self) -> None:
        self._file.close()
        self._sock.close()


class Visitor:
    """A client in a thread of its own, who connects, asks who is there, and leaves, again and again.

    Attributes:
        port: where it connects, from the next time on.
        answers: what was answered, in order.
        refused: errors of connections that could not be made.
        lost: errors of connections that were made. One at a time is open.
    """

    def __init__(self, port: int) -> None:
        self.answers: list[Answer] = []
        self.refused: list[str] = []
        self.lost: list[str] = []
        self.port = port
        self._condition = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stopping.wait(VISIT_PAUSE_SECONDS):
            try:
                connection = Kept(self.port)
            except OSError as error:
                self.refused.append(repr(error))
                continue
            try:
                answer = connection.ask()
            except TimeoutError as error:
                self.lost.append(repr(error))
                continue
            finally:
                connection.close()
            with self._condition:
                if answer is None:
                    self.lost.append("closed without an answer")
                else:
                    self.answers.append(answer)
                    self._condition.notify_all()

    def wait_for(self, is_so: Callable[[Answer], bool], seconds: float = PATIENCE_SECONDS) -> Answer | None:
        """Wait for an answer from now on; return it, or None."""
        with self._condition:
            seen = len(self.answers)
            self._condition.wait_for(lambda: any(map(is_so, self.answers[seen:])), seconds)
            return next(filter(is_so, self.answers[seen:]), None)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def end(self) -> None:
        """Visit no more."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def __exit__(self, *exception: object) -> None:
        self.end()


class Service:
    """A service of tests/faults/app.py, in a directory of its own.

    Args:
        directory: for its files.
        anchored: whether it has an anchor.
        workers: how many, where it has.
        probation: of its restarts, seconds.
        loop: what it runs on: "asyncio" or "uvloop".

    Attributes:
        control: its control socket.
        main: the process that was started last: the anchor, or the first generation.
    """

    def __init__(
        self, directory: Path, *, anchored: bool, workers: int = 1, probation: float = 0.05, loop: str = "asyncio"
    ) -> None:
        self.loop = loop
        self.directory = directory
        self.anchored = anchored
        self.workers = workers
        self.control = str(directory / "control")
        self._probation = str(probation)
        self._events_read = 0
        self._fault_directory = directory / "faults"
        self._fault_directory.mkdir()
        (directory / "ports").write_text("web", encoding="utf-8")
        self.started: list[subprocess.Popen[bytes]] = []
        self.main = self.start()

    # How it is started, and ends

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """Start an anchor, or a first generation."""
        options = ("--probation", self._probation, "--drain-timeout", "60", "--exit-timeout", "60")
        common = (
            "--workers",
            str(self.workers),
            "--loop",
            self.loop,
            "--pid-file",
            "pid",
            "--control",
            self.control,
            *options,
        )
        if self.anchored:
            words = ["-m", "ecdysis_async.cli", "run", "app:main", "--app-dir", str(HERE), *common, *more]
        else:
            words = [str(HERE / "app.py"), self.control, self._probation, self.loop]
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.directory,
                env=self.make_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def make_environment(self) -> dict[str, str]:
        """Return what lets a process fail."""
        path = os.pathsep.join((str(INJECTED), str(PROJECT)))
        return {**os.environ, "PYTHONPATH": path, "FAULTS": str(self._fault_directory), "PWD": str(self.directory)}

    def wait_until_serving(self) -> Json:
        """Wait until it serves with all its workers; return its status."""
        found: Json = {}

        def serves() -> bool:
            nonlocal found
            try:
                found = self.status()
            except client.CommandFailed:
                assert self.main.poll() is None or self.living(), self.log
                return False
            return found["state"] == "serving" and len(self.find_serving(found)) == self.workers

        self.wait_until(serves, "it does not serve")
        return found

    def end(self) -> None:
        """End whatever is left, by force."""
        for process in reversed(self.processes()):
            # Its number is nobody else's as long as it is one of those that began when it did.
            with contextlib.suppress(psutil.NoSuchProcess):
                found = psutil.Process(process.pid)
                if found.create_time() <= process.started + 1:
                    found.kill()
        for each in self.started:
            if each.poll() is None:
                each.kill()
            each.wait()

    def stop(self) -> None:
        """Stop it in good order, and see that nothing is left."""
        (pid,) = {self.status()["pid"]}
        os.kill(pid, signal.SIGTERM)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        """Wait until all of its processes have ended, and see that nothing is left."""
        self.wait_until(lambda: not self.living(), lambda: f"left behind: {self.living()}")
        for each in self.started:
            each.wait()

    # What it is

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")

    def port(self, name: str = "web") -> int:
        """Return where it listens; it has to serve."""
        return int((self.directory / f"port.{name}").read_text(encoding="utf-8"))

    def status(self) -> Json:
        return client.status(self.control)

    def find_serving(self, status: Json | None = None) -> list[int]:
        """Return who accepts, as the status tells."""
        found = self.status() if status is None else status
        if not self.anchored:
            return [found["pid"]] if found["state"] == "serving" else []
        return [each["pid"] for each in found["workers"] if each["state"] == "serving"]

    def events(self) -> list[Json]:
        """Return all that its processes have told."""
        try:
            text = (self._fault_directory / "events").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        # The last line may be half of one.
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def processes(self) -> list[Process]:
        """Return all processes that there ever were, in order; one that is executed anew stands there twice."""
        return [Process(each["pid"], each["kind"], each["at"]) for each in self.events() if each["event"] == "started"]

    def living(self, *kinds: str) -> list[Process]:
        """Return those that have not ended, of these kinds, or of all."""
        return [each for each in self.processes() if (not kinds or each.kind in kinds) and is_alive(each.pid)]

    # Faults

    def record(self) -> None:
        """Let all processes tell which points they reach."""
        self._tell("recording", {"serving": self.find_serving()})

    def recorded(self) -> list[tuple[str, str]]:
        """Return roles and points that were reached since it was recorded, and end that."""
        (self._fault_directory / "recording").unlink()
        found = {(each["role"], each["point"]): None for each in self.events() if each["event"] == "reached"}
        return list(found)

    def arm(self, role: str, point: str, fault: str) -> None:
        """Let one process fail, once."""
        self.disarm()
        self._events_read = len(self.events())
        self._tell("armed", {"serving": self.find_serving(), "role": role, "point": point, "fault": fault})

    def disarm(self) -> None:
        """Let nobody fail any more."""
        for name in ("armed", "fired"):
            (self._fault_directory / name).unlink(missing_ok=True)

    def find_fired(self) -> Json | None:
        """Return who has failed since it was armed."""
        return next((each for each in self.events()[self._events_read :] if each["event"] == "fired"), None)

    def _tell(self, name: str, content: Json) -> None:
        draft = self._fault_directory / f"{name}.draft"
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(self._fault_directory / name)

    # Waiting

    def wait_until(self, is_so: Callable[[], object], otherwise: str | Callable[[], str]) -> None:
        """Wait for something that nobody tells."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            text = otherwise if isinstance(otherwise, str) else otherwise()
            assert time.monotonic() < deadline, f"{text}\n{self.log}"
            time.sleep(0.01)


def outcome_of(service: Service, until: str = "settled") -> tuple[str, Json]:
    """Restart it; return what became of it, and the report where there is one."""
    try:
        report: Json = client.restart(service.control, until, lambda event: None)["report"]
    except client.CommandFailed as error:
        return error.code.name, (error.event or {}).get("report") or {}
    return report["outcome"], report


@contextlib.contextmanager
def keeping(port: int, number: int) -> Iterator[Sequence[Kept]]:
    """Have connections, each with an answer and half of another request."""
    connections: list[Kept] = []
    try:
        for _ in range(number):
            connections.append(Kept(port))
            assert connections[-1].ask() is not None
            connections[-1].send(b"hel")
        yield connections
    finally:
        for each in connections:
            each.close()
