"""The history of a service as it was written (``_system/history.py``): read, checked, and put in order."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ecdysis_async._system.history import FORMER_SUFFIX, SUFFIX, VERSION, Note

__all__ = ["Record", "find_histories", "read"]


# What colours text on a terminal, and what else would move its cursor: other processes have written these lines.
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


# The end of the year 9999, seconds since the epoch: what is later cannot be written as a date.
MAX_TIME = 253402300799


@dataclass(frozen=True, slots=True)
class Record:
    """One line.

    Attributes:
        at: when, in seconds since the epoch.
        clock: the same by CLOCK_MONOTONIC.
        pid: of the process that has written it.
        kind: what it tells of.
        facts: the rest of it.
    """

    at: float
    clock: float
    pid: int
    kind: Note
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def restart(self) -> str:
        """The id of the restart that it belongs to; empty for none."""
        return self.text("restart")

    def text(self, name: str) -> str:
        """Return a fact as text; empty where there is none."""
        value = self.facts.get(name)
        return "" if value is None else str(value)

    def number(self, name: str) -> int | None:
        """Return a fact as a whole number; None where it is none."""
        value = self.facts.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def seconds(self, name: str) -> float | None:
        """Return a fact as a number of seconds; None where it is none."""
        value = self.facts.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        try:
            seconds = float(value)
        except OverflowError:  # a whole number beyond what a float can hold
            return None
        return seconds if math.isfinite(seconds) else None


def read(control_path: str) -> list[Record]:
    """Return what the processes behind a control socket have written, in the order of time.

    A line that is torn, of a later form, or of an unknown kind is left out.

    Raises:
        FileNotFoundError: nothing was ever written there.
        OSError: it cannot be read.
    """
    records = []
    missing: list[FileNotFoundError] = []
    for suffix in (FORMER_SUFFIX, SUFFIX):
        try:
            with open(control_path + suffix, "rb") as lines:
                records += list(_parse(lines))
        except FileNotFoundError as error:
            missing.append(error)
    if len(missing) > 1:
        raise missing[-1]
    return sorted(records, key=lambda record: record.at)


def find_histories(directories: list[str]) -> list[str]:
    """Return the paths of the control sockets that have a history in one of these directories, the newest first."""
    found: dict[str, float] = {}
    for directory in directories:
        try:
            with os.scandir(directory) as entries:
                found |= {
                    entry.path.removesuffix(SUFFIX): entry.stat().st_mtime
                    for entry in entries
                    if entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False)
                }
        except OSError:
            # It is not there, or is none of this user's business.
            continue
    return sorted(found, key=lambda path: -found[path])


def _parse(lines: Iterator[bytes]) -> Iterator[Record]:
    for line in lines:
        try:
            facts = _printable(json.loads(line))
            if int(facts.pop("v")) != VERSION:
                continue
            at, clock, pid = float(facts.pop("at")), float(facts.pop("clock")), int(facts.pop("pid"))
            if not 0 <= at <= MAX_TIME or not math.isfinite(clock):
                continue
            yield Record(at, clock, pid, Note(facts.pop("kind")), facts)
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
            continue


def _printable(value: Any) -> Any:
    match value:
        case str():
            return _CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found[0]):02x}", _COLOURS.sub("", value))
        case dict():
            return {_printable(key): _printable(each) for key, each in value.items()}
        case list():
            return [_printable(each) for each in value]
    return value
