"""What a run of the peers has found, as it is kept: raw enough for every table and every picture, and for a reader."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.load import percentile

__all__ = ["Latency", "Restart", "Result", "Run", "Timeline", "Verdict"]


@dataclass(slots=True)
class Latency:
    """How long answers took, in milliseconds, over some time."""

    answers: int
    p50: float
    p99: float
    p999: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """Make it of what was measured."""
        values = [percentile(seconds, percent) for percent in (50, 99, 99.9, 100)]
        return cls(len(seconds), *(round(value * 1000, 2) if math.isfinite(value) else 0.0 for value in values))


@dataclass(slots=True)
class Restart:
    """One restart.

    Attributes:
        said: what whoever asked for it has learned.
        first_answer: by new code, seconds after it was asked for; None, if none came.
        failures: requests that failed, by how they did.
        closed: connections that the server closed with no request in flight and without a word.
        dismissed: connections that ended behind an answer that said so.
        cpu: seconds of processor time of all processes, beyond what the same time takes without a restart.
        switches: context switches, likewise.
        pss: the most memory that all processes had together, in megabytes.
        left: when the last of the processes that ended by it was gone, seconds after it was asked for; None, if none
            has.
    """

    said: bool | None
    first_answer: float | None
    failures: dict[str, int]
    closed: int
    dismissed: int
    cpu: float
    switches: int
    pss: float
    left: float | None


@dataclass(slots=True)
class Verdict:
    """What became of a restart that is not an ordinary one.

    Attributes:
        said: what whoever asked for it has learned.
        answer: a second restart right behind the first: the first answer by the second one's code, seconds after that
            was asked for. A broken release: seconds for which it was watched, if the code before it still answers at
            their end. None otherwise.
        failures: requests that failed, by how they did.
    """

    said: bool | None
    answer: float | None
    failures: dict[str, int]


@dataclass(slots=True)
class Timeline:
    """The last ordinary restart, in steps.

    Attributes:
        start: of the first step, seconds before it was asked for.
        step: seconds.
        worst: the longest answer to a request made in each step, milliseconds; 0, if there was none.
        failed: requests made in each step that failed.
        old: answers by the code before, to requests made in each step.
        new: answers by the code behind.
    """

    start: float
    step: float
    worst: list[float]
    failed: list[int]
    old: list[int]
    new: list[int]


@dataclass(slots=True)
class Result:
    """What one peer's restarts have cost.

    Attributes:
        name: of the peer.
        language: it is written in.
        how: it is restarted.
        version: of what restarts it.
        keeps_connections: whether a connection serves more than one request.
        held: connections that clients hold open.
        requests: in all.
        cold: seconds from its start to its first answer.
        steady: latency without a restart.
        steady_pss: memory of all processes without a restart, in megabytes.
        restarted: latency from each ordinary restart to the end of the quiet time behind it.
        restarts: the ordinary ones.
        twice: a second restart, right after the first answer of the first.
        broken: a release that fails as it is loaded.
        timeline: the last ordinary restart.
        load_cpu: share of a processor that the load itself took.
        load_late: how much later than due the load made a new connection, milliseconds.
    """

    name: str
    language: str
    how: str
    version: str
    keeps_connections: bool
    held: int
    requests: int
    cold: float
    steady: Latency
    steady_pss: float
    restarted: Latency
    restarts: list[Restart]
    twice: Verdict | None
    broken: Verdict | None
    timeline: Timeline
    load_cpu: float
    load_late: Latency

    @classmethod
    def load(cls, value: dict[str, Any]) -> Self:
        """Make it of what a file holds."""
        return cls(
            **{
                **value,
                "steady": Latency(**value["steady"]),
                "restarted": Latency(**value["restarted"]),
                "restarts": [Restart(**each) for each in value["restarts"]],
                "twice": value["twice"] and Verdict(**value["twice"]),
                "broken": value["broken"] and Verdict(**value["broken"]),
                "timeline": Timeline(**value["timeline"]),
                "load_late": Latency(**value["load_late"]),
            }
        )


@dataclass(slots=True)
class Run:
    """All peers of one run.

    Attributes:
        machine: what it ran on.
        date: when.
        load: what the clients did, in words.
        results: of the peers.
        missing: why others are not among them, by their names.
    """

    machine: str
    date: str
    load: str
    results: list[Result] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        value = dataclasses.asdict(self)
        results = value.pop("results")
        # A line for each peer, so that a difference of two runs can be read.
        lines = ",\n".join(f"  {json.dumps(result)}" for result in results)
        head = json.dumps(value, indent=1).removesuffix("\n}")
        path.write_text(f'{head},\n "results": [\n{lines}\n ]\n}}\n')

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it from a file."""
        value = json.loads(path.read_text())
        results = [Result.load(each) for each in value.pop("results")]
        return cls(**value, results=results)
