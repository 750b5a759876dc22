"""What has become of a restart, in one line each: for the log of who was asked for it.

Nothing here is read, awaited or logged.
"""

from __future__ import annotations

from ecdysis_async.errors import ReadyTimeout, RestartError
from ecdysis_async.report import Outcome, Phase, RestartReport

__all__ = ["describe_drain", "describe_verdict", "name_successors", "summarize"]


def summarize(error: RestartError) -> str:
    """Say in one line why a restart failed. All of it stands above in the log already, where the process wrote it."""
    what, *others = str(error.args[0]).splitlines() or [""]
    if isinstance(error, ReadyTimeout):
        # It says itself where the process stood, and the whole stack is no reason.
        return what
    # The last line of a traceback, and of what the process has written, says what happened.
    words = [line.strip() for line in (*others, *error.stderr.splitlines()) if line.strip()]
    return f"{what} … {words[-1]}" if words and words[-1] not in what else what


def name_successors(report: RestartReport) -> str:
    """Name the process that came, or say how many came."""
    if len(report.workers) > 1:
        return f"{len(report.workers)} workers"
    # Of a service with workers, the report itself names the anchor, which stays.
    return f"pid {(report.workers or [report])[0].successor_pid}"


def describe_verdict(report: RestartReport, error: RestartError | None, former: int | None) -> str:
    """Say in one line how a restart has ended, for the log of who was asked for it.

    Args:
        report: what has become of it.
        error: why it failed.
        former: the number of the generation that was asked; None where nobody serves any more.
    """
    who = name_successors(report)
    release = f", {report.release}" if report.release else ""
    serves = f"generation {former} serves"
    match report.outcome:
        case Outcome.ROLLED_BACK if former is None:
            parts = ["was rolled back, and nobody serves"]
        case Outcome.SETTLED:
            parts = [f"is settled: generation {report.generation} ({who}{release}) serves"]
        case Outcome.ROLLED_BACK:
            parts = [f"was rolled back, and {serves} again"]
        case Outcome.STOPPED:
            parts = ["was called off, because the service stops"]
        case _:
            parts = [f"has failed, and {serves} on" if former is not None else "has failed, and nobody serves"]
    if error is not None and report.outcome is not Outcome.STOPPED:
        parts[0] += f": {summarize(error)}"
    if report.phases:
        parts.append(", ".join(f"{phase} {seconds * 1000:.1f} ms" for phase, seconds in report.phases.items()))
    if report.accept_gap is not None and error is None:
        parts.append(f"accept gap {report.accept_gap * 1000:.2f} ms")
    if report.lost:
        parts.append(f"{report.lost} connections lost")
    return "; ".join((*parts, *report.unanswered, *report.hurried))


def describe_drain(report: RestartReport, who: str) -> str:
    """Say in one line what has become of the connections of those who have left.

    Args:
        report: of the restart for which they have left.
        who: they are, in words, and that they have.
    """
    return f"{who} drained in {report.phases.get(Phase.DRAIN, 0.0):.1f} s: {report.drain}"
