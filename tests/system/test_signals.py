"""Signals within the loop: each one is seen, by whom it is meant for, and the former handlers come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import anyio
import pytest

from ecdysis_async._system import signals as signals_module
from ecdysis_async._system.signals import handled_signals

ENDS = """
import atexit, os, signal, sys
from ecdysis_async._system.signals import handled_signals

stop_signals = (signal.SIGTERM, signal.SIGINT)
with handled_signals(dict.fromkeys((*stop_signals, signal.SIGHUP), lambda: None)) as receiver:
    if sys.argv[1] == "stopped":
        receiver.keep_ignoring(stop_signals)
assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
for each in stop_signals:
    atexit.register(os.kill, os.getpid(), each)
"""


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    """Fail a test that leaves a handler or a wakeup descriptor of its own."""
    every = signal.valid_signals()
    before = {each: signal.getsignal(each) for each in every}
    yield
    after = {each: signal.getsignal(each) for each in every}
    assert after == before
    assert wakeup_descriptor() == -1


def wakeup_descriptor() -> int:
    """Tell which descriptor Python writes signals to. There is no way but to set it."""
    found = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(found, warn_on_full_buffer=False)
    return found


def is_asleep() -> bool:
    """Say whether the main thread waits in its loop; asked from another thread."""
    return "epoll" in Path(f"/proc/self/task/{os.getpid()}/wchan").read_text()


async def wait_for(happened: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not happened():
            await anyio.lowlevel.checkpoint()


async def test_each_signal_is_seen_once_and_in_order() -> None:
    seen: list[str] = []
    handlers = {signal.SIGUSR1: lambda: seen.append("one"), signal.SIGUSR2: lambda: seen.append("two")}
    with handled_signals(handlers) as receiver:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(receiver.run)
            for _ in range(3):
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR2)
            await wait_for(lambda: len(seen) >= 6)
            # What C has written as well must not count for anything.
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            task_group.cancel_scope.cancel()
    assert seen == ["one", "two"] * 3


async def test_a_signal_is_seen_on_a_loop_that_sleeps() -> None:
    # C's handler runs in another thread than Python's, which has no occasion to run: as for a signal that comes between
    # the main thread's last bytecode and its sleep.
    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not is_asleep() and time.monotonic() < deadline:
            time.sleep(0.001)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    seen = anyio.Event()
    thread = threading.Thread(target=interrupt)
    with handled_signals({signal.SIGUSR1: seen.set}) as receiver:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(receiver.run)
            await anyio.lowlevel.checkpoint()
            thread.start()
            try:
                with anyio.fail_after(60):
                    await seen.wait()
            finally:
                thread.join()
            task_group.cancel_scope.cancel()


@pytest.mark.backends("asyncio", "uvloop")
async def test_signals_of_others_do_not_matter() -> None:
    seen: list[str] = []
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGWINCH, lambda number, frame: seen.append("theirs"))
    try:
        with handled_signals({signal.SIGUSR1: lambda: seen.append("ours")}) as receiver:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(receiver.run)
                signal.raise_signal(signal.SIGWINCH)
                await wait_for(lambda: seen == ["theirs"])
                # From here on Python writes to the loop's own descriptor, and that stays so.
                loop.add_signal_handler(signal.SIGUSR2, seen.append, "the loop's")
                signal.raise_signal(signal.SIGUSR2)
                await wait_for(lambda: seen[1:] == ["the loop's"])
                signal.raise_signal(signal.SIGUSR1)
                await wait_for(lambda: seen[2:] == ["ours"])
                task_group.cancel_scope.cancel()
        signal.raise_signal(signal.SIGUSR2)
        await wait_for(lambda: seen[3:] == ["the loop's"])
    finally:
        loop.remove_signal_handler(signal.SIGUSR2)
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)


async def test_what_comes_while_nobody_runs_it_is_seen_later() -> None:
    seen = anyio.Event()
    with handled_signals({signal.SIGUSR1: seen.set}) as receiver:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await receiver.run()
        signal.raise_signal(signal.SIGUSR1)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(receiver.run)
            with anyio.fail_after(60):
                await seen.wait()
            task_group.cancel_scope.cancel()


def test_the_former_handlers_and_the_descriptor_come_back() -> None:
    def theirs(number: int, frame: object) -> None: ...

    reading, writing = os.pipe2(os.O_NONBLOCK)
    former = signal.signal(signal.SIGUSR1, theirs)
    signal.set_wakeup_fd(writing)
    try:
        with handled_signals({signal.SIGUSR1: lambda: None}):
            assert wakeup_descriptor() == writing
        assert signal.getsignal(signal.SIGUSR1) is theirs
        assert wakeup_descriptor() == writing
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR1, former)
        os.close(reading)
        os.close(writing)


def test_a_handler_that_cannot_be_installed_leaves_nothing() -> None:
    impossible = dict.fromkeys((signal.SIGUSR1, signal.SIGKILL), lambda: None)
    with pytest.raises(OSError, match="Invalid argument"), handled_signals(impossible):
        pytest.fail("SIGKILL has a handler")


def test_a_full_pipe_is_no_failure() -> None:
    with handled_signals({signal.SIGUSR1: lambda: None}) as receiver:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(receiver._write_end, bytes(4096))
        signal.raise_signal(signal.SIGUSR1)


def test_a_handler_that_somebody_kept_writes_nowhere() -> None:
    with handled_signals({signal.SIGUSR1: lambda: None}):
        kept = signal.getsignal(signal.SIGUSR1)
    assert callable(kept)
    # They get the numbers that the pipe had.
    reading, writing = os.pipe2(os.O_NONBLOCK)
    try:
        kept(signal.SIGUSR1, None)
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(("why", "status"), [("stopped", 0), ("left", -signal.SIGTERM)])
def test_after_a_stop_no_second_one_kills_the_interpreter(why: str, status: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(signals_module.__file__).parents[2])}
    # Exit handlers run in reverse: SIGINT, and then SIGTERM.
    done = subprocess.run(
        [sys.executable, "-c", ENDS, why], env=environment, check=False, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize("is_blocked", [True, False])
async def test_a_signal_that_a_blocked_loop_does_not_see_is_told(
    backend: str, monkeypatch: pytest.MonkeyPatch, *, is_blocked: bool
) -> None:
    monkeypatch.setattr(signals_module, "DELAY_SECONDS", 0.05)
    told = threading.Event()
    delays: list[tuple[list[str], float]] = []

    def tell_delay(names: Collection[str], seconds: float) -> None:
        delays.append((list(names), seconds))
        told.set()

    before = threading.active_count()
    seen = anyio.Event()
    with handled_signals({signal.SIGUSR1: seen.set}, tell_delay) as receiver:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(receiver.run)
            await anyio.lowlevel.checkpoint()
            if not is_blocked:
                monkeypatch.setattr(signals_module, "DELAY_SECONDS", 60)
            signal.raise_signal(signal.SIGUSR1)
            if is_blocked:
                told.wait(60)
            with anyio.fail_after(60):
                await seen.wait()
            task_group.cancel_scope.cancel()
    assert [names for names, _ in delays[:1]] == ([["SIGUSR1"]] if is_blocked else [])
    with anyio.fail_after(60):
        while threading.active_count() > before:  # noqa: ASYNC110 - the end of a thread is no event
            await anyio.sleep(0.01)
