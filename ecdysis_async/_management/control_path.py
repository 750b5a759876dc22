"""Where control sockets are, and whether a live service holds one: directories, their permissions, and locks.

Both ends use it, the service and the command. Everything here may block on the file system: call it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING

from ecdysis_async._system.shortages import REMEDIES
from ecdysis_async._system.wording import is_by_command

if TYPE_CHECKING:
    from ecdysis_async._system.lock_file import LockFile
    from ecdysis_async.settings import StrPath

__all__ = [
    "ControlLock",
    "default_directories",
    "default_directory",
    "find_live",
    "is_live",
    "locate",
    "make_lock_file",
    "prepare_directory",
]

LOCK_SUFFIX = ".lock"

PASSABLE = stat.S_IXGRP | stat.S_IXOTH

# Below it systemd makes what a unit asks for by RuntimeDirectory= (systemd.exec(5)).
RUN_DIRECTORY = "/run"


def locate(path: StrPath) -> str:
    """Return the absolute path of a control socket; a bare name is one in the default directory.

    Raises:
        ValueError: it is empty, or an abstract address, which would have no permissions.
    """
    text = os.fspath(path)
    if not text or text.startswith(("@", "\0")):
        raise ValueError(f"a control socket is a path, or a name in {default_directory()}, and not {text!r}")
    return os.path.abspath(os.path.join(default_directory(), text) if os.sep not in text else text)


def _name_option() -> str:
    """Return what says where the control socket is, by the name that the reader knows."""
    return "--control" if is_by_command() else "control_socket"


def default_directory() -> str:
    """Return where a service puts a control socket that was given as a bare name."""
    return default_directories()[0]


def default_directories() -> list[str]:
    """Return where services of this user may have put theirs, the most likely one first.

    A service may run in another environment than the shell that asks, and so has used another of them.
    """
    environment = os.environ
    # systemd separates several directories by colons (systemd.exec(5)).
    directories = [each for each in environment.get("RUNTIME_DIRECTORY", "").split(":") if each]
    if runtime_directory := environment.get("XDG_RUNTIME_DIR"):
        directories.append(os.path.join(runtime_directory, "ecdysis"))
    if os.geteuid() == 0:
        directories.append("/run/ecdysis")
    elif os.path.isabs(home := os.path.expanduser("~")):
        directories.append(os.path.join(home, ".local/state/ecdysis"))
    else:
        # Neither HOME nor an entry in passwd(5): where the session manager would have made a directory.
        directories.append(f"/run/user/{os.geteuid()}/ecdysis")
    return list(dict.fromkeys(directories))


def prepare_directory(path: str, *, is_shared: bool = False) -> None:
    """See that nobody else can replace a control socket; make its directory where that is the default one.

    Args:
        path: of the control socket.
        is_shared: whether others may use the socket, who then need to pass the directory.

    Raises:
        OSError: there is no such directory, or it belongs to, or may be written by, others; the text says what to do.
    """
    directory = os.path.dirname(path)
    if directory in default_directories():
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if is_shared and (found := os.stat(directory)).st_uid == os.geteuid():
            # They pass it, and cannot look around in it.
            os.chmod(directory, stat.S_IMODE(found.st_mode) | PASSABLE)
    try:
        found = os.stat(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.errno, f"the directory of the control socket {path} does not exist: mkdir -m 700 {directory}"
        ) from None
    # Root may own it: root could replace the socket anywhere, and a service may have been root when it began.
    if found.st_uid not in (0, os.geteuid()):
        raise PermissionError(
            errno.EPERM,
            f"the directory of the control socket {path} belongs to uid {found.st_uid}, and this service runs as uid "
            f"{os.geteuid()}, so it could be replaced: take a directory of the service's own",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            errno.EPERM,
            f"the directory of the control socket {path} may be written by others, who could replace it: "
            f"chmod go-w {directory}, or take another",
        )


def make_lock_file(path: str | None) -> LockFile:
    """Return the file of a new service's locks: beside its control socket, or memory where that cannot be.

    Args:
        path: of the control socket; None where there is none.

    Raises:
        OSError: there is no memory, or no descriptor, to be had.
    """
    # Imported here, because commands have no locks, and it doubles what they load.
    from ecdysis_async._system.lock_file import LockFile

    if path is not None:
        try:
            prepare_directory(path)
        except OSError:
            # Whether that is a fault is said where the control socket is opened.
            path = None
    return LockFile.make(path)


def _unit_directories() -> list[str]:
    """Return where services of systemd units may have theirs: RuntimeDirectory= is below one of these directories."""
    found: list[str] = []
    for parent in dict.fromkeys((RUN_DIRECTORY, os.environ.get("XDG_RUNTIME_DIR") or RUN_DIRECTORY)):
        with contextlib.suppress(OSError), os.scandir(parent) as entries:
            found += sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    return found


def find_live() -> list[str]:
    """Return the control sockets that somebody listens on: in the default directories, and in those of units."""
    found = []
    for directory in dict.fromkeys((*default_directories(), *_unit_directories())):
        # A directory that is missing, or cannot be read, holds no service of this user.
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            found += sorted(entry.path for entry in entries if _is_socket(entry))
    # A lock file lies beside a control socket, and beside no other socket of the service in the same directory.
    return [path for path in found if os.path.exists(path + LOCK_SUFFIX) and is_live(path)]


def _is_socket(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)
    except OSError:
        # It has gone since: other services come and go in the same directory.
        return False


def is_live(path: str) -> bool:
    """Say whether somebody listens on a socket of the file system."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        # EAGAIN: somebody listens, and its queue is full (connect(2)).
        return probe.connect_ex(path) in (0, errno.EAGAIN)


