"""The successor as its predecessor has it: a process, the channel to it, its stderr, and its connection counters."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Awaitable, Callable

import anyio

from ecdysis_async._ipc.channel import Channel
from ecdysis_async._ipc.peer import Peer, wait_for_death
from ecdysis_async._system.process import Child, Spawner, find_children
from ecdysis_async._system.stacks import ask_for_stacks
from ecdysis_async._system.stderr import StderrTail
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import RestartError, SpawnFailed
from ecdysis_async.report import Phase

from .side import ALL_COUNTERS, COUNTERS

__all__ = ["SuccessorProcess"]

# What a successor that has to leave gets between SIGTERM and SIGKILL, seconds.
END_GRACE_SECONDS = 3.0


class SuccessorProcess:
    """Starts a successor, watches it, and ends it. It owns the pidfds, the channel, the pipe and the counters.

    Attributes:
        process: the child that was spawned; its zombie is to be reaped here.
        peer: the process that speaks on the channel: that child, or one behind a wrapper.
        stderr: its stderr until it is ready.
        stacks: where it stood when its time was over; empty where it was not asked, or has not told.
        exit_status: how the child ended, once :meth:`collect_exit` has learnt it.
    """

    def __init__(self, process: Child, peer: Peer, stderr: StderrTail) -> None:
        self.process = process
        self.peer = peer
        self.stderr = stderr
        self.exit_status = 0
        self.stacks = ""
        self._counters = -1
        # What is_dead() said at the close, when the peer could still be asked.
        self._was_dead = False

    @classmethod
    async def start(
        cls, spawner: Spawner, prepare: Callable[[Channel, int], Awaitable[None]] | None = None
    ) -> SuccessorProcess:
        """Run the successor's process.

        Args:
            spawner: brings the process, given its end of the channel and its stderr.
            prepare: is called before that, with this end of the channel and the descriptor by which the stderr is read.

        Raises:
            RestartError: it could not be run; nothing is left of it then.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise SpawnFailed(
                f"no channel for a successor: {error}; is the limit of open files reached?", phase=Phase.START
            ) from error
        try:
            stderr = StderrTail()
        except OSError as error:
            ours.close()
            theirs.close()
            raise SpawnFailed(
                f"no pipe for a successor: {error}; is the limit of open files reached?", phase=Phase.START
            ) from error
        process: Child | None = None
        channel = Channel(ours)
        try:
            if prepare is not None:
                await prepare(channel, stderr.read_end)
            process = await spawner(theirs, stderr.write_end)
            return cls(process, Peer(channel, os.dup(process.pidfd)), stderr)
        except BaseException as error:
            channel.close()
            stderr.close()
            if process is not None:
                try:
                    await process.end(END_GRACE_SECONDS)
                finally:
                    process.close()
            if isinstance(error, Exception) and not isinstance(error, RestartError):
                raise SpawnFailed(f"the successor could not be started: {error!r}") from error
            raise
        finally:
            theirs.close()
            stderr.close_write_end()

    @property
    def is_known(self) -> bool:
        """Whether it has said who it is."""
        return self._counters >= 0

    def is_dead(self) -> bool:
        """Say whether it has ended, without waiting."""
        return self._was_dead or self.peer.is_dead()

    def know(self, pidfd: int, counters: int) -> None:
        """Take over what it has said of itself: a pidfd of the process that speaks, and its connection counters.

        Where the command is a wrapper, another process than the spawned one speaks. From here on the speaker counts.
        """
        self._counters = counters
        self.peer.watch(pidfd)

    def read_open_connections(self) -> int:
        """Return how many connections it has accepted that are not closed, alive or dead.

        Raises:
            OSError, struct.error: that cannot be read.
        """
        # Read rather than mapped: a file that was cut short would be a SIGBUS here.
        opened: int
        closed: int
        opened, closed = COUNTERS.unpack(os.pread(self._counters, COUNTERS.size, 0))
        return max(0, opened - closed)

    async def learn_where_it_stands(self, pid: int) -> None:
        """Ask it where it stands, and note its answer.

        Args:
            pid: the process that is the successor, as far as that is known; one behind a wrapper is asked as well.
        """

        def ask() -> str:
            return next((found for each in (pid, *find_children(pid)) if (found := ask_for_stacks(each))), "")

        self.stacks = await run_in_thread(ask)

    def read_work(self) -> tuple[int, int]:
        """Return how many requests it has told somebody of, and how many of its connections are closed.

        Raises:
            OSError, struct.error: that cannot be read.
        """
        counts = os.pread(self._counters, ALL_COUNTERS.size, 0)
        closed = int(COUNTERS.unpack(counts[: COUNTERS.size])[1])
        return (int(ALL_COUNTERS.unpack(counts)[2]) if len(counts) == ALL_COUNTERS.size else 0), closed

    async def end(self, *, leaves_by_itself: bool, at_once: bool = False) -> None:
        """End it: by SIGTERM, and after a grace by SIGKILL.

        Args:
            leaves_by_itself: it has said that it fails: a signal would cut its own way of cleaning up short.
            at_once: it is killed. What may accept takes SIGTERM for a stop of the service, and shuts the listening
                sockets, which are the very ones that its predecessor is to accept from.

        Cancellation kills the child at once.
        """
        if leaves_by_itself:
            with anyio.move_on_after(END_GRACE_SECONDS):
                await self.peer.died.wait()
        if at_once:
            self.peer.send_signal(signal.SIGKILL)
        await self.process.end(END_GRACE_SECONDS)
        # Where a wrapper was spawned, the one that speaks is its child, and has to be ended too.
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.peer.is_dead():
                self.peer.send_signal(number)
                with anyio.move_on_after(END_GRACE_SECONDS):
                    await self.peer.died.wait()

    async def kill(self) -> None:
        """End it and wait for its death, where nobody listens to the peer any more."""
        await self.process.end(END_GRACE_SECONDS)
        if not self.peer.is_dead():
            self.peer.send_signal(signal.SIGKILL)
            await wait_for_death(self.peer.pidfd)

    async def collect_exit(self) -> None:
        """Learn how it died, and hear its last words."""
        self.exit_status = await self.process.end(END_GRACE_SECONDS)
        self.stderr.read_rest()

    def close(self) -> None:
        """Let go of everything; a process that is alive stays so. Call it once."""
        self._was_dead = self.peer.is_dead()
        self.peer.close()
        self.stderr.close()
        if self._counters >= 0:
            os.close(self._counters)
        self.process.close()
