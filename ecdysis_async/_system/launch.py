"""What is run: a command line, the complete environment, and the working directory.

By default this process is run again as it was started: its own command line, from the directory that it was started in,
with what its env file says now. Nothing is started here.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ecdysis_async.errors import RestartError, RestartUnsupported

from .claims import PRIVATE_KEYS

__all__ = [
    "TRAMPOLINE",
    "UNFOLLOWED",
    "Launch",
    "describe_following",
    "describe_launch",
    "find_following",
    "find_from_start",
    "find_start_link",
    "find_unfollowed_link",
    "follow_link",
    "leave_debugger",
    "look_up_links",
    "read_env_file",
    "read_first_lines",
]


# AT_EXECFN of getauxval(3): the address of the path that was given to execve(2).
EXECUTED_FILE = 31

# How many words an interpreter may have before its program, such as -X and -W with their values.
MAX_INTERPRETER_WORDS = 10

# The longest path, PATH_MAX of limits.h.
MAX_PATH = 4096

# What the log says of a link that leads to where a service was started, and by which nobody has said to go.
UNFOLLOWED = (
    "the link %s leads to the directory in which this service was started, and is not followed when it moves: neither "
    "PWD nor the command line goes through it. Start the service by an absolute path through the link, or set PWD"
)

# How many entries of a directory are looked at for links, and how many directories above where a service was started.
MAX_ENTRIES = 1000
MAX_LEVELS = 3

# Variables in which a file says where it is that unpacks itself into a cache, and executes itself anew out of there, in
# the order of what was written by hand: the path as it was called, what a shell has called (bash(1)), and where it is
# without links (PEX).
SELF_KEYS = ("__PEX_EXE__", "_", "PEX")
# How the variables begin by which such a file tells itself that it was executed anew.
SELF_PREFIXES = ("PEX", "_PEX_", "__PEX_")
# Variables of its user that begin so as well.
SELF_SETTINGS = "PEX_"
# Where it keeps PYTHONPATH meanwhile.
SELF_PYTHON_PATH = "_PEX_PYTHONPATH"

# How the second line begins of a script whose interpreter has a path too long for its first line, as pip and uv write
# it: a shell executes the interpreter, which takes this line for a string.
TRAMPOLINE = b"'''exec' "


def _read_given_environment() -> dict[str, str]:
    """Return the variables that this process was started with, whatever the application has made of them since."""
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = [entry.partition(b"=") for entry in file.read().split(b"\0") if entry]
    # A process that has changed its user may not read it.
    except OSError:
        entries = []
    # A title of the process (setproctitle) overwrites what stands there.
    if not entries or not all(separator for _, separator, _ in entries):
        return dict(os.environ)
    # Python takes the first one of two, as getenv(3) does.
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in reversed(entries)}


def _read_executed_file() -> str:
    """Return the path that this process was executed by, as it was written; of a script it is the script's.

    It is empty where the kernel does not tell.
    """
    try:
        with open("/proc/self/auxv", "rb") as file:
            addresses = dict(struct.iter_unpack("@NN", file.read()))
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(addresses[EXECUTED_FILE])
            return os.fsdecode(memory.read(MAX_PATH).partition(b"\0")[0])
    except (OSError, KeyError, ValueError, struct.error):
        return ""


def _find_self_executing_file(given: Mapping[str, str]) -> str | None:
    """Return the file that has executed itself anew as this process, out of a cache; None where there is none.

    The command line names the cache then, which the next release's file does not use. It is known by a variable of its
    own, which children of such a process inherit, and by the name that it has given to this program.
    """
    if "PEX" not in given or not sys.argv or not _is_same(given["PEX"], sys.argv[0]):
        return None
    # A shell that was called by that name, or a `python app.pex`, leaves the path in the command line.
    if any(_is_same(given["PEX"], word) for word in sys.orig_argv):
        return None
    names = (given.get(key, "") for key in SELF_KEYS)
    return next(os.path.normpath(each) for each in names if os.path.isabs(each) and _is_same(each, given["PEX"]))


def _find_own_interpreter(path: str) -> list[str]:
    """Return by what a self-executing file is run that is not executable: this interpreter, outside the cache."""
    return [] if os.access(path, os.X_OK) else [os.path.realpath(sys.executable)]


def _forget_execution(given: Mapping[str, str]) -> dict[str, str]:
    """Return an environment as it was before a file has executed itself anew."""
    kept = {
        name: value
        for name, value in given.items()
        if not name.startswith(SELF_PREFIXES) or name.startswith(SELF_SETTINGS)
    }
    if SELF_PYTHON_PATH in given:
        kept["PYTHONPATH"] = given[SELF_PYTHON_PATH]
    return kept


def _read_words_of_uv(given: Mapping[str, str]) -> list[str]:
    """Return what was written where `uv run` has started this process, which it hands no path through links.

    It goes into a directory of its options by itself, and does not set PWD.
    """
    if "UV_RUN_RECURSION_DEPTH" not in given:
        return []
    words = [given.get(name, "") for name in ("UV_WORKING_DIR", "UV_WORKING_DIRECTORY", "UV_PROJECT")]
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            words += os.fsdecode(file.read()).split("\0")
    # It has another user.
    except OSError:
        pass
    return words


def _find_start_directory(given: Mapping[str, str], executed: str, itself: str | None) -> tuple[str | None, str | None]:
    """Return the directory that this process was started in: as it was written, and without links."""
    try:
        physical = os.getcwd()
    # It was deleted before Python began; then every successor inherits it as it is.
    except FileNotFoundError:
        return None, None
    # The shell's view of it goes through symlinks, and so follows a `current` that moves to the next release.
    logical = given.get("PWD", "")
    # PWD is only a variable: it may name what was never there.
    if logical != physical and os.path.isabs(logical) and _is_same(logical, physical):
        return logical, physical
    # A parent without a shell (cwd= of subprocess, systemd) sets no PWD. What else was written may
    # tell: the path of the program, or of an argument, goes through the same link.
    words = [itself or "", executed, *sys.orig_argv, given.get("VIRTUAL_ENV", ""), *_read_words_of_uv(given)]
    for word in words:
        path = word.rpartition("=")[2]
        if os.path.isabs(path) and (found := _find_through(path, physical)) is not None:
            return found, physical
    return physical, physical


def _find_through(path: str, physical: str) -> str | None:
    """Return a directory's name by way of a link that a path goes through; None where the path does not lead there."""
    prefix = os.path.join(path, "")
    while (prefix := os.path.dirname(prefix)) != os.sep:
        real = os.path.realpath(prefix)
        if real != prefix and f"{physical}{os.sep}".startswith(f"{real}{os.sep}"):
            return prefix + physical.removeprefix(real)
    return None


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _find_link(logical: str | None, physical: str | None) -> tuple[str, str] | None:
    """Return where the link leads that the start directory goes through, and the link; None where there is none."""
    if logical is None or physical is None or logical == physical:
        return None
    while os.path.basename(logical) == os.path.basename(physical):
        above = os.path.dirname(logical), os.path.dirname(physical)
        if not _is_same(*above):
            break
        logical, physical = above
    return physical, logical


