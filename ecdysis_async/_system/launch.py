"""What is run: a command line, the complete environment, and the working directory.

By default this process is run again as it was started: its own command line, from the directory that it was started in,
with what its env file says now. Nothing is started here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ecdysis_async.errors import RestartError, RestartUnsupported

from .claims import PRIVATE_KEYS

__all__ = ["Launch", "describe_launch", "read_env_file"]


def _start_directory() -> str | None:
    try:
        physical = os.getcwd()
    # It was deleted before Python began; then every successor inherits it as it is.
    except FileNotFoundError:
        return None
    logical = os.environ.get("PWD", "")
    # The shell's view of it goes through symlinks, and so follows a `current` that moves to the next release.
    try:
        is_same = os.path.isabs(logical) and os.path.samefile(logical, physical)
    # PWD is only a variable: it may name what was never there.
    except OSError:
        is_same = False
    return logical if is_same else physical


# At import, since the application may change both later.
_START_DIRECTORY = _start_directory()
_SCRIPT = sys.argv[0] if sys.argv else ""


@dataclass(frozen=True, slots=True)
class Launch:
    """What is run as the successor.

    Attributes:
        arguments: the command line; the first one is the program.
        directory: the working directory, or None for the one this process is in.
        environment: the complete environment.
    """

    arguments: tuple[str, ...]
    directory: str | None
    environment: dict[str, str]


def describe_launch(
    command: Sequence[str] | None,
    environment: Mapping[str, str] | None,
    env_file: str | os.PathLike[str] | None,
    stale_keys: Collection[str] = (),
) -> tuple[Launch, tuple[str, ...]]:
    """Work out what to run as the successor. It reads files: call it in a thread.

    Args:
        command: the command line; None: the one that this process was started with.
        environment: the complete environment; None: the one of this process.
        env_file: a file of more variables, read afresh at each call; relative to where the service was started.
        stale_keys: variables that an earlier generation took from its env file. They are dropped from the environment
            of this process, so that what was removed from the file is gone. A value that such a variable had before
            there was the file is lost then: give ``environment`` where that one is to come back.

    Returns:
        What to run, and the names of the variables that came from the file.

    Raises:
        RestartUnsupported: this process cannot be run again as it was.
        RestartError: the env file cannot be read.
    """
    variables = dict(os.environ if environment is None else environment)
    # What was given explicitly is what was meant, whatever a file once said.
    for key in (*PRIVATE_KEYS, *(stale_keys if environment is None else ())):
        variables.pop(key, None)
    from_file = {} if env_file is None else read_env_file(env_file)
    variables |= from_file
    # Looked at afresh each time: it may have been deleted, and a restart works without it.
    directory = _START_DIRECTORY if _START_DIRECTORY and os.path.isdir(_START_DIRECTORY) else None
    if directory is not None:
        variables["PWD"] = directory
    arguments = _own_command() if command is None else tuple(command)
    if not arguments:
        raise RestartUnsupported("command= is empty: name a program in it", phase="start")
    return Launch(arguments, directory, variables), tuple(from_file)


def _own_command() -> tuple[str, ...]:
    """Return the command line of this process, with a program that can be found from anywhere."""
    program, *arguments = sys.orig_argv or [""]
    if getattr(sys, "frozen", False) or os.sep not in program:
        # What was found on the PATH of that time. Never resolved further: a symlink may have moved, and a virtual
        # environment is found by the name it was called by.
        program = sys.executable
    elif not os.path.isabs(program) and _START_DIRECTORY is not None:
        program = os.path.join(_START_DIRECTORY, program)
    if not program:
        raise RestartUnsupported("it is not known how this process was started: set command=", phase="start")
    if _SCRIPT in ("", "-"):
        raise RestartUnsupported(
            "this program was read from standard input, or typed in, and cannot be run again: put it into a file, "
            "or set command=",
            phase="start",
        )
    return program, *arguments


def read_env_file(env_file: str | os.PathLike[str]) -> dict[str, str]:
    """Return the variables of an env file; a relative path is meant from where this process was started.

    Raises:
        RestartError: it cannot be read, or the package that reads such files is not installed.
    """
    try:
        from dotenv import dotenv_values
    except ImportError as error:
        raise RestartError(
            "env_file= needs python-dotenv: pip install 'ecdysis_async[env-file]'", phase="start"
        ) from error
    path = os.path.join(_START_DIRECTORY or "", env_file)
    try:
        # Opened here, because dotenv takes a file that is not there for an empty one.
        with open(path, encoding="utf-8") as stream:
            values = dotenv_values(stream=stream, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise RestartError(f"the env file {path} cannot be read: {error}", phase="start") from error
    # A name without "=" has no value.
    return {key: value for key, value in values.items() if value is not None}
