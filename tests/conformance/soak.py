"""A thousand restarts of `ecdysis run` under load, of which nothing may remain.

``python -m tests.conformance.soak`` writes a JSON file and a plot, and ``nox -s soak`` does the same. After each
restart the processes of the service are counted, with their descriptors and memory; so are the requests meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tests.conformance.service import PROJECT, Service, serving

__all__: list[str] = []

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

KEPT_CONNECTIONS = 4
NEW_CONNECTIONS = 2

# How long a client rests after each answer, seconds: this is a soak, and no benchmark.
PAUSE_SECONDS = 0.05
LOST_SECONDS = 60.0

# What is said to be flat grows by no more than this from the first tenth to the last one; memory by this factor, and
# times by the other one, as a machine has other things to do now and then.
MEMORY_FACTOR = 1.1
TIME_FACTOR = 3.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What there is after one restart.

    Attributes:
        seconds: what the restart took.
        accept_gap: for how long nobody accepted, seconds.
        processes: of the service.
        descriptors: of all of them.
        pss: their memory, bytes; what they share is counted once.
        requests: that were answered since the restart before.
        median: of their latencies, seconds.
        worst: of their latencies.
        failed: requests that had no answer.
    """

    seconds: float
    accept_gap: float
    processes: int
    descriptors: int
    pss: int
    requests: int
    median: float
    worst: float
    failed: int


class Load:
    """Clients that ask again and again.

    Attributes:
        latencies: of the answers since they were taken note of, seconds.
        failures: what has gone wrong.
        goodbyes: how many kept connections were closed as announced.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.latencies: list[float] = []
        self.failures: list[str] = []
        self.goodbyes = 0
        self.over = asyncio.Event()

    async def keep(self) -> None:
        """Ask on one connection; on another one, once the service has announced that it closes it."""
        while not self.over.is_set():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                with contextlib.closing(writer):
                    goes_on = True
                    while goes_on and not self.over.is_set():
                        goes_on = await self._ask(reader, writer, REQUEST)
                        await asyncio.sleep(PAUSE_SECONDS)
            except IdleEnd:
                pass
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                self.failures.append(repr(error))
            self.goodbyes += 1

    async def connect(self) -> None:
        """Ask on a new connection each time."""
        while not self.over.is_set():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                with contextlib.closing(writer):
                    await self._ask(reader, writer, LAST_REQUEST)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                self.failures.append(repr(error))
            await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bool:
        """Ask, and say whether the connection goes on."""
        # A connection that was closed while it was idle, as HTTP allows, has lost nothing.
        if reader.at_eof():
            raise IdleEnd
        begun = time.monotonic()
        writer.write(request)
        async with asyncio.timeout(LOST_SECONDS):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not head.startswith(b"http/1.1 200 "):
                raise ValueError(head.partition(b"\r\n")[0].decode())
            await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        self.latencies.append(time.monotonic() - begun)
        return b"connection: close" not in head


class IdleEnd(Exception):
    """A connection has ended between two requests."""


def measure(service: Service, load: Load, failed_before: int) -> Sample:
    """Count what there is, and begin to count anew."""
    anchor = psutil.Process(service.process.pid)
    processes = [anchor, *anchor.children(recursive=True)]
    latencies, load.latencies = load.latencies, []
    return Sample(
        seconds=service.seconds[-1],
        accept_gap=service.reports[-1]["accept_gap"],
        processes=len(processes),
        descriptors=sum(each.num_fds() for each in processes),
        pss=sum(each.memory_full_info().pss for each in processes),
        requests=len(latencies),
        median=statistics.median(latencies) if latencies else 0.0,
        worst=max(latencies, default=0.0),
        failed=len(load.failures) - failed_before,
    )


async def soak(restarts: int, seconds: float) -> tuple[list[Sample], list[str]]:
    """Restart a service so many times, or for so long; return a sample of each restart, and what has failed."""
    until = time.monotonic() + seconds
    samples: list[Sample] = []
    options = ("--probation", "0.1", "--drain-timeout", "10", "--no-access-log")
    async with (
        serving("asgi_app:app", *options, app_dir=PROJECT / "examples") as service,
        asyncio.TaskGroup() as clients,
    ):
        load = Load(service.port)
        for _ in range(KEPT_CONNECTIONS):
            clients.create_task(load.keep())
        for _ in range(NEW_CONNECTIONS):
            clients.create_task(load.connect())
        failed = 0
        try:
            while len(samples) < restarts and time.monotonic() < until:
                await service.restart("drained")
                service.reports = service.reports[-1:]
                samples.append(await asyncio.to_thread(measure, service, load, failed))
                failed = len(load.failures)
        finally:
            load.over.set()
    return samples, load.failures


def judge(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Compare the first tenth, after as many restarts that fill caches, with the last one: by their medians."""
    tenth = max(1, len(samples) // 10)
    first, last = samples[tenth : 2 * tenth] or samples[:1], samples[-tenth:]
    found = {}
    for name, factor in (
        ("processes", 1.0),
        ("descriptors", 1.0),
        ("pss", MEMORY_FACTOR),
        ("median", TIME_FACTOR),
        ("seconds", TIME_FACTOR),
        ("accept_gap", TIME_FACTOR),
    ):
        before, after = (statistics.median(getattr(each, name) for each in part) for part in (first, last))
        found[name] = {"first": before, "last": after, "is_flat": after <= before * factor}
    return found


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Draw one curve for each quantity, over the restarts."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    curves: dict[str, Sequence[float]] = {
        "processes": [each.processes for each in samples],
        "descriptors": [each.descriptors for each in samples],
        "memory (PSS), MB": [each.pss / 1e6 for each in samples],
        "median latency, ms": [each.median * 1e3 for each in samples],
        "a restart, s": [each.seconds for each in samples],
        "failed requests": [each.failed for each in samples],
    }
    figure, axes = plt.subplots(len(curves), 1, sharex=True, figsize=(8, 10), layout="constrained")
    for axis, (name, values) in zip(axes, curves.items(), strict=True):
        axis.plot(range(1, len(values) + 1), values, linewidth=0.8)
        axis.set_ylabel(name, fontsize=8)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("restarts")
    figure.savefig(path)


def main() -> int:
    """Write the results; return 0 where nothing has failed, and everything is flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after so many, it ends earlier")
    parser.add_argument("--output", type=Path, default=Path(".nox", "soak"), help="a directory [default: .nox/soak]")
    arguments = parser.parse_args()
    samples, failures = asyncio.run(soak(arguments.restarts, arguments.minutes * 60))
    verdict = judge(samples)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, Linux {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "restarts": len(samples),
        "requests": sum(each.requests for each in samples),
        "failed": len(failures),
        "failures": failures[:20],
        "verdict": verdict,
        "samples": [asdict(each) for each in samples],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(samples, arguments.output / "soak.svg")
    sys.stdout.write(f"{result['restarts']:,} restarts, {result['requests']:,} requests, {len(failures)} failed\n\n")
    sys.stdout.write("| median of | first tenth | last tenth | |\n|---|--:|--:|---|\n")
    for name, each in verdict.items():
        word = "flat" if each["is_flat"] else "**grows**"
        sys.stdout.write(f"| {name} | {each['first']:,.4g} | {each['last']:,.4g} | {word} |\n")
    return int(bool(failures) or not all(each["is_flat"] for each in verdict.values()))


if __name__ == "__main__":
    sys.exit(main())
