"""Functions that block, run beside the loop: also where the application has taken all threads, or there are none."""

from __future__ import annotations

import threading

import anyio
import anyio.to_thread
import pytest

from ecdysis_async._system.threads import run_in_thread


async def test_it_runs_in_another_thread_and_its_error_is_raised(backend: str) -> None:
    assert await run_in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(RuntimeError, match="its own"):
        await run_in_thread(fail)


def fail() -> None:
    raise RuntimeError("its own")


async def test_an_application_that_uses_all_of_anyios_threads_is_not_in_the_way(backend: str) -> None:
    limiter = anyio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 1
    release = threading.Event()
    try:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(lambda: anyio.to_thread.run_sync(release.wait))
                await anyio.wait_all_tasks_blocked()
                assert await run_in_thread(lambda: "done") == "done"
                release.set()
    finally:
        release.set()
        limiter.total_tokens = before


async def test_cancellation_waits_unless_the_function_is_abandoned(backend: str) -> None:
    begun, release, done = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        release.wait()
        done.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(lambda: run_in_thread(wait, abandon_on_cancel=True))
            await anyio.to_thread.run_sync(begun.wait)
            task_group.cancel_scope.cancel()
        assert not done.is_set()
        release.set()
        assert await anyio.to_thread.run_sync(done.wait)


async def test_without_a_thread_it_runs_on_the_loop(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("can't start new thread")

    # A process at its limit of threads could not run the rest of the tests.
    monkeypatch.setattr(anyio.to_thread, "run_sync", refuse)
    assert await run_in_thread(threading.get_ident) == threading.get_ident()
