"""The client of the control socket: blocking, because a command has nothing else to do.

It asks, and finds out what became of what it has asked for, also where the generation that was asked dies over it.
What is printed, and how, is decided elsewhere. Nothing that a service says is believed before it was looked at:
somebody else may listen on that path.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ecdysis_async._management.control_path import default_directories, find_live, is_live, locate
from ecdysis_async.report import RestartReport

from .output import Exit

__all__ = [
    "CommandFailed",
    "check",
    "compare",
    "find",
    "find_all",
    "reopen_logs",
    "restart",
    "status",
    "stop",
    "upgrade",
]

Event = dict[str, Any]

# The longest answer: a report with the successor's traceback and the last of its stderr, each twice.
MAX_ANSWER_BYTES = 16 * 1024 * 1024

# A service says something every second to those who wait; one that says nothing for this long hangs, seconds.
SILENCE_SECONDS = 15.0

# How long a service may take to say who serves, after a restart that has failed, seconds.
SERVING_SECONDS = 5.0

# After how many seconds without a first answer that is told, while it is still waited for.
QUIET_SECONDS = 3.0

# How long to look for somebody who knows the verdict, once the generation that was asked is gone, seconds.
VERDICT_SECONDS = 10.0
VERDICT_POLL_SECONDS = 0.05

# The same where systemd runs this command (ExecReload=) and the unit's main process is dead: before systemd starts the
# service anew, it waits for this command to end, and clients wait with it.
FORSAKEN_SECONDS = 1.0

# How long an anchor may take to be itself again, seconds.
UPGRADE_SECONDS = 30.0

# How long a process may take from its last word to its end, seconds. What its application has left behind is ended by
# force within exit_timeout, which is 10 seconds unless somebody has set it.
EXIT_SECONDS = 20.0


# All but the end of a line and the tabulator: C0, DEL and C1, which some terminals obey in UTF-8 as well.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

ERRORS = {
    "RestartInProgress": Exit.IN_PROGRESS,
    "RolledBack": Exit.ROLLED_BACK,
    # There is no service to restart any more: it is being stopped.
    "RestartWhileDraining": Exit.NO_SERVICE,
}


class CommandFailed(Exception):
    """The command ends with this message and this exit code.

    Attributes:
        code: the exit code.
        event: what the service has said last, if it has said anything.
    """

    def __init__(self, message: str, code: Exit, event: Event | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.event = event


class NoAnswer(Exception):
    """The connection ended, or stayed silent, before there was an answer."""


class ConnectionLost(NoAnswer):
    """It ended: the process that was asked is no more, or was executed anew at that moment."""


@contextlib.contextmanager
def understanding(path: str) -> Iterator[None]:
    """Read what a service has said, where it may be another release's, or no service's at all.

    Raises:
        CommandFailed: something in it is missing, or is not what it should be.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise _strange(path, f"{type(error).__name__}: {error}") from error


def _strange(path: str, what: str) -> CommandFailed:
    return CommandFailed(
        f"what listens on {path} does not answer as a service of this library ({_printable(what)}): is it another "
        "program's socket, or another release's?",
        Exit.UNKNOWN,
    )


def find(control: str | None) -> str:
    """Return the path of the control socket that is meant: the named one, or the only one that is live.

    Raises:
        CommandFailed: there is none, or there are several.
    """
    if control is not None:
        try:
            return locate(control)
        except ValueError as error:
            raise CommandFailed(str(error), Exit.USAGE) from error
    live = find_all()
    if len(live) > 1:
        raise CommandFailed(
            "several services run; choose one:\n" + "\n".join(f"  --control {path}" for path in live), Exit.USAGE
        )
    return live[0]


def find_all() -> list[str]:
    """Return the paths of all control sockets that are live, as far as this user can see.

    Raises:
        CommandFailed: there is none.
    """
    live = find_live()
    if not live:
        raise CommandFailed(
            f"no service has its control socket in {', '.join(default_directories())}, nor in a unit's directory in "
            "/run: start it (`systemctl status` says why a unit has not started), or say where it is by --control PATH",
            Exit.NO_SERVICE,
        )
    return live


