"""What a restart, a stop and a status look like: plain lines, and on a terminal a line that moves.

Nothing here asks a service anything. Lines never change once they are written; only rich's last one does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

from ecdysis_async._handoff.verdict import name_successors
from ecdysis_async.report import Outcome, Phase, RestartReport, State

__all__ = [
    "Lines",
    "Progress",
    "Watch",
    "describe_check",
    "describe_outcome",
    "describe_services",
    "describe_status",
    "find_missing",
    "fitting_rows",
    "showing",
    "watching",
]

# How often a line tells how many connections a drain has left, where lines stay, seconds.
COUNT_SECONDS = 5.0

# A worker that has said nothing to its anchor for so long hangs, seconds: it tells of itself each second.
SILENT_SECONDS = 2.5

# Parts of what a service waits for (status.py, account.py).
_STEP = re.compile(r"(worker \d+ of \d+): .*")
_PID = re.compile(r" \(pid \d+\)")
_COUNT = re.compile(r"\d+ connections?")

MINUTE = 60
HOUR = 60 * MINUTE
DAY = 24 * HOUR


class Display(Protocol):
    """Where lines go, and the one that moves."""

    def write(self, line: str) -> None:
        """Write a line that stays."""

    def move(self, waits: dict[str, str]) -> None:
        """Show what is waited for at this moment: by the service (its name is empty), and by each of its workers."""


class Watch(Protocol):
    """Where a status is shown that is looked at again and again."""

    def show(self, status: dict[str, Any]) -> None:
        """Show it as it is now."""


class Progress:
    """Tells how something goes on, from the events of a service.

    Args:
        display: where it is told.
        path: the service's control socket, which names it.
    """

    def __init__(self, display: Display, path: str) -> None:
        self._display = display
        self._path = path
        self._phases: set[Phase] = set()

    def show(self, event: dict[str, Any]) -> None:
        """Show what is new in an event."""
        if event["event"] == "accepted" and "id" in event:
            self._display.write(f"restart {event['id']} of {self._path}, asked of pid {event['pid']}")
        elif event["event"] == "accepted":
            self._display.write(f"{self._path} (pid {event['pid']}) stops")
        if event.get("report") is not None:
            report = RestartReport.from_json(event["report"])
            # What several workers took is a sum, which stands once all of them serve.
            if not event.get("workers") or report.outcome is not Outcome.IN_PROGRESS:
                self._show_report(report)
        waits = {"": event.get("waiting_for")}
        waits |= {f"worker {each['slot']}": each["waiting_for"] for each in event.get("workers", ())}
        if any(waits.values()):
            self._display.move({name: text for name, text in waits.items() if text})

    def _show_report(self, report: RestartReport) -> None:
        for phase in Phase:
            if phase in report.phases and phase not in self._phases:
                self._phases.add(phase)
                self._display.write(f"  {phase:<10} {report.phases[phase] * 1000:>10.1f} ms")


class Lines:
    """Plain lines, for logs and pipes: one for each thing that is waited for, and now and then one for a drain's count.

    Args:
        count_seconds: how often.
    """

    def __init__(self, count_seconds: float = COUNT_SECONDS) -> None:
        self._count_seconds = count_seconds
        self._counted = -math.inf
        self._last: str | None = None

    def write(self, line: str) -> None:
        """Write a line, at once: it may be read by somebody who waits."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def move(self, waits: dict[str, str]) -> None:
        """Write a line where the service waits for something else; what its workers do about it is told elsewhere."""
        if "" not in waits:
            return
        # The steps of a worker's handoff follow each other within milliseconds, and each worker has as many.
        text = _STEP.sub(r"\1", waits[""])
        what = _PID.sub("", text.partition(",")[0])
        is_new = what != self._last
        if is_new and _COUNT.fullmatch(what):
            is_new = time.monotonic() - self._counted >= self._count_seconds
            self._counted = time.monotonic() if is_new else self._counted
        if is_new:
            self._last = what
            self.write(f"  {_wait_line('', text)}")

    def show(self, status: dict[str, Any]) -> None:
        """Write a status."""
        self.write(describe_status(status))


