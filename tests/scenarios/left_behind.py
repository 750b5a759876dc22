"""What an application may leave behind that keeps its process: each thing on each loop, with an anchor and without.

``python -m tests.scenarios.left_behind`` tries all of them and prints a table; with arguments, those alone whose names
they begin. The suite tries most of them without an anchor, and a few with one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.scenarios.anchor.harness import AnchoredService, anchored
from tests.scenarios.handoff.harness import Service, running

__all__ = ["LEFT", "LIMITS", "Left", "has_ended", "leave_behind", "leave_behind_in_a_worker"]

LOOPS = ("asyncio", "uvloop", "trio")
LIMITS = {"drain_timeout": 1, "exit_timeout": 0.5}

EXECUTOR = """
import concurrent.futures, time
jobs = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="job")
jobs.submit(time.sleep, 600)
None
"""
# A child of multiprocessing, by a start method. Its pid is the result.
CHILD = """
import multiprocessing, time, warnings
warnings.simplefilter("ignore")
child = multiprocessing.get_context({method!r}).Process(target=time.sleep, args=(600,), name="helper")
child.start()
child.pid
"""
DEAF = """
import multiprocessing, os, signal, time, warnings
warnings.simplefilter("ignore")
reader, writer = os.pipe()
def be_deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(writer, b".")
    time.sleep(600)
child = multiprocessing.get_context("fork").Process(target=be_deaf, name="helper")
child.start()
os.read(reader, 1)
child.pid
"""
# The loop stands still from the moment in which it has settled: the drain never ends.
BLOCKED = """
import time
async def stand():
    await ecdysis.draining.wait(); time.sleep(600)
ecdysis._task_group.start_soon(stand)
None
"""
SHIELDED = """
async def never():
    with anyio.CancelScope(shield=True):
        await anyio.sleep_forever()
ecdysis._task_group.start_soon(never)
None
"""


@dataclass(frozen=True)
class Left:
    """One thing.

    Attributes:
        code: is run in a process that serves; what it gives is the pid of a child that shall end too, if it is any.
        named: what the process is said to be kept by.
    """

    code: str
    named: str


LEFT = {
    "a thread": Left(
        "import threading, time; threading.Thread(target=time.sleep, args=(600,), name='poller').start()",
        "thread poller",
    ),
    "a job in an executor": Left(EXECUTOR, "thread job_0"),
    "an exit hook": Left("import atexit, time; atexit.register(time.sleep, 600); None", "thread MainThread"),
    "a child process": Left(CHILD.format(method="fork"), "child process helper"),
    "a child process by spawn": Left(CHILD.format(method="spawn"), "child process helper"),
    "a child process by a fork server": Left(CHILD.format(method="forkserver"), "child process helper"),
    "a child process that ignores SIGTERM": Left(DEAF, "child process helper"),
    "a blocked loop": Left(BLOCKED, "thread MainThread at <planted>"),
    "a task that cannot be cancelled": Left(SHIELDED, "never: never at <"),
}


def leave_behind(service: Service, left: Left) -> None:
    """Leave something behind at a restart, and at a stop, of a service that runs with LIMITS; see that it ends."""
    former = service.pids[0]
    child = service.run(left.code)
    # A client that waits for "settled" waits for an answer of the former process, whose loop may stand still then.
    service.restart("serving")
    assert service.wait_for_death(former) == 0
    _expect(service, left, child)
    child = service.run(left.code)
    newest = service.newest()
    service.signal(newest, signal.SIGTERM)
    assert service.wait_for_death(newest) in (0, None)
    _expect(service, left, child, times=2)


def leave_behind_in_a_worker(service: AnchoredService, left: Left) -> None:
    """Leave something behind at a restart, and at a stop, of a service with one worker; see that all of it ends."""
    (former,) = service.workers().values()
    child = service.run(left.code)
    # It returns although the former process would not end by itself.
    service.roll_out("drained")
    assert service.wait_for_death(former) in (0, None)
    _expect(service, left, child)
    child = service.run(left.code)
    service.stop()
    _expect(service, left, child, times=2)


def _expect(service: Service, left: Left, child: object, times: int = 1) -> None:
    service.wait_until(
        lambda: service.log.count("ended by force (exit_timeout); it was kept by ") >= times,
        "it was not ended by force",
    )
    assert service.log.count(left.named) >= times
    if isinstance(child, int):
        service.wait_until(lambda: has_ended(child), "the child lives on")


def has_ended(pid: int) -> bool:
    """Say whether a process has ended: one that was killed right before its parent ended is a zombie of ours."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _try(what: str, loop: str, *, has_anchor: bool) -> str:
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w", encoding="utf-8") as nowhere:
        directory = Path(name)
        try:
            # The log of a service that is as it should be is nothing to read.
            with contextlib.redirect_stdout(nowhere):
                if has_anchor:
                    with anchored(directory, workers=1, loop=loop, ecdysis=LIMITS, handoffs=LIMITS) as worker:
                        leave_behind_in_a_worker(worker, LEFT[what])
                else:
                    with running(directory, loop, ecdysis=LIMITS) as service:
                        leave_behind(service, LEFT[what])
        except AssertionError as error:
            return f"FAILED: {str(error).splitlines()[:1]}"
    return "ends"


def main() -> int:
    """Print the table; return how many have failed, as far as an exit status can say."""
    os.environ.setdefault("TEST_GUARD", "left behind")  # as tests/conftest.py marks processes
    wanted = sys.argv[1:] or [""]
    failures = 0
    print("| what is left behind | anchor | " + " | ".join(LOOPS) + " |")  # noqa: T201
    print("|---|---|" + "---|" * len(LOOPS))  # noqa: T201
    for what, has_anchor in itertools.product(LEFT, (False, True)):
        if any(what.startswith(each) for each in wanted):
            results = [_try(what, loop, has_anchor=has_anchor) for loop in LOOPS]
            failures += sum(each != "ends" for each in results)
            print(f"| {what} | {'yes' if has_anchor else 'no'} | " + " | ".join(results) + " |", flush=True)  # noqa: T201
    return min(failures, 100)


if __name__ == "__main__":
    sys.exit(main())
