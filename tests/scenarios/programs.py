"""Whole programs that tests write down, run to their end in a process of their own, with all of their generations."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "run"]

# How long a program may take on a busy machine, on which each of its generations imports several servers.
PATIENCE_SECONDS = 240.0


@dataclass(frozen=True)
class Ended:
    """What a program and its generations have left: the exit status of the first one, and what all have written."""

    status: int
    output: str
    log: str


def run(directory: Path, source: str | Path, *arguments: object, anchored: bool = False, **variables: str) -> Ended:
    """Run a program until nobody writes to its output any more.

    Args:
        directory: where it runs, and is written to.
        source: of the program, or its path.
        arguments: of its command line.
        anchored: run ``serve`` of the program by ``ecdysis run``, in a worker of an anchor; the arguments are in the
            variable ``ARGUMENTS`` then.
        variables: of its environment.
    """
    path = directory / "program.py"
    path.write_text(source.read_text() if isinstance(source, Path) else source)
    words = [str(each) for each in arguments]
    command = [sys.executable, "-W", "default", str(path), *words]
    if anchored:
        command = [sys.executable, "-m", "ecdysis_async", "run", "program:serve", "--workers=1", "--probation=0.1"]
        command += ["--control", str(directory / "control.sock")]
    environment = {**os.environ, "ARGUMENTS": " ".join(words), "PWD": str(directory), **variables}
    process = subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            output, log = process.communicate(timeout=PATIENCE_SECONDS)
        except BaseException:
            process.kill()
            raise
    return Ended(process.returncode, output, log)