def _is_terminal() -> bool:
    """Say whether something can move on stdout: it is a terminal, and rich is there."""
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def showing() -> Iterator[Display]:
    """Show progress on stdout, moving where that is possible."""
    if not _is_terminal():
        yield Lines()
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    console = Console(highlight=False)
    # What has moved is gone at the end: the lines above it tell what it has led to.
    with Live(console=console, transient=True) as live:
        spinners: dict[str, Spinner] = {}

        class Moving:
            def write(self, line: str) -> None:
                console.print(Text(line))

            def move(self, waits: dict[str, str]) -> None:
                for name in spinners.keys() - waits.keys():
                    del spinners[name]
                for name, text in waits.items():
                    spinners.setdefault(name, Spinner("dots")).update(text=Text(_wait_line(name, text)))
                live.update(Group(*(spinners[name] for name in waits)))

        yield Moving()


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Show a status again and again: as a table that is drawn anew where that is possible, else in lines."""
    if not _is_terminal():
        yield Lines()
        return
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with Live() as live:

        class Moving:
            def show(self, status: dict[str, Any]) -> None:
                table = Table.grid(padding=(0, 1))
                table.add_column(no_wrap=True)
                table.add_column(no_wrap=True, overflow="ellipsis")
                # One line is the title's, and one the cursor's.
                for name, text in fitting_rows(status, live.console.size.height - 2):
                    table.add_row(name, Text(text))
                live.update(Group(Text(_title(status)), table), refresh=True)

        yield Moving()


def _wait_line(name: str, text: str) -> str:
    return f"{name}: waiting for {text}" if name else f"waiting for {text}"


def describe_outcome(report: RestartReport) -> str:
    """Tell in one line what a restart has led to, whose phases have been told."""
    text = f"generation {report.generation} ({name_successors(report)}) serves: {report.outcome}"
    if report.accept_gap is not None:
        text += f", accept gap {report.accept_gap * 1000:.2f} ms"
    if Phase.DRAIN in report.phases:
        text += f"; connections: {report.drain}"
    cut = (f"cut at the deadline: {each}" for each in report.cut_requests)
    hurried = (f"cut short, because too many releases drain (--max-draining): {each}" for each in report.hurried)
    return "\n".join([text, *cut, *hurried, *report.unanswered])


def describe_check(checked: dict[str, Any]) -> str:
    """Tell what a release is, and in what a restart into it would differ from what runs, where something runs."""
    process, former = checked["process"], checked.get("former_process")
    rows = [("service", f"pid {checked['pid']}" if former is not None else "none runs there: this is a first start")]
    if checked.get("target") is not None:
        rows.append(("target", f"{checked['target']} by {checked['server']}"))
        if checked["file"] is not None:
            rows.append(("file", _through_links(checked["file"], checked["real_file"])))
    for name, describe in (("interpreter", _describe_interpreter), ("directory", _describe_directory)):
        text = describe(process)
        if former is not None:
            text += "\nas now" if describe(former) == text else f"\nnow {describe(former)}"
        rows.append((name, text))
    rows += _describe_unfollowed(checked)
    if former is not None:
        rows.append(("environment", _describe_changes(checked["environment"], "as now")))
    if checked["sockets"] is None:
        rows.append(("sockets", "only its run tells"))
    elif former is None:
        rows.append(("sockets", "\n".join(checked["sockets"]) or "none"))
    else:
        rows.append(("sockets", _describe_changes(checked["sockets"], "none")))
    return "\n".join(_lay_out(rows))


def _describe_interpreter(process: dict[str, Any]) -> str:
    return f"{_through_links(process['interpreter'], process['real_interpreter'])} ({process['python']})"


def _describe_directory(process: dict[str, Any]) -> str:
    if process["directory"] is None:
        return "one that was deleted"
    return _through_links(process.get("logical_directory") or process["directory"], process["directory"])


def _describe_changes(changes: dict[str, list[str]], otherwise: str) -> str:
    return "\n".join(f"{kind}: {', '.join(names)}" for kind, names in changes.items() if names) or otherwise


def _through_links(path: str, real: str | None) -> str:
    return path if real is None or path == real else f"{path} -> {real}"


def describe_services(found: dict[str, dict[str, Any] | str]) -> str:
    """Tell of several services in a table: the status of each by its control socket, or why there is none."""
    rows: list[tuple[str, ...]] = [
        ("control socket", "generation", "pid", "state", "workers", "connections", "listening")
    ]
    silent = [status for status in found.values() if isinstance(status, str)]
    for path, status in found.items():
        if isinstance(status, str):
            rows.append((path, "", "", "no answer", "", "", ""))
            continue
        addresses = "" if _has_left(status) else ", ".join(str(each["address"]) for each in status["listeners"])
        workers = str(len(status.get("workers", ()))) if status.get("workers") else "-"
        facts = (str(status["generation"]), str(status["pid"]), _describe_state(status))
        rows.append((path, *facts, workers, str(status["connections"]), addresses or "nowhere"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join([*("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), *silent])


def describe_status(status: dict[str, Any]) -> str:
    """Tell a status in lines."""
    return "\n".join([_title(status), *_lay_out(_rows(status))])


def _lay_out(rows: list[tuple[str, str]]) -> Iterator[str]:
    for name, text in rows:
        first, *others = text.splitlines()
        yield f"  {name:<12} {first}"
        yield from (f"  {'':<12} {line}" for line in others)


def _title(status: dict[str, Any]) -> str:
    state = _describe_state(status)
    return f"generation {status['generation']} (pid {status['pid']}): {state}, up {_duration(status['uptime'])}"


def _describe_state(status: dict[str, Any]) -> str:
    """Say in a few words what a service does; also one of an older release."""
    stopping = status.get("stopping")
    if not isinstance(stopping, dict):
        # A process that answers for the service and drains has nobody to follow it.
        return "stopping (draining)" if _has_left(status) else str(status["state"])
    text = f"stopping ({stopping['phase']}"
    if stopping.get("ends_in") is not None:
        text += f", {stopping['ends_in']:.0f} s at most"
    return f"{text})"


def _has_left(status: dict[str, Any]) -> bool:
    """Say whether a service accepts nobody any more."""
    return str(status["state"]) == State.DRAINING.value


def find_missing(status: dict[str, Any]) -> dict[str, str]:
    """Return what the anchor of a status goes on without, and why; nothing where none is named."""
    anchor = status.get("anchor")
    found = anchor.get("missing") if isinstance(anchor, dict) else None
    return {str(what): str(why) for what, why in found.items()} if isinstance(found, dict) else {}


def _describe_exclusives(status: dict[str, Any]) -> list[str]:
    """Say who holds, and who waits for, what one process of the service holds at a time."""
    found: dict[str, list[str]] = {}
    claims = status.get("exclusive")
    for each in claims if isinstance(claims, list) else ():
        who = f"worker {each['slot']} (pid {each['pid']})" if "slot" in each else f"pid {status['pid']}"
        verb = "holds it" if each["is_held"] else "waits"
        found.setdefault(str(each["name"]), []).append(f"{who} {verb}, for {each['seconds']:.0f} s")
    return [f"{name}: {'; '.join(sorted(claims, key=lambda text: 'waits' in text))}" for name, claims in found.items()]


def _rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what there is to tell of a service, each with its name; also of one of an older release."""
    rows = _urgent_rows(status)
    rows += [(f"worker {each['slot']}", _describe_worker(each, status)) for each in status.get("workers", ())]
    return rows + _lasting_rows(status)