def _find_script(directory: str | None, executed: str) -> list[str] | None:
    """Return the command line from the script on that was executed; None where the interpreter itself was.

    A console script is executed again as such. The kernel has put the interpreter of that time in front of it, which is
    the interpreter of an environment that a link has led to. The script of the next release names its own.
    """
    # The kernel passes at most one argument of the first line.
    for index, word in enumerate(sys.orig_argv[1:3], 1):
        path = os.path.join(directory or "", word)
        if os.sep in word and os.path.isfile(path) and os.access(path, os.X_OK):
            return (
                [word, *sys.orig_argv[index + 1 :]]
                if _is_executed(word, path, sys.orig_argv[:index], directory, executed)
                else None
            )
    return None


def _is_executed(word: str, path: str, before: Sequence[str], directory: str | None, executed: str) -> bool:
    """Say whether a script was executed itself, and its interpreter by the script's first lines.

    Args:
        word: the script, as it was written.
        path: where it is.
        before: what stands before it in the command line.
        directory: where this process was started.
        executed: the path that this process was executed by; empty where that is not known.
    """
    first, second = read_first_lines(path)
    if not first.startswith(b"#!"):
        return False
    if second.startswith(TRAMPOLINE):
        # A console script stands next to its interpreter.
        return _is_same(*(os.path.dirname(os.path.join(directory or "", each)) for each in (path, before[0])))
    return word == executed if executed else first[2:].split(None, 1) == [os.fsencode(each) for each in before]


