"""A process that shall end is ended, and says what has kept it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAD = """
import asyncio, atexit, concurrent.futures, multiprocessing, os, signal, sys, threading, time
from ecdysis_async._system.exit_deadline import ExitDeadline
from ecdysis_async._system.tasks import LoopTasks

def tell(kept):
    print(*kept, sep="\\n", flush=True)

def set_deadline(seconds=1):
    deadline = ExitDeadline(tell, status=7)
    deadline.set(seconds)
    return deadline

def stand():
    time.sleep(600)
"""

KEEPS = {
    "a thread": ("set_deadline(); threading.Thread(target=stand, name='poller').start()", "thread poller at <string>"),
    "a job in an executor": (
        "set_deadline(); concurrent.futures.ThreadPoolExecutor(thread_name_prefix='jobs').submit(stand)",
        "thread jobs_0 at <string>",
    ),
    "an exit hook": ("set_deadline(); atexit.register(stand)", "thread MainThread at <string>"),
    "a blocked loop": (
        """
        async def main():
            set_deadline()
            stand()
        asyncio.run(main())
        """,
        "(stand)",
    ),
    "a task that cannot be cancelled": (
        """
        async def stubborn():
            while True:
                try:
                    await asyncio.sleep(600)
                except asyncio.CancelledError:
                    pass
        async def main():
            set_deadline()
            task = asyncio.create_task(stubborn(), name="stubborn")
            await asyncio.sleep(0)
        asyncio.run(main())
        """,
        "task stubborn: stubborn at <string>",
    ),
    "a child process": (
        """
        child = multiprocessing.get_context("fork").Process(target=stand, name="helper")
        child.start()
        set_deadline()
        """,
        "child process helper (pid ",
    ),
    "a child that ignores SIGTERM": (
        """
        def ignore():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stand()
        child = multiprocessing.get_context("fork").Process(target=ignore, name="deaf")
        child.start()
        set_deadline()
        """,
        "child process deaf (pid ",
    ),
}


def run(program: str) -> subprocess.CompletedProcess[str]:
    # The pipe ends only once no child has it any more.
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", HEAD + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("what", KEEPS)
def test_what_keeps_a_process_is_named_and_it_ends(what: str) -> None:
    program, named = KEEPS[what]
    ended = run(program)
    # A process that only its children have kept may end by itself, once they are gone.
    assert ended.returncode == 7 or ("child" in what and ended.returncode == 0), ended.stderr
    assert named in ended.stdout


# A generator that stands at its end, in the block of a library's task, as the application's lifespan does in a server.
RELEASES = """
import contextlib, anyio
async def release():
    await anyio.sleep(600)
@contextlib.asynccontextmanager
async def lifespan():
    yield
    await release()
async def leave():
    async with lifespan():
        pass
async def main():
    # An idle thread of anyio, one of the executor, and tasks that wait for others, and nobody for them.
    await anyio.to_thread.run_sync(int)
    if LOOP != "trio":
        await asyncio.to_thread(int)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(anyio.sleep, 600, name="ecdysis_async.idle")
        task_group.start_soon(leave, name="leaving")
        await anyio.wait_all_tasks_blocked()
        set_deadline()
"""

RUNS = {"asyncio": "asyncio.run(main())", "uvloop": "uvloop.run(main())", "trio": "trio.run(main)"}


@pytest.mark.parametrize("loop", RUNS)
def test_a_task_is_named_with_the_applications_innermost_line_and_idle_ones_are_not(loop: str) -> None:
    ended = run(f"import {loop}; LOOP = {loop!r}\n{RELEASES}\n{RUNS[loop]}")
    assert ended.returncode == 7, ended.stderr
    told = [line.rpartition(":")[0] for line in ended.stdout.splitlines() if ": main at" not in line]
    assert told == ["task leaving: leave, in release at <string>"]


def test_where_nothing_is_the_applications_the_main_thread_is_named() -> None:
    ended = run("set_deadline(); asyncio.run(asyncio.sleep(600))")
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout.startswith("thread MainThread at ")


def test_tasks_at_the_same_line_are_named_once() -> None:
    """What is asked for takes no longer with each of them: at this moment the time of the process is over."""
    program = """
    import anyio, sysconfig
    asked, get_paths = [], sysconfig.get_paths
    sysconfig.get_paths = lambda *given: asked.append(None) or get_paths(*given)
    async def main():
        async with asyncio.TaskGroup() as task_group:
            for _ in range(500):
                task_group.create_task(handle())
            await anyio.wait_all_tasks_blocked()
            ExitDeadline(lambda kept: tell([*kept, len(asked) < 10]), status=7).set(1)
    async def handle():
        await asyncio.sleep(600)
    asyncio.run(main())
    """
    ended = run(program)
    assert ended.returncode == 7, ended.stderr
    named, _, is_asked_seldom = ended.stdout.splitlines()
    assert named.startswith("500 tasks: handle at <string>:")
    assert is_asked_seldom == "True"


def test_a_process_ends_although_what_keeps_it_cannot_be_found() -> None:
    """Another thread may change what is looked at, whatever the interpreter makes of that."""
    ended = run("LoopTasks.list = None; ExitDeadline(lambda kept: tell([f'kept by {kept}']), status=7).set(1); stand()")
    assert (ended.returncode, ended.stdout) == (7, "kept by []\n"), ended.stderr


def test_a_thread_of_the_applications_that_waits_for_work_is_named() -> None:
    program = """
    import queue
    class Writer(threading.Thread):
        def run(self):
            self.queue.get()
    writer = Writer(name="writer"); writer.queue = queue.Queue(); writer.start()
    set_deadline()
    """
    assert "thread writer at <string>" in run(program).stdout


def test_a_process_that_ends_by_itself_is_left_alone() -> None:
    ended = run("set_deadline(600)")
    assert (ended.returncode, ended.stdout) == (0, "")


def test_the_earlier_of_two_deadlines_counts() -> None:
    ended = run("deadline = set_deadline(600); deadline.set(0.1); deadline.set(600); stand()")
    assert ended.returncode == 7


def test_a_process_ends_although_nobody_reads_what_it_writes() -> None:
    program = """
    read, write = os.pipe()
    os.dup2(write, 1)
    os.set_blocking(1, False)
    try:
        while os.write(1, b"x" * 4096):
            pass
    except BlockingIOError:
        os.set_blocking(1, True)
    ExitDeadline(lambda kept: None, status=7).set(0.1)
    sys.stdout.write("one more")
    stand()
    """
    assert run(program).returncode == 7


def test_a_word_that_cannot_be_said_ends_the_process_all_the_same() -> None:
    assert run("ExitDeadline(lambda kept: 1 / 0, status=7).set(0.1); stand()").returncode == 7


def test_a_program_that_goes_on_after_many_services_has_one_thread_that_looks_and_is_ended_at_its_end() -> None:
    program = """
    from ecdysis_async._system import exit_deadline
    exit_deadline.LOOK_SECONDS = 0.01
    def serve():
        deadline = ExitDeadline(tell, status=7)
        deadline.note_left()
        deadline.set(0)
    def look():
        return [each for each in threading.enumerate() if each.name == "ecdysis-exit-deadline"]
    for _ in range(5):
        serve()
    while len(look()) > 1:
        time.sleep(0.01)
    atexit.register(stand)
    """
    ended = run(program)
    assert ended.returncode == 7, ended.stderr
    assert "thread MainThread at <string>" in ended.stdout