def _urgent_rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is going on, which somebody who looks at a status wants to see first."""
    rows = []
    if (restart := status["restart"]) is not None:
        pid = f" (pid {restart['pid']})" if restart["pid"] is not None else ""
        what = f"{restart['id']} to generation {restart['generation']}{pid}"
        rows.append(("restart", f"{what}: {restart['phase']}, for {restart['seconds']:.1f} s"))
    if status["waiting_for"] is not None:
        rows.append(("waiting for", status["waiting_for"]))
    rows += [("missing", f"{what}: {why}") for what, why in find_missing(status).items()]
    rows += [
        ("paused" if each.get("state") == State.PAUSED.value else "draining", _describe_leaving(each))
        for each in status["draining"]
    ]
    rows += [("exclusive", each) for each in _describe_exclusives(status)]
    return rows


def _lasting_rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    addresses = [f"{each['address']} ({each['kind']})" for each in status["listeners"]]
    rows = [
        ("connections", _describe_load(status)),
        ("no longer on" if _has_left(status) else "listening", "\n".join(addresses) or "nowhere"),
    ]
    if (process := status.get("process")) is not None:
        where = (
            f"\nin {_describe_directory(process)}" if process["directory"] is not None else ", in a deleted directory"
        )
        rows.append(("running", f"{process['interpreter']} ({process['python']}){where}"))
    rows += _describe_following(status)
    if status.get("release"):
        rows.append(("release", str(status["release"])))
    if status["last_report"] is not None:
        rows.append(("last", str(RestartReport.from_json(status["last_report"])).replace("; ", "\n")))
    return rows


def _describe_following(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a restart would run, where that is not what runs, and which link it would not follow."""
    rows = []
    following = status.get("restart_would_run")
    if isinstance(following, dict):
        if following.get("error") is not None:
            rows.append(("a restart", f"would fail: {following['error']}"))
        else:
            rows.append(("a restart", f"would run {following['program']}\nin {following['directory']}"))
    return rows + _describe_unfollowed(status)