def upgrade(path: str, on_event: Callable[[Event], None]) -> Event:
    """Upgrade the anchor of a service in place; return its status afterwards.

    Where its control socket is elsewhere by now, the status has that path as "control".

    Raises:
        CommandFailed: it goes on as it is, or nobody is there.
    """
    before: Event | None = None
    pid = pidfd = -1
    paths = [path]
    try:
        for event in _ask(path, {"command": "upgrade"}, SILENCE_SECONDS):
            with understanding(path):
                on_event(event)
            if event["event"] == "failed":
                with understanding(path):
                    if event["error"] == "UpgradeFailed":
                        event["message"] = f"the anchor goes on as it is: {event['message']}"
                raise _failure(event, path)
            if event["event"] == "accepted":
                with understanding(path):
                    before = {"upgrades": int(event["upgrades"])}
                    pid = int(event["pid"])
                    # The new code may have another one. Where it cannot be opened, the former one stays.
                    if (moved := event.get("control")) is not None and moved != path:
                        paths.append(str(moved))
                pidfd = _open_pidfd(pid)
    except NoAnswer as error:
        if before is None:
            raise CommandFailed(f"the service at {path} does not answer: {error}", Exit.UNKNOWN) from error
    try:
        return _await_upgrade(paths, before["upgrades"] if before is not None else 0, pidfd)
    except NoAnswer as error:
        raise CommandFailed(
            f"the anchor (pid {pid}) has not said what became of its upgrade ({error}): see `ecdysis status`",
            Exit.UNKNOWN,
        ) from error
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _await_upgrade(paths: Sequence[str], upgrades: int, pidfd: int) -> Event:
    """Return the status of an anchor once new code runs it.

    Args:
        paths: its control socket, and another one where the new code may have it.
        upgrades: how often it had been upgraded.
        pidfd: of the process; -1 where it cannot be watched.

    Raises:
        CommandFailed: it goes on as it is, or has ended. NoAnswer: it does not say.
    """
    deadline = time.monotonic() + UPGRADE_SECONDS
    silence: Exception | None = None
    for path in itertools.cycle(paths):
        if time.monotonic() >= deadline:
            break
        try:
            answer = _ask_once(path, {"command": "status"}, SILENCE_SECONDS)
        except NoAnswer as error:  # in the moment of the exec
            silence = error
        except CommandFailed as error:
            # A process that lives may be about to open its control socket, which it could not open at first.
            if error.code is not Exit.NO_SERVICE or pidfd < 0 or select.select([pidfd], [], [], 0)[0]:
                raise
            silence = error
        else:
            with understanding(path):
                found: Event = answer["status"]
                if found["anchor"]["upgrades"] > upgrades:
                    return found if path == paths[0] else {**found, "control": path}
                failure = found["anchor"]["error"]
            if failure is not None:
                raise CommandFailed(f"the anchor goes on as it is: {failure}", Exit.FAILED)
        time.sleep(VERDICT_POLL_SECONDS)
    raise NoAnswer(str(silence) if silence is not None else "it answers, and is not upgraded yet")


def status(path: str, timeout: float = SILENCE_SECONDS) -> Event:
    """Return the status of whichever generation accepts; it may be silent for so many seconds.

    Raises:
        CommandFailed: nobody is there, or nobody answers.
    """
    answer = _ask_for(path, {"command": "status"}, "status", timeout)
    with understanding(path):
        found: Event = dict(answer["status"])
        # What no status of any release lacks.
        int(found["generation"]), int(found["pid"]), str(found["state"]), found["listeners"], found["draining"]
    return found


def reopen_logs(path: str) -> Event:
    """Let a service open its log files anew; return its word of it, an event "reopened".

    Raises:
        CommandFailed: nobody is there, or nobody answers.
    """
    answer = _ask_for(path, {"command": "reopen-logs"}, "reopened")
    with understanding(path):
        return {**answer, "handlers": int(answer["handlers"])}


