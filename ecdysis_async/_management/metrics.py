"""The metrics that every kind of service has, whoever speaks for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from ecdysis_async._sockets.backlog import measure_backlog
from ecdysis_async._sockets.entry import Entry

from .exposition import Family, counter, gauge
from .ledger import Closed, Ledger, describe_restarts

__all__ = ["describe_service"]


def describe_service(
    ledger: Ledger, *, generation: int, closed: Mapping[Closed, int], entries: Sequence[Entry]
) -> list[Family]:
    """Return what is told of the service as a whole.

    Args:
        ledger: what is counted of it.
        generation: the number of the one that serves.
        closed: how connections of the processes have ended that the ledger does not know yet.
        entries: the sockets that are served.
    """
    build = gauge("ecdysis_build_info", "The release of ecdysis_async, and of Python, in a label: always 1.")
    package = sys.modules[__name__.partition(".")[0]]
    build.add(1, version=package.__version__, python=sys.version.split()[0])
    number = gauge("ecdysis_generation", "The number of the release that serves: each restart adds one.")
    number.add(generation)
    ended = counter("ecdysis_connections_closed_total", "Connections that are over, by how they ended.")
    for kind in Closed:
        ended.add(ledger.closed[kind] + closed.get(kind, 0), reason=kind)
    return [build, number, *describe_restarts(ledger), ended, _describe_backlog(entries)]


def _describe_backlog(entries: Sequence[Entry]) -> Family:
    backlog = gauge("ecdysis_socket_backlog", "Connections that wait in the kernel to be accepted, on TCP sockets.")
    waiting: dict[str, int] = {}
    for entry in entries:
        if (count := measure_backlog(entry.sock)) is not None:
            # Several sockets of one name are one listener: one for each address of a host.
            waiting[entry.name] = waiting.get(entry.name, 0) + count
    for name, count in waiting.items():
        backlog.add(count, listener=name)
    return backlog
