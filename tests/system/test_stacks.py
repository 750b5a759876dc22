"""A process tells another one where it stands, whatever its main thread does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ecdysis_async._system.stacks import ask_for_stacks, hear_questions, stop_hearing

# How often it is asked for what a process has to tell.
PATIENCE = 20

HEAD = """
import asyncio, sys, time
from ecdysis_async._system.stacks import hear_questions, stop_hearing
hear_questions()

async def wait_for_the_database():
    print("waiting", flush=True)
    await sleep(600)

def block():
    print("waiting", flush=True)
    time.sleep(600)
"""

AWAITS = {
    "asyncio": "sleep = asyncio.sleep; asyncio.run(wait_for_the_database())",
    "uvloop": "import uvloop; sleep = asyncio.sleep; uvloop.run(wait_for_the_database())",
    "trio": "import trio; sleep = trio.sleep; trio.run(wait_for_the_database)",
}


@contextmanager
def standing(body: str) -> Iterator[int]:
    """Run a program that has said that it waits; yield its pid."""
    command = [sys.executable, "-c", HEAD + textwrap.dedent(body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        try:
            yield process.pid
        finally:
            process.kill()


def ask_for(pid: int, place: str) -> str:
    """Ask until the answer, which a busy machine may cut short, tells of a place."""
    for _ in range(PATIENCE):
        if place in (stacks := ask_for_stacks(pid) or ""):
            return stacks
    raise AssertionError(f"it does not tell of {place}: {stacks}")


@pytest.mark.parametrize("loop", list(AWAITS))
def test_a_task_that_awaits_is_told(loop: str) -> None:
    with standing(AWAITS[loop]) as pid:
        ask_for(pid, "in wait_for_the_database")


def test_what_an_asynchronous_generator_awaits_is_told_also_behind_much_else() -> None:
    body = """
    import contextlib

    @contextlib.asynccontextmanager
    async def lifespan():
        await wait_for_the_database()
        yield

    async def behind(middleware):
        if middleware:
            await behind(middleware - 1)
        else:
            async with lifespan():
                pass

    sleep = asyncio.sleep; asyncio.run(behind(40))
    """
    with standing(body) as pid:
        stacks = ask_for(pid, "in behind")
        assert stacks.index("in wait_for_the_database") < stacks.index("in lifespan") < stacks.index("in behind")


def test_a_blocked_main_thread_is_told_each_time() -> None:
    with standing("block()") as pid:
        for _ in range(2):
            stacks = ask_for(pid, "in block")
            assert stacks.count("in block") == 1


def test_a_loop_that_is_blocked_tells_where() -> None:
    with standing("async def main(): block()\nasyncio.run(main())") as pid:
        stacks = ask_for(pid, "in main")
        assert stacks.index("in block") < stacks.index("in main")


def test_who_does_not_hear_is_left_alone() -> None:
    with standing("stop_hearing(); block()") as pid:
        assert ask_for_stacks(pid) is None
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def test_a_process_that_is_not_there_tells_nothing() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert ask_for_stacks(process.pid) is None


def test_nothing_is_left_of_hearing() -> None:
    number = signal.SIGRTMIN + 11
    before = sorted(os.listdir("/proc/self/fd"))
    hear_questions()
    hear_questions()
    stop_hearing()
    stop_hearing()
    assert (signal.getsignal(number), sorted(os.listdir("/proc/self/fd"))) == (signal.SIG_DFL, before)


def test_a_signal_that_somebody_has_is_left_to_them() -> None:
    number = signal.SIGRTMIN + 11
    former = signal.signal(number, signal.SIG_IGN)
    try:
        hear_questions()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, former)
        stop_hearing()
