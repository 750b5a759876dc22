"""The command line in click: which commands there are, and what becomes of Ctrl-C.

Each command is loaded where it is asked for: `ecdysis run` needs nothing of those that ask a service, nor they of it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from ecdysis_async._system.garbage import without_collections

from .output import Exit

__all__ = ["CODES", "command"]

CODES = """Exit codes: 0 the new generation serves; 1 it failed and the old one serves; 2 usage; 3 no service there, or
nobody serves; 4 a restart is in progress; 5 rolled back; 6 the outcome is unknown; 7 you may not; 130 interrupted, and
the service goes on. A reader that leaves (`| head -1`) or a closed stdout changes none of them."""


# The module of each command, and what it is called there.
COMMANDS = {
    "check": ("control", "check_command"),
    "explain": ("explain", "explain"),
    "prove": ("prove", "prove"),
    "reopen-logs": ("control", "reopen_logs"),
    "restart": ("control", "restart"),
    "run": ("run", "run"),
    "status": ("control", "status"),
    "stop": ("control", "stop"),
    "unit": ("unit", "unit"),
}


class _Commands(click.Group):
    """Loads a command when it is asked for: one of them loads half of the service."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name]
        try:
            with without_collections():
                found: click.Command = getattr(importlib.import_module(f".{module}", __package__), name)
        except KeyboardInterrupt:
            # In the middle of the imports, as in `main`.
            sys.exit(Exit.INTERRUPTED)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # click would end with 1, which is a verdict here.
            click.echo("\necdysis: interrupted", err=True)
            sys.exit(Exit.INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=CODES)
@click.version_option(package_name="ecdysis_async")
def command() -> None:
    """Run a service and restart it without refusing or losing a connection; stop it, and see how it is."""
