"""``ecdysis prove``: the options in click, and what is printed of a verdict."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ecdysis_async._proving.plan import (
    Plan,
    PlanError,
    Shape,
    Url,
    check_extra,
    mix_requests,
    order_steps,
    read_requests,
)

from .client import CommandFailed, find
from .output import Exit, let_readers_leave

__all__ = ["prove"]

DESCRIPTION = """Restart a service under load, again and again, and say whether anything was lost.

TARGET is what `ecdysis run` serves: it is started here, on a port of its own, and options that are not listed below are
those of `ecdysis run`. One release is broken on purpose, one successor and one predecessor are killed.

Instead of a TARGET, --control proves a service that runs already, and --command any other one, by --restart-command."""

CODES = """Exit codes: 0 nothing was lost; 1 something was, or a restart had the wrong outcome; 2 usage, or there is no
service to be proved; 130 interrupted."""


def _prove(arguments: tuple[str, ...], *, as_json: bool, html: str | None, **given: Any) -> None:
    let_readers_leave()
    try:
        plan = _make_plan(arguments, given)
        for path in (html, plan.log):
            if path is not None:
                _require_writable(path)
        check_extra()
        from ecdysis_async._proving import campaign, page
        from ecdysis_async._proving.service import ServiceFailed

        try:
            verdict = campaign.prove(plan, lambda line: click.echo(line, err=as_json))
        except ServiceFailed as error:
            raise PlanError(str(error)) from error
    except (PlanError, CommandFailed, OSError) as error:
        _fail(str(error), as_json=as_json)
    except KeyboardInterrupt:
        click.echo("\necdysis: interrupted: nothing is proved", err=True)
        sys.exit(Exit.INTERRUPTED)
    if as_json:
        click.echo(json.dumps(verdict.to_json()))
    else:
        click.echo(str(verdict))
    if html is not None:
        try:
            Path(html).write_text(page.write(verdict, _name_subject(plan)), encoding="utf-8")
        except OSError as error:
            # The disk is full, say. The verdict stands all the same.
            click.echo(f"ecdysis: there is no page: {error}", err=True)
    sys.exit(Exit.DONE if verdict.is_good else Exit.FAILED)


def _require_writable(path: str) -> None:
    """See that a file can be written, before minutes are spent on what is to be in it.

    Raises:
        PlanError: it cannot.
    """
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise PlanError(f"{path} is a directory: name a file in it")
    if not os.path.isdir(directory):
        raise PlanError(f"{path} cannot be written: there is no directory {directory}")
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
        raise PlanError(f"{path} cannot be written by uid {os.geteuid()}")


def _split(option: str, words: str | None) -> tuple[str, ...]:
    """Take a command line apart as a shell would.

    Raises:
        PlanError: a quotation does not end.
    """
    try:
        return tuple(shlex.split(words or ""))
    except ValueError as error:
        raise PlanError(f"{option} {words}: {error}") from None


def _name_subject(plan: Plan) -> str:
    return shlex.join([plan.target, *plan.run_options] if plan.target else plan.command) or str(
        plan.control or plan.url
    )


def _fail(message: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"verdict": "none", "message": message}))
    else:
        click.echo(f"ecdysis: {message}", err=True)
    sys.exit(Exit.USAGE)


def _make_plan(arguments: tuple[str, ...], given: dict[str, Any]) -> Plan:
    """Make a plan of what was typed.

    Raises:
        PlanError, CommandFailed, OSError: it cannot be carried out.
    """
    target, *options = arguments or ("",)
    if target.startswith("-"):
        raise PlanError(f"{target}: there is no such option of `ecdysis prove`; those of `ecdysis run` follow a TARGET")
    control, command, restart_command = given["control"], given["command"], given["restart_command"]
    is_own = bool(target) and not control and not command
    if not (target or control or command or restart_command):
        control = find(None)
    steps = order_steps(
        given["restarts"],
        broken=is_own and given["broken"],
        successor=is_own and given["kill_successor"],
        predecessor=is_own and given["kill_predecessor"],
    )
    return Plan(
        requests=_make_requests(given),
        steps=steps,
        target=target or None,
        run_options=tuple(options),
        control=find(control) if control is not None else None,
        command=_split("--command", command),
        restart_command=_split("--restart-command", restart_command),
        url=Url.parse(given["url"]) if given["url"] is not None else None,
        identify_by=given["identify_by"],
        between=given["between"],
        patience=given["patience"],
        max_slowdown=given["max_slowdown"],
        log=given["log"],
    )


def _make_requests(given: dict[str, Any]) -> tuple[Shape, ...]:
    if given["requests"] is not None:
        try:
            return read_requests(Path(given["requests"]).read_text(encoding="utf-8"), given["requests"])
        except UnicodeDecodeError as error:
            raise PlanError(f"--requests {given['requests']}: this is no TOML file: {error}") from None
    if given["connections"] < 1:
        raise PlanError(f"--connections {given['connections']}: at least one is needed")
    path = Url.parse(given["url"]).path if given["url"] is not None else "/"
    headers = []
    for line in given["header"]:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise PlanError(f"--header {line!r}: write NAME: VALUE")
        headers.append((name.strip(), value.strip()))
    return mix_requests(
        given["path"] or (path,),
        rate=given["rate"],
        connections=given["connections"],
        upload_path=given["upload_path"],
        websocket_path=given["websocket_path"],
        header=headers,
    )


def _fault(name: str, what: str) -> click.Option:
    return click.Option([f"--{name}/--no-{name}"], default=True, help=f"{what} [default: on, with a TARGET]")


prove = click.Command(
    "prove",
    callback=_prove,
    context_settings={"ignore_unknown_options": True},
    params=[
        click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED, metavar="[TARGET [OPTIONS OF ecdysis run]]"),
        click.Option(["--control"], metavar="PATH", help="Prove the service with this control socket."),
        click.Option(["--command"], metavar="COMMAND", help="Prove what this starts."),
        click.Option(
            ["--restart-command"],
            metavar="COMMAND",
            help="How that is restarted, such as 'kill -HUP {pid}': {pid} is the process of --command.",
        ),
        click.Option(["--url"], metavar="URL", help="Where it listens, on loopback. [default: as the service says]"),
        click.Option(["--restarts"], type=click.IntRange(0, 1000), default=3, show_default=True, help="How often."),
        _fault("broken", "A release that cannot start."),
        _fault("kill-successor", "Kill a new process while it starts."),
        _fault("kill-predecessor", "Kill the old process while the new one starts."),
        click.Option(["--path"], multiple=True, metavar="PATH", help="What to ask for; several times for several."),
        click.Option(
            ["--rate"], type=float, default=60, show_default=True, help="Requests a second, of all kinds together."
        ),
        click.Option(["--connections"], type=int, default=10, show_default=True, help="How many are kept alive."),
        click.Option(["--upload-path"], metavar="PATH", help="Where to POST 64 kB. [default: PATH, if it takes them]"),
        click.Option(
            ["--websocket-path"], metavar="PATH", help="Where WebSockets are. [default: PATH, if it has them]"
        ),
        click.Option(["--header"], multiple=True, metavar="NAME:VALUE", help="Goes with each request."),
        click.Option(["--requests"], metavar="FILE", help="A TOML file of requests, instead of these options."),
        click.Option(
            ["--identify-by"],
            metavar="HEADER",
            help="A header by which the application names the process, or the release, that has answered.",
        ),
        click.Option(
            ["--between"], type=float, default=2, show_default=True, help="Seconds without a restart before each."
        ),
        click.Option(
            ["--patience"],
            type=float,
            default=10,
            show_default=True,
            help="Seconds after which an answer is late, which is told; after six times as many, it is lost.",
        ),
        click.Option(
            ["--max-slowdown"],
            type=float,
            default=2,
            show_default=True,
            help="How many times slower than the first generation a later one may answer.",
        ),
        click.Option(["as_json", "--json"], is_flag=True, help="Print the verdict as one JSON object, on stdout."),
        click.Option(["--log"], metavar="FILE", help="Where what the service writes goes, if it is started here."),
        click.Option(["--html"], metavar="FILE", help="Write the verdict as a page, with a time line."),
    ],
    help=DESCRIPTION,
    short_help="Restart a service under load, and say whether anything was lost.",
    epilog=CODES,
)
