"""A deploy user: who is in the group of ``--control-group`` commands the service, and nobody else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async.cli.output import Exit
from tests.scenarios.run.commands import Running, call, make_environment, running, wait_until, write_app

pytestmark = [
    pytest.mark.main_python_only,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else"),
]

GROUP, OTHER, DEPLOY = 54321, 54322, 54000

# A command of another user, who need not be able to read the library: it is loaded before.
COMMANDS = """
import os, sys
import ecdysis_async.cli.client as client, ecdysis_async.cli.progress, encodings.idna
command, path, gid, *groups = sys.argv[1:]
os.setgroups([int(each) for each in groups])
os.setgid(int(gid))
os.setuid(54000)
try:
    if command == "status":
        print(client.status(path)["state"])
    elif command == "restart":
        print(client.restart(path, "settled", lambda event: None)["report"]["outcome"])
    elif command == "takeover":
        import socket
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(b'{"command": "takeover", "anchor": 1}\\n')
            print(sock.recv(4096).decode())
except client.CommandFailed as error:
    print(error)
    sys.exit(error.code)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Make a directory for the control socket that everybody may pass, as that of pytest is not."""
    write_app(tmp_path / "main.py", "hello")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def command(run: Running, cwd: Path, what: str, *groups: int) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, what, run.control, *map(str, groups)],
        env=make_environment(cwd, {}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def describe(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_gid, stat.S_IMODE(found.st_mode)


def test_a_member_of_the_group_commands(directory: Path, tmp_path: Path) -> None:
    options = ("--port", "0", "--probation", "0.1", "--control-group", str(GROUP))
    with running(tmp_path, *options, directory=directory) as run:
        run.find_port()
        assert describe(run.control) == (GROUP, 0o660)
        assert command(run, tmp_path, "status", OTHER, GROUP) == (0, "serving\n")
        assert command(run, tmp_path, "restart", GROUP) == (0, "settled\n")
        code, text = command(run, tmp_path, "status", OTHER)
        assert code == Exit.PERMISSION, text
        # A user who may command the service does not get its sockets.
        code, text = command(run, tmp_path, "takeover", GROUP)
        assert '"reason": "permission"' in text
        # The new code of the anchor, and a socket that was made anew, admit the same.
        assert call("restart", "--anchor", "--control", run.control, cwd=tmp_path).returncode == 0
        assert command(run, tmp_path, "status", GROUP)[0] == 0
        os.unlink(run.control)
        wait_until(lambda: os.path.exists(run.control), "it is not made anew")
        wait_until(lambda: command(run, tmp_path, "status", GROUP)[0] == 0, "nobody is admitted")
        assert describe(run.control) == (GROUP, 0o660)


def test_a_mode_alone_does_not_admit_others(directory: Path, tmp_path: Path) -> None:
    with running(tmp_path, "--port", "0", "--control-mode", "666", directory=directory) as run:
        run.find_port()
        assert describe(run.control)[1] == 0o666
        code, text = command(run, tmp_path, "status", OTHER)
        assert code == Exit.PERMISSION
        assert "may not control a service of uid 0" in text


def test_a_directory_in_the_way_is_named(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "hello")
    with running(tmp_path, "--port", "0", "--control-group", str(GROUP)) as run:
        run.wait_for(rf"group {GROUP} cannot reach the control socket: it may not pass {tmp_path}")


def test_a_group_that_is_none(tmp_path: Path) -> None:
    done = call("run", "main:app", "--control-group", "no-such-group", cwd=tmp_path)
    assert done.returncode == Exit.USAGE
    assert "--control-group: there is no group 'no-such-group'" in done.stderr
