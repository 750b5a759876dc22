"""The command as a process, for the tests of what it says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from tests.scenarios.handoff.harness import Service

Run = Callable[..., Service]

COMMAND = [sys.executable, "-W", "error", "-m", "ecdysis_async.cli"]

SERVING, FAILED, USAGE, NO_SERVICE, IN_PROGRESS, ROLLED_BACK, UNKNOWN, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


def with_patience(**seconds: float) -> list[str]:
    """Return the command with another patience: of the constants of its client, by the first word of their names."""
    constants = "; ".join(f"client.{name}_SECONDS = {value}" for name, value in seconds.items())
    return [sys.executable, "-W", "error", "-c", f"from ecdysis_async.cli import client, main; {constants}; main()"]


def call(*arguments: str, command: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


def begin(*arguments: str, command: list[str] = COMMAND) -> subprocess.Popen[str]:
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors
