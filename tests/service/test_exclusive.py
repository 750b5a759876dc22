"""What a process holds exclusively: one of its tasks, and one of the service's processes."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import anyio
import pytest

import ecdysis_async
from ecdysis_async import DrainInterrupt, Ecdysis, exclusive
from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.host import AcceptingHost
from ecdysis_async._service.exclusive import Exclusives, _Turn, in_application
from ecdysis_async._system.lock_file import LockFile
from ecdysis_async._system.shared_memory import make_memory
from ecdysis_async.errors import StartupError
from ecdysis_async.settings import Settings
from tests.planes import a_plane

PATIENCE_SECONDS = 30

HOLD = """
import json, sys, time
from ecdysis_async._system.lock_file import LockFile
locks = LockFile(int(sys.argv[1]))
# A process that has it in vain gives it back in a moment.
while not locks.try_lock("name"):
    time.sleep(0.001)
locks.write("name", json.loads(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


class Holder:
    """The exclusives of a generation that a test has made.

    Attributes:
        exclusives: what is tested.
        draining: its generation leaves.
        drained: it has.
        is_starting: it has yet to serve.
        is_paused: another process serves in its place.
    """

    def __init__(self, generation: Generation, draining: anyio.Event) -> None:
        self.draining, self.drained = draining, anyio.Event()
        self.is_starting = self.is_paused = False
        self.changes = 0
        self.exclusives = Exclusives(
            generation,
            draining=self.draining,
            drained=self.drained,
            is_starting=lambda: self.is_starting,
            is_paused=lambda: self.is_paused,
            body_task=anyio.get_current_task().id,
            on_change=self.note_change,
        )

    def note_change(self) -> None:
        self.changes += 1

    def leave(self) -> None:
        self.draining.set()
        self.exclusives.leave()

    async def hold(self, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with self.exclusives.hold("name"):
            task_status.started()
            await anyio.sleep_forever()


@contextlib.asynccontextmanager
async def a_holder(lock_file: LockFile | None = None, ready_timeout: float = 60) -> AsyncIterator[Holder]:
    async with a_plane() as plane:
        settings = Settings(ready_timeout=ready_timeout)
        generation = Generation(3, settings, AcceptingHost(plane), GenerationLog(3))
        generation.lock_file = lock_file or LockFile.make()
        with contextlib.closing(generation.lock_file), anyio.fail_after(PATIENCE_SECONDS):
            yield Holder(generation, anyio.Event())


@contextlib.contextmanager
def held_elsewhere(lock_file: LockFile, facts: str = "{}") -> Iterator[subprocess.Popen[bytes]]:
    """Let another process of the service hold it."""
    command = [sys.executable, "-c", HOLD, str(lock_file.fileno()), facts]
    with subprocess.Popen(
        command, pass_fds=[lock_file.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


async def test_without_an_ecdysis_it_is_held_at_once() -> None:
    async with exclusive("scheduler"), exclusive("scheduler"):
        pass
    for name in ("", "a\nb", "x" * 201):
        with pytest.raises(ValueError, match="printable"):
            exclusive(name)
    with pytest.raises(TypeError):
        exclusive(3)  # type: ignore[arg-type]


async def test_one_task_holds_it_and_the_body_ends_with_the_generation() -> None:
    order: list[str] = []
    second = anyio.Event()

    async def hold(name: str) -> None:
        async with exclusive("name"):
            order.append(f"{name} begins")
            if name == "second":
                second.set()
            try:
                await anyio.sleep(0.01 if name == "first" else 3600)
            finally:
                order.append(f"{name} ends")
        order.append(f"{name} goes on: {ecdysis_async.draining.is_set()}")

    with anyio.fail_after(PATIENCE_SECONDS):
        # One that waits for it while this generation leaves is interrupted, which is no failure of the block.
        async with Ecdysis(systemd=False, drain_timeout=1, exit_timeout=3600) as ecdysis:
            await ecdysis.ready()
            async with anyio.create_task_group() as task_group:
                for name in ("first", "second", "third"):
                    task_group.start_soon(hold, name)
                    await anyio.wait_all_tasks_blocked()
                await second.wait()
                ecdysis.stop()
    assert order == [
        "first begins",
        "first ends",
        "first goes on: False",
        "second begins",
        "second ends",
        "second goes on: True",
    ]


async def test_a_task_that_holds_it_does_not_wait_for_itself() -> None:
    async with a_holder() as holder, holder.exclusives.hold("name"), holder.exclusives.hold("other"):
        with pytest.raises(RuntimeError, match="would wait for itself"):
            async with holder.exclusives.hold("name"):
                pass
        assert [each["name"] for each in holder.exclusives.describe() if each["is_held"]] == ["name", "other"]


async def test_another_process_is_waited_for_until_its_death() -> None:
    locks = LockFile.make()
    async with a_holder(locks) as holder, anyio.create_task_group() as task_group:
        with held_elsewhere(locks) as process:
            # A task that is cancelled leaves the queue, and another one stands there.
            with anyio.move_on_after(0.05) as scope:
                async with holder.exclusives.hold("name"):
                    pass
            assert scope.cancelled_caught
            task_group.start_soon(anyio.sleep, 0)
            process.kill()
            await task_group.start(holder.hold)
        assert [each["is_held"] for each in holder.exclusives.describe()] == [True]
        assert locks.read("name")["generation"] == 3
        holder.leave()
    assert holder.exclusives.describe() == []


async def test_what_comes_when_nobody_wants_it_any_more_is_given_back() -> None:
    locks = LockFile.make()
    async with a_holder(locks) as holder:
        with held_elsewhere(locks) as process:
            with anyio.move_on_after(0.05):
                async with holder.exclusives.hold("name"):
                    pass
            process.kill()
        with held_elsewhere(locks):
            pass
        async with holder.exclusives.hold("name"):
            assert [each["is_held"] for each in holder.exclusives.describe()] == [True]


def test_what_nobody_wants_is_given_back_before_it_can_be_taken_again() -> None:
    """A process that takes a lock which it has succeeds: it would lose the lock a moment later."""
    made = threading.Event()
    was_over = []

    class Watched(LockFile):
        def lock(self, name: str) -> None:
            made.wait(PATIENCE_SECONDS)
            super().lock(name)

        def unlock(self, name: str) -> None:
            was_over.append(turn.is_over)
            super().unlock(name)

    with contextlib.closing(Watched(make_memory("ecdysis-test"))) as locks:
        turn = _Turn(locks, "name")
        (thread,) = [each for each in threading.enumerate() if each.name == "ecdysis exclusive name"]
        made.set()
        thread.join(PATIENCE_SECONDS)
        assert (was_over, turn.is_over) == ([False], True)


async def test_where_no_thread_can_wait_it_is_tried_again_and_again() -> None:
    """The kernel sees a deadlock where tasks of two processes wait for each other's names, which are independent."""

    class Deadlock(LockFile):
        def lock(self, name: str) -> None:
            raise OSError(errno.EDEADLK, "Resource deadlock avoided")

    locks = Deadlock(make_memory("ecdysis-test"))
    async with a_holder(locks) as holder, anyio.create_task_group() as task_group:
        with held_elsewhere(locks) as process:

            async def end() -> None:
                await anyio.sleep(0.05)
                process.kill()

            task_group.start_soon(end)
            async with holder.exclusives.hold("name"):
                pass


async def test_a_generation_that_has_paused_does_not_take_it() -> None:
    async with a_holder() as holder, anyio.create_task_group() as task_group:
        holder.is_paused = True
        taken = anyio.Event()

        async def take() -> None:
            async with holder.exclusives.hold("name"):
                taken.set()

        task_group.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        assert not taken.is_set()
        holder.is_paused = False
        await taken.wait()


async def test_a_task_of_an_application_waits_until_it_is_cancelled() -> None:
    """It would have an exception that nobody fetches; and others learn of the end when the connections have ended."""
    async with a_holder() as holder, anyio.create_task_group() as task_group:
        await task_group.start(holder.hold)
        interrupted = anyio.Event()

        async def wait() -> None:
            with pytest.raises(DrainInterrupt):
                async with holder.exclusives.hold("name"):
                    pass
            interrupted.set()

        with in_application():
            task_group.start_soon(holder.hold, anyio.TASK_STATUS_IGNORED)
        task_group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        holder.leave()
        await anyio.wait_all_tasks_blocked()
        assert not interrupted.is_set()
        holder.drained.set()
        await interrupted.wait()
        assert [each["is_held"] for each in holder.exclusives.describe()] == [False]
        task_group.cancel_scope.cancel()


@pytest.mark.parametrize(("facts", "expected"), [('{"is_kept": true}', "another process"), ("{}", "another process")])
async def test_a_start_up_does_not_wait_for_ever(facts: str, expected: str) -> None:
    """It does not wait at all where the holder keeps it for as long as it serves."""
    locks = LockFile.make()
    async with a_holder(locks, ready_timeout=0.4) as holder:
        holder.is_starting = True
        with held_elsewhere(locks, facts), pytest.raises(StartupError, match=expected):
            async with holder.exclusives.hold("name"):
                pass


async def test_what_a_start_up_keeps_is_said_to_those_who_wait() -> None:
    locks = LockFile.make()
    async with a_holder(locks) as holder:
        holder.is_starting = True
        with in_application() as start_up:
            async with holder.exclusives.hold("name"):
                holder.exclusives.note_serving()
                assert locks.read("name")["is_kept"]
                start_up.is_over = True
