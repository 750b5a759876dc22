"""Histories as services write them, short ones made up here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ecdysis_async._explaining.records import Record, read
from ecdysis_async._system.history import SUFFIX

Line = dict[str, Any]

OLD, NEW, ANCHOR = 11, 12, 10


def line(clock: float, pid: int, kind: str, **facts: Any) -> Line:
    return {"v": 1, "at": 1_700_000_000 + clock, "clock": clock, "pid": pid, "kind": kind, **facts}


def of_predecessor(clock: float, kind: str, old: int = OLD, new: int = NEW, **facts: Any) -> Line:
    return line(clock, old, kind, restart="r1", peer=new, **facts)


def of_successor(clock: float, kind: str, old: int = OLD, new: int = NEW, **facts: Any) -> Line:
    return line(clock, new, kind, restart="r1", peer=old, **facts)


def begin(old: int = OLD, new: int = NEW, at: float = 100.0) -> list[Line]:
    """Return how a handoff begins, until the new process has its sockets."""
    return [
        line(at, old, "handoff", restart="r1", title="restart r1", former=1, generation=2),
        line(at + 0.02, old, "spawned", restart="r1", child=new, begun=at + 0.01),
        of_predecessor(at + 0.61, "got", old, new, message="hello"),
        of_predecessor(at + 0.61, "state", old, new, side="predecessor", state="initialising", event="hello"),
        of_predecessor(at + 0.62, "sent", old, new, message="listeners"),
        of_successor(
            at + 0.63,
            "process",
            old,
            new,
            generation=2,
            first=at + 0.11,
            hello=at + 0.6,
            listeners=at + 0.63,
            imports=[["numpy", at + 0.2, 0.3, 0], ["numpy.linalg", at + 0.3, 0.1, 1]],
        ),
    ]


def settle(old: int = OLD, new: int = NEW, at: float = 100.0) -> list[Line]:
    """Return how the same handoff settles, and the old process drains."""
    report = {"outcome": "settled", "successor_pid": new, "accept_gap": 0.004}
    return [
        line(at + 0.9, new, "step", what="lifespan start-up", begun=at + 0.7),
        of_successor(at + 1.0, "imports", old, new, imports=[["late", at + 0.75, 0.1, 0]]),
        of_successor(at + 1.0, "sent", old, new, message="ready"),
        of_predecessor(at + 1.01, "got", old, new, message="ready"),
        of_predecessor(at + 1.01, "state", old, new, side="predecessor", state="pausing", event="ready"),
        of_predecessor(at + 1.02, "state", old, new, side="predecessor", state="committing", event="paused"),
        of_predecessor(at + 1.02, "sent", old, new, message="commit"),
        of_successor(at + 1.03, "got", old, new, message="commit"),
        of_successor(at + 1.04, "state", old, new, side="successor", state="probation", event="opened"),
        of_predecessor(at + 1.05, "state", old, new, side="predecessor", state="probation", event="serving"),
        of_predecessor(at + 6.05, "state", old, new, side="predecessor", state="settled", event="timed out"),
        of_predecessor(at + 6.05, "outcome", old, new, report=report, why=None, phase=None, stderr=""),
        line(at + 6.06, old, "drain", restart="r1", connections=2, seconds=30),
        line(at + 6.31, old, "waits", restart="r1", connections=1, requests=["GET /slow, 3.2 s old"]),
        line(at + 8.0, old, "drained", restart="r1", report={**report, "cut_requests": ["GET /slow, 5.0 s old"]}),
    ]


def fail(at: float = 100.0) -> list[Line]:
    """Return how the same handoff fails before the commit."""
    report = {"outcome": "failed", "successor_pid": NEW}
    why = "the successor (pid 12) failed: no such table: users"
    return [
        of_predecessor(at + 0.9, "state", side="predecessor", state="aborting", event="failed"),
        of_predecessor(at + 1.0, "state", side="predecessor", state="failed", event="died"),
        of_predecessor(
            at + 1.0, "outcome", report=report, why=why, phase="initialise", stderr="a\x1b[31mb\x07\nlast", status=1
        ),
    ]


def roll_out() -> list[Line]:
    """Return how an anchor rolls a release out over two workers."""
    told = {"restart": "r1", "side": "anchor"}
    lines = [line(99.0, ANCHOR, "roll-out", restart="r1", generation=2, workers=2)]
    for slot, (old, new, at) in enumerate([(11, 21, 100.0), (12, 22, 110.0)]):
        lines += [
            line(at - 0.1, ANCHOR, "turn", restart="r1", slot=slot, state="under way", old=old),
            line(at - 0.1, ANCHOR, "sent", **told, message="restart", peer=old),
            *begin(old, new, at),
            line(at + 0.02, ANCHOR, "worker", slot=slot, child=new, generation=2),
            *settle(old, new, at),
            line(at + 1.06, ANCHOR, "turn", restart="r1", slot=slot, state="served", old=old),
            line(at + 9, ANCHOR, "died", slot=slot, child=old, status=0),
        ]
    lines.append(line(118, ANCHOR, "outcome", **told, report={"outcome": "settled"}, why=None))
    return sorted(lines, key=lambda each: float(each["clock"]))


def write(directory: Path, lines: Iterable[Line]) -> str:
    """Write a history; return the path of the control socket that it belongs to."""
    path = directory / "app.sock"
    path.with_name(path.name + SUFFIX).write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


def records(directory: Path, lines: Iterable[Line]) -> list[Record]:
    return read(write(directory, lines))