def check(path: str) -> Event:
    """Let a service check what its restart would start; return what that would change.

    Raises:
        CommandFailed: it does not pass the check, or nobody answers.
    """
    try:
        for event in _ask(path, {"command": "check"}, SILENCE_SECONDS):
            match event["event"]:
                case "checked":
                    with understanding(path):
                        comparison: Event = dict(event["comparison"])
                    return comparison
                case "failed":
                    raise _failure(event, path)
    except NoAnswer as error:
        raise CommandFailed(f"the service at {path} does not answer: {error}", Exit.UNKNOWN) from error
    raise AssertionError("a conversation ends by its last word, or by NoAnswer")


def compare(path: str, release: Event) -> Event:
    """Ask a service what its restart into a release would change, which has told of itself here.

    Raises:
        CommandFailed: nobody is there, or nobody answers.
    """
    answer = _ask_for(path, {"command": "compare", "release": release}, "checked")
    with understanding(path):
        comparison: Event = dict(answer["comparison"])
    return comparison


def _ask_for(path: str, request: Event, wanted: str, timeout: float = SILENCE_SECONDS) -> Event:
    try:
        try:
            answer = _ask_once(path, request, timeout)
        except ConnectionLost:
            # Once more: there may be a successor, and these are questions that may be asked twice.
            answer = _ask_once(path, request, timeout)
    except NoAnswer as error:
        raise CommandFailed(f"the service at {path} does not answer: {error}", Exit.UNKNOWN) from error
    if answer["event"] != wanted:
        raise CommandFailed(f"the service at {path} answers with {answer['event']!r}", Exit.UNKNOWN, answer)
    return answer


def restart(path: str, until: str, on_event: Callable[[Event], None], by: str = "`ecdysis restart`") -> Event:
    """Restart a service; return its last word, an event "done".

    Args:
        path: its control socket.
        until: "serving", "settled" or "drained".
        on_event: called with each event on the way.
        by: what the service's log says who has asked.

    Raises:
        CommandFailed: there is no new generation, or nobody knows.
    """
    last: str | None = None
    try:
        for event in _ask(path, {"command": "restart", "until": until, "by": by}, SILENCE_SECONDS, on_event):
            with understanding(path):
                on_event(event)
            match event["event"]:
                case "done":
                    with understanding(path):
                        RestartReport.from_json(event["report"])
                    return event
                case "failed":
                    raise _failure_of_restart(event, path)
                case "accepted":
                    with understanding(path):
                        last = str(event["id"])
    except NoAnswer as error:
        if last is not None:
            return _seek_verdict(path, last, until)
        if not is_live(path):
            raise CommandFailed(f"the service at {path} has ended without an answer", Exit.NO_SERVICE) from error
        raise CommandFailed(
            f"the service at {path} did not say whether it restarts ({error}): see `ecdysis status`", Exit.UNKNOWN
        ) from error
    raise AssertionError("a conversation ends by its last word, or by NoAnswer")


