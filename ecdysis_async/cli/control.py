"""The commands to a service that runs: what is asked of it, what is printed, and which exit code that is."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import click

from ecdysis_async.errors import STDERR_HEAD, STDERR_MARK
from ecdysis_async.report import RestartReport

from . import client
from .client import CommandFailed
from .commands import CODES
from .output import Exit, has_reader, let_readers_leave
from .progress import (
    Progress,
    describe_check,
    describe_outcome,
    describe_services,
    describe_status,
    find_missing,
    showing,
    watching,
)

__all__ = ["check_command", "reopen_logs", "restart", "status", "stop"]

P = ParamSpec("P")

# How often `status --watch` looks, seconds.
WATCH_SECONDS = 1.0

control_option = click.option(
    "--control",
    metavar="PATH",
    envvar="ECDYSIS_CONTROL",
    help="The service's control socket, or its bare name in the default directory; else ECDYSIS_CONTROL. Found by "
    "itself where one runs.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, on stdout.")


def failures_exit(function: Callable[P, None]) -> Callable[P, None]:
    """Let a command that fails print why, and exit by the code of it; with ``--json`` as JSON on stdout.

    The code tells of the service alone: it is the same where nobody reads what is printed.
    """

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> None:
        let_readers_leave()
        try:
            function(*args, **named)
        except CommandFailed as error:
            if named.get("as_json"):
                print_json(error.event or {"event": "error", "message": str(error)})
            else:
                click.echo(f"ecdysis: {_shorten(str(error)) if _is_reload() else error}", err=True)
            sys.exit(error.code)

    return run


@contextlib.contextmanager
def interruptible(what: str) -> Iterator[None]:
    """Say what becomes of it, where Ctrl-C ends the waiting."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\necdysis: {what} goes on without being watched: see `ecdysis status`", err=True)
        sys.exit(Exit.INTERRUPTED)


def _is_reload() -> bool:
    """Say whether this is ExecReload= of a unit of systemd, whose journal has what both the service and this write."""
    return "MAINPID" in os.environ and "INVOCATION_ID" in os.environ


def _shorten(text: str) -> str:
    """Return why something has failed, without what the new process has written to stderr, which was passed on."""
    lines = text.splitlines()
    return "\n".join(each for each in lines if each != STDERR_HEAD and not each.startswith(STDERR_MARK))


def end_as_reload() -> None:
    """As ExecReload= of a unit, end well when the unit is stopped: else it would be left as failed, by our signal."""
    if _is_reload():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))


def print_json(value: Any) -> None:
    """Print an object in a line of its own, at once."""
    click.echo(json.dumps(value))


@click.command(epilog=CODES)
@click.option(
    "--until",
    type=click.Choice(["serving", "settled", "drained"]),
    default="settled",
    show_default=True,
    help="How far to wait: until the new generation serves, until that is final, or until the old one's connections "
    "have ended.",
)
@click.option(
    "--anchor",
    is_flag=True,
    help="Upgrade the process in front of the workers in place, to the library that is installed now; they serve on.",
)
@click.option("--check", is_flag=True, help="First see whether the new release loads; if not, do not restart.")
@json_option
@control_option
@failures_exit
def restart(until: str, anchor: bool, check: bool, as_json: bool, control: str | None) -> None:  # noqa: FBT001 - click passes it by name
    """Restart the service, and wait for the outcome. Leaving earlier (Ctrl-C) does not call it off."""
    end_as_reload()
    path = client.find(control)
    if anchor:
        with interruptible("the upgrade"):
            found = client.upgrade(path, lambda event: None)
        if as_json:
            print_json({"event": "done", "status": found})
        else:
            moved = f"; its control socket is {found['control']} now" if "control" in found else ""
            click.echo(f"the anchor (pid {found['pid']}) is upgraded, and its workers serve on{moved}")
        for what, why in find_missing(found).items():
            click.echo(f"ecdysis: it goes on without {what}, which it tries again: {why}", err=True)
        return
    if check:
        try:
            checked = client.check(path)
        except CommandFailed as error:
            raise CommandFailed(f"{error}\nnothing was restarted", error.code, error.event) from error
        if as_json:
            print_json({"event": "checked", "comparison": checked})
        else:
            with client.understanding(path):
                click.echo(describe_check(checked))
    if as_json:
        with interruptible("the restart"):
            print_json(client.restart(path, until, lambda event: None))
        return
    with interruptible("the restart"), showing() as display:
        progress = Progress(display, path)
        event = client.restart(path, until, progress.show)
        progress.show(event)
    click.echo(describe_outcome(RestartReport.from_json(event["report"])))


