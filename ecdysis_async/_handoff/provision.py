"""What a successor is given to begin with, and how: put into its channel before it lives, or sent when it asks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from ecdysis_async._ipc.channel import Channel
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._system.descriptors import describe_place
from ecdysis_async._system.shared_memory import LastWord
from ecdysis_async._system.stderr import duplicate_stderr

from .generation import Generation
from .protocol import VERSIONS, FromPredecessor
from .stash import At, Batch

__all__ = ["Message", "Provision"]

Message = tuple[dict[str, Any], list[int]]
"""The body of a message, and the descriptors that go with it."""


class Provision:
    """The sockets for one successor, and what it has to know of its predecessor.

    Args:
        generation: the predecessor.
        number: of the successor.
        restart: the id of the restart; empty where the successor belongs to none.

    Attributes:
        entries: the sockets of the last message, in its order.
        env_file_keys: the keys that the successor's environment has from the env file.
        last_word: what keeps the counts where this process is killed during the start; None: nothing does.
        is_known: whether the successor's release knows that it may have been given its sockets before it asks.
    """

    def __init__(self, generation: Generation, number: int, restart: str) -> None:
        self._generation = generation
        self._number = number
        self._restart = restart
        self.entries: list[Entry] = []
        self.env_file_keys: tuple[str, ...] = ()
        self.last_word: LastWord | None = None
        self.is_known = False
        # What was put into the channel before there was a successor.
        self._sent_ahead: list[tuple[Entry, int]] | None = None

    def keep_counts(self) -> None:
        """Keep what is counted, also if this process is killed: the successor would count from 0 without it."""
        generation = self._generation
        try:
            generation.last_word = self.last_word = LastWord.make()
        except OSError as error:
            generation.log.of(self._restart).debug("nothing keeps what is counted: %s", error)
        generation.keep_counts()

    def send_ahead(self, channel: Channel, stderr: int) -> None:
        """Put the sockets into the channel before there is a successor, which has them whatever happens here (G6).

        Nothing is put there where a stash is due at the start, which is made while the successor imports; and where
        there are more sockets than one message of the kernel has descriptors (253). A death during the import costs the
        queue then.

        Args:
            channel: to the successor.
            stderr: the end of a pipe that the successor's standard error is read from.
        """
        if self._generation.stashes.names(At.START):
            return
        try:
            with self._describe(Batch(), stderr) as (body, descriptors):
                if channel.send_at_once(FromPredecessor.LISTENERS, {**body, "provision": True}, descriptors):
                    self._sent_ahead = _identify(self.entries)
        except OSError as error:
            # No descriptor is left now; there may be one when the successor asks.
            self._generation.log.of(self._restart).debug("the successor gets no provision: %s", error)

    @contextlib.contextmanager
    def answer(self, stash: Batch, stderr: int) -> Iterator[Message | None]:
        """Yield the answer to a successor that asks; None: it has found its answer already.

        Args:
            stash: what was made for the start.
            stderr: the end of a pipe that the successor's standard error is read from.

        Raises:
            OSError: there are not enough descriptors.
        """
        if self._sent_ahead is None:
            with self._describe(stash, stderr) as message:
                yield message
        elif not self.is_known:
            # A release before this one takes what it finds for the answer.
            yield None
        elif self._sent_ahead == _identify(self._generation.host.registry.entries):
            yield {"as_before": True}, []
        else:
            with self._describe(stash, stderr) as message:
                yield message

    @contextlib.contextmanager
    def _describe(self, stash: Batch, stderr: int) -> Iterator[Message]:
        generation = self._generation
        self.entries = list(generation.host.registry.entries)
        descriptions, sockets = generation.host.registry.describe(self.entries)
        ancestors = list(generation.lineage.ancestors)
        with contextlib.ExitStack() as ours:

            def owned(descriptor: int) -> int:
                ours.callback(os.close, descriptor)
                return descriptor

            # Duplicates, because an ancestor may end, or the application close a listener, while this is being sent.
            sockets = [owned(os.dup(each)) for each in sockets]
            ends = [owned(os.dup(end)) for each in ancestors for end in (each.peer.channel.fileno(), each.peer.pidfd)]
            body = {
                "version": VERSIONS[1],
                "restart": self._restart,
                "generation": self._number,
                "predecessor": {"generation": generation.number, "pid": os.getpid()},
                "sockets": descriptions,
                "stash": stash.describe(),
                "stash_later": generation.stashes.names(At.COMMIT),
                "ancestors": [ancestor.to_json() for ancestor in ancestors],
                "env_file_keys": list(self.env_file_keys),
                # How many may come to the successor once this has settled.
                "connections": generation.host.connections,
                # A process that this one has not started finds both by it. A child was passed them.
                "lock_file": generation.lock_file.describe() if generation.lock_file is not None else None,
                "last_word": describe_place(self.last_word.descriptor) if self.last_word is not None else None,
            }
            pidfd, errors = owned(os.pidfd_open(os.getpid())), owned(duplicate_stderr())
            yield body, [pidfd, errors, stderr, *sockets, *stash.descriptors, *ends]

    def close(self) -> None:
        """Forget what is counted: the successor has it, or there is none."""
        if self.last_word is not None:
            self._generation.last_word = None
            self.last_word.close()


def _identify(entries: Iterable[Entry]) -> list[tuple[Entry, int]]:
    """Return what stands for these sockets: each entry, and the inode of its socket."""
    return [(entry, os.fstat(entry.sock.fileno()).st_ino) for entry in entries]
