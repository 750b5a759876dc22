"""A process that was started without stdin, stdout and stderr: no descriptor of its own takes their numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Where it is a worker of `ecdysis run`, the one that was started so is the parent.
PROGRAM = """
import os
import ecdysis_async
from pathlib import Path

async def main(ecdysis):
    process = "self" if ecdysis is None else os.getppid()
    Path("found").write_text(" ".join(os.readlink(f"/proc/{process}/fd/{number}") for number in range(3)))
    raise ecdysis_async.StartupError("enough")

if __name__ == "__main__":
    ecdysis_async.run(main(None))
"""
COMMAND = ("-m", "ecdysis_async.cli", "run", "program:main", "--port", "0", "--control", "off")


@pytest.mark.parametrize("arguments", [("program.py",), COMMAND])
def test_closed_standard_descriptors_lead_to_nothing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    closing = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    subprocess.run((*closing, sys.executable, *arguments), cwd=tmp_path, timeout=60, check=False)
    assert (tmp_path / "found").read_text() == "/dev/null /dev/null /dev/null"
