"""What a restart, a stop and a status look like: plain lines, and on a terminal a line that moves.

Nothing here asks a service anything. Lines never change once they are written; only rich's last one does.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from ecdysis_async.report import Phase, RestartReport

__all__ = ["Progress", "describe_outcome", "describe_status", "showing"]

MINUTE = 60
HOUR = 60 * MINUTE
DAY = 24 * HOUR


class Display(Protocol):
    """Where lines go, and the one that moves."""

    def write(self, line: str) -> None:
        """Write a line that stays."""

    def move(self, text: str) -> None:
        """Show what is waited for at this moment."""


class Progress:
    """Tells how something goes on, from the events of a service."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._phases: set[Phase] = set()

    def show(self, event: dict[str, Any]) -> None:
        """Show what is new in an event."""
        if event["event"] == "accepted" and "id" in event:
            self._display.write(f"restart {event['id']}, asked of pid {event['pid']}")
        elif event["event"] == "accepted":
            self._display.write(f"pid {event['pid']} stops")
        if event.get("report") is not None:
            self._show_report(RestartReport.from_json(event["report"]))
        if event.get("waiting_for"):
            self._display.move(event["waiting_for"])

    def _show_report(self, report: RestartReport) -> None:
        for phase in Phase:
            if phase in report.phases and phase not in self._phases:
                self._phases.add(phase)
                self._display.write(f"  {phase:<10} {report.phases[phase] * 1000:>10.1f} ms")


class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, line: str) -> None:
        """Write a line, at once: it may be read by somebody who waits."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def move(self, text: str) -> None:
        """Write a line where it tells more than the time that has passed."""
        what = text.partition(",")[0]
        if what != self._last:
            self._last = what
            self.write(f"  waiting for {text}")


@contextlib.contextmanager
def showing() -> Iterator[Display]:
    """Show progress on stdout, moving where that is a terminal and rich is there."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.text import Text
        except ModuleNotFoundError:
            pass
        else:
            console = Console(highlight=False)
            with console.status("") as status:

                class Moving:
                    def write(self, line: str) -> None:
                        console.print(Text(line))

                    def move(self, text: str) -> None:
                        status.update(Text(f"waiting for {text}"))

                yield Moving()
            return
    yield Lines()


def describe_outcome(report: RestartReport) -> str:
    """Tell in one line what a restart has led to, whose phases have been told."""
    text = f"generation {report.generation} (pid {report.successor_pid}) serves: {report.outcome}"
    if report.accept_gap is not None:
        text += f", accept gap {report.accept_gap * 1000:.2f} ms"
    if Phase.DRAIN in report.phases:
        drain = report.drain
        text += (
            f"; connections: {drain.drained} drained, {drain.silent} silent, {drain.transferred} transferred, "
            f"{drain.cut} cut"
        )
    return text


def describe_status(status: dict[str, Any]) -> str:
    """Tell a status in lines."""
    rows = [
        ("connections", str(status["connections"])),
        ("listening", "\n".join(f"{each['address']} ({each['kind']})" for each in status["listeners"]) or "nowhere"),
    ]
    if (restart := status["restart"]) is not None:
        pid = f" (pid {restart['pid']})" if restart["pid"] is not None else ""
        what = f"{restart['id']} to generation {restart['generation']}{pid}"
        rows.append(("restart", f"{what}: {restart['phase']}, for {restart['seconds']:.1f} s"))
    if status["waiting_for"] is not None:
        rows.append(("waiting for", status["waiting_for"]))
    rows += [
        (
            "draining",
            f"generation {each['generation']} (pid {each['pid']})"
            + (f": {each['connections']} connections" if each["connections"] is not None else ""),
        )
        for each in status["draining"]
    ]
    if status["last_report"] is not None:
        rows.append(("last", str(RestartReport.from_json(status["last_report"])).replace("; ", "\n")))
    lines = [
        f"generation {status['generation']} (pid {status['pid']}): {status['state']}, up {_duration(status['uptime'])}"
    ]
    for name, text in rows:
        first, *others = text.splitlines()
        lines.append(f"  {name:<12} {first}")
        lines += [f"  {'':<12} {line}" for line in others]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < MINUTE:
        return f"{seconds:.1f} s"
    if seconds < HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < DAY else f"{seconds / DAY:.1f} days"
