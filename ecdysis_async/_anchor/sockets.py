"""The sockets that an anchor holds, as long as the service runs: those of its workers, its own, and what systemd keeps.

Nobody accepts here on what the workers have. What they create is held as well, and what none of a release wants is
closed once that release has settled.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._management.descriptor_store import DescriptorStore
from ecdysis_async._management.systemd import Systemd
from ecdysis_async._sockets.registry import Entry, Registry
from ecdysis_async.errors import ChannelError
from ecdysis_async.report import RestartReport

__all__ = ["HeldSockets"]


class HeldSockets:
    """What an anchor holds.

    Args:
        systemd: which may keep them, too.
        log: of the anchor.

    Attributes:
        service: what the workers inherit.
        control, health: the anchor's own.
    """

    def __init__(self, systemd: Systemd, log: GenerationLog) -> None:
        self.service = Registry()
        self.control = Registry()
        self.health = Registry()
        self._log = log
        self._store = DescriptorStore(systemd, os.environ.get("FDSTORE", ""))

    def activate(self, passed: Mapping[int, str]) -> None:
        """Take over what systemd has passed: what its socket units listen on, and what it has kept."""
        self.service.activate(self._store.recover(passed, self.service))

    @property
    def are_kept(self) -> bool:
        """Whether systemd keeps what the workers have, so that clients can wait there for the next start."""
        return self._store.is_there

    def park(self) -> None:
        """Let systemd keep those on which clients can wait by now."""
        self._store.park(self.service.entries)

    def park_for_next_start(self) -> None:
        """Let systemd keep only those that need no path: nobody can come to the others any more."""
        self._store.park(entry for entry in self.service.entries if entry.inode is None)

    def refuse_newcomers(self) -> None:
        """Let only those be answered who wait by now; whoever came later would be reset where the last one closes."""
        for entry in self.service.entries:
            entry.refuse_newcomers()

    def stop_listening(self) -> None:
        """Refuse whoever comes, now that no worker accepts any more."""
        for entry in self.service.entries:
            entry.stop_listening()

    def take(self, descriptions: list[dict[str, Any]], descriptors: Sequence[int]) -> None:
        """Hold what a worker has created, for the other ones and for ever."""
        known = {(entry.name, entry.address) for entry in self.service.entries}
        fresh = []
        for description, descriptor in zip(descriptions, descriptors, strict=True):
            if (description["name"], description["address"]) in known:
                os.close(descriptor)
            else:
                fresh.append((description, descriptor))
        try:
            self.service.inherit([description for description, _ in fresh], [descriptor for _, descriptor in fresh])
        except (ChannelError, OSError) as error:
            # It has closed them all.
            self._log.error("what a worker has opened cannot be held: %s", error)

    def share(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Return what a worker may not have, because another one has created it; the descriptors are the caller's.

        Raises:
            OSError: there is no room for so many.
        """
        # Those that this anchor opened itself, and all that existed when it started, the worker has.
        shared = [entry for entry in self.service.entries if entry.inherited and entry.number is None]
        descriptions, descriptors = self.service.describe(shared)
        given: list[int] = []
        with contextlib.ExitStack() as duplicates:
            for descriptor in descriptors:
                duplicates.callback(os.close, duplicate := os.dup(descriptor))
                given.append(duplicate)
            duplicates.pop_all()
        return descriptions, given

    def drop_unclaimed(self, reports: Sequence[RestartReport | None]) -> None:
        """Close what no worker of a release wants; the service manager's own stay, as it passes them but once."""
        for entry in self.service.entries:
            if not reports or not all(report is not None and entry.name in report.unclaimed for report in reports):
                continue
            if entry.number is None:
                self._log.warning("no worker wants %s: it is closed", entry)
                self.service.release(entry, unlink=True)
            else:
                self._log.warning("systemd has passed %s, and nobody asks for it: clients wait there", entry)

    def drop_newer(self, entries: set[Entry]) -> None:
        """Close what was not there before: a release has created it that was taken back."""
        for entry in set(self.service.entries) - entries:
            self.service.release(entry, unlink=True)

    def close(self, *, unlink: bool) -> None:
        """Close them all.

        Args:
            unlink: also the paths of what was inherited; what a crash has left is the next start's, where this one has
                failed.
        """
        # Each of them, whatever becomes of those before.
        with contextlib.ExitStack() as ends:
            ends.callback(self._store.close)
            for entry in self.service.entries:
                ends.callback(self.service.release, entry, unlink=unlink or not entry.inherited)
            for registry in (self.control, self.health):
                ends.callback(registry.close, unlink=True)

    # For the code that follows

    def _registries(self) -> Iterator[tuple[str, Registry]]:
        yield from (("service", self.service), ("control", self.control), ("health", self.health))

    def describe(self) -> tuple[dict[str, Any], list[int]]:
        """Return them all as JSON, and the descriptors that it names."""
        sockets: dict[str, Any] = {}
        descriptors: list[int] = []
        for name, registry in self._registries():
            descriptions, numbers = registry.describe()
            sockets[name] = {"descriptions": descriptions, "descriptors": numbers}
            descriptors += numbers
        return sockets, descriptors

    def restore(self, sockets: Mapping[str, Any]) -> None:
        """Take over what was described."""
        for name, registry in self._registries():
            registry.inherit(sockets[name]["descriptions"], sockets[name]["descriptors"])

    def know_parked(self) -> None:
        """Know what the former code may have had systemd keep."""
        self._store.inherit(self.service.entries)
