"""`ecdysis unit`: what it prints is whole, and what could not work it refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cli.commands import (
    COMMAND,
    USAGE,
)

pytestmark = pytest.mark.newest_python_only


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--socket", "--bind=localhost:8000"], "with --socket say an IP address"),
        (["--pid-file=/nowhere/app.pid"], "there is no directory /nowhere: make it, or use /run/app"),
        (["--control=/nowhere/control"], "there is no directory /nowhere"),
        (["--user=nobody\nExecStartPre=/bin/false"], "say a user's name or number"),
        (["--name=-x"], "letters, digits"),
        (["--keyfile-password=hunter2"], "a unit is there for everybody to read"),
        (["--server-option=ssl_keyfile_password=hunter2"], "a unit is there for everybody to read"),
        (["--name=app.service"], "without .service at the end"),
        ([f"--name={300 * 'x'}"], "up to 200 letters"),
    ],
)
def test_a_unit_that_could_not_work_is_not_printed(tmp_path: Path, options: list[str], complaint: str) -> None:
    command = [*COMMAND, "unit", "app:main", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert complaint in result.stderr
    assert "hunter2" not in result.stderr


def test_a_mere_name_of_a_control_socket_is_the_same_in_the_whole_unit(tmp_path: Path) -> None:
    command = [*COMMAND, "unit", "app:main", "--control=admin"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert text.count("/run/app/admin") == 2
    assert "admin" not in text.replace("/run/app/admin", "")
