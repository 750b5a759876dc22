"""PID 1 of a container must not leave: a restart there is refused, and the service goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import anyio, ecdysis_async, os

async def main():
    async with ecdysis_async.Ecdysis() as ecdysis:
        await ecdysis.ready()
        try:
            await ecdysis.restart()
        except ecdysis_async.RestartUnsupported as error:
            print(os.getpid(), ecdysis.state.value, error)

anyio.run(main)
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, and unshare(1)")
def test_a_restart_as_pid_1_is_refused_and_says_what_to_do() -> None:
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 serving ")
    assert "ecdysis run" in done.stdout
