"""The pid file: written beside itself and renamed, so that no reader ever sees half of it, nor none.

Everything here may block on the file system: call it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from pathlib import Path

from ecdysis_async._system.shortages import REMEDIES

__all__ = ["PidFile"]

MODE = 0o644

# More than any pid has digits, bytes.
MAX_SIZE = 64


class PidFile:
    """One process' claim to a pid file.

    Others may be able to write in its directory (/tmp). So no link is followed, nothing that is there is written to,
    and a draft's name cannot be foreseen.
    """

    def __init__(self, path: Path) -> None:
        # Absolute from the start: the application may change its working directory.
        self.path = path.absolute()
        self._draft: Path | None = None

    def prepare(self) -> None:
        """Write the draft, so that what can fail does so before anything depends on it.

        It also removes the drafts of successors that were killed before they could.

        Raises:
            OSError: the directory is missing or not writable, the disk is full, or something else than a file is there.
        """
        self.discard()
        if self.names(os.getpid()):
            # Nothing has to be written: the code of a process may have changed, and not its pid.
            return
        try:
            self._require_place()
            self._write()
        except OSError as error:
            self.discard()
            remedy = REMEDIES.get(error.errno or 0, "create its directory and let the service's user write there")
            raise OSError(
                error.errno,
                f"the pid file {self.path} cannot be written ({error.strerror}): {remedy}, or choose another pid_file",
            ) from error
        self._discard_orphans()

    def publish(self) -> None:
        """Make this process the one that the pid file names.

        Raises:
            OSError: the directory has become unwritable since ``prepare``.
        """
        if self.names(os.getpid()):
            self.discard()
            return
        if self._draft is None or not _is_own_file(self._draft):
            self.prepare()
        assert self._draft is not None
        self._draft.replace(self.path)
        self._draft = None

    def names(self, pid: int) -> bool:
        """Say whether the file names a process."""
        # A file that is not there, or cannot be read, names nobody. Somebody else's may be another one in a moment.
        with contextlib.suppress(OSError):
            return _is_own_file(self.path) and self._read() == str(pid).encode()
        return False

    def discard(self) -> None:
        """Remove a draft that was never published."""
        if self._draft is not None:
            with contextlib.suppress(OSError):
                self._draft.unlink()
            self._draft = None

    def remove(self) -> None:
        """Remove the file at a full stop, if it still names this process."""
        self.discard()
        self._discard_orphans()
        # A process that is not root any more cannot remove the file from a directory of root's. What is no file is
        # somebody else's.
        with contextlib.suppress(OSError):
            if self.names(os.getpid()):
                self.path.unlink()

    def _require_place(self) -> None:
        """See that a file can be put there.

        Raises:
            OSError: something else is there, or a file that belongs to somebody else and cannot be replaced.
        """
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(found.st_mode):
            raise FileExistsError(errno.EEXIST, f"{_describe(found.st_mode)} is there, which is left alone: remove it")
        directory = os.stat(self.path.parent)
        # The sticky bit of a directory: only who owns a file, or the directory, may replace the file (unlink(2)).
        if directory.st_mode & stat.S_ISVTX and os.geteuid() not in (0, found.st_uid, directory.st_uid):
            raise PermissionError(errno.EPERM, f"it belongs to uid {found.st_uid}, who alone may replace it there")

    def _write(self) -> None:
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
        self._draft = draft
        try:
            # Whatever the umask: everybody may ask which process it is.
            os.fchmod(descriptor, MODE)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        finally:
            os.close(descriptor)

    def _read(self) -> bytes:
        # O_NONBLOCK: a FIFO would wait for somebody who writes.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(descriptor, MAX_SIZE).strip()
        finally:
            os.close(descriptor)

    def _discard_orphans(self) -> None:
        # Earlier releases wrote drafts without the last part.
        draft = re.compile(rf"\.{re.escape(self.path.name)}\.(\d+)(?:\.[0-9a-f]{{16}})?")
        # What cannot be removed is left: the directory cannot be listed, or the draft is another user's.
        with contextlib.suppress(OSError), os.scandir(self.path.parent) as entries:
            for entry in entries:
                found = draft.fullmatch(entry.name)
                if (
                    found is not None
                    and not _is_alive(int(found[1]))
                    and entry.is_file(follow_symlinks=False)
                    and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                ):
                    self.path.with_name(entry.name).unlink(missing_ok=True)


def _is_own_file(path: Path) -> bool:
    """Say whether a file is there that nobody else can have put there; root's counts, which this user may have been."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.geteuid())


def _describe(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO"}
    return kinds.get(stat.S_IFMT(mode), "something that is no file")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    # OverflowError: no process ever had this number, so the file is no draft, and is left alone.
    except (PermissionError, OverflowError):
        return True
    except ProcessLookupError:
        return False
    return True
