"""How the cost of a restart grows: with listening sockets, and with workers. Run `python -m benchmarks.scale`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bench import LIMIT_SECONDS, Options, Table, describe_machine, parse, publish
from benchmarks.peers.sampler import sample

PROJECT = Path(__file__).resolve().parent.parent

FULL = {"sockets": (1, 10, 100, 1000), "workers": (1, 2, 4, 8)}
QUICK = {"sockets": (1, 10), "workers": (1, 2)}

COMMAND = [sys.executable, "-m", "ecdysis_async.cli"]


class Service:
    """A service that holds some sockets in some workers, and is restarted from outside."""

    def __init__(self, sockets: int, workers: int, directory: Path) -> None:
        self._control = ["--control", str(directory / "control")]
        environment = {**os.environ, "SOCKETS": str(sockets), "SOCKETS_IN": str(directory)}
        command = [*COMMAND, "run", "benchmarks.many:main", *self._control, f"--workers={workers}", "--probation=0.5"]
        self._log = (directory / "log").open("w+")
        self._known = set(sample(os.getpid(), set()).processes)
        self._process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=self._log, stderr=self._log)
        until = time.monotonic() + LIMIT_SECONDS
        while subprocess.run([*COMMAND, "status", *self._control], capture_output=True, check=False).returncode:
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the service does not start: {(directory / 'log').read_text()}")

    def restart(self, until: str) -> dict[str, float]:
        """Restart it, and return how long that took and what memory there was then, old and new."""
        begun = time.monotonic()
        command = [*COMMAND, "restart", "--until", until, "--json", *self._control]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        took = time.monotonic() - begun
        return {"seconds": took, "gap": json.loads(done.stdout)["report"]["accept_gap"], "memory": self.memory()}

    def memory(self) -> float:
        """Return the memory of all of its processes, in megabytes."""
        return sample(os.getpid(), self._known).pss()

    def stop(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait(LIMIT_SECONDS)
        self._log.close()


def run(options: Options) -> None:
    """Measure both, and say what came out."""
    before = describe_machine()
    tables = []
    for what, numbers in (QUICK if options.quick else FULL).items():
        table = Table(
            f"A restart with many {what}",
            [what, "seconds until new code serves", "accept gap, ms", "memory before, MB", "in the restart, MB"],
        )
        seconds = []
        for number in numbers:
            with tempfile.TemporaryDirectory() as name:
                service = Service(number if what == "sockets" else 1, number if what == "workers" else 1, Path(name))
                try:
                    service.restart("drained")  # from here on all workers are there
                    memory = service.memory()
                    found = service.restart("serving")
                finally:
                    service.stop()
            seconds.append(found["seconds"])
            gap = f"{found['gap'] * 1000:.1f}"
            table.add(str(number), f"{found['seconds']:.2f}", gap, f"{memory:.0f}", f"{found['memory']:.0f}")
        slope, intercept = statistics.linear_regression(numbers, seconds)
        table.note = f"In a straight line: {intercept:.2f} s, and {slope * 1000:.2f} ms for each of the {what}."
        tables.append(table)
    publish("scale", tables, None, options, before)


if __name__ == "__main__":
    run(parse(__doc__))