class ControlLock:
    """A generation's share of the lock beside its control socket.

    All generations of a service share it, from their start to their end. A process that gets it for itself alone knows
    that no generation is left, whatever the socket file looks like. The kernel frees the share of a process that is
    killed.
    """

    def __init__(self, path: str) -> None:
        self._socket_path = path
        self._path = path + LOCK_SUFFIX
        self._descriptor = -1

    def acquire(self, *, is_family: bool) -> None:
        """Take a share.

        Args:
            is_family: the socket was inherited, so that those who hold the lock are generations of this service.

        Raises:
            OSError: a live service has it, or the file cannot be made.
        """
        # Imported here, because there are platforms without it, on which nobody has a control socket.
        import fcntl

        while self._descriptor < 0:
            try:
                # O_NOFOLLOW: nothing but a lock file of ours is ever opened, and made.
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                if is_family and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    # Root has made the file, which this service was when it began. Another service that comes to bind
                    # sees that somebody listens there.
                    return
                remedy = REMEDIES.get(error.errno or 0, "let the service's user write to its directory")
                raise OSError(
                    error.errno,
                    f"the control socket's lock {self._path} cannot be made ({error.strerror}): {remedy}, "
                    f"or give this service another {_name_option()}",
                ) from error
            try:
                if not is_family:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The exchange is not atomic (flock(2)): if another first generation comes in between, this one fails.
                # Nothing is lost by that, because nothing is bound yet.
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                # The last generation of a service removes the file: a lock on what is gone excludes nobody.
                if _is_file_at(descriptor, self._path):
                    self._descriptor = descriptor
            except BlockingIOError:
                raise OSError(
                    errno.EADDRINUSE,
                    f"the control socket {self._socket_path} belongs to a live service: restart that one (ecdysis "
                    f"restart --control {self._socket_path}), or stop it (ecdysis stop), or give this one another "
                    f"{_name_option()}",
                ) from None
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"the control socket's lock {self._path} cannot be taken ({error.strerror}): its file system, or a "
                    f"sandbox, has no flock(2), so give this service another {_name_option()}",
                ) from error
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)

    def is_removed(self) -> bool:
        """Say whether somebody has removed or replaced the file, so that another service is not kept out by it."""
        return self._descriptor >= 0 and not _is_file_at(self._descriptor, self._path)

    def release(self) -> None:
        """Give the share back, and remove the file if nobody else has one; harmless if done already."""
        import fcntl

        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have cleared the directory: then the file may be another service's by now.
            if _is_file_at(descriptor, self._path):
                os.unlink(self._path)
        except OSError:
            # Another generation goes on, or somebody has cleared the directory, or this process is not root any more.
            pass
        finally:
            os.close(descriptor)


def _is_file_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
