"""`ecdysis unit`: what it prints is whole, and what could not work it refuses."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.commands import (
    COMMAND,
    USAGE,
)

pytestmark = pytest.mark.main_python_only


COMPLAINTS = [
    (["--socket", "--bind=localhost:8000"], "with --socket say an IP address"),
    (["--pid-file=/nowhere/app.pid"], "there is no directory /nowhere: make it, or use /run/shop"),
    (["--control=/nowhere/control"], "there is no directory /nowhere"),
    (["--health-bind=unix:/nowhere/health"], "there is no directory /nowhere"),
    (["--user=nobody", "--bind=unix:/run/shop.sock"], "nobody may not write to /run: use /run/shop, which systemd"),
    (["--user=nobody\nExecStartPre=/bin/false"], "say a user's name or number"),
    (["--name=-x"], "letters, digits"),
    (["--keyfile-password=hunter2"], "a unit is there for everybody to read"),
    (["--server-option=ssl_keyfile_password=hunter2"], "a unit is there for everybody to read"),
    (["--command=ecdysis run main:app --keyfile-password hunter2"], "a unit is there for everybody to read"),
    (["--name=app.service"], "without .service at the end"),
    ([f"--name={300 * 'x'}"], "up to 200 letters"),
]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A project, in the directory of its name."""
    directory = tmp_path / "shop"
    directory.mkdir()
    (directory / "main.py").write_text("async def app(scope, receive, send): ...\n")
    return directory


def call(directory: Path, *options: str, target: str = "main:app") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PWD": str(directory)}
    command = [*COMMAND, "unit", target, *options]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def printed(directory: Path, *options: str) -> str:
    result = call(directory, *options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("options", "complaint"), COMPLAINTS)
def test_a_unit_that_could_not_work_is_not_printed(shop: Path, options: list[str], complaint: str) -> None:
    result = call(shop, *options)
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert complaint in result.stderr
    assert "hunter2" not in result.stderr


@pytest.mark.parametrize(
    ("target", "complaint"),
    [("mian:app", "there is no module 'mian'"), ("main:ap", "main has no attribute 'ap'")],
)
def test_a_unit_of_nothing_is_not_printed(shop: Path, target: str, complaint: str) -> None:
    result = call(shop, target=target)
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert complaint in result.stderr
    assert "did you mean" in result.stderr


def test_a_mere_name_of_a_control_socket_is_the_same_in_the_whole_unit(shop: Path) -> None:
    text = printed(shop, "--control=admin")
    assert text.count("/run/shop/admin") == 2
    assert "admin" not in text.replace("/run/shop/admin", "")


def test_it_is_named_after_the_project_and_replaces_nothing_in_silence(shop: Path, tmp_path: Path) -> None:
    units = tmp_path / "units"
    units.mkdir()
    assert call(shop, f"--output={units}").returncode == 0
    unit = units / "shop.service"
    first = unit.read_text()
    assert "is as it would be written" in call(shop, f"--output={units}").stderr
    refused = call(shop, f"--output={units}", "--workers=4")
    assert refused.returncode == USAGE
    assert f"{unit} is there, and differs" in refused.stderr
    assert "+ExecStart=" in refused.stderr
    assert unit.read_text() == first
    assert "over another one" in call(shop, f"--output={units}", "--workers=4", "--force").stderr
    assert "--workers=4" in unit.read_text()
    assert [each.name for each in units.iterdir()] == ["shop.service"]
    assert unit.stat().st_mode & 0o777 == 0o644


def test_a_socket_unit_from_before_is_told_of(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "shop.socket").touch()
    told = call(shop, f"--output={tmp_path}").stderr
    assert "systemctl disable --now shop.socket" in told
    assert "systemctl enable --now shop.service" in told


def test_a_unix_socket_is_for_the_proxy_or_else_for_everybody(shop: Path) -> None:
    bind = "--bind=unix:/run/shop/web.sock"
    for_all = call(shop, bind)
    assert "--unix-mode=666" in for_all.stdout
    assert "RuntimeDirectoryMode=0755" in for_all.stdout
    assert "every user of this machine may connect" in for_all.stderr
    for_one = call(shop, bind, "--unix-group=daemon")
    assert "--unix-mode" not in for_one.stdout
    assert "SupplementaryGroups=daemon" in for_one.stdout
    assert "every user" not in for_one.stderr
    by_systemd = printed(shop, bind, "--unix-group=daemon", "--socket")
    assert "SocketMode=0660\nSocketGroup=daemon\n" in by_systemd
    # The directory of the service goes with the service, and the socket unit stays.
    assert "RuntimeDirectory=shop-control\n" in by_systemd


def test_a_link_in_the_path_is_left_to_systemd_to_follow(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    link = tmp_path / "site" / "current"
    link.symlink_to(shop)
    text = printed(link)
    assert "# /etc/systemd/system/site.service" in text
    assert f"WorkingDirectory={link}\nEnvironment=PWD={link}\n" in text
    # A unit that is made in the release itself says so.
    beside = tmp_path / "current"
    beside.symlink_to(shop)
    assert f"cd {beside} and run `ecdysis unit` there" in call(shop).stderr


def test_options_of_other_servers_are_those_of_run(shop: Path) -> None:
    text = printed(shop, "--timeout-keep-alive=20", "--user=nobody")
    assert "=timeout_keep_alive=20" in text
    assert "User=nobody\n" in text