@click.command(
    "check",
    short_help="See whether a release loads, and what a restart would change.",
    context_settings={"ignore_unknown_options": True},
    epilog="Exit codes: 0 the release passes; 1 it does not; 2 usage; 130 interrupted.",
)
@click.option("--timeout", type=float, default=60, show_default=True, help="Seconds that it may take.")
@json_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="TARGET [OPTIONS OF ecdysis run]")
@failures_exit
def check_command(arguments: tuple[str, ...], timeout: float, as_json: bool) -> None:  # noqa: FBT001 - as above
    """Load a release as `ecdysis run TARGET` would, without serving it, and tell what a restart would change.

    It is compared with the service that has its control socket, where that runs. The environment is the one of this
    command: `ecdysis restart --check` checks what the service itself would start, with the service's environment.
    """
    from . import check as preflight  # anyio, and what starts a process: nothing else here needs them

    if not 0 < timeout < math.inf:
        raise CommandFailed(f"--timeout: a number of seconds above 0 is needed, not {timeout:g}", Exit.USAGE)
    checked = preflight.check(arguments, timeout)
    if as_json:
        print_json({"event": "checked", "comparison": checked})
    else:
        click.echo(describe_check(checked))


@click.command(short_help="Stop the service, and wait until it has ended.")
@json_option
@control_option
@failures_exit
def stop(as_json: bool, control: str | None) -> None:  # noqa: FBT001 - click passes it by name
    """Stop the service, and wait until its newest generation has ended. Ctrl-C does not call it off."""
    path = client.find(control)
    if as_json:
        with interruptible("the stop"):
            client.stop(path, lambda event: None)
        print_json({"event": "done"})
        return
    with interruptible("the stop"), showing() as display:
        client.stop(path, Progress(display, path).show)
    click.echo("stopped")


@click.command(short_help="Show what serves, what restarts, and what still drains.")
@json_option
@click.option("--watch", is_flag=True, help="Look again each second, until Ctrl-C or the end of the service.")
@control_option
@failures_exit
def status(as_json: bool, watch: bool, control: str | None) -> None:  # noqa: FBT001 - click passes it by name
    """Show the generation that accepts: its connections, its sockets, its restart, and who still drains.

    Where several services run and none is chosen, all of them are shown in a table.
    """
    if control is None and not watch and len(paths := client.find_all()) > 1:
        _show_services(paths, as_json=as_json)
        return
    path = client.find(control)
    if not watch:
        found = client.status(path)
        if as_json:
            print_json(found)
        else:
            with client.understanding(path):
                click.echo(describe_status(found))
        return
    try:
        with watching() if not as_json else contextlib.nullcontext() as display:
            while has_reader():
                found = client.status(path)
                with client.understanding(path):
                    if display is None:
                        print_json(found)
                    else:
                        display.show(found)
                time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)


def _show_services(paths: list[str], *, as_json: bool) -> None:
    found: dict[str, dict[str, Any] | str] = {}
    for path in paths:
        try:
            found[path] = client.status(path)
        except CommandFailed as error:
            found[path] = str(error)
    if as_json:
        print_json({"services": found})
        return
    with client.understanding(", ".join(paths)):
        click.echo(describe_services(found))


@click.command("reopen-logs", short_help="Let the service open its log files anew, for logrotate.")
@json_option
@control_option
@failures_exit
def reopen_logs(as_json: bool, control: str | None) -> None:  # noqa: FBT001 - click passes it by name
    """Let the service open its log files anew, for logrotate; those that were not moved stay as they are."""
    event = client.reopen_logs(client.find(control))
    if as_json:
        print_json(event)
    else:
        click.echo("reopened 1 log file" if event["handlers"] == 1 else f"reopened {event['handlers']} log files")
