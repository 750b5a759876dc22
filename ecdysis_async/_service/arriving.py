"""How a generation comes to serve: it takes over what its predecessor has, gets ready, and accepts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack

import anyio

from ecdysis_async._handoff.protocol import SuccessorEvent
from ecdysis_async._handoff.successor import SuccessorSide
from ecdysis_async._management.takeover import ask_for_channel
from ecdysis_async._system.claims import take_channel
from ecdysis_async._system.launch import UNFOLLOWED, find_unfollowed_link
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.report import State

from .life import Life

__all__ = ["Arriving", "tell_of_unread"]


# How long an application may take to read what was left to it, after its generation is final, seconds.
UNREAD_SECONDS = 1.0


def tell_of_unread(life: Life) -> None:
    """Name what the predecessor has left and nobody has read: a name that is spelt otherwise loses it in silence."""
    if life.settled.is_set() and (unread := life.generation.inherited_stash.take_unread()):
        life.generation.log.warning(
            "nobody has read what the predecessor has left: %s (inherited_stash)", ", ".join(map(repr, unread))
        )


class Arriving:
    """The way of one generation in: :meth:`inherit` when its block is entered, and :meth:`serve` when it is ready.

    Args:
        life: of this generation.
    """

    def __init__(self, life: Life) -> None:
        self._life = life

    async def inherit(
        self, takeover_path: str | None, on_change: Callable[[SuccessorSide], None], resources: ExitStack
    ) -> bool:
        """Take over what a predecessor hands down, if there is one; return whether it has started this process.

        Args:
            takeover_path: the control socket of a service that is to hand over to this process, which it has not
                started. Where there is a predecessor, that goes first.
            on_change: is called after each change of the handoff.
            resources: what is closed at the end of the block.

        Raises:
            HandoffAborted: the predecessor does not hand down anything.
            TakeoverFailed: the other service does not hand over.
        """
        sock = take_channel()
        is_child = sock is not None
        if sock is None and takeover_path is not None:
            sock = await run_in_thread(functools.partial(ask_for_channel, takeover_path))
        if sock is not None:
            inheritance = SuccessorSide(sock, self._life.generation, self._life.plane, on_change, is_child=is_child)
            self._life.inheritance = inheritance
            resources.callback(inheritance.close)
            await inheritance.greet()
        return is_child

    async def serve(self, describe: Callable[[], str]) -> None:
        """Announce that this generation is ready, and return when it accepts.

        Args:
            describe: says what is served.

        Raises:
            OSError: a socket cannot listen, or the pid file cannot be written.
        """
        life = self._life
        await life.management.prepare(describe)
        if life.inheritance is None:
            await self._open(describe)
        else:
            # It is waited for once more where the task was cancelled that had announced it.
            if life.state is State.STARTING:
                life.state = State.WAITING
                life.inheritance.post(SuccessorEvent.READY)
            await life.inheritance.opened.wait()
            if life.is_aborted:
                # The body is being cancelled; but a task that was woken before gets one more turn on asyncio.
                await anyio.sleep_forever()
            life.management.announce(describe())
        life.management.serving()

    async def tell_of_unread_stashes(self) -> None:
        """Name what the predecessor has left and nobody has read, soon after this generation is final."""
        await self._life.settled.wait()
        # A commit may be final at once, before the application has had its turn.
        await anyio.sleep(UNREAD_SECONDS)
        tell_of_unread(self._life)

    async def _open(self, describe: Callable[[], str]) -> None:
        """Accept, as a generation that follows nobody."""
        life, registry, log = self._life, self._life.plane.registry, self._life.generation.log
        async with life.generation.gate_lock:
            # A socket listens also where the task that will accept has not had its turn yet, which on trio is a matter
            # of chance: who hears "ready" connects at once, and was refused.
            registry.start_listening()
            # A client that finds the pid file may connect, and one that has an answer may look for the file.
            await life.management.publish()
            # A stop at this moment, which cancels the body, does not cut this short: the drain begins where it ends.
            with anyio.CancelScope(shield=True):
                await life.plane.gate.open()
        # It is told at once: who waited in the queue may ask for a restart by now.
        if life.state is State.STARTING:
            life.state = State.SERVING
            life.management.changed()
        life.management.announce(describe())
        if (link := await run_in_thread(find_unfollowed_link)) is not None:
            log.warning(UNFOLLOWED, link)
        life.settled.set()
        for entry in registry.unclaimed():
            if entry.number is None:
                log.warning("nobody asks for %s, which systemd has kept: closing it", entry)
            else:
                log.warning("systemd has passed %s, and nobody asks for it: clients wait there", entry)
        registry.close_unclaimed(unlink=True)
        life.management.park()
