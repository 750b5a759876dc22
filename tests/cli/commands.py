"""The command as a process, for the tests of what it says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from tests.scenarios.handoff.harness import Service

Run = Callable[..., Service]

COMMAND = [sys.executable, "-W", "error", "-m", "ecdysis_async.cli"]

# Those who seek a verdict that nobody knows shall not seek it for ten seconds.
IMPATIENT = [
    sys.executable,
    "-W",
    "error",
    "-c",
    "from ecdysis_async.cli import client, main; client.VERDICT_SECONDS = client.SILENCE_SECONDS = 1.5; main()",
]

SERVING, FAILED, USAGE, NO_SERVICE, IN_PROGRESS, ROLLED_BACK, UNKNOWN, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


def call(*arguments: str, command: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


def begin(*arguments: str, command: list[str] = COMMAND) -> subprocess.Popen[str]:
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors
