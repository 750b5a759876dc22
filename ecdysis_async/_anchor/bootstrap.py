"""What an anchor's process does first after its exec: it waits for code that is being replaced at this very moment.

A package manager takes the files of a package away, and then puts others there. A process that is executed in between
ends, and the service with it. So the text of this module is executed in place of the program. It imports what the
program needs, executes itself anew while that fails, and then runs the program in this same process.

Nothing of the package may be imported at the top: the text is executed where there is none.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ecdysis_async._system.launch import Launch

__all__ = ["describe_modules", "prepare"]

# For how long the code may be away, and between two attempts, seconds.
AWAY_SECONDS = 10.0
PAUSE_SECONDS = 0.1

# A console script is shorter.
SCRIPT_BYTES = 65536

# What the program needs before it can tell anybody that something is missing.
NEEDED = ("ecdysis_async", "anyio", "click")
# Its names, as they are run by `python -m`.
MODULES = ("ecdysis_async", "ecdysis_async.cli")

# Options of an interpreter whose value is a word of its own.
WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")

# In `__main__` of the process, for launch.py: the path that the program would have been executed by.
ECDYSIS_EXECUTED = ""

# This text, as long as it is there.
_TEXT = globals()["__loader__"].get_source(__name__) if __name__ != "__main__" else None


def describe_modules() -> list[str]:
    """Return the names of the modules that this process needs, and has imported."""
    return sorted(
        name
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in NEEDED and getattr(module, "__spec__", None) is not None
    )


def prepare(launch: Launch, modules: Sequence[str], descriptors: Sequence[int]) -> tuple[Launch, int] | None:
    """Return what runs a program once it can be imported, and the memory that this needs, which is the caller's.

    None where the program is not known to be `ecdysis`, and is executed as it is.

    Args:
        launch: the program.
        modules: what it needs, as its check has told.
        descriptors: what has to survive.

    Raises:
        OSError: there is no memory, or no descriptor.
    """
    if not modules or _TEXT is None or (found := _find_program(launch)) is None:
        return None
    interpreter, executed, arguments, module = found
    memory = os.memfd_create("ecdysis-bootstrap", os.MFD_CLOEXEC)
    try:
        command = [*interpreter, *(("-m", module) if module else arguments[:1]), *arguments[1:]]
        deadline = time.monotonic() + AWAY_SECONDS
        kept = [memory, *descriptors]
        call = ", ".join(map(repr, (memory, command, executed, arguments, module, [*modules], kept, deadline)))
        # The first byte says that nothing was told yet.
        text = f" {_TEXT}\n\nrun({call})\n".encode()
        view = memoryview(text)
        while view:
            view = view[os.write(memory, view) :]
    except BaseException:
        os.close(memory)
        raise
    line = f"import os; exec(os.pread({memory}, {len(text)}, 1))"
    shown = [module, *arguments[1:]] if module else arguments
    return type(launch)((*interpreter, "-c", line, *shown), launch.directory, launch.environment), memory


def _find_program(launch: Launch) -> tuple[list[str], str, list[str], str] | None:
    """Take a command line apart: the interpreter, what is executed, the program with its arguments, and its module."""
    from ecdysis_async._system.launch import TRAMPOLINE, read_first_lines

    words = [*launch.arguments]
    first, second = read_first_lines(words[0])
    if first.startswith(b"#!"):
        interpreter, executed = [os.fsdecode(word) for word in first[2:].strip().split(None, 1)], words[0]
        if second.startswith(TRAMPOLINE):
            interpreter = [os.fsdecode(second.removeprefix(TRAMPOLINE).split()[0].strip(b'"'))]
            executed = interpreter[0]
        is_plain = bool(interpreter) and os.path.basename(interpreter[0]) != "env"
        return (interpreter, executed, words, "") if is_plain and _is_ours(words[0]) else None
    index = 1
    while index < len(words) and words[index].startswith("-") and words[index] not in ("-m", "-c", "-"):
        index += 2 if words[index] in WITH_VALUE else 1
    interpreter, rest = words[:index], words[index:]
    if rest[:1] == ["-m"]:
        module = "".join(rest[1:2])
        return (interpreter, words[0], ["-m", *rest[2:]], module) if module in MODULES else None
    is_script = bool(rest) and _is_ours(os.path.join(launch.directory or "", rest[0]))
    return (interpreter, words[0], rest, "") if is_script else None


def _is_ours(script: str) -> bool:
    """Say whether a file is a script in Python that runs this package."""
    try:
        with open(script, "rb") as file:
            text = file.read(SCRIPT_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return False
    return "ecdysis_async" in text


def run(
    memory: int,
    command: list[str],
    executed: str,
    arguments: list[str],
    module: str,
    names: list[str],
    descriptors: list[int],
    deadline: float,
) -> None:
    """Import what the program needs, and run it. Signals wait meanwhile, as they do over an exec.

    Args:
        memory: where this text is; its first byte says whether a failure was told.
        command: the command line that the program is meant to have.
        executed: the path by which it is meant to have been executed.
        arguments: the program, which is a script or "-m", and its own arguments.
        module: what is run with "-m".
        names: the modules that the program needs.
        descriptors: what has to survive another attempt.
        deadline: until when it is tried, by CLOCK_MONOTONIC.
    """
    global ECDYSIS_EXECUTED
    ECDYSIS_EXECUTED = executed
    environment, again = dict(os.environ), sys.orig_argv
    sys.orig_argv, sys.argv = command, arguments
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(arguments[0]))
    is_told = os.pread(memory, 1, 0) == b"!"
    try:
        for name in names:
            importlib.import_module(name)
        if not module:
            os.stat(arguments[0])
    except Exception as error:  # noqa: BLE001 - half a file may raise anything, and the program raises it again
        if not is_told:
            os.pwrite(memory, b"!", 0)
            _say(f"the anchor's new code cannot be imported, which is tried for {AWAY_SECONDS:g} seconds: {error!r}")
        while time.monotonic() < deadline:
            time.sleep(PAUSE_SECONDS)
            for descriptor in descriptors:
                os.set_inheritable(descriptor, True)
            try:
                os.execve(sys.executable, again, environment)  # noqa: S606 - this very program, in a process without it
            except OSError:
                # The interpreter has gone as well.
                continue
        _say("the anchor's new code is still not there")
    else:
        if is_told:
            _say("the anchor's new code is there by now")
    os.close(memory)
    # The anchor of a first start has no need of it.
    import runpy

    if module:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def _say(text: str) -> None:
    """Tell it where the log is, which is not set up yet."""
    try:
        os.write(2, f"ecdysis: {text}\n".encode("utf-8", "replace"))
    except OSError:
        # Nobody reads it.
        return
