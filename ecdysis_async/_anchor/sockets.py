"""The sockets that an anchor holds, as long as the service runs: those of its workers, and its own.

The anchor accepts nothing on the sockets of the workers. It holds what workers create as well. What no worker of a
release wants is closed once that release has settled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.descriptors import close_all, duplicate_all
from ecdysis_async.errors import ChannelError
from ecdysis_async.report import RestartReport

__all__ = ["HeldSockets"]


class HeldSockets:
    """The sockets of a service, and of its anchor.

    Args:
        log: the anchor's log.

    Attributes:
        service: the sockets that the workers inherit.
        control: the anchor's own control socket.
        health: the anchor's own sockets for /live and /ready.
    """

    def __init__(self, log: GenerationLog) -> None:
        self.service = Registry()
        self.control = Registry()
        self.health = Registry()
        self._log = log
        # What there was before the first worker; nothing where former code has started it.
        self._first: frozenset[Entry] = frozenset()

    def refuse_newcomers(self) -> None:
        """Let only the clients be answered that wait by now: later ones would be reset when the last process closes."""
        for entry in self.service.entries:
            entry.refuse_newcomers()

    def stop_listening(self) -> None:
        """Refuse every client that comes, now that no worker accepts any more."""
        for entry in self.service.entries:
            entry.stop_listening()

    def take(self, descriptions: list[dict[str, Any]], descriptors: Sequence[int]) -> None:
        """Hold what a worker has created, for the other workers and for ever; the descriptors are taken over.

        Raises:
            KeyError, ValueError: this describes no sockets; the descriptors stay the caller's.
        """
        # A socket whose path was removed is no hindrance to the one that a worker has made in its place.
        known = {(entry.name, entry.address) for entry in self.service.entries if not entry.has_lost_its_path()}
        fresh, surplus = [], []
        for description, descriptor in zip(descriptions, descriptors, strict=True):
            if (description["name"], description["address"]) in known:
                surplus.append(descriptor)
            else:
                fresh.append((description, descriptor))
        close_all(surplus)
        try:
            self.service.inherit([description for description, _ in fresh], [descriptor for _, descriptor in fresh])
        except (ChannelError, OSError) as error:
            # The registry has closed them all.
            self._log.error("what a worker has opened cannot be held: %s", error)

    def note_start(self) -> None:
        """Take note that the first worker is about to start: what there is by now, every worker has."""
        self._first = frozenset(self.service.entries)

    def share(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the sockets that a worker may not have: another worker has created them, or this anchor since then.

        Returns:
            Descriptions for JSON, and descriptors, which are the caller's.

        Raises:
            OSError: there is no room for so many descriptors.
        """
        # A worker closes what it knows already. It has to have room for what comes, though, and a restart is the remedy
        # for one that has none: so what every worker has does not come.
        shared = [entry for entry in self.service.entries if entry.number is None and entry not in self._first]
        descriptions, descriptors = self.service.describe(shared)
        return descriptions, duplicate_all(descriptors)

    def drop_unclaimed(self, reports: Sequence[RestartReport | None]) -> None:
        """Close what no worker of a release wants. The service manager's own stay, because it passes them but once."""
        for entry in self.service.entries:
            if not reports or not all(report is not None and _is_unwanted(entry, report) for report in reports):
                continue
            if entry.number is None:
                if entry.has_lost_its_path():
                    self._log.warning("%s was removed by somebody, and is there again", entry.address)
                else:
                    self._log.warning("no worker wants %s: it is closed", entry)
                self.service.release(entry, unlink=True)
            else:
                self._log.warning("systemd has passed %s, and nobody asks for it: clients wait there", entry)

    def drop_newer(self, entries: set[Entry]) -> None:
        """Close what was not there before: a release has created it that was taken back."""
        for entry in set(self.service.entries) - entries:
            self.service.release(entry, unlink=True)

    def close(self, *, unlink: bool) -> None:
        """Close all sockets.

        Args:
            unlink: whether the paths of inherited sockets are removed as well. Where this start has failed, the sockets
                that a crash has left are the next start's.
        """
        # Each socket is closed, whatever becomes of those before it.
        with contextlib.ExitStack() as ends:
            for entry in self.service.entries:
                ends.callback(self.service.release, entry, unlink=unlink or not entry.inherited)
            for registry in (self.control, self.health):
                ends.callback(registry.close, unlink=True)

    # What is left to the code that follows

    def _registries(self) -> Iterator[tuple[str, Registry]]:
        yield from (("service", self.service), ("control", self.control), ("health", self.health))

    def describe(self) -> tuple[dict[str, Any], list[int]]:
        """Return all sockets as JSON, and the descriptors that it names."""
        sockets: dict[str, Any] = {}
        descriptors: list[int] = []
        for name, registry in self._registries():
            descriptions, numbers = registry.describe()
            # The code that tries the state has no descriptors, by which it could see what they are.
            kinds = [[int(entry.sock.family), int(entry.sock.type)] for entry in registry.entries]
            sockets[name] = {"descriptions": descriptions, "descriptors": numbers, "kinds": kinds}
            descriptors += numbers
        return sockets, descriptors

    def restore(self, sockets: Mapping[str, Any]) -> None:
        """Take over the sockets that were described."""
        for name, registry in self._registries():
            registry.inherit(sockets[name]["descriptions"], sockets[name]["descriptors"])


def _is_unwanted(entry: Entry, report: RestartReport) -> bool:
    """Say whether a worker does not want a socket; another one of the same name may be in its place."""
    is_there = entry.name in (*report.inherited, *report.created)
    return entry.name in report.unclaimed and (not is_there or entry.has_lost_its_path())