def _describe_unfollowed(found: dict[str, Any]) -> list[tuple[str, str]]:
    if not isinstance(link := found.get("unfollowed_link"), str):
        return []
    return [("the link", f"{link} is not followed when it moves: start the service by it, or set PWD to it")]


def fitting_rows(status: dict[str, Any], height: int) -> list[tuple[str, str]]:
    """Return as many rows as fit a screen, the urgent ones first; workers that just serve are told in one row.

    Args:
        status: of the service.
        height: of the screen, in lines.
    """
    rows = _urgent_rows(status)
    workers: list[dict[str, Any]] = list(status.get("workers", ()))
    lasting = _lasting_rows(status)
    room = height - sum(_height(row) for row in (*rows, *lasting))
    if len(workers) > room:
        usual = [each for each in workers if _is_usual(each, status)]
        unusual = [each for each in workers if not _is_usual(each, status)]
        shown = unusual[: max(1, height - len(rows) - 4)]
        rows += [(f"worker {each['slot']}", _describe_worker(each, status)) for each in shown]
        if left := len(unusual) - len(shown):
            rows.append(("workers", f"{left} more of them"))
        if usual:
            rows.append(("workers", f"{len(usual)} serving in generation {status['generation']}"))
    else:
        rows += [(f"worker {each['slot']}", _describe_worker(each, status)) for each in workers]
    fitting: list[tuple[str, str]] = []
    for name, text in (*rows, *lasting):
        left = height - sum(_height(row) for row in fitting)
        if left > 0:
            fitting.append((name, "\n".join(text.splitlines()[:left])))
    return fitting


def _height(row: tuple[str, str]) -> int:
    return len(row[1].splitlines()) or 1


def _is_usual(worker: dict[str, Any], status: dict[str, Any]) -> bool:
    """Say whether there is nothing to tell of a worker but that it serves."""
    return (
        worker.get("state") == State.SERVING.value
        and worker.get("generation") == status["generation"]
        and (worker.get("silence") or 0) < SILENT_SECONDS
    )


def _describe_load(of: dict[str, Any]) -> str:
    jobs = of.get("jobs") or 0
    return str(of["connections"]) + (f", and {_counted(jobs, 'job')}" if jobs else "")


def _describe_connections(of: dict[str, Any]) -> str:
    jobs, text = of.get("jobs") or 0, _counted(of["connections"], "connection")
    return f"{text} and {_counted(jobs, 'job')}" if jobs else text


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _describe_leaving(each: dict[str, Any]) -> str:
    """Tell of a generation, or a worker, that leaves, or may take over again."""
    text = f"generation {each['generation']} (pid {each['pid']})"
    if each["connections"] is not None:
        text += f": {_describe_connections(each)}"
    if each.get("state") == State.PAUSED.value:
        text += ", can take over again"
    if each.get("ends_in") is not None:
        text += f", ends within {each['ends_in']:.0f} s"
    return "\n".join((text, *(f"  {served}" for served in each.get("serving") or ())))


def _describe_worker(worker: dict[str, Any], status: dict[str, Any]) -> str:
    """Tell of one worker what is known of it."""
    text = str(worker["state"]) if worker.get("state") is not None else "unknown"
    if worker.get("pid") is not None:
        text = f"pid {worker['pid']}: {text}"
    if worker.get("generation") is not None:
        text = f"generation {worker['generation']}, {text}"
    if worker.get("connections") is not None:
        text += f", {_describe_connections(worker)}"
    if worker.get("uptime") is not None:
        text += f", up {_duration(worker['uptime'])}"
    if worker.get("release") and worker["release"] != status.get("release"):
        text += f", {worker['release']}"
    if worker.get("silence") is not None and worker["silence"] >= SILENT_SECONDS:
        text += f"; has not answered for {worker['silence']:.0f} s"
    if worker.get("waiting_for"):
        text += f"; waiting for {worker['waiting_for']}"
    return text


def _duration(seconds: float) -> str:
    if seconds < MINUTE:
        return f"{seconds:.1f} s"
    if seconds < HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < DAY else f"{seconds / DAY:.1f} days"
