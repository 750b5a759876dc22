"""Clients that ask a service all the time while a test goes on, and say exactly what became of their requests."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from typing import Self

from benchmarks import load
from benchmarks.load import Address, Counts, Failure, Mix
from tests.scenarios.systemd.machine import PATIENCE_SECONDS

# Of all kinds, and not so many that they take the place of what they measure on a small machine.
MIX = Mix(new_per_second=40, hasty=1, keep_alive=4, pause=0.06, slow=3, slow_seconds=(0.1, 0.5), silent=2)

# Without clients that are silent, for whom a drain waits to its deadline.
LOUD = dataclasses.replace(MIX, silent=0)

# What may become of requests that a killed process had accepted, and of no others.
LOST = {Failure.RESET, Failure.UNANSWERED}


class Load:
    """A load that runs beside the test: in the block, and from its first answer on.

    Refused, reset and unanswered requests are counted apart: only those that a killed process had accepted may be of
    the latter two kinds.
    """

    def __init__(self, address: Address, mix: Mix = MIX, *, first_generation: int = 1) -> None:
        self._address = address
        self._mix = mix
        self._first_generation = first_generation
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._begun = threading.Event()

    @property
    def counts(self) -> Counts:
        """What became of the requests so far."""
        return self._load.counts

    def wait_for(self, generation: int, number: int = 1) -> None:
        """Wait until a generation has answered so many more requests."""
        wanted = self.counts.generations[generation] + number
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.counts.generations[generation] < wanted:
            assert time.monotonic() < deadline, f"generation {generation} does not answer: {self.counts.generations}"
            time.sleep(0.01)

    def __enter__(self) -> Self:
        self._thread.start()
        self._begun.wait()
        try:
            self.wait_for(self._first_generation)
        except BaseException:
            # The block's end does not come then, and a thread that goes on would keep the tests from theirs.
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._load.end)
        self._thread.join()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._load = load.Load(self._address, self._mix)
        self._begun.set()
        await self._load.run()
