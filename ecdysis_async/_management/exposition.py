"""The text format in which Prometheus reads metrics (exposition format 0.0.4).

https://prometheus.io/docs/instrumenting/exposition_formats/. A few lines write it, so that serving metrics needs no
library, and costs an anchor no memory.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["CONTENT_TYPE", "Family", "Histogram", "Type", "counter", "gauge", "write"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Type(enum.StrEnum):
    """What the numbers of a family mean."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(slots=True)
class Histogram:
    """How often a duration fell below each of some bounds.

    Attributes:
        bounds: in seconds, rising.
        counts: how many durations fell below each bound and below none before it; the last count has no bound.
        sum: of all durations.
    """

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, seconds: float, count: int = 1) -> None:
        """Count a duration."""
        index = next((index for index, bound in enumerate(self.bounds) if seconds <= bound), len(self.bounds))
        self.counts[index] += count
        self.sum += seconds * count

    def to_json(self) -> dict[str, object]:
        """Return the histogram as an object of JSON."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}

    def add(self, body: Mapping[str, object]) -> None:
        """Add what another release may have counted, whose bounds may be others.

        Raises:
            KeyError, TypeError, ValueError: it is no histogram.
        """
        bounds, counts = body["bounds"], body["counts"]
        if not isinstance(bounds, list) or not isinstance(counts, list):
            raise TypeError("a histogram has a list of bounds and a list of counts")
        before = self.sum
        for bound, count in zip([*map(float, bounds), math.inf], map(int, counts), strict=True):
            if count:
                self.observe(bound, count)
        self.sum = before + float(str(body["sum"]))


@dataclass(frozen=True, slots=True)
class Family:
    """One metric, with all of its labels.

    Attributes:
        name: begins with ``ecdysis_``.
        type: what its numbers mean.
        help: one sentence.
        samples: the numbers, each with what its name ends in and its labels.
    """

    name: str
    type: Type
    help: str
    samples: list[tuple[str, Mapping[str, str], float]] = field(default_factory=list)

    def add(self, value: float, **labels: object) -> None:
        """Add a number."""
        self.samples.append(("", {name: str(label) for name, label in labels.items()}, value))

    def add_histogram(self, histogram: Histogram, **labels: object) -> None:
        """Add a histogram."""
        named = {name: str(label) for name, label in labels.items()}
        count = 0
        for bound, each in zip([*histogram.bounds, math.inf], histogram.counts, strict=True):
            count += each
            self.samples.append(("_bucket", {**named, "le": _write_number(bound)}, count))
        self.samples.append(("_sum", named, histogram.sum))
        self.samples.append(("_count", named, count))


def counter(name: str, help: str) -> Family:
    """Return a family of numbers that only rise."""
    return Family(name, Type.COUNTER, help)


def gauge(name: str, help: str) -> Family:
    """Return a family of numbers that rise and fall."""
    return Family(name, Type.GAUGE, help)


def write(families: Iterable[Family]) -> str:
    """Return the text that Prometheus reads."""
    lines = []
    for family in families:
        lines.append(f"# HELP {family.name} {_escape(family.help)}")
        lines.append(f"# TYPE {family.name} {family.type}")
        for ending, labels, value in family.samples:
            pairs = ",".join(f'{name}="{_escape(label, quotes=True)}"' for name, label in labels.items())
            lines.append(f"{family.name}{ending}{'{' + pairs + '}' if pairs else ''} {_write_number(value)}")
    return "".join(f"{line}\n" for line in lines)


def _write_number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(value)


def _escape(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text
