"""Where a generation stands, and what a restart did and what it cost: data only, and the way it travels as JSON."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["DrainCount", "Outcome", "Phase", "RestartReport", "State", "read_drain"]


class State(enum.Enum):
    """Where a generation stands, from its start to its end."""

    STARTING = "starting"  # preparing itself: nothing is accepted
    WAITING = "waiting"  # ready, and waiting for the predecessor's commit
    SERVING = "serving"
    PAUSED = "paused"  # a successor accepts, on probation; connections of this generation are served
    DRAINING = "draining"  # this generation leaves: it will never accept again
    ENDED = "ended"


class Outcome(enum.StrEnum):
    """Where a restart stands, or how it ended, as its caller is told."""

    IN_PROGRESS = "in progress"  # the successor does not serve yet
    SERVING = "serving"  # it serves, on probation
    SETTLED = "settled"  # the restart is final
    FAILED = "failed"  # before the commit: the predecessor serves as if nothing had been asked
    ROLLED_BACK = "rolled back"  # after it: the predecessor accepts again
    STOPPED = "stopped"  # the service was stopped meanwhile


class Phase(enum.StrEnum):
    """The phases of a restart, in their order; each one's duration stands in the report."""

    START = "start"  # from the request to the successor's first word: exec, interpreter, imports
    INITIALISE = "initialise"  # from its first word to ready
    PAUSE = "pause"  # from ready until the predecessor accepts no more
    COMMIT = "commit"  # from there until the successor accepts
    PROBATION = "probation"
    DRAIN = "drain"


@dataclass(slots=True)
class DrainCount:
    """What became of the connections of a generation that left, and of the application's jobs, which have none.

    Attributes:
        drained: ended by themselves, or by their handler, before the deadline.
        silent: idle to the end, and closed at a safe point shortly before the deadline.
        transferred: passed on to the successor alive.
        cut: still busy at the deadline: cancelled, then aborted.
        jobs_done: jobs that ended before the deadline: what runs within ``track()``, or after an answer.
        jobs_cut: jobs that were cancelled at the deadline.
    """

    drained: int = 0
    silent: int = 0
    transferred: int = 0
    cut: int = 0
    jobs_done: int = 0
    jobs_cut: int = 0

    def __str__(self) -> str:
        """Tell it in a few words; jobs only where there were any."""
        text = f"{self.drained} drained, {self.silent} silent, {self.transferred} transferred, {self.cut} cut"
        return f"{text}; jobs: {self.jobs_done} done, {self.jobs_cut} cut" if self.jobs_done or self.jobs_cut else text


def read_drain(body: Mapping[str, Any]) -> DrainCount:
    """Read counts that another release may have written: what this one does not know is left out.

    Raises:
        OverflowError, TypeError, ValueError: these are no counts.
    """
    return DrainCount(**{each.name: int(body[each.name]) for each in fields(DrainCount) if each.name in body})


@dataclass(slots=True)
class RestartReport:
    """One restart, told by the predecessor; times in seconds.

    Attributes:
        id: names this restart in logs, and in a question for its verdict.
        generation: the number of the generation that came, or was to come.
        predecessor_pid: the process that was asked to restart.
        successor_pid: the process that came, once it runs.
        started_at: when it was asked for, in seconds since the epoch.
        outcome: where it stands, or how it ended.
        phases: the duration of each phase that has ended.
        accept_gap: how long new connections waited in the kernel's queue, from the pause to the successor's opening.
        inherited: names of the sockets that the successor took over.
        created: names of the sockets that it opened anew.
        unclaimed: names of the sockets that it did not want; they are closed after the restart has settled.
        lost: connections that a successor had accepted and took with it when it was rolled back.
        drain: what became of the predecessor's connections and jobs.
        unanswered: which workers did not answer, and were replaced without a handoff.
        cut_requests: what was cut at its deadline, in a few words each: ten of them, and how many more.
        hurried: generations whose drain this restart has cut short, because more than ``max_draining`` drained; each
            with the number of its connections, which have about a second left.
        left_behind: what had kept the predecessor's process after its drain, where it was ended by force.
        error: why it failed.
        workers: where an anchor rolled it out over several workers, the restart of each; what stands above is for all.
        asked_by: who has asked for it, in words.
        release: what came: the directory of its code, and of its environment where that lies elsewhere, without links.
    """

    id: str
    generation: int
    predecessor_pid: int
    successor_pid: int | None = None
    started_at: float = 0.0
    outcome: Outcome = Outcome.IN_PROGRESS
    phases: dict[Phase, float] = field(default_factory=dict)
    accept_gap: float | None = None
    inherited: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    unclaimed: list[str] = field(default_factory=list)
    lost: int = 0
    drain: DrainCount = field(default_factory=DrainCount)
    unanswered: list[str] = field(default_factory=list)
    cut_requests: list[str] = field(default_factory=list)
    hurried: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    error: str | None = None
    workers: list[RestartReport] = field(default_factory=list)
    asked_by: str = ""
    release: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the report as an object of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> RestartReport:
        """Read a report that another release may have written: what this one does not know is left out.

        An outcome that it does not know is read as failed, where the report holds an error, and else as in progress:
        nothing is claimed to be final that may not be.

        Raises:
            KeyError, OverflowError, TypeError, ValueError: it is no report.
        """
        known = {name.name: body[name.name] for name in fields(cls) if name.name in body}
        outcome, phases, counts = known["outcome"], dict(known["phases"]), dict(known["drain"])
        if outcome not in set(Outcome):
            outcome = Outcome.FAILED if known.get("error") is not None else Outcome.IN_PROGRESS
        known["outcome"] = Outcome(outcome)
        known["phases"] = {phase: float(phases[phase]) for phase in Phase if phase in phases}
        known["drain"] = read_drain(counts)
        for name in ("asked_by", "release"):
            known[name] = str(known.get(name, ""))
        known["unanswered"] = [str(each) for each in known.get("unanswered", ())]
        known["cut_requests"] = [str(each) for each in known.get("cut_requests", ())]
        known["hurried"] = [str(each) for each in known.get("hurried", ())]
        known["left_behind"] = [str(each) for each in known.get("left_behind", ())]
        known["workers"] = [cls.from_json(each) for each in known.get("workers", ())]
        return cls(**known)

    def __str__(self) -> str:
        """Tell it in one line."""
        parts = [f"restart {self.id} to generation {self.generation}: {self.outcome}"]
        if self.phases:
            parts.append(", ".join(f"{phase} {seconds * 1000:.1f} ms" for phase, seconds in self.phases.items()))
        if self.accept_gap is not None:
            parts.append(f"accept gap {self.accept_gap * 1000:.2f} ms")
        if Phase.DRAIN in self.phases:
            parts.append(f"connections: {self.drain}")
        if self.cut_requests:
            parts.append(f"cut at the deadline: {', '.join(self.cut_requests)}")
        if self.lost:
            parts.append(f"{self.lost} connections lost")
        parts += self.unanswered
        if self.hurried:
            parts.append(f"cut short, because too many releases drain (--max-draining): {', '.join(self.hurried)}")
        if self.left_behind:
            parts.append(f"the old process was ended by force, kept by {', '.join(self.left_behind)}")
        if self.error:
            parts.append(self.error.splitlines()[0])
        return "; ".join(parts)