def stop(path: str, on_event: Callable[[Event], None]) -> None:
    """Stop a service; return when its newest generation has ended.

    Raises:
        CommandFailed: nobody is there, or it is not known whether it stops.
    """
    pid = pidfd = -1
    try:
        for event in _ask(path, {"command": "stop"}, SILENCE_SECONDS, on_event):
            with understanding(path):
                on_event(event)
            if event["event"] == "accepted":
                with understanding(path):
                    pid = int(event["pid"])
                pidfd = _open_pidfd(pid)
            if event["event"] == "done":
                if pid < 0:
                    raise _strange(path, "it says that something is done which it has not accepted")
                if pidfd >= 0 and not _wait_for_death(pidfd):
                    raise CommandFailed(
                        f"the service at {path} has said that it has stopped, but its process (pid {pid}) is still "
                        f"there after {EXIT_SECONDS:.0f} seconds",
                        Exit.UNKNOWN,
                    )
                return
    except NoAnswer as error:
        # A process that is killed while it stops has stopped as well.
        if _wait_for_death(pidfd) or not is_live(path):
            return
        raise CommandFailed(
            f"the service at {path} does not say that it stops ({error}): see `ecdysis status`", Exit.UNKNOWN
        ) from error
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _seek_verdict(path: str, id: str, until: str) -> Event:
    """Find out what became of a restart from the process that serves now."""
    begun = time.monotonic()
    while (left := begun + (FORSAKEN_SECONDS if _is_forsaken() else VERDICT_SECONDS) - time.monotonic()) > 0:
        try:
            # In turns: where systemd keeps the socket, one waits there also while there is no service.
            answer = _ask_once(path, {"command": "verdict", "id": id}, min(left, FORSAKEN_SECONDS))
        except (NoAnswer, CommandFailed):
            # It is just leaving, or a successor is about to accept.
            answer = {"event": "unknown"}
        if answer["event"] == "verdict":
            with understanding(path):
                report = answer["report"]
                RestartReport.from_json(report)
            match report["outcome"]:
                # That drain ended with its generation, if that is what was waited for.
                case "settled":
                    return {"event": "done", "report": report}
                case "serving" if until == "serving":
                    return {"event": "done", "report": report}
                case "failed":
                    raise _failure_of_restart(_failed("SuccessorFailed", report), path)
                case "rolled back":
                    raise _failure_of_restart(_failed("RolledBack", report), path)
                case "stopped":
                    raise _failure(_failed("RestartWhileDraining", report), path)
                case _:
                    # It goes on, bounded by the service's own limits.
                    begun = time.monotonic()
        time.sleep(VERDICT_POLL_SECONDS)
    raise CommandFailed(
        f"the generation that was asked is gone, and nobody knows what became of restart {id}: see `ecdysis status`",
        Exit.UNKNOWN,
    )


def _is_forsaken() -> bool:
    """Say whether systemd has run this command for a main process that is no more."""
    pid = os.environ.get("MAINPID", "")
    if not pid.isdecimal():
        return False
    try:
        pidfd = os.pidfd_open(int(pid))
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    try:
        return bool(select.select([pidfd], [], [], 0)[0])
    finally:
        os.close(pidfd)


def _failed(error: str, report: Event) -> Event:
    message = report.get("error") or "the service was stopped while it restarted"
    return {"event": "failed", "error": error, "message": message, "phase": None, "report": report}


def _failure(event: Event, path: str) -> CommandFailed:
    with understanding(path):
        return CommandFailed(str(event["message"]), ERRORS.get(str(event["error"]), Exit.FAILED), event)


def _failure_of_restart(event: Event, path: str) -> CommandFailed:
    """Return why there is no new generation, and who serves instead, which is asked: nobody may.

    It is told with the code of a service that is not there, where nobody serves.
    """
    error = _failure(event, path)
    if error.code not in (Exit.FAILED, Exit.ROLLED_BACK):
        return error
    found: Event | None = None
    try:
        answer = _ask_once(path, {"command": "status"}, SERVING_SECONDS)
        found = dict(answer["status"])
        generation, pid, state = int(found["generation"]), int(found["pid"]), str(found["state"])
    except CommandFailed as failure:
        if failure.code is not Exit.NO_SERVICE:
            return CommandFailed(f"{error}\nwho serves now is not known: {failure}", error.code, event)
        event["serving"] = None
        return CommandFailed(f"{error}\nnobody serves: the service has ended since", Exit.NO_SERVICE, event)
    except (NoAnswer, AttributeError, KeyError, OverflowError, TypeError, ValueError) as failure:
        return CommandFailed(f"{error}\nwho serves now is not known: {failure}", error.code, event)
    if state in ("serving", "paused"):
        event["serving"] = {"generation": generation, "pid": pid}
        return CommandFailed(f"{error}\ngeneration {generation} (pid {pid}) serves on", error.code, event)
    event["serving"] = None
    wait = found.get("waiting_for")
    reason = f", and waits for {wait}" if wait else ""
    text = f"{error}\nnobody serves: the service (pid {pid}) is {state}{reason}"
    return CommandFailed(text, Exit.NO_SERVICE, event)


