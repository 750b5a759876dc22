"""What a stash passes per second, beside copies within one process, a pipe and a Unix socket.

Each round runs all of them one after the other, so that a ratio compares moments next to each other. What is measured
is the time from bytes in the predecessor to bytes that the successor can use: with a stash those are where they were
written, and with a pipe a copy. New memory is most of it all: what the kernel takes for that is a row of its own. Run
`python -m benchmarks.stash`.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import anyio

from ecdysis_async._handoff.stash import At, Batch, InheritedStash, Stashes

from .bench import PROJECT, Options, Table, describe_machine, parse, publish, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIGABYTE = 1024 * 1024 * 1024
PIECE = 64 * 1024 * 1024
READ = 1024 * 1024

# The successor: it says that it is there, takes everything, and says so. The memory for a copy is new to it, as it is
# to every process that has just started.
READER = f"""
import mmap, os, sys
kind, descriptor, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
target = memoryview(mmap.mmap(-1, size))
os.write(1, b"r")
if kind == "stash":
    os.read(0, 1)
    with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as source:
        target[:] = source
else:
    with open(descriptor, "rb", buffering=0) as source:
        taken = 0
        while taken < size:
            taken += source.readinto(target[taken : taken + {READ}])
os.write(1, b"d")
"""


def start_reader(kind: str, descriptor: int, size: int) -> subprocess.Popen[bytes]:
    """Start a successor, and wait until it is prepared."""
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, kind, str(descriptor), str(size)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        pass_fds=[descriptor],
    )
    assert reader.stdout is not None
    reader.stdout.read(1)
    return reader


def wait_for(reader: subprocess.Popen[bytes]) -> None:
    """Wait until a successor has everything, and has ended."""
    assert reader.stdout is not None and reader.stdin is not None
    if reader.stdout.read(1) != b"d":
        raise RuntimeError("the reader failed")


def end(reader: subprocess.Popen[bytes]) -> None:
    """Let go of a successor."""
    reader.communicate()


def copy(data: bytes) -> float:
    """Copy within this process, into memory that is there."""
    target = memoryview(bytearray(len(data)))
    begun = time.perf_counter()
    target[:] = data
    return time.perf_counter() - begun


def copy_to_new(data: bytes) -> float:
    """Copy within this process, into memory that the kernel has yet to give: what anything that keeps a copy pays."""
    begun = time.perf_counter()
    with mmap.mmap(-1, len(data)) as target:
        target[:] = data
        return time.perf_counter() - begun


def make_stash(data: bytes) -> tuple[float, Batch]:
    """Make a stash, and map it as a successor does; return how long that took."""
    stashes = Stashes()

    def produce() -> Iterator[memoryview]:
        with memoryview(data) as view:
            for start in range(0, len(data), PIECE):
                yield view[start : start + PIECE]

    stashes.add("data", produce, At.START, 0)
    batch = stashes.batch(At.START)
    begun = time.perf_counter()
    anyio.run(batch.make)
    InheritedStash().receive(batch.describe(), batch.descriptors)
    return time.perf_counter() - begun, batch


def map_stash(data: bytes) -> float:
    """Make a stash that the successor reads where it is."""
    made, batch = make_stash(data)
    batch.close()
    return made


def copy_stash(data: bytes) -> float:
    """Make a stash, of which the successor makes a copy, as it has to of everything that comes through a pipe."""
    made, batch = make_stash(data)
    try:
        reader = start_reader("stash", batch.descriptors[0], len(data))
    finally:
        batch.close()
    assert reader.stdin is not None
    begun = time.perf_counter()
    reader.stdin.write(b"g")
    wait_for(reader)
    read = time.perf_counter() - begun
    end(reader)
    return made + read


def stream(ours: int, theirs: int, data: bytes) -> float:
    """Write everything to one end, while the successor reads the other one."""
    try:
        reader = start_reader("stream", theirs, len(data))
    finally:
        os.close(theirs)
    begun = time.perf_counter()
    with memoryview(data) as view:
        written = 0
        while written < len(data):
            written += os.write(ours, view[written : written + READ])
    wait_for(reader)
    took = time.perf_counter() - begun
    os.close(ours)
    end(reader)
    return took


def pass_pipe(data: bytes) -> float:
    """Write everything to a pipe."""
    theirs, ours = os.pipe()
    return stream(ours, theirs, data)


def pass_socket(data: bytes) -> float:
    """Write everything to a Unix stream socket."""
    ours, theirs = socket.socketpair()
    return stream(ours.detach(), theirs.detach(), data)


WAYS: dict[str, Callable[[bytes], float]] = {
    "copy in one process": copy,
    "copy to new memory": copy_to_new,
    "stash, read in place": map_stash,
    "stash, copied there": copy_stash,
    "pipe": pass_pipe,
    "Unix socket": pass_socket,
}


def measure(size: int, rounds: int, only: str) -> dict[str, list[float]]:
    """Return how many seconds each way took in each round."""
    data = os.urandom(1024 * 1024) * (size // (1024 * 1024))
    ways = {name: way for name, way in WAYS.items() if only in name}
    times: dict[str, list[float]] = {name: [] for name in ways}
    anyio.run(Batch().make)  # what the first loop of a process has to import is none of this
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way(data))
    return times


def tabulate(times: dict[str, list[float]], size: int) -> Table:
    """Make the table: medians, and the medians of the ratios within a round."""
    table = Table(
        "What a stash passes",
        ["way", "seconds", "GB/s", "of a copy", "times a pipe"],
        f"{size / 1e9:.2f} GB, from process to process; {max(map(len, times.values()), default=0)} rounds, medians.",
    )

    def ratio(name: str, other: str) -> str:
        if other not in times:
            return "0"
        return f"{spread([theirs / ours for ours, theirs in zip(times[name], times[other], strict=True)])[0]:.2f}"

    for name, seconds in times.items():
        speed = spread([size / 1e9 / each for each in seconds])[0]
        table.add(
            name, f"{spread(seconds)[0]:.2f}", f"{speed:.2f}", ratio(name, "copy in one process"), ratio(name, "pipe")
        )
    return table


def plot(times: dict[str, list[float]], size: int) -> Figure:
    """Draw the throughput of each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(times), [spread([size / 1e9 / each for each in seconds])[0] for seconds in times.values()])
    axes.invert_yaxis()
    axes.set_xlabel("GB/s from one process to another")
    return figure


def run(options: Options) -> None:
    """Measure all ways, and say what came out."""
    before = describe_machine()
    size, rounds = (64 * 1024 * 1024, 1) if options.quick else (2 * GIGABYTE, 5)
    times = measure(size, rounds, options.only)
    figure = plot(times, size) if options.output is not None else None
    publish("stash", [tabulate(times, size)], figure, options, before)


if __name__ == "__main__":
    run(parse(__doc__))
