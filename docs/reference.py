"""Writes what can be looked up from the code that decides it: options, commands, exit codes, and reasons.

``python docs/reference.py`` writes the pages anew, between the markers that they have; a test holds them against the
code of today.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import click

from ecdysis_async._config.options import Option, Options, Shape, command_line_options
from ecdysis_async._management.ledger import Closed, Reason, WorkerRestart
from ecdysis_async.cli.client import ERRORS
from ecdysis_async.cli.commands import command
from ecdysis_async.cli.output import Exit
from ecdysis_async.report import RestartReport

HERE = Path(__file__).parent
WIDTH = 100

EXIT_MEANINGS = {
    Exit.DONE: "done: the new generation serves; the service has stopped; the release passes",
    Exit.FAILED: "the restart failed, and the old generation serves; the release does not pass",
    Exit.USAGE: "usage: an option or a file of options is wrong",
    Exit.NO_SERVICE: "there is no service, or nobody serves there any more; of `ecdysis run`: it could not start",
    Exit.IN_PROGRESS: "another restart is in progress",
    Exit.ROLLED_BACK: "the new generation had served, and failed on probation; the old one serves again",
    Exit.UNKNOWN: "what became of it is not known: the service went away before it told",
    Exit.PERMISSION: "this user may not command the service",
    Exit.INTERRUPTED: "Ctrl-C; what was asked goes on",
}

REASON_MEANINGS = {
    Reason.NONE: "it has succeeded",
    Reason.SPAWN_FAILED: "the new process could not be started at all: no such program, no permission, no memory",
    Reason.SUCCESSOR_FAILED: "the new process raised, or ended, before it was ready",
    Reason.READY_TIMEOUT: "it was not ready within `--ready-timeout`",
    Reason.STASH_FAILED: "what it should have inherited could not be made",
    Reason.DIED_ON_PROBATION: "it had served already, and died within `--probation`",
    Reason.CALLED_OFF: "the restart was called off",
    Reason.STOPPED: "the service was stopped meanwhile",
    Reason.OTHER: "anything else: the log has the text",
}

CLOSED_MEANINGS = {
    Closed.ENDED: "by themselves, while their generation served",
    Closed.DRAINED: "by themselves, while their generation drained",
    Closed.SILENT: "idle at the end of the drain, and closed at a safe point",
    Closed.TRANSFERRED: "passed on to the new process, alive",
    Closed.CUT: "still busy at the deadline",
    Closed.LOST: "with a process that died, or was killed",
}

WORKER_MEANINGS = {
    WorkerRestart.CRASHED: "it ended by a signal or with an error",
    WorkerRestart.HUNG: "its loop stood still for longer than `--hang-timeout`",
    WorkerRestart.LEFT: "it left of its own accord",
    WorkerRestart.NOT_STARTED: "it did not get ready",
    WorkerRestart.MAX_REQUESTS: "`--max-requests`",
    WorkerRestart.MAX_RSS: "`--max-rss`",
}


def write_options() -> str:
    """Write the table of the options of ``ecdysis run``."""
    lines = ["| option | variable | default | what it does |", "|---|---|---|---|"]
    for option in command_line_options():
        names = [f"--{option.key}", *option.aliases]
        variables = ", ".join(f"`{name}`" for name in option.all_variables)
        metavar = "" if option.shape is Shape.SWITCH else f" `{option.metavar}`"
        lines.append(
            f"| {', '.join(f'`{name}`' for name in names)}{metavar} | {variables} | {_describe_default(option)} "
            f"| {_escape(option.help)} |"
        )
    return "\n".join(lines)


def _describe_default(option: Option) -> str:
    if option.name not in Options.__dataclass_fields__:
        return ""
    default = Options.__dataclass_fields__[option.name].default
    if option.name == "bind":
        return "`127.0.0.1:8000`"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int | float):
        return f"`{default:g}`"
    return f"`{default}`" if isinstance(default, str) and default else ""


def _escape(text: str) -> str:
    """Return text that Markdown leaves as it is."""
    return re.sub(r"([*_\[\]|<])", r"\\\1", text)


def write_commands() -> str:
    """Write what each command says of itself with ``--help``; the options of ``run`` stand in a table of their own."""
    context = click.Context(command, info_name="ecdysis")
    parts = []
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        own = click.Context(found, parent=context, info_name=name, max_content_width=WIDTH, terminal_width=WIDTH)
        text = found.get_help(own)
        if name == "run":
            text = re.sub(r"\nOptions:\n.*?\n(?=\n)", "\nOptions: see the table above.\n", text, flags=re.DOTALL)
        parts.append(f"### `ecdysis {name}`\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def write_exit_codes() -> str:
    """Write the table of exit codes, and of the errors that lead to them."""
    lines = ["| code | meaning | error of the service |", "|---|---|---|"]
    for code in Exit:
        errors = ", ".join(f"`{name}`" for name, leads_to in ERRORS.items() if leads_to is code)
        lines.append(f"| {code.value} | {EXIT_MEANINGS[code]} | {errors} |")
    return "\n".join(lines)


def write_reasons() -> str:
    """Write the tables of reasons: of restarts, of closed connections and of workers that were started anew."""
    tables = (
        ("Why a restart has not succeeded", Reason, REASON_MEANINGS),
        ("How connections have ended", Closed, CLOSED_MEANINGS),
        ("Why a worker was started anew, outside of restarts", WorkerRestart, WORKER_MEANINGS),
    )
    parts = []
    for title, reasons, meanings in tables:
        rows = "\n".join(f"| `{each.value}` | {meanings[each]} |" for each in reasons)  # type: ignore[index]
        parts.append(f"### {title}\n\n| reason | meaning |\n|---|---|\n{rows}")
    return "\n\n".join(parts)


def write_report() -> str:
    """Write the table of what a report has, from the docstring that says it."""
    _, _, attributes = (inspect.getdoc(RestartReport) or "").partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", attributes, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == [each.name for each in dataclasses.fields(RestartReport)]
    rows = [f"| `{name}` | {_escape(' '.join(text.replace('``', '`').split()))} |" for name, text in found]
    return "\n".join(["| key | meaning |", "|---|---|", *rows])


PAGES = {
    "command.md": {"options": write_options, "commands": write_commands},
    "json.md": {"report": write_report},
    "exit-codes.md": {"exit codes": write_exit_codes, "reasons": write_reasons},
}


def put_into(name: str, page: str) -> str:
    """Return a page with its generated parts replaced by current ones.

    Raises:
        ValueError: the page has no place for one of them.
    """
    for part, write in PAGES[name].items():
        begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{name} needs exactly one pair of markers for {part}")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{write()}\n\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    for name in PAGES:
        (HERE / name).write_text(put_into(name, (HERE / name).read_text()))
