"""A real service with all of its generations, seen from outside: started, asked, restarted, harmed, and ended.

Every wait is for an event that the service tells through a FIFO, for an answer on a socket, or for a death on a pidfd;
each has a limit that only a failure reaches.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil

PROJECT = Path(__file__).resolve().parents[3]
SERVICE = Path(__file__).with_name("service.py")

# How long anything may take that should happen at once: on a busy machine, with several tests at a time.
PATIENCE_SECONDS = 60.0

# A client's pause between two connections: there shall always be somebody who asks, and a processor for the others.
CLIENT_PAUSE_SECONDS = 0.01

# What this process is told of descendants whose parent has died (prctl(2)).
PR_SET_CHILD_SUBREAPER = 36

FIFO_SIZE = 1024 * 1024

# Waits of the library that no setting is worth, shortened to what a busy machine needs.
LIMITS = {"PAUSE_SECONDS": 30.0, "SERVING_SECONDS": 30.0, "END_GRACE_SECONDS": 3.0}

# Run in a predecessor: what the clock would say, at a moment that the test knows. No limit is then too short for a busy
# machine.
TIME_IS_UP = "ecdysis._life.handover.post(ecdysis._life.handover.timed_out)"

# What a healthy service never writes.
BLEMISHES = ("Traceback (most", "Exception ignored", "Warning:", "never awaited", "never retrieved")

Json = dict[str, Any]


class Refused(Exception):
    """Nobody listened."""


class Lost(Exception):
    """A connection that was made ended without an answer."""


class Conversation:
    """One connection to the service."""

    def __init__(self, address: Any, *, timeout: float = PATIENCE_SECONDS) -> None:
        self._sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self._sock.settimeout(timeout)
        try:
            self._sock.connect(tuple(address) if isinstance(address, list) else address)
        except OSError as error:
            self._sock.close()
            raise Refused(str(error)) from error
        self._file = self._sock.makefile("rwb")

    def say(self, do: str, **more: Any) -> Self:
        """Send a request; its answer comes later."""
        try:
            self._file.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise Lost(f"while asking: {error}") from error
        return self

    def answer(self) -> Any:
        """Wait for the next answer."""
        try:
            line = self._file.readline()
        except OSError as error:
            raise Lost(f"while waiting for the answer: {error!r}") from error
        if not line.endswith(b"\n"):
            raise Lost(f"the answer ends after {line!r}")
        return json.loads(line)

    def is_over(self) -> bool:
        """Wait for the service to close, and say whether it said nothing before."""
        return self._file.readline() == b""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still in the buffer has nobody to go to
            self._file.close()
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Clients:
    """A client in a thread of its own, who connects, asks who is there, and leaves, again and again.

    Args:
        address: of the service.

    Attributes:
        answers: the pids that answered, in their order.
        refused: errors of connections that could not be made: there must never be any.
        lost: errors of connections that were made. One at a time is open, so a killed process can only cost one.
    """

    def __init__(self, address: Any) -> None:
        self.answers: list[int] = []
        self.refused: list[str] = []
        self.lost: list[str] = []
        self._address = address
        self._condition = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def wait_for(self, pid: int) -> None:
        """Wait until a process answers, from now on."""
        with self._condition:
            seen = len(self.answers)
            assert self._condition.wait_for(lambda: pid in self.answers[seen:], PATIENCE_SECONDS), (
                f"answers only from {set(self.answers[seen:])}, lost {self.lost}, refused {self.refused[:3]}"
            )

    def _run(self) -> None:
        while not self._stopping.wait(CLIENT_PAUSE_SECONDS):
            try:
                with Conversation(self._address) as conversation:
                    pid = conversation.say("hello").answer()["pid"]
            except Refused as error:
                self.refused.append(str(error))
            except Lost as error:
                self.lost.append(str(error))
            else:
                with self._condition:
                    self.answers.append(pid)
                    self._condition.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.join()


class Service:
    """A service: all of its generations.

    Args:
        directory: for its files.
        loop: "asyncio", "uvloop", "trio" or "anyio" (on asyncio, accepting by ``ecdysis.serve``).
        command: the first generation's command line, if not that of service.py.
        settings: see ``configure``.
    """

    def __init__(self, directory: Path, loop: str, *, command: list[str] | None = None, **settings: Any) -> None:
        self.directory = directory
        self.faults = directory / "faults"
        self.faults.mkdir()
        self.log_path = directory / "log"
        self.output_path = directory / "output"
        self._accepts_path = directory / "accepts"
        self._settings_path = directory / "settings.json"
        self._settings: Json = {
            "loop": loop,
            "events": str(directory / "events"),
            "gate": str(directory / "gate"),
            "accepts": str(self._accepts_path),
            "faults": str(self.faults),
            "ecdysis": {"probation": 0.2, "drain_timeout": 10},
            "listeners": [["listen_tcp", ["127.0.0.1", 0], {}]],
            "limits": LIMITS,
            "at_import": "",
            "at_start": "",
        }
        self.configure(**settings)
        self.command = command or [sys.executable, "-W", "error", str(SERVICE), str(self._settings_path)]
        self.addresses: list[Any] = []
        # In the order they came. A pidfd each, so that nobody else is ever taken for one of them.
        self.pids: list[int] = []
        self.statuses: dict[int, int | None] = {}
        self.expected_blemishes: tuple[str, ...] = ()
        self._pidfds: dict[int, int] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._events: list[Json] = []
        self._unread = b""

    # What it is told

    def configure(self, *, ecdysis: Json | None = None, **settings: Any) -> None:
        """Change the settings of the generations to come.

        Args:
            ecdysis: arguments of ``Ecdysis``, added to those it has.
            settings: ``at_import``, ``at_start``: code to run there; ``listeners``: [method, arguments, options] each;
                ``limits``: constants of predecessor.py and successor_process.py.
        """
        self._settings |= settings
        self._settings["ecdysis"] = {**self._settings["ecdysis"], **(ecdysis or {})}
        draft = self._settings_path.with_suffix(".draft")
        draft.write_text(json.dumps(self._settings), encoding="utf-8")
        draft.replace(self._settings_path)

    def arm(self, side: str, state: str, action: str) -> None:
        """Let the next process that comes to a state do something, once: "kill-self", "stop-peer" and the like."""
        (self.faults / f"{side}.{state}.{action}").touch()

    def start(self) -> None:
        """Run the first generation."""
        for path in (self._settings["events"], self._settings["gate"]):
            os.mkfifo(path)
        # Opened for both, so that each has a reader before the first writer, and never ends.
        self._fifo = os.open(self._settings["events"], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._gate = os.open(self._settings["gate"], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        # Room for what the generations tell while the test does not read.
        fcntl.fcntl(self._fifo, fcntl.F_SETPIPE_SZ, FIFO_SIZE)
        self._former_children = set(psutil.Process().children())
        set_subreaper(enabled=True)
        self.start_another()

    def start_another(self) -> int:
        """Run one more process by the same command line, which no generation has asked for; return its pid."""
        with self.log_path.open("ab") as log, self.output_path.open("ab") as output:
            child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(PROJECT)},
                cwd=self.directory,
                start_new_session=True,
            )
        self._children.append(child)
        self._know(child.pid)
        return child.pid

    def wait_until_serving(self) -> None:
        """Wait for the first generation, and learn where it is."""
        self.addresses = self.wait_for("ready")["addresses"]

    def release(self) -> None:
        """Let one go on that waits, or blocks, by its planted code."""
        os.write(self._gate, b"\n")

    # What it does

    @property
    def address(self) -> Any:
        """Where its first listener is."""
        return self.addresses[0]

    @property
    def log(self) -> str:
        """What all generations have written to stderr."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def ask(self, do: str = "hello", **more: Any) -> Any:
        """Ask whoever answers."""
        with Conversation(self.address) as conversation:
            result = conversation.say(do, **more).answer()
        self._read_events()
        return result

    def run(self, code: str) -> Any:
        """Run code in the generation that answers; return what its last expression gives."""
        return self.ask("run", code=code)

    def begin(self, do: str, **more: Any) -> Conversation:
        """Ask, and let the answer come later."""
        return Conversation(self.address).say(do, **more)

    def restart(self, until: str = "serving") -> Json:
        """Restart it; return the report."""
        report: Json = self.ask("restart", until=until)
        assert "outcome" in report, report
        return report

    def fail_to_restart(self, until: str = "serving") -> Json:
        """Restart it in vain; return the error."""
        error: Json = self.ask("restart", until=until)
        assert "outcome" not in error, error
        return error

    def wait_for(self, event: str, **facts: Any) -> Json:
        """Wait for something that the service tells, each of which is found once."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        wanted = {"event": event, **facts}
        while True:
            for index, found in enumerate(self._events):
                if wanted.items() <= found.items():
                    return self._events.pop(index)
            ready, _, _ = select.select([self._fifo], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{wanted} did not happen, but {self._events}"
            self._read_events()

    def forget_events(self) -> None:
        """Wait for nothing that has happened until now."""
        self._read_events()
        self._events.clear()

    def wait_for_death(self, pid: int) -> int | None:
        """Wait until a generation has ended; return its exit status, or None where another process has reaped it."""
        if pid not in self.statuses:
            ready, _, _ = select.select([self._pidfds[pid]], [], [], PATIENCE_SECONDS)
            assert ready, f"{pid} does not end"
            self.statuses[pid] = reap(pid)
        return self.statuses[pid]

    def is_alive(self, pid: int) -> bool:
        """Say whether a generation has not ended."""
        return pid not in self.statuses and not select.select([self._pidfds[pid]], [], [], 0)[0]

    def wait_until_stopped(self, pid: int) -> None:
        """Wait until a SIGSTOP has come into effect: its sender is not told (and only a parent can wait for it)."""
        self.wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, f"{pid} does not stop")

    def wait_for_log(self, text: str) -> None:
        """Wait for a line in the log, which comes through other processes."""
        self.wait_until(lambda: text in self.log, f"{text!r} is not logged")

    def wait_until(self, is_so: Callable[[], bool], otherwise: str) -> None:
        """Wait for something that nobody tells: a file, or what /proc says of a process."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, otherwise
            time.sleep(0.005)

    def accepting_turns(self) -> list[int]:
        """Return the pids that accepted, as often as another one had accepted in between."""
        accepts = sorted(map(str.split, self._accepts_path.read_text().splitlines()), key=lambda each: int(each[0]))
        turns: list[int] = []
        for _, pid in accepts:
            if turns[-1:] != [int(pid)]:
                turns.append(int(pid))
        return turns

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a generation."""
        signal.pidfd_send_signal(self._pidfds[pid], number)

    def newest(self) -> int:
        """Return the generation that was started last, of those alive."""
        self._read_events()
        return [pid for pid in self.pids if self.is_alive(pid)][-1]

    # How it ends

    def stop(self) -> None:
        """Stop it in good order, and see that nothing is left."""
        pid = self.newest()
        self.signal(pid, signal.SIGTERM)
        self.wait_for_end()
        assert self.statuses[pid] in (0, None), f"{pid} ended with {self.statuses[pid]}"

    def wait_for_end(self) -> None:
        """Wait until every generation has ended, and see that nothing is left."""
        self._read_events()
        for pid in self.pids:
            self.wait_for_death(pid)
        self._read_events()
        assert not [pid for pid in self.pids if self.is_alive(pid)]
        with contextlib.suppress(Refused), Conversation(self.address):
            # The kernel may have given the free port to a service of another test.
            assert self._is_of_another_test(), "somebody still listens"

    def _is_of_another_test(self) -> bool:
        """Say whether all who listen on the port are processes that another test has started."""
        if isinstance(self.address, str):
            return False
        listening = [
            each.pid
            for each in psutil.net_connections("tcp")
            if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == self.address[1]
        ]
        # None: a socket that no process has, as one that waits in a channel.
        return None not in listening and not any(is_marked(pid) for pid in listening if pid is not None)

    def check_log(self) -> None:
        """See that no generation has written what it should not."""
        log = self.log
        for text in self.expected_blemishes:
            log = log.replace(text, "")
        blemishes = [line for line in log.splitlines() if any(blemish in line for blemish in BLEMISHES)]
        assert not blemishes, "\n".join(blemishes)

    def end(self) -> None:
        """End whatever is left, by force, and let go of everything."""
        self._read_events()
        for pid in self.pids:
            if self.is_alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    self.signal(pid, signal.SIGKILL)
                self.wait_for_death(pid)
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        os.close(self._fifo)
        os.close(self._gate)
        # What a generation has left running (a resource tracker of multiprocessing) ends soon, and is ours to reap.
        for orphan in set(psutil.Process().children()) - self._former_children:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(orphan.pid)
                select.select([pidfd], [], [], PATIENCE_SECONDS)
                os.close(pidfd)
            reap(orphan.pid)
        set_subreaper(enabled=False)
        for child in self._children:
            child.returncode = 0  # reaped here, and not by Popen

    def _know(self, pid: int) -> None:
        if pid not in self.pids:
            self.pids.append(pid)
            try:
                self._pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:  # it has ended, and was reaped by its parent
                self.statuses[pid] = None

    def _read_events(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._unread += os.read(self._fifo, FIFO_SIZE)
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            event = json.loads(line)
            self._know(event["pid"])
            if "successor" in event:
                self._know(event["successor"])
            self._events.append(event)


@contextlib.contextmanager
def running(directory: Path, loop: str, *, serves: bool = True, **settings: Any) -> Iterator[Service]:
    """Run a service for a test; at the test's end it is stopped, unless that is done, and nothing may be left.

    One that never ``serves`` is not waited for.
    """
    service = Service(directory, loop, **settings)
    try:
        service.start()
        if serves:
            service.wait_until_serving()
        yield service
        if any(map(service.is_alive, service.pids)):
            service.stop()
        service.check_log()
    finally:
        print(service.log)  # noqa: T201 - pytest shows it with a failure
        service.end()


def reap(pid: int) -> int | None:
    """Return the exit status of a dead process, or the negative number of its signal; None if it is not ours."""
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def is_marked(pid: int) -> bool:
    """Say whether a process was started by this test (see tests/conftest.py)."""
    mark = f"TEST_GUARD={os.environ['TEST_GUARD']}".encode()
    with contextlib.suppress(OSError):
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def set_subreaper(*, enabled: bool) -> None:
    """Become the parent of descendants whose parent has died, and so learn their exit status; or no more."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(enabled), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