def _ask_once(path: str, request: Event, timeout: float) -> Event:
    return next(_ask(path, request, timeout))


def _ask(path: str, request: Event, timeout: float, on_event: Callable[[Event], None] | None = None) -> Iterator[Event]:
    """Ask, and yield each answer.

    Args:
        path: the control socket.
        request: what is asked.
        timeout: how long the service may be silent, in seconds.
        on_event: is told that the service does not answer yet.

    Raises:
        CommandFailed: nobody is there, or the service refuses to answer.
        NoAnswer: the connection ended, or the service was silent.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        # Where the queue is full, connect() waits by this limit, and not by Python's (unix(7), connect(2)). On some
        # machines of 32 bits the struct is another one: without the limit it waits on.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", *_split_seconds(timeout)))
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise CommandFailed(
                f"no service has the control socket {path}: it has ended, or was not started. Without --control and "
                "ECDYSIS_CONTROL, `ecdysis status` finds the services that run",
                Exit.NO_SERVICE,
            ) from error
        except PermissionError as error:
            raise CommandFailed(
                f"the control socket {path} may not be used by uid {os.geteuid()}: ask as the service's user or root",
                Exit.PERMISSION,
            ) from error
        except BlockingIOError as error:
            raise NoAnswer(f"its queue has been full for {timeout:.0f} seconds") from error
        except OSError as error:
            raise CommandFailed(f"{path} is no control socket: {error.strerror or error}", Exit.USAGE) from error
        sock.settimeout(timeout)
        # Refused before it was heard: what the service has said to that is there to be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(json.dumps(request).encode() + b"\n")
        if on_event is not None and not select.select([sock], [], [], min(QUIET_SECONDS, timeout))[0]:
            what = f"an answer of {path}, silent for {QUIET_SECONDS:.0f} s: is its event loop blocked?"
            on_event({"event": "silent", "waiting_for": what})
        with sock.makefile("rb") as lines:
            while True:
                try:
                    line = lines.readline(MAX_ANSWER_BYTES)
                except TimeoutError as error:
                    raise NoAnswer(
                        f"it has said nothing for {timeout:.0f} seconds; is it stopped? `kill -CONT` lets it go on"
                    ) from error
                except OSError as error:
                    raise ConnectionLost(f"the connection broke: {error.strerror}") from error
                if len(line) >= MAX_ANSWER_BYTES:
                    raise _strange(path, f"a line of more than {MAX_ANSWER_BYTES} bytes")
                if not line.endswith(b"\n"):
                    raise ConnectionLost("the connection ended")
                yield _read_event(line, path)


def _split_seconds(seconds: float) -> tuple[int, int]:
    """Return seconds and microseconds, one at least: nothing would mean no limit."""
    return divmod(max(1, round(seconds * 1e6)), 1_000_000)


def _read_event(line: bytes, path: str) -> Event:
    try:
        event = _printable(json.loads(line))
    except (RecursionError, ValueError) as error:
        raise _strange(path, "what it says is no JSON") from error
    match event:
        case {"event": "error", "message": str(message)}:
            code = Exit.PERMISSION if event.get("reason") == "permission" else Exit.FAILED
            raise CommandFailed(message, code, event)
        case {"event": str()}:
            found: Event = event
            return found
    raise _strange(path, "what it says is no event")


def _printable(value: Any) -> Any:
    """Return what a service has said without characters that would move a terminal's cursor, or rename its window."""
    match value:
        case str():
            return _CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found[0]):02x}", value)
        case dict():
            return {_printable(key): _printable(each) for key, each in value.items()}
        case list():
            return [_printable(each) for each in value]
    return value


def _open_pidfd(pid: int) -> int:
    """Watch the process that ends, where its number means the same here: not from outside of a container."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _wait_for_death(pidfd: int) -> bool:
    """Wait until a process is gone, so that the next start of the service finds everything free."""
    return pidfd >= 0 and bool(select.select([pidfd], [], [], EXIT_SECONDS)[0])
