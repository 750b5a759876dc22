"""``ecdysis run``: the options in click, and who serves."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

import click

from ecdysis_async._config.foreign import FOREIGN, Foreign, translate
from ecdysis_async._config.gather import gather
from ecdysis_async._config.options import Option, OptionError, Options, Shape, command_line_options
from ecdysis_async._system.claims import ANCHOR_MARKER, is_check, is_worker
from ecdysis_async._system.descriptors import occupy_standard_descriptors
from ecdysis_async._system.garbage import without_collections

from .output import Exit

__all__ = ["run"]

OTHERS = """Options of uvicorn, gunicorn and hypercorn (-k, --timeout-keep-alive, --ws, --lifespan …) are applied where
they mean something here; the others are answered with what to do instead."""

CODES = """Exit codes: 0 the service was stopped; 2 usage; 3 it could not start."""

SOURCES = """Each option may also be a variable (--drain-timeout is ECDYSIS_DRAIN_TIMEOUT), or stand in the file of
--config (drain-timeout = 10). The command line goes before the environment, and that before the file."""


def serve(options: Options) -> int:
    """Serve until the service ends; return the exit code.

    This is the one place where it is decided which part of the service this process is.
    """
    occupy_standard_descriptors()
    # Imported here: none needs the others, and the anchor shall stay small.
    if is_check():
        with without_collections():
            from . import worker
        return worker.check(options)
    if is_worker():
        with without_collections():
            from . import worker
        return worker.run(options)
    with without_collections():
        from . import anchor as start
    return start.run(options)


def _run(**given: Any) -> None:
    """Serve TARGET, restartable without losing a connection.

    TARGET is MODULE:ATTRIBUTE: an ASGI application, an aiohttp application, or an `async def main(ecdysis)`.
    `ecdysis restart`, SIGHUP and SIGUSR2 restart it without losing a connection; SIGTERM
    and Ctrl-C stop it, and a second one hurries.
    """
    try:
        options = _find_tried() or gather(translate(given), os.environ)
    except OptionError as error:
        click.echo(f"ecdysis: {error}", err=True)
        sys.exit(Exit.USAGE)
    sys.exit(serve(options))


def _find_tried() -> Options | None:
    """Return the options that new code of an anchor was tried with: their files may have changed since, or be gone."""
    if ANCHOR_MARKER not in os.environ:
        return None
    from . import anchor as start

    return start.find_tried_options()


def _parameter(option: Option, defaults: Mapping[str, Any]) -> click.Option:
    names = [f"--{option.key}", *option.aliases]
    if option.shape is Shape.SWITCH:
        names[0] += f"/--no-{option.key}"
    return click.Option(
        [option.name, *names],
        # None, and not the default itself: what is not said here, the environment or the file may say.
        default=None,
        type=bool if option.shape is Shape.SWITCH else str,
        is_flag=option.shape is Shape.SWITCH,
        multiple=option.shape is Shape.MANY,
        metavar=None if option.shape is Shape.SWITCH else option.metavar,
        help=option.help + _describe_default(defaults.get(option.name)),
    )


def _foreign_parameter(option: Foreign) -> click.Option:
    is_switch = option.shape is Shape.SWITCH
    return click.Option(
        [option.parameter, *option.flags],
        default=None,
        type=bool if is_switch else str,
        is_flag=is_switch,
        hidden=True,
    )


def _describe_default(value: Any) -> str:
    match value:
        case None | "" | False | () | dataclasses.MISSING:
            return ""
        case True:
            return " [default: on]"
        case tuple():
            return f" [default: {', '.join(map(str, value))}]"
        case float():
            return f" [default: {value:g}]"
        case str() | int():
            return f" [default: {value}]"
    return ""


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}

run = click.Command(
    "run",
    callback=_run,
    params=[
        click.Argument(["target"], required=False),
        *(_parameter(option, _DEFAULTS) for option in command_line_options()),
        *(_foreign_parameter(option) for option in FOREIGN if option.flags),
    ],
    help=_run.__doc__,
    short_help="Serve an application, restartable without losing a connection.",
    epilog=f"{SOURCES}\n\n{OTHERS}\n\n{CODES}",
)
