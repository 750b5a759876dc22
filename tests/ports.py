"""Ports for those who have to be told one before they listen there: the kernel gives it to nobody else meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ["find_free_port"]

# Above the last one that browsers refuse, 10080 (Fetch, port blocking).
FIRST = 11_000

# More than there are workers of pytest-xdist: each has ports of its own.
WORKERS = 32


def find_free_port() -> int:
    """Return a TCP port on which nobody listens.

    The kernel may give a port of its own choice to another process as soon as it is closed here. Those below its
    range it gives to nobody (ip(7), ip_local_port_range).
    """
    for port in _ports:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("there is always another port")


def _count_ports() -> Iterator[int]:
    """Go through the ports of this process again and again, from one that another run hardly begins with."""
    last = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    # Where the kernel's range begins lower, there are none that it gives to nobody.
    ports = range(FIRST + worker, last, WORKERS) or range(FIRST + worker, 2**16, WORKERS)
    begin = random.randrange(len(ports))
    return itertools.cycle((*ports[begin:], *ports[:begin]))


_ports = _count_ports()
