"""What processes use, seen from a process of its own: their looking does not hold up the clients' loop.

It watches all descendants of its parent that come after it, until its standard input ends; then it prints its samples.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.bench import context_switches, cpu_seconds, memory

STEP_SECONDS = 0.1


class Usage(NamedTuple):
    """What one process has used so far.

    Attributes:
        cpu: seconds of processor time.
        switches: context switches of the threads that it has now.
        pss: its share of memory, in megabytes.
    """

    cpu: float
    switches: int
    pss: float


class Sample(NamedTuple):
    """All processes at one moment, of CLOCK_MONOTONIC in seconds."""

    at: float
    processes: dict[int, Usage]

    def pss(self) -> float:
        """Return the memory of all of them, in megabytes."""
        return sum(usage.pss for usage in self.processes.values())


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that this one has started, and those that they have."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, children.read_text().split()):
                yield child
                yield from descendants(child)


def sample(root: int, known: set[int]) -> Sample:
    """Look at all processes, but those that are known."""
    usages = {}
    for pid in set(descendants(root)) - known:
        # A process may end between the listing and the reading; one that has is a zombie without memory.
        with contextlib.suppress(OSError, KeyError):
            usages[pid] = Usage(cpu_seconds(pid), sum(context_switches(pid)), memory(pid)[0])
    return Sample(time.monotonic(), usages)


def read(text: str) -> list[Sample]:
    """Return the samples that a sampler has printed."""
    return [
        Sample(at, {int(pid): Usage(*usage) for pid, usage in processes.items()}) for at, processes in json.loads(text)
    ]


def wait_for_end(over: threading.Event) -> None:
    """Read until nobody writes any more."""
    sys.stdin.read()
    over.set()


def main() -> None:
    """Sample until told to stop."""
    over = threading.Event()
    root = os.getppid()
    known = {os.getpid(), *descendants(root)}
    threading.Thread(target=wait_for_end, args=(over,)).start()
    print(flush=True)  # who comes from here on is watched
    samples = [sample(root, known)]
    while not over.wait(STEP_SECONDS):
        samples.append(sample(root, known))
    json.dump(samples, sys.stdout)


if __name__ == "__main__":
    main()
