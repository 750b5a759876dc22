"""The pid file: written beside itself and renamed, so that no reader ever sees half of it, nor none.

Everything here may block on the file system: call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["PidFile"]


class PidFile:
    """One process' claim to a pid file."""

    def __init__(self, path: Path) -> None:
        # Absolute from the start: the application may change its working directory.
        self.path = path.absolute()
        self._draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")

    def prepare(self) -> None:
        """Write the draft, so that what can fail does so before anything depends on it.

        It also removes the drafts of successors that were killed before they could.

        Raises:
            OSError: the directory is missing or not writable, or the disk is full.
        """
        try:
            self._draft.write_text(f"{os.getpid()}\n")
        except OSError as error:
            self.discard()
            raise OSError(
                error.errno,
                f"the pid file {self.path} cannot be written ({error.strerror}): "
                "create its directory and let the service's user write there, or choose another pid_file",
            ) from error
        self._discard_orphans()

    def publish(self) -> None:
        """Make this process the one that the pid file names.

        Raises:
            OSError: the directory has become unwritable since ``prepare``.
        """
        if not self._draft.exists():
            self.prepare()
        self._draft.replace(self.path)

    def discard(self) -> None:
        """Remove a draft that was never published."""
        with contextlib.suppress(OSError):
            self._draft.unlink()

    def remove(self) -> None:
        """Remove the file at a full stop, if it still names this process."""
        self.discard()
        self._discard_orphans()
        # A process that is not root any more cannot remove the file from a directory of root's.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if self.path.read_text().strip() == str(os.getpid()):
                self.path.unlink()

    def _discard_orphans(self) -> None:
        prefix = f".{self.path.name}."
        # What cannot be removed is left: the directory cannot be listed, or the draft is another user's.
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path.parent):
                pid = name.removeprefix(prefix)
                if name.startswith(prefix) and pid.isdecimal() and not _is_alive(int(pid)):
                    self.path.with_name(name).unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    # OverflowError: no process ever had this number, so the file is no draft, and is left alone.
    except (PermissionError, OverflowError):
        return True
    except ProcessLookupError:
        return False
    return True
