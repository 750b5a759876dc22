"""The path of a Unix socket over restarts: its permissions change with the options, and a lost path comes back."""

from __future__ import annotations

import grp
import socket
import stat
from pathlib import Path

import pytest

from tests.scenarios.run.commands import Running, call, running, wait_until, write_app

pytestmark = pytest.mark.main_python_only

ROLLED_BACK = 5

OPTIONS = ("--config", "service.toml", "--uds", "web.sock", "--probation", "0.1", "--drain-timeout", "5")


def configure(directory: Path, text: str) -> None:
    (directory / "service.toml").write_text(text)


def restart(run: Running, cwd: Path, *options: str) -> int:
    return call("restart", "--control", run.control, *options, cwd=cwd).returncode


def get(path: Path) -> str:
    """Return who answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = b""
        while received := sock.recv(4096):
            answer += received
    return answer.decode().rpartition("\r\n\r\n")[2]


def permissions(path: Path) -> tuple[int, int]:
    found = path.stat()
    return stat.S_IMODE(found.st_mode), found.st_gid


def test_permissions_change_with_a_restart_that_succeeds(tmp_path: Path) -> None:
    path, group = tmp_path / "web.sock", grp.getgrnam("daemon").gr_gid
    own = tmp_path.stat().st_gid
    write_app(tmp_path / "main.py", "first")
    configure(tmp_path, 'unix-mode = "600"')
    with running(tmp_path, *OPTIONS, "--workers", "2") as run:
        run.wait_for("2 workers serving")
        inode = path.stat().st_ino
        assert permissions(path) == (0o600, own)
        configure(tmp_path, 'unix-group = "daemon"')
        write_app(tmp_path / "main.py", "", "raise ValueError('a broken release')")
        assert restart(run, tmp_path) == 1
        assert permissions(path) == (0o600, own)
        write_app(tmp_path / "main.py", "second")
        assert restart(run, tmp_path) == 0
        assert permissions(path) == (0o660, group)
        # The anchor reads it anew as well.
        configure(tmp_path, 'unix-mode = "666"')
        assert restart(run, tmp_path, "--anchor") == 0
        wait_until(lambda: permissions(path) == (0o666, group), "the anchor changes nothing")
        assert path.stat().st_ino == inode
        assert get(path) == "second"
    assert not path.exists()


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_path_that_was_removed_comes_back_with_a_restart_that_succeeds(workers: str, tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    write_app(tmp_path / "main.py", "first")
    configure(tmp_path, 'unix-mode = "660"')
    with running(tmp_path, *OPTIONS, "--workers", workers) as run:
        run.wait_for(f"{workers} workers? serving")
        path.unlink()
        # It fails where nothing was made yet, or where a first worker has made the path.
        write_app(tmp_path / "main.py", "", "raise ValueError('a broken release')")
        assert restart(run, tmp_path) == 1
        assert not path.exists()
        write_app(tmp_path / "main.py", "second", "import os\nif os.path.exists('web.sock'): raise ValueError('late')")
        assert restart(run, tmp_path) == (0 if workers == "1" else ROLLED_BACK)
        assert path.exists() == (workers == "1")
        write_app(tmp_path / "main.py", "third")
        assert restart(run, tmp_path) == 0
        assert get(path) == "third"
        assert permissions(path)[0] == 0o660
        inode = path.stat().st_ino
        # The anchor holds it from now on: it is the same one for the next workers, and goes with the service.
        write_app(tmp_path / "main.py", "fourth")
        assert restart(run, tmp_path) == 0
        assert get(path) == "fourth"
        assert path.stat().st_ino == inode
    assert not path.exists()


def test_a_path_that_was_removed_comes_back_after_an_upgrade_of_the_anchor(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    write_app(tmp_path / "main.py", "first")
    configure(tmp_path, "")
    with running(tmp_path, *OPTIONS, "--workers", "2") as run:
        run.wait_for("2 workers serving")
        path.unlink()
        assert restart(run, tmp_path, "--anchor") == 0
        write_app(tmp_path / "main.py", "second")
        assert restart(run, tmp_path) == 0
        assert get(path) == "second"
    assert not path.exists()