def leave_debugger(command: Sequence[str]) -> list[str]:
    """Return a command line without debugpy in front, which has its port already, and attaches to children by itself.

    Args:
        command: with the interpreter as its first word, as `python -m debugpy --listen 5678 -m app`.
    """
    words = list(command)
    for index, word in enumerate(words[1:MAX_INTERPRETER_WORDS], 1):
        is_module = word == "debugpy" and words[index - 1] == "-m"
        if not is_module and not (os.path.basename(word) == "debugpy" and os.path.isdir(word)):
            continue
        rest = range(index + 1, len(words))
        # Its own options, some with a value, come before what it debugs.
        begin = next((each for each in rest if words[each] in ("-m", "-c") or words[each].endswith(".py")), None)
        return [*words[: index - is_module], *words[begin:]] if begin is not None else words
    return words


def read_first_lines(path: str) -> tuple[bytes, bytes]:
    """Return the first two lines of a file; they are empty where it has none, or may not be read."""
    try:
        with open(path, "rb") as file:
            return file.readline(MAX_PATH).rstrip(), file.readline(MAX_PATH).rstrip()
    except OSError:
        return b"", b""


# At import, since the application may change all of it later.
_GIVEN = _read_given_environment()
_EXECUTED = _read_executed_file()
_ITSELF = _find_self_executing_file(_GIVEN)
_START_DIRECTORY, _PHYSICAL_DIRECTORY = _find_start_directory(_GIVEN, _EXECUTED, _ITSELF)
_LINK = _find_link(_START_DIRECTORY, _PHYSICAL_DIRECTORY)
_SCRIPT = sys.argv[0] if sys.argv else ""
# Now that it is there: the release of which it is may be pruned before the restart.
if _ITSELF is not None:
    _GIVEN = _forget_execution(_GIVEN)
    _COMMAND = [*_find_own_interpreter(_ITSELF), _ITSELF, *sys.argv[1:]]
else:
    # An application may change the list later.
    _COMMAND = [*(_find_script(_START_DIRECTORY, _EXECUTED) or leave_debugger(sys.orig_argv) or [""])]


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

    def pin(self) -> Launch:
        """Return what starts the same release again once links have moved: each path by way of where links lead now.

        It reads links: call it in a thread. The last part of a path stays as it is where it is a file: a virtual
        environment is found by the name that its interpreter was called by.
        """
        directory = os.path.realpath(self.directory) if self.directory is not None else None
        program, *arguments = self.arguments
        arguments = [_pin_argument(each) for each in arguments]
        if os.sep in program:
            path = os.path.join(directory or "", program)
            arguments = [*_find_interpreter(path), _pin(path), *arguments]
        else:
            arguments = [program, *arguments]
        environment = dict(self.environment)
        for name in ("PATH", "VIRTUAL_ENV", "PYTHONPATH", "PWD"):
            if name in environment:
                environment[name] = os.pathsep.join(map(_pin, environment[name].split(os.pathsep)))
        return Launch(tuple(arguments), directory, environment)


