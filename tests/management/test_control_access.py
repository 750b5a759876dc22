"""Who may command a service: its user, root, and the members of one group, as the kernel knows them."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._management import control_access
from ecdysis_async._management.control_access import ControlAccess
from ecdysis_async._sockets.addresses import Unix

GROUP, OTHER = 54321, 54322

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")

# Connects as a user, with a group and supplementary groups, and stays until its stdin ends.
CONNECTS = """
import os, socket, sys
path, uid, gid, *groups = sys.argv[1:]
os.setgroups([int(each) for each in groups])
os.setgid(int(gid))
os.setuid(int(uid))
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(path)
    sys.stdin.read()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Make a directory that everybody may pass, as that of pytest is not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_the_modes_that_are_taken() -> None:
    assert ControlAccess().mode == 0o600
    assert ControlAccess(group=GROUP).mode == 0o660
    assert ControlAccess(0o620, GROUP).mode == 0o620
    assert ControlAccess().admitted_group is None
    assert ControlAccess(0o660).admitted_group == os.getegid()


@as_root
@pytest.mark.parametrize("kernel_tells", [True, False])
@pytest.mark.parametrize(
    ("who", "may"),
    [((54000, GROUP), True), ((54000, OTHER, GROUP), True), ((54000, OTHER), False), ((0, OTHER), True)],
)
def test_who_may(
    who: tuple[int, ...], directory: Path, monkeypatch: pytest.MonkeyPatch, *, may: bool, kernel_tells: bool
) -> None:
    if not kernel_tells:
        monkeypatch.setattr(control_access, "SO_PEERGROUPS", 9999)
    # Without the kernel's word only the groups of a user with a name are known.
    may = may and (kernel_tells or GROUP not in who[2:])
    access = ControlAccess(0o666, GROUP)
    path = directory / "control"
    with Unix(str(path), mode=access.mode, group=access.group).bind() as listener:
        listener.listen()
        assert (path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (GROUP, 0o666)
        with subprocess.Popen([sys.executable, "-c", CONNECTS, path, *map(str, who)], stdin=subprocess.PIPE) as client:
            sock, _ = listener.accept()
            with sock:
                assert access.admits(sock) is may
                assert f"member of group {GROUP}" in access.refusal(sock)
                assert ControlAccess().admits(sock) is (who[0] == 0)
            client.communicate()
    assert client.returncode == 0


@as_root
def test_an_inherited_socket_is_given_what_is_asked_for_now(directory: Path) -> None:
    path = directory / "control"
    with Unix(str(path), mode=0o600).bind():
        ControlAccess(group=GROUP).apply(str(path))
        assert (path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (GROUP, 0o660)
        ControlAccess().apply(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_directory_that_the_group_may_not_pass_is_found(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    path = str(tmp_path / "run" / "control")
    assert ControlAccess().find_obstacle(path) is None
    assert ControlAccess(group=GROUP).find_obstacle(path) == str(tmp_path / "run")


@as_root
def test_a_directory_of_the_group_is_no_obstacle(directory: Path) -> None:
    (directory / "run").mkdir(mode=0o750)
    os.chown(directory / "run", -1, GROUP)
    assert ControlAccess(group=GROUP).find_obstacle(str(directory / "run" / "control")) is None
    assert ControlAccess(group=OTHER).find_obstacle(str(directory / "run" / "control")) == str(directory / "run")


def test_a_connection_of_ones_own_is_admitted() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert ControlAccess().admits(ours)
