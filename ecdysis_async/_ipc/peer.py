"""One other generation, heard through its channel and watched through its pidfd, as a single ordered stream.

What a process says before it dies is heard before its death; and its death is learnt from the pidfd alone, never
guessed from a channel that ended. Nothing here knows what the messages mean.
"""

from __future__ import annotations

import math
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from ecdysis_async.errors import ChannelClosed, ChannelError, DescriptorsLost

from .channel import Channel, Frame

__all__ = ["Death", "Peer", "is_dead", "wait_for_death"]

# A dying process closes its descriptors a moment before its pidfd becomes readable (do_exit of Linux: exit_files, then
# exit_notify). An end of file is therefore a death or a fault; this many seconds are enough to tell which.
DEATH_GRACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Death:
    """The peer is dead: its pidfd is readable. Always the last thing that is delivered."""


def is_dead(pidfd: int) -> bool:
    """Say whether the process of a pidfd has ended (pidfd_open(2): it polls readable), without waiting."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


async def wait_for_death(pidfd: int) -> None:
    """Wait until the process of a pidfd has ended. Cancelling changes nothing."""
    while not is_dead(pidfd):
        await anyio.wait_readable(pidfd)


class Peer:
    """The other side of a handoff. Owns the channel and the pidfd."""

    def __init__(self, channel: Channel, pidfd: int) -> None:
        self.channel = channel
        self.pidfd = pidfd
        # Set by the one task that waits for the pidfd, which no other can wait for at the same time.
        self.died = anyio.Event()
        self._watching = anyio.CancelScope()
        self._replaced: list[int] = []

    def is_dead(self) -> bool:
        """Say whether it has died, without waiting."""
        return is_dead(self.pidfd)

    def send_signal(self, number: int) -> bool:
        """Send it a signal, if it still lives and is not another user's by now; say whether it was sent."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def has_news(self) -> bool:
        """Say whether something was sent, or the channel ended, that ``run`` has not delivered yet."""
        poll = select.poll()
        poll.register(self.channel.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def watch(self, pidfd: int) -> None:
        """Watch another process from now on: the one that really speaks, where a wrapper was spawned."""
        # It is closed when nobody waits on it any more. Its number may belong to the next connection at once. The end
        # of the wait would then take that connection's reader away (asyncio: it hangs; uvloop: RuntimeError).
        self._replaced.append(self.pidfd)
        self.pidfd = pidfd
        self._watching.cancel()

    async def run(self, deliver: Callable[[Frame | ChannelError | Death], None]) -> None:
        """Deliver each frame, or that its descriptors are lost; at most one other error; and at the end the death.

        ``deliver`` owns the frames. Cancellation loses nothing: a later run goes on where this one ended.
        """
        heard_all = False
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self._wait_and_cancel, task_group.cancel_scope)
            try:
                while True:
                    deliver(await self.receive())
            except ChannelError as error:
                heard_all = True
                if isinstance(error, ChannelClosed):
                    await anyio.sleep(DEATH_GRACE_SECONDS)
                else:
                    # The peer would wait for answers to what it passes on; so it learns that nothing arrives.
                    self.channel.refuse()
                deliver(error)
            await anyio.sleep(math.inf)
        while not heard_all:
            try:
                if (frame := self.channel.receive_nowait()) is None:
                    break
                deliver(frame)
            except DescriptorsLost as error:
                deliver(error)
            except ChannelError:
                # The end of the stream, or half a frame that its death cut short: nothing that it had said is lost.
                break
        deliver(Death())

    async def receive(self) -> Frame | DescriptorsLost:
        """Wait for the next frame, or for what is left of it: the one error after which the channel goes on.

        Raises:
            ChannelError: nothing can be received any more.
        """
        try:
            return await self.channel.receive()
        except DescriptorsLost as error:
            return error

    def close(self) -> None:
        """Let go of all descriptors; harmless if done already. Cancel ``run`` first."""
        self.channel.close()
        self._close_replaced()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    async def _wait_and_cancel(self, scope: anyio.CancelScope) -> None:
        while True:
            with anyio.CancelScope() as self._watching:
                await wait_for_death(self.pidfd)
                self.died.set()
                scope.cancel()
                return
            self._close_replaced()

    def _close_replaced(self) -> None:
        while self._replaced:
            os.close(self._replaced.pop())
