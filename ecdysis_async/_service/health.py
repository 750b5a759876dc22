"""The health address of a service without workers: /live, /ready, and what else was asked for.

The generation answers that accepts, from its readiness to its end.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ecdysis_async._accepting.gated_socket import GatedSocket
from ecdysis_async._management import status_page
from ecdysis_async._management.exposition import CONTENT_TYPE, Family, counter, gauge, write
from ecdysis_async._management.health import HealthServer, Page
from ecdysis_async._management.metrics import describe_service
from ecdysis_async._management.recent import read_recent
from ecdysis_async._sockets.addresses import Address, Descriptor, resolve
from ecdysis_async._sockets.entry import Entry, Until
from ecdysis_async._system.history import history
from ecdysis_async._system.memory import resident_bytes
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.report import State

from .counting import SLOT, Counting
from .description import Description
from .life import Life

__all__ = ["Health", "HealthSettings", "describe_metrics"]

NAME = "health"

# What a generation can be while it is there.
_STATES = (State.STARTING, State.WAITING, State.SERVING, State.PAUSED, State.DRAINING)


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """What is answered at the health address.

    Attributes:
        address: where.
        metrics: whether /metrics is there.
        status_page: whether the page for people is there.
    """

    address: Address
    metrics: bool = False
    status_page: bool = False


class Health:
    """Answers at the health address.

    Args:
        settings: where, and what.
        life: of this generation.
        counting: what is counted.
    """

    def __init__(self, settings: HealthSettings, life: Life, counting: Counting) -> None:
        self._settings = settings
        self._life = life
        self._counting = counting
        self._description = Description(life)
        self._entries: list[Entry] = []

    async def open(self) -> None:
        """Ask for the sockets.

        Raises:
            OSError: the address cannot be bound. LookupError: no such socket was passed.
        """
        self._entries = await run_in_thread(self._open)

    def _open(self) -> list[Entry]:
        registry, address = self._life.plane.registry, self._settings.address
        if isinstance(address, Descriptor):
            return [registry.claim(address.name, until=Until.EXIT)]
        return [registry.obtain(each, name=NAME, until=Until.EXIT) for each in resolve(address)]  # type: ignore[arg-type] # a Descriptor stays one

    async def remember(self) -> None:
        """Let the page show the last restarts of a service that has ended here, and has left its history."""
        if self._settings.status_page and self._life.inheritance is None and history.path is not None:
            self._counting.ledger.recent = await run_in_thread(functools.partial(read_recent, history.path))

    def servers(self) -> list[HealthServer]:
        """Return what answers on each socket."""
        pages: dict[str, Callable[[], Awaitable[Page]]] = {}
        if self._settings.metrics:
            pages["/metrics"] = self.show_metrics
        if self._settings.status_page:
            pages["/"] = status_page.show
            pages["/status.json"] = self.show_status
        plane = self._life.plane
        return [HealthServer(GatedSocket(each, plane=plane), self._why_not_ready, pages) for each in self._entries]

    def _why_not_ready(self) -> str | None:
        return "the service is about to stop" if self._life.is_leaving else None

    async def show_metrics(self) -> Page:
        """Return what Prometheus reads."""
        return Page(CONTENT_TYPE, write(describe_metrics(self._life, self._counting)))

    async def show_status(self) -> Page:
        """Return what the page for people shows."""
        return status_page.describe({"workers": None, **self._description.status()}, self._counting.ledger.recent)


def describe_metrics(life: Life, counting: Counting) -> list[Family]:
    """Return the metrics of a service without workers: whoever is told of them never sees a counter fall."""
    life.generation.keep_counts()
    ancestors, tracker = life.generation.lineage.ancestors, life.plane.tracker
    workers = gauge("ecdysis_workers", "Processes that serve, by where they stand.")
    connections = gauge("ecdysis_connections", "Open connections, by where the process stands that has them.")
    for each in _STATES:
        is_own, older = life.state is each, ancestors if each is State.DRAINING else ()
        workers.add(is_own + len(older), state=each.value)
        count = (len(tracker) - tracker.jobs) * is_own + sum(ancestor.connections or 0 for ancestor in older)
        connections.add(count, state=each.value)
    requests = counter("ecdysis_requests_total", "Requests, or connections where a server counts none, by slot.")
    requests.add(counting.requests, slot=SLOT)
    memory = gauge("ecdysis_worker_memory_bytes", "Resident memory of the process that serves.")
    memory.add(resident_bytes() or 0, slot=SLOT)
    entries = life.plane.registry.entries
    service = describe_service(
        counting.ledger, generation=life.generation.number, closed=counting.closed, entries=entries
    )
    return [*service, workers, connections, requests, memory]
