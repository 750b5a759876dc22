"""Workers whose both ends are in a test: what an anchor has of one, and what the worker itself says and hears."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import anyio

from ecdysis_async._anchor.config import AnchorConfig
from ecdysis_async._anchor.hanging import HungWorkers
from ecdysis_async._anchor.pool import HandoffStatus, Slot, Worker, WorkerPool
from ecdysis_async._anchor.sockets import HeldSockets
from ecdysis_async._anchor.state import AnchorState, Filled, Life
from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._ipc.channel import Frame
from ecdysis_async._ipc.worker_link import WorkerLink
from ecdysis_async._system.process import Process
from ecdysis_async.errors import RestartError
from ecdysis_async.report import RestartReport, State
from ecdysis_async.settings import Settings

__all__ = ["Begun", "Puppet", "Stage", "make_report", "stage"]


def make_report(**facts: object) -> RestartReport:
    return RestartReport("id", 2, 100, 101, **facts)  # type: ignore[arg-type]


class Puppet:
    """A worker that says and does what a test wants.

    Attributes:
        worker: what the anchor has of it.
        link: the worker's own end.
    """

    def __init__(self, process: Process, *, state: State = State.SERVING, served_since: float = 0.0) -> None:
        ours, theirs = socket.socketpair()
        self.link = WorkerLink(theirs)
        self.worker = Worker(1, process, WorkerLink(ours), born=0.0, pid=process.pid, state=state)
        if state is not State.STARTING:
            self.worker.served_since = served_since

    def close(self) -> None:
        for link in (self.link, self.worker.link):
            link.close()
        self.worker.process.close()

    async def hear(self) -> Frame:
        """Return the next message of the anchor, which need not send by itself."""
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self.worker.link.run)
            frame = await self.link.receive()
            await self.worker.link.flush()
            task_group.cancel_scope.cancel()
        return frame

    async def say(self, message: str, body: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Tell the anchor something; the descriptors are taken over."""
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self.link.run)
            self.link.tell(message, body, descriptors)
            await self.link.flush()
            task_group.cancel_scope.cancel()

    def stand(
        self,
        state: PredecessorState | None = PredecessorState.PROBATION,
        *,
        is_over: bool = False,
        error: RestartError | None = None,
    ) -> None:
        """Let the anchor know where the handoff of this worker stands."""
        self.worker.handoff = HandoffStatus(state, is_over, None, error)


class Begun:
    """What was begun beside everything else, and does not run before a test wants it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Coroutine[Any, Any, object]], tuple[object, ...]]] = []

    def __call__(self, function: Callable[..., Coroutine[Any, Any, object]], /, *arguments: object) -> None:
        self.calls.append((function, arguments))

    @property
    def names(self) -> list[str]:
        return [function.__name__.strip("_") for function, _ in self.calls]

    async def run(self) -> None:
        """Run what was begun until now, one after the other."""
        while self.calls:
            function, arguments = self.calls.pop(0)
            await function(*arguments)


class Stage:
    """An anchor's knowledge, with puppets for workers.

    Attributes:
        state: what the anchor knows.
        sockets: what it holds.
        log: its log.
        begun: what it has begun.
        filled: the slots and generations in which a worker was started; each start succeeds unless `failure` is set.
        failure: why a start fails.
        hung_workers: what is done about workers that do not answer.
    """

    def __init__(self, config: AnchorConfig) -> None:
        self.log = GenerationLog(0)
        self.state = AnchorState(config, WorkerPool(config.workers), life=Life.SERVING, has_served=True)
        self.sockets = HeldSockets(self.log)
        self.begun = Begun()
        self.filled: list[tuple[int, int]] = []
        self.failure: RestartError | None = None
        self.hung_workers = HungWorkers(self.state, self.log, begin=self.begun, fill=self.fill)
        self._puppets: list[Puppet] = []
        # Every worker may be sent a signal, so that none is the test's own process.
        self._sleeper: subprocess.Popen[bytes] | None = None

    def add_slot(self, *, state: State | None = State.SERVING, process: Process | None = None) -> Puppet | None:
        """Add a slot, with a worker in a state."""
        slot = self.state.pool.enlarge()
        return None if state is None else self.add_worker(slot, state=state, process=process)

    def add_worker(self, slot: Slot, *, state: State = State.SERVING, process: Process | None = None) -> Puppet:
        """Add a worker to a slot; without a process of its own it shares one that sleeps."""
        if process is None:
            if self._sleeper is None:
                self._sleeper = subprocess.Popen(["sleep", "600"])
            process = Process(self._sleeper.pid, os.pidfd_open(self._sleeper.pid))
        puppet = Puppet(process, state=state)
        self._puppets.append(puppet)
        slot.workers.append(puppet.worker)
        return puppet

    def kill(self, puppet: Puppet) -> None:
        """Let the anchor know that a worker is dead."""
        puppet.worker.exit_status = 0
        for slot in self.state.pool.slots:
            if puppet.worker in slot.workers:
                slot.note_end(puppet.worker, 0.0)
        self.state.changes.announce()

    async def fill(self, slot: Slot, generation: int) -> Filled:
        """Start a worker, as far as an anchor sees it."""
        self.filled.append((slot.index, generation))
        if self.failure is None:
            self.add_worker(slot)
        return Filled(make_report(), self.failure)

    def close(self) -> None:
        for puppet in self._puppets:
            puppet.close()
        self.sockets.close(unlink=True)
        if self._sleeper is not None:
            self._sleeper.kill()
            self._sleeper.wait()


@contextlib.contextmanager
def stage(
    workers: int = 0, *, target: int | None = None, settings: Settings | None = None, **plan: Any
) -> Iterator[Stage]:
    """Set a stage with so many slots, in each of which a worker serves."""
    config = AnchorConfig(
        {},
        workers=workers if target is None else target,
        settings=settings or Settings(probation=0),
        **plan,
    )
    found = Stage(config)
    try:
        for _ in range(workers):
            found.add_slot()
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def sleeping_process() -> Iterator[Process]:
    """Run a child that does nothing, reaped by its pidfd."""
    child = subprocess.Popen(["sleep", "600"])
    process = Process(child.pid, os.pidfd_open(child.pid))
    child.returncode = 0
    try:
        yield process
    finally:
        if process.pidfd == -1:
            pass
        elif process.returncode is None:
            process.send_signal(9)
            os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED)
        process.close()