def _pin(path: str) -> str:
    """Return an absolute path as it leads now, without links in it; another text as it is."""
    if not os.path.isabs(path):
        return path
    if os.path.isdir(path):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _pin_argument(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{_pin(value)}"


def _find_interpreter(script: str) -> list[str]:
    """Return what the kernel puts before a script, as it leads now; nothing for what it executes itself.

    The first line of a script may name the interpreter by way of a link, also where the script itself is found without.
    """
    first, second = read_first_lines(script)
    if not first.startswith(b"#!"):
        return []
    if second.startswith(TRAMPOLINE):
        first = b"#!" + second.removeprefix(TRAMPOLINE).split()[0].strip(b'"')
    return [_pin(os.fsdecode(word)) for word in first[2:].strip().split(None, 1)]


def describe_launch(
    command: Sequence[str] | None,
    environment: Mapping[str, str] | None,
    env_file: str | os.PathLike[str] | None,
    stale_keys: Collection[str] = (),
    *,
    is_bound_to_directory: bool = False,
) -> tuple[Launch, tuple[str, ...]]:
    """Work out what to run as the successor. It reads files: call it in a thread.

    Args:
        command: the command line; None: the one that this process was started with.
        environment: the complete environment; None: the one that this process was given, without what the
            application has made of it.
        env_file: a file of more variables, read afresh at each call; relative to where the service was started.
        stale_keys: variables that an earlier generation took from its env file. They are dropped from the environment
            of this process, so that what was removed from the file is gone. A value that such a variable had before
            there was the file is lost then: give ``environment`` where that one is to come back.
        is_bound_to_directory: whether the program, unless ``command`` says another one, is found from the start
            directory, and cannot be run where that is gone.

    Returns:
        What to run, and the names of the variables that came from the file.

    Raises:
        RestartUnsupported: this process cannot be run again as it was.
        RestartError: the env file cannot be read.
    """
    variables = _follow_all(_GIVEN) if environment is None else dict(environment)
    # What was given explicitly is what was meant, whatever a file once said.
    for key in (*PRIVATE_KEYS, *(stale_keys if environment is None else ())):
        variables.pop(key, None)
    from_file = {} if env_file is None else read_env_file(env_file)
    variables |= from_file
    # Looked at afresh each time: it may have been deleted, and a restart works without it.
    directory = _START_DIRECTORY if _START_DIRECTORY and os.path.isdir(_START_DIRECTORY) else None
    if directory is not None:
        variables["PWD"] = directory
    elif is_bound_to_directory and command is None and _START_DIRECTORY is not None:
        raise RestartError(
            f"the directory {_START_DIRECTORY}, in which the service was started, is gone: put it back, or start the "
            "service through a link that stays, or with --command",
            phase="start",
        )
    arguments = _own_command() if command is None else tuple(command)
    if not arguments:
        raise RestartUnsupported("command= is empty: name a program in it", phase="start")
    return Launch(arguments, directory, variables), tuple(from_file)


def _own_command() -> tuple[str, ...]:
    """Return the command line of this process, with a program that can be found from anywhere."""
    program, *arguments = _COMMAND
    if getattr(sys, "frozen", False) or os.sep not in program:
        # What was found on the PATH of that time. Never resolved further: a symlink may have moved, and a virtual
        # environment is found by the name it was called by.
        program = sys.executable
    elif _START_DIRECTORY is not None:
        program = _leave_parents(os.path.join(_START_DIRECTORY, program))
    program = follow_link(program)
    if not program:
        raise RestartUnsupported("it is not known how this process was started: set command=", phase="start")
    if _SCRIPT in ("", "-"):
        raise RestartUnsupported(
            "this program was read from standard input, or typed in, and cannot be run again: put it into a file, "
            "or set command=",
            phase="start",
        )
    return program, *arguments


def _leave_parents(path: str) -> str:
    """Return a path without `..` in it, which leads from where a link leads now.

    An interpreter finds its environment by its path, and takes `current/..` for the directory in which the link lies.
    """
    before, parents, after = path.rpartition(f"{os.sep}..{os.sep}")
    return os.path.join(os.path.realpath(f"{before}{parents}"), after) if parents else path


def find_following(command: Sequence[str] | None) -> Launch:
    """Return what a restart would run at this moment, as the links lead now; its environment is left out.

    Args:
        command: as in ``describe_launch``.

    Raises:
        RestartError: nothing.
    """
    return describe_launch(command, {}, None, is_bound_to_directory=True)[0].pin()


def describe_following(started: Launch, command: Sequence[str] | None) -> dict[str, str | None] | None:
    """Return what a restart would run, where that is not what runs; None where it is the same.

    Args:
        started: what runs, pinned when it was started.
        command: as in ``describe_launch``.
    """
    try:
        following = find_following(command)
    except RestartError as error:
        return {"error": str(error)}
    if (following.arguments, following.directory) == (started.arguments, started.directory):
        return None
    return {"program": following.arguments[0], "directory": following.directory}


def find_unfollowed_link() -> str | None:
    """Return a link that leads to the start directory and by which a restart does not go; None for none that is known.

    A parent that sets neither PWD nor an absolute path in the command line has not told by which way it came.
    """
    physical = _PHYSICAL_DIRECTORY
    # A shell in the directory itself has said which one is meant.
    if physical is None or physical != _START_DIRECTORY or physical == _GIVEN.get("PWD"):
        return None
    directory = physical
    for _ in range(MAX_LEVELS):
        directory = os.path.dirname(directory)
        try:
            with os.scandir(directory) as entries:
                for entry in itertools.islice(entries, MAX_ENTRIES):
                    if entry.is_symlink() and _leads_into(entry.path, physical, directory):
                        return entry.path
        except OSError:
            continue
    return None


def find_start_link() -> str | None:
    """Return a link that leads to where this process was started, also one that no restart follows; None for none."""
    return _LINK[1] if _LINK is not None else find_unfollowed_link()


def _leads_into(link: str, directory: str, below: str) -> bool:
    """Say whether a link leads to a directory, or to one above it that lies below another one."""
    real = os.path.realpath(link)
    # The root has links of its own, such as /bin.
    if below == os.sep:
        return real == directory
    return f"{directory}{os.sep}".startswith(f"{real}{os.sep}") and real.startswith(f"{below}{os.sep}")


def look_up_links(started: Launch | None, command: Sequence[str] | None) -> dict[str, Any]:
    """Return what a status says of links: what a restart would run, and the link that it would not follow. It blocks.

    Args:
        started: what runs, pinned when it was started; None where that is not known.
        command: as in ``describe_launch``.
    """
    return {
        "restart_would_run": None if started is None else describe_following(started, command),
        "unfollowed_link": find_unfollowed_link(),
    }


def follow_link(path: str) -> str:
    """Return a path by way of the link that the start directory goes through, where the path lies behind that link.

    An activated virtual environment is on PATH by the name that it had when it was made, without links.
    """
    if _LINK is not None and path.startswith(_LINK[0] + os.sep):
        return _LINK[1] + path.removeprefix(_LINK[0])
    return path


def _follow_all(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment whose paths of a virtual environment go through the link as well."""
    variables = dict(environment)
    for name in ("PATH", "VIRTUAL_ENV", "PYTHONPATH"):
        if name in variables:
            variables[name] = os.pathsep.join(map(follow_link, variables[name].split(os.pathsep)))
    return variables


def find_from_start(path: str | os.PathLike[str]) -> str:
    """Return where a path is that is meant from where this process was started, through the same links."""
    return os.path.join(_START_DIRECTORY or "", path)


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
    path = find_from_start(env_file)
    try:
        # Opened here, because dotenv takes a file that is not there for an empty one.
        with open(path, encoding="utf-8") as stream:
            values = dotenv_values(stream=stream, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise RestartError(f"the env file {path} cannot be read: {error}; put it back", phase="start") from error
    # A name without "=" has no value.
    return {key: value for key, value in values.items() if value is not None}
