"""Whatever cannot be opened or written for want of something says what it wants, and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

# A pid file and a lock are made in the directory that the first argument names, under the limit that the second names.
PROGRAM = """
import fcntl, pathlib, resource, sys
from ecdysis_async._management.control_path import ControlLock
from ecdysis_async._management.pid_file import PidFile

directory, limit = pathlib.Path(sys.argv[1]), getattr(resource, sys.argv[2])
resource.setrlimit(limit, (0, resource.getrlimit(limit)[1]))
for attempt in (
    lambda: PidFile(directory / "app.pid").prepare(),
    lambda: ControlLock(str(directory / "control")).acquire(is_family=False),
):
    try:
        attempt()
    except OSError as error:
        print(error.strerror)
    else:
        print("made")
"""


def make_under(limit: str, directory: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), limit],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    pid_file, lock = make_under("RLIMIT_NOFILE", tmp_path)
    remedy = "raise the limit of open files (ulimit -n, LimitNOFILE=)"
    assert f"the pid file {tmp_path}/app.pid cannot be written (Too many open files): {remedy}, or" in pid_file
    assert f"the control socket's lock {tmp_path}/control.lock cannot be made (Too many open files): {remedy}" in lock


def test_files_may_have_no_size(tmp_path: Path) -> None:
    pid_file, lock = make_under("RLIMIT_FSIZE", tmp_path)
    assert "(File too large): raise the limit of the size of files (ulimit -f, LimitFSIZE=), or choose" in pid_file
    # It has no size.
    assert lock == "made"
