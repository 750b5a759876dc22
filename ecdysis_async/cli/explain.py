"""``ecdysis explain``: what happened in the last restarts, and what a service that is stuck waits for."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ecdysis_async._explaining import page
from ecdysis_async._explaining.now import Wait, add_stacks, find_deaths, find_waits, is_alive
from ecdysis_async._explaining.records import Record, find_histories, read
from ecdysis_async._explaining.story import Story, tell_stories
from ecdysis_async._explaining.text import describe, describe_briefly, describe_now
from ecdysis_async._explaining.trace import make_trace
from ecdysis_async._management.control_path import default_directories, find_live, is_live
from ecdysis_async._system.history import SUFFIX
from ecdysis_async._system.stacks import ask_for_stacks

from . import client
from .client import CommandFailed
from .output import Exit, let_readers_leave

__all__ = ["explain"]

DESCRIPTION = """Explain a restart: who took part, what was said, where the time went, why it failed, what was lost.

Without an ID it is the last one, after what the service waits for at this moment, if it waits. The beginning of an ID
is enough. What is told was written down beside the control socket, so that it can be told after the service's death."""

CODES = """Exit codes: 0 explained; 2 usage, or there is no such restart; 3 no service has left anything there; 7 you
may not read it; 130 interrupted."""


def _explain(id: str | None, *, control: str | None, last: int, as_json: bool, **files: str | None) -> None:
    let_readers_leave()
    try:
        path = _find(control)
        records = _read(path)
        stories = tell_stories(records)
        for story in stories:
            if not story.is_over and is_alive(story.predecessor):
                story.go_on(time.monotonic())
        chosen = _choose(stories, id, path)
        status = _ask_status(path)
        waits = find_waits(records, stories, status) if id is None else []
        add_stacks(waits, ask_for_stacks)
        shown = chosen[-last:]
        if (html := files["html"]) is not None:
            Path(html).write_text(page.write(stories if id is None else shown, waits, path), encoding="utf-8")
        if (trace := files["trace"]) is not None:
            Path(trace).write_text(json.dumps(make_trace(stories if id is None else shown)), encoding="utf-8")
    except (CommandFailed, OSError) as error:
        _fail(error, as_json=as_json)
    if as_json:
        click.echo(json.dumps(page.describe(shown, waits, path)))
    else:
        _print(path, stories, shown, waits, status, find_deaths(records))


def _fail(error: CommandFailed | OSError, *, as_json: bool) -> None:
    code = error.code if isinstance(error, CommandFailed) else Exit.USAGE
    if as_json:
        click.echo(json.dumps({"event": "error", "message": str(error)}))
    else:
        click.echo(f"ecdysis: {error}", err=True)
    sys.exit(code)


def _find(control: str | None) -> str:
    """Return the path of the control socket that is meant; where nothing runs, of the only one that has a history.

    Raises:
        CommandFailed: there is none, or there are several.
    """
    if control is not None:
        return client.find(control)
    if live := find_live():
        return live[0] if len(live) == 1 else client.find(None)
    found = find_histories(default_directories())
    if not found:
        raise CommandFailed(
            "no service is running, and none has left its history in a default directory: name its control socket "
            "(--control PATH), if it has one",
            Exit.NO_SERVICE,
        )
    if len(found) > 1:
        choices = "\n".join(f"  --control {path}" for path in found)
        raise CommandFailed(
            f"no service is running, and several have left a history; choose one:\n{choices}", Exit.USAGE
        )
    return found[0]


def _read(path: str) -> list[Record]:
    try:
        return read(path)
    except FileNotFoundError as error:
        if is_live(path):
            # Nothing has happened yet, or it cannot be written down.
            return []
        raise CommandFailed(f"no service has the control socket {path}, or has had it", Exit.NO_SERVICE) from error
    except PermissionError as error:
        raise CommandFailed(
            f"{path}{SUFFIX} may not be read by uid {os.geteuid()}: ask as the service's user or root", Exit.PERMISSION
        ) from error


def _choose(stories: Sequence[Story], id: str | None, path: str) -> list[Story]:
    """Return the restarts that are asked for.

    Raises:
        CommandFailed: there is no restart of this id, or several begin so.
    """
    if id is None:
        return list(stories)
    found = [story for story in stories if story.id.startswith(id)]
    found = found or [part for story in stories for part in story.parts if part.id.startswith(id)]
    if not found:
        raise CommandFailed(
            f"{path} has no restart {id} in its history: see `ecdysis explain --last 100`, which lists all", Exit.USAGE
        )
    if len({story.id for story in found}) > 1:
        raise CommandFailed(
            f"several restarts begin with {id}: " + ", ".join(dict.fromkeys(story.id for story in found)), Exit.USAGE
        )
    return found


def _ask_status(path: str) -> dict[str, Any] | str | None:
    """Return what the service says of itself; a text where it does not answer, None where nobody is there."""
    if not is_live(path):
        return None
    try:
        return client.status(path, timeout=STATUS_SECONDS)
    except CommandFailed as error:
        return None if error.code is Exit.NO_SERVICE else str(error)


# How long a service gets to answer before its processes are asked where they stand, seconds.
STATUS_SECONDS = 3.0


def _print(
    path: str,
    stories: Sequence[Story],
    shown: Sequence[Story],
    waits: Sequence[Wait],
    status: dict[str, Any] | str | None,
    deaths: Sequence[str],
) -> None:
    def say(line: str) -> None:
        # Where no terminal shows it, click leaves the colours out (https://no-color.org for the variable).
        click.echo(line, color=False if os.environ.get("NO_COLOR") else None)

    if status is None:
        say(f"no service listens on {path} now; this is what the last one has left:")
        for line in deaths:
            say(line)
    for line in describe_now(waits):
        say(line)
    if not shown:
        has_restarted = isinstance(status, dict) and status.get("last_report") is not None
        say(f"{path}: {NO_HISTORY if has_restarted else 'no restart was asked for yet'}")
    earlier = [story for story in stories if story not in shown]
    if len(shown) > 1:
        for story in shown:
            say(describe_briefly(story))
        say("")
    elif earlier and len(stories) > 1 and shown and shown[-1] is stories[-1]:
        for story in earlier[-EARLIER:]:
            say(describe_briefly(story))
        say("")
    if shown:
        for line in describe(shown[-1]):
            say(line)


NO_HISTORY = (
    "its restarts were not written down: it runs an earlier release of this library, or may not write beside its "
    "control socket"
)

# How many restarts before the one that is explained are listed, a line each.
EARLIER = 5


explain = click.Command(
    "explain",
    callback=_explain,
    params=[
        click.Argument(["id"], required=False, metavar="[ID]"),
        click.Option(
            ["--control"],
            metavar="PATH",
            envvar="ECDYSIS_CONTROL",
            help="The service's control socket, or its bare name in the default directory; it need not be there any "
            "more. Found by itself where one runs, or one has run.",
        ),
        click.Option(
            ["--last"], type=click.IntRange(1), default=1, show_default=True, help="List so many restarts first."
        ),
        click.Option(["--html"], metavar="FILE", help="Write a page with a time line of each restart."),
        click.Option(["--trace"], metavar="FILE", help="Write a trace, for ui.perfetto.dev or chrome://tracing."),
        click.Option(["as_json", "--json"], is_flag=True, help="Print one JSON object instead, on stdout."),
    ],
    help=DESCRIPTION,
    short_help="Explain a restart: where the time went, why it failed, what it waits for.",
    epilog=CODES,
)
