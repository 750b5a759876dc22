"""One fault at one point of one operation: what happened, and what must be true afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ecdysis_async.cli import client
from tests.faults.harness import PATIENCE_SECONDS, Service, Visitor, is_alive, keeping, outcome_of

__all__ = ["OPERATIONS", "Cell", "Operation", "Seen", "record", "run", "serving"]

# How many connections are kept through the operation, with half of a request on each.
KEPT = 3

# How long after the end of an operation its last points may be reached; one that is not reached is told as such.
LATE_SECONDS = 5.0

# How long a stopped process is given to be missed.
STOPPED_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done to a service while something fails.

    Attributes:
        anchored: whether the service has an anchor.
        workers: how many, where it has.
        perform: does it, and says what became of it.
        good: what becomes of it where nothing fails.
    """

    anchored: bool
    perform: Callable[[Service], str]
    good: str
    workers: int = 1


def restart(service: Service) -> str:
    """Restart it, by the control socket."""
    return outcome_of(service)[0]


def command(service: Service) -> str:
    """Restart it by ``ecdysis restart``."""
    done = subprocess.run(
        [sys.executable, "-m", "ecdysis_async.cli", "restart", "--control", service.control],
        cwd=service.directory,
        env=service.make_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return f"exit {done.returncode}"


def break_release(service: Service) -> str:
    """Restart it into a release that does not start."""
    (service.directory / "broken").touch()
    try:
        return restart(service)
    finally:
        (service.directory / "broken").unlink()


def break_second(service: Service) -> str:
    """Restart it into a release that starts in one worker only, so that this one is called back."""
    (service.directory / "breaks-later").touch()
    try:
        return restart(service)
    finally:
        for name in ("breaks-later", "was-here"):
            (service.directory / name).unlink(missing_ok=True)


def upgrade(service: Service) -> str:
    """Replace the anchor in place."""
    try:
        client.upgrade(service.control, lambda event: None)
    except client.NoAnswer:
        return "UNKNOWN"
    except client.CommandFailed as error:
        return error.code.name
    return "upgraded"


def take_over(service: Service) -> str:
    """Let another anchor go on with it."""
    former = service.main
    newcomer = service.start("--takeover", service.control)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while former.poll() is None and newcomer.poll() is None:
        assert time.monotonic() < deadline, f"neither of the two ends\n{service.log}"
        time.sleep(0.01)
    if newcomer.poll() is None:
        service.main = newcomer
        return "taken over"
    return f"newcomer: {newcomer.returncode}"


def kill_worker(service: Service) -> str:
    """Kill its worker, in whose place the anchor starts another one."""
    former = service.find_serving()
    os.kill(former[0], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(client.CommandFailed):
            if (now := service.find_serving()) and now != former:
                return "filled"
        if service.main.poll() is not None:
            return "NO_SERVICE"
        time.sleep(0.01)
    return "nobody serves"


OPERATIONS = {
    "restart": Operation(anchored=False, perform=restart, good="settled"),
    "broken restart": Operation(anchored=False, perform=break_release, good="FAILED"),
    "restart of a worker": Operation(anchored=True, perform=restart, good="settled"),
    "ecdysis restart": Operation(anchored=True, perform=command, good="exit 0"),
    "broken restart of a worker": Operation(anchored=True, perform=break_release, good="FAILED"),
    "roll-out taken back": Operation(anchored=True, perform=break_second, good="ROLLED_BACK", workers=2),
    "anchor's upgrade": Operation(anchored=True, perform=upgrade, good="upgraded"),
    "takeover": Operation(anchored=True, perform=take_over, good="taken over"),
    "death of a worker": Operation(anchored=True, perform=kill_worker, good="filled"),
}

# What lets go of the service's process that was asked: its verdict may then be unknown.
UNKNOWN = {"UNKNOWN", "NO_SERVICE", "exit 6", "exit 3"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault.

    Attributes:
        operation: a name of ``OPERATIONS``.
        role: of the process that fails.
        point: where.
        fault: how.
    """

    operation: str
    role: str
    point: str
    fault: str


@dataclass(slots=True)
class Seen:
    """What came of it.

    Attributes:
        is_reached: whether the point was.
        outcome: of the operation.
        serves: whether the service serves afterwards.
        must_serve: whether somebody was left who could.
        lost: requests without an answer that a living process had accepted.
        lost_with_dead: those that the killed process had accepted, which nothing can save.
        refused: connections that could not be made while somebody lived.
        wrong: what must not be, in words.
    """

    is_reached: bool = False
    outcome: str = ""
    serves: bool = False
    must_serve: bool = True
    lost: int = 0
    lost_with_dead: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serving(operation: str, loop: str = "asyncio") -> Iterator[Service]:
    """Run a service for an operation, to be stopped in good order by who uses it."""
    kind = OPERATIONS[operation]
    with tempfile.TemporaryDirectory(prefix="faults") as directory:
        service = Service(Path(directory), anchored=kind.anchored, workers=kind.workers, loop=loop)
        try:
            service.wait_until_serving()
            yield service
        finally:
            service.end()


def record(operation: str) -> list[tuple[str, str]]:
    """Return which roles reach which points, where nothing fails."""
    kind = OPERATIONS[operation]
    with serving(operation) as service, keeping(service.port(), KEPT) as connections:
        former = service.find_serving()
        service.record()
        outcome = kind.perform(service)
        assert outcome == kind.good, f"{operation}: {outcome}\n{service.log}"
        for each in connections:
            each.ask(b"lo\n")
            each.close()
        if former != service.find_serving():
            service.wait_until(lambda: not any(map(is_alive, former)), "it does not end")
        service.wait_until_serving()
        reached = service.recorded()
        service.stop()
    return reached


class _Run:
    """One cell on a service that serves."""

    def __init__(self, service: Service, cell: Cell) -> None:
        self.service = service
        self.cell = cell
        self.kind = OPERATIONS[cell.operation]
        self.seen = Seen()
        self.fired: dict[str, Any] | None = None

    def run(self) -> Seen:
        service, seen = self.service, self.seen
        before = service.wait_until_serving()
        self.former = service.find_serving(before)
        with Visitor(service.port()) as visitor, keeping(service.port(), KEPT) as connections:
            self.visitor = visitor
            service.arm(self.cell.role, self.cell.point, self.cell.fault)
            done: list[str] = []
            thread = threading.Thread(target=lambda: done.append(self.kind.perform(service)), daemon=True)
            thread.start()
            deadline = time.monotonic() + 2 * PATIENCE_SECONDS
            while thread.is_alive():
                assert time.monotonic() < deadline, f"{self.cell} does not end\n{service.log}"
                self.look()
                thread.join(0.01)
            seen.outcome = done[0] if done else "failed"
            answers = []
            for each in connections:
                answers.append(each.ask(b"lo\n"))
                each.close()
            deadline = time.monotonic() + LATE_SECONDS
            while self.fired is None and time.monotonic() < deadline:
                self.look()
                time.sleep(0.01)
            self.look()
            service.disarm()
            seen.is_reached = self.fired is not None
            self.judge(answers.count(None))
        return seen

    def look(self) -> None:
        """Notice the fault; let a stopped process go on once it was missed, or not."""
        if self.fired is not None or (fired := self.service.find_fired()) is None:
            return
        self.fired = fired
        pid = fired["pid"]
        if self.cell.fault == "SIGKILL":
            self.service.wait_until(lambda: not is_alive(pid), "it is not killed")
            kinds = ("anchor", "newcomer") if self.kind.anchored else ("generation",)
            self.seen.must_serve = any(each.pid != pid for each in self.service.living(*kinds))
            if self.cell.operation == "broken restart" and self.cell.role == "predecessor":
                self.seen.must_serve = False  # its successor does not start
        if self.cell.fault == "SIGSTOP":
            with contextlib.suppress(psutil.NoSuchProcess):
                self.service.wait_until(
                    lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it does not stop"
                )
            self.visitor.wait_for(lambda answer: True, STOPPED_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def judge(self, unanswered: int) -> None:
        """Find out who serves, what was lost, and whether all is true that must be."""
        service, seen, cell = self.service, self.seen, self.cell
        killed = self.fired["pid"] if self.fired is not None and cell.fault == "SIGKILL" else None
        if killed is not None and not self.kind.anchored and cell.role == "successor" and seen.outcome == "settled":
            # From the moment at which it has settled, its predecessor never accepts again.
            seen.must_serve = False
        if not seen.must_serve and not self.serves_after_all():
            self.visitor.end()
            service.wait_for_end()
        else:
            if killed is not None and cell.operation == "takeover":
                self.follow_newcomer()
            answer = self.visitor.wait_for(lambda answer: answer.pid != killed)
            seen.serves = answer is not None
            if answer is None:
                seen.wrong.append("nobody answers")
            self.check_truth(killed)
            self.visitor.end()
            seen.refused = len(self.visitor.refused)
        lost = unanswered + len(self.visitor.lost)
        # What a killed process had accepted dies with it: one visitor at a time, and what was kept.
        doomed = 0
        if killed is not None and cell.role in ("predecessor", "successor"):
            doomed = 1 + KEPT
        if cell.operation == "death of a worker":
            doomed += 1 + KEPT
        seen.lost_with_dead = min(lost, doomed)
        seen.lost = lost - seen.lost_with_dead
        if seen.lost:
            seen.wrong.append(f"{seen.lost} lost")
        if seen.refused:
            seen.wrong.append(f"{seen.refused} refused")

    def serves_after_all(self) -> bool:
        """Say whether somebody goes on where nobody had to."""
        kinds = ("anchor", "newcomer") if self.kind.anchored else ("generation",)
        self.service.wait_until(
            lambda: not self.service.living(*kinds) or self.visitor.wait_for(lambda answer: True, STOPPED_SECONDS),
            "it neither ends nor serves",
        )
        return bool(self.service.living(*kinds))

    def follow_newcomer(self) -> None:
        """Visit a newcomer where it is: in the place of an anchor that was killed it starts anew, on other ports."""
        self.service.wait_until_serving()
        if (port := self.service.port()) != self.visitor.port:
            self.visitor.port = port
            self.visitor.refused.clear()

    def check_truth(self, killed: int | None) -> None:
        """See that the outcome agrees with who serves, and that the next restart works."""
        service, seen = self.service, self.seen
        status = service.wait_until_serving()
        now = service.find_serving(status)
        survivors = [pid for pid in self.former if pid != killed]
        if seen.outcome in ("settled", "exit 0") and set(now) & set(self.former):
            seen.wrong.append(f"{seen.outcome}, and a former process serves")
        if seen.outcome in ("FAILED", "ROLLED_BACK", "exit 1", "exit 5") and not set(survivors) <= set(now):
            seen.wrong.append(f"{seen.outcome}, and {survivors} do not serve, but {now}")
        if seen.outcome in UNKNOWN and killed is None and self.cell.role != "command":
            seen.wrong.append(f"{seen.outcome}, and nobody was killed")
        again, report = outcome_of(service)
        deadline = time.monotonic() + PATIENCE_SECONDS
        # An operation may have been told as done while a worker is still being replaced; one that never ends is wrong.
        while again == "IN_PROGRESS" and time.monotonic() < deadline:
            time.sleep(0.05)
            again, report = outcome_of(service)
        if again != "settled":
            seen.wrong.append(f"the next restart: {again}")
        elif report["generation"] <= status["generation"]:
            seen.wrong.append(f"generation {report['generation']} follows {status['generation']}")


def run(service: Service, cell: Cell) -> Seen:
    """Let something fail once; the service goes on with the next cell where it serves."""
    return _Run(service, cell).run()
