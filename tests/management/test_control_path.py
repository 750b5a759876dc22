"""Where control sockets are, whose directories are safe, and who holds the lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._management import control_path
from ecdysis_async._management.control_path import (
    ControlLock,
    default_directories,
    default_directory,
    find_live,
    locate,
    make_lock_file,
    prepare_directory,
)
from ecdysis_async._system.wording import speak_of_options

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be somebody with no runtime directory at all."""
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # What runs on this machine besides is none of the test's business.
    monkeypatch.setattr(control_path, "RUN_DIRECTORY", str(tmp_path / "run"))
    return tmp_path


@pytest.fixture
def default(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a default directory of this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home))
    return home / "ecdysis"


def listen(path: Path, *, type: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, type)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_default_directories(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = "/run/ecdysis" if os.geteuid() == 0 else f"{home}/.local/state/ecdysis"
    assert default_directories() == [last]
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_directories() == ["/run/user/7/ecdysis", last]
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/api:/run/more")
    assert default_directories() == ["/run/api", "/run/more", "/run/user/7/ecdysis", last]
    assert default_directory() == "/run/api"


@needs_root
def test_the_default_directory_of_others_than_root(home: Path) -> None:
    os.seteuid(65534)
    try:
        assert default_directory() == f"{home}/.local/state/ecdysis"
    finally:
        os.seteuid(0)


def test_a_bare_name_is_in_the_default_directory(default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate("api") == str(default / "api")
    assert locate("/run/api/control") == "/run/api/control"
    monkeypatch.chdir(default.parent)
    assert locate("./api") == str(default.parent / "api")
    assert locate(Path("run") / "api") == str(default.parent / "run" / "api")


@pytest.mark.parametrize("path", ["", "@api", "\0api"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="a control socket is a path, or a name in"):
        locate(path)


def test_the_default_directory_is_made(default: Path) -> None:
    before = os.umask(0)
    try:
        prepare_directory(locate("api"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(default.stat().st_mode) == 0o700
    prepare_directory(locate("api"))


def test_another_directory_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"mkdir -m 700 {tmp_path}/missing"):
        prepare_directory(str(tmp_path / "missing" / "control"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(PermissionError, match=f"chmod go-w {directory}"):
        prepare_directory(str(directory / "control"))
    directory.chmod(mode & ~0o022)
    prepare_directory(str(directory / "control"))


@needs_root
def test_the_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(PermissionError, match="belongs to uid 65534, and this service runs as uid 0"):
        prepare_directory(str(tmp_path / "control"))


def test_who_finds_a_live_service_reads_the_names_that_he_knows(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    first, stranger = ControlLock(path), ControlLock(path)
    first.acquire(is_family=False)
    with pytest.raises(OSError, match=r"or give this one another control_socket$"):
        stranger.acquire(is_family=False)
    speak_of_options()
    told = rf"restart that one \(ecdysis restart --control {path}\), .* or give this one another --control$"
    with pytest.raises(OSError, match=told):
        stranger.acquire(is_family=False)
    first.release()


def test_generations_share_the_lock(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    first, second, stranger = ControlLock(path), ControlLock(path), ControlLock(path)
    first.acquire(is_family=False)
    second.acquire(is_family=True)
    for holder in (first, second):
        with pytest.raises(OSError, match=f"{path} belongs to a live service"):
            stranger.acquire(is_family=False)
        assert (tmp_path / "control.lock").exists()
        holder.release()
    assert list(tmp_path.iterdir()) == []
    stranger.acquire(is_family=False)
    stranger.release()
    stranger.release()


def test_a_lock_file_that_nobody_holds_is_taken(tmp_path: Path) -> None:
    (tmp_path / "control.lock").touch()
    lock = ControlLock(str(tmp_path / "control"))
    lock.acquire(is_family=False)
    assert stat.S_IMODE((tmp_path / "control.lock").stat().st_mode) & 0o077 == 0o044, "as it was"
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", deny)
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"control\.lock cannot be taken \(No locks available\): .* has no flock\(2\)"):
        ControlLock(str(tmp_path / "control")).acquire(is_family=False)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_lock_on_a_removed_file_excludes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "control.lock"
    opened: list[int] = []

    def open_and_remove(file: str, flags: int, mode: int = 0o777) -> int:
        descriptor = real_open(file, flags, mode)
        opened.append(descriptor)
        if len(opened) == 1:
            os.unlink(file)  # what the last generation of a service does, in this very moment
        return descriptor

    real_open = os.open
    monkeypatch.setattr(os, "open", open_and_remove)
    lock = ControlLock(str(tmp_path / "control"))
    lock.acquire(is_family=False)
    assert len(opened) == 2
    assert path.exists()
    lock.release()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "control.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"control\.lock"):
        ControlLock(str(tmp_path / "control")).acquire(is_family=False)
    assert not (tmp_path / "elsewhere").exists()


def test_who_clears_the_directory_harms_nobody(tmp_path: Path) -> None:
    lock, other = (ControlLock(str(tmp_path / "control")) for _ in range(2))
    lock.acquire(is_family=False)
    assert not lock.is_removed()
    (tmp_path / "control.lock").unlink()
    assert lock.is_removed()
    other.acquire(is_family=False)
    assert lock.is_removed()
    lock.release()
    assert (tmp_path / "control.lock").exists(), "it is another service's"
    other.release()
    assert list(tmp_path.iterdir()) == []


def test_live_sockets_are_found(default: Path) -> None:
    assert find_live() == []
    default.mkdir()
    for name in ("live", "stale", "seqpacket"):
        (default / f"{name}.lock").touch()
    (default / "file").touch()
    (default / "file.lock").touch()
    listen(default / "stale").close()
    with listen(default / "live"), listen(default / "other"), listen(default / "seqpacket", type=socket.SOCK_SEQPACKET):
        assert find_live() == [str(default / "live")]
    assert find_live() == []


def test_a_file_that_goes_at_that_moment_hides_no_service(default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default.mkdir()
    for name in ("api.lock", "other.draft"):
        (default / name).touch()
    scan = os.scandir

    @contextlib.contextmanager
    def scan_slowly(path: str) -> Iterator[list[os.DirEntry[str]]]:
        with scan(path) as entries:
            found = list(entries)
        if path == str(default):
            (default / "other.draft").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", scan_slowly)
    with listen(default / "api"):
        assert find_live() == [str(default / "api")]


def test_services_of_units_are_found(home: Path) -> None:
    directory = home / "run" / "api"
    directory.mkdir(parents=True)
    (directory / "control.sock.lock").touch()
    assert find_live() == []
    with listen(directory / "control.sock"):
        assert find_live() == [str(directory / "control.sock")]


def test_the_locks_lie_beside_a_control_socket_whose_directory_is_safe(tmp_path: Path) -> None:
    control = str(tmp_path / "control")
    with contextlib.closing(make_lock_file(control)):
        assert os.listdir(tmp_path) == ["control.exclusive"]
    tmp_path.chmod(0o777)
    for path in (str(tmp_path / "other"), str(tmp_path / "nowhere/control"), None):
        with contextlib.closing(make_lock_file(path)) as locks:
            assert locks.try_lock("scheduler")
    assert os.listdir(tmp_path) == ["control.exclusive"]
