"""What watches the files of a service in development, and asks for a restart when one is saved: a process of its own.

Started as ``python -m ecdysis_async.cli.reload [--include GLOB]... [--exclude GLOB]... CONTROL PATH...`` by the process
that serves; it ends with its standard input, which is a pipe from there. Its standard output is one back, on which it
says, by one byte, that it watches.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING, NoReturn

from ecdysis_async._management.control_path import is_live
from ecdysis_async._system.stderr import say

from . import client
from .client import CommandFailed
from .output import Exit

if TYPE_CHECKING:
    from watchfiles import Change

__all__ = ["Causes", "Wanted", "main"]

# Changes that come within so many milliseconds of each other are one.
QUIET_MILLISECONDS = 100

# It is known to watch once it has seen nothing, or something, for so long.
FIRST_LOOK_MILLISECONDS = 200

# How often to try again while another restart is in progress, seconds.
BUSY_PAUSE_SECONDS = 0.2


# So many restarts in a row, each for nothing but what was written while the one before went on, are suspicious.
STARTS_THAT_WRITE = 3

# How many restarts prove it. A developer who saves during one of them is taken for the service, and so there are two.
PROOFS = 2

# How long suspicious files are left alone, seconds. Whoever types on is a developer, and not the service.
PROOF_SECONDS = 3.0

# By how much the time of a file may differ from the clock, seconds: the kernel's own clock for them is a coarse one.
COARSE_SECONDS = 0.05

# Directories with the code of others, beside those that watchfiles leaves out (.git, .venv, node_modules …).
INSTALLED = "site-packages"
ENVIRONMENT_MARK = "pyvenv.cfg"

# Larger files count as changed whenever they are written, bytes.
DIGEST_AT_MOST = 16 * 2**20


def main() -> NoReturn:
    """Watch until the service, or the process that has started this one, is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--include", action="append", default=[])
    parser.add_argument("--exclude", action="append", default=[])
    parser.add_argument("control")
    parser.add_argument("paths", nargs="+")
    given = parser.parse_args()
    # Ctrl-C reaches this process too: it ends with the service, and has nothing to say about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    _watch(given.control, given.paths, Wanted(given.paths, given.include, given.exclude))
    sys.exit(0)


class Wanted:
    """Says which files are watched.

    Args:
        paths: directories, and single files, which are watched in any case.
        include: globs of files beside ``*.py``.
        exclude: globs of files that are not watched, and directories all of whose files are not.
    """

    def __init__(self, paths: Iterable[str], include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        from watchfiles import DefaultFilter

        self._others = DefaultFilter(ignore_entity_patterns=())
        real = [os.path.realpath(path) for path in paths]
        self.files = {path for path in real if not os.path.isdir(path)}
        self.directories = {path for path in real if os.path.isdir(path)}
        self._include = ("*.py", *include)
        self._exclude = tuple(exclude)
        self._excluded = {os.path.realpath(each) for each in exclude if os.path.isdir(each)}

    def __call__(self, change: Change, path: str) -> bool:
        real = os.path.realpath(path)
        if real in self.files:
            return True
        root = next((each for each in self.directories if real.startswith(os.path.join(each, ""))), None)
        if root is None or not self._others(change, path):
            return False
        inner = PurePath(os.path.relpath(real, root))
        if not _matches(inner, self._include) or _matches(inner, self._exclude):
            return False
        above = [os.path.join(root, each) for each in inner.parents if each.name]
        return not (INSTALLED in inner.parts or self._excluded & {real, *above} or any(map(_is_environment, above)))


class Causes:
    """Tells changes of the program from what the service itself writes at its start.

    A service may write files of its own program: a generator, a cache. With each restart it would write them again, and
    be restarted for that. So a start that leaves a file as it was has not changed it. Where one start after the other
    has changed something, the files are left alone for a while, and one more restart proves it, and after another while
    a second one. What both have changed, too, the service writes itself: from then on it counts only at other times. An
    editor that saves all the time does so between restarts as well.
    """

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}
        # When the last restart began, and when it was over, by the clock of files.
        self._begun = self._ended = -math.inf
        # How many restarts in a row were for nothing else than what the one before has written.
        self._in_a_row = 0
        # What is suspected, since when, whether the last restart was to prove it, how many have, and what is known.
        self._suspected: set[str] = set()
        self._since = math.inf
        self._is_proof = False
        self._proofs = 0
        self._written: set[str] = set()

    def begin(self) -> None:
        """Take note that the service is to be restarted."""
        self._begun = time.time()

    def end(self) -> None:
        """Take note that the restart is over, whatever has become of it."""
        self._ended = time.time()

    def find(self, paths: Iterable[str]) -> set[str]:
        """Return which of the files that were written are reasons for a restart; also where none was, for the proof."""
        by_start = {path: self._is_of_start(path) for path in paths}
        changed = {path for path, is_so in by_start.items() if self._note_content(path) or not is_so}
        changed -= {path for path in self._written if by_start.get(path)}
        if not changed:
            return self._find_proof()
        if others := {path for path in changed if not by_start[path]}:
            self._in_a_row, self._is_proof, self._proofs = 0, False, 0
            self._suspected.clear()
            self._written -= others
            return changed
        if self._is_proof:
            self._is_proof = False
            self._proofs += 1
            if self._proofs < PROOFS:
                return self._suspect(changed)
            self._proofs = 0
            self._written |= changed
            names = sorted(map(os.path.relpath, changed))
            remedy = " ".join(f"--reload-exclude {each}" for each in names)
            say(
                f"the service itself changes {', '.join(names)} at each start: that does not restart it any more, and "
                f"a change at another time does; to leave it out for good: {remedy}"
            )
            return set()
        self._in_a_row += 1
        if self._in_a_row < STARTS_THAT_WRITE:
            return changed
        return self._suspect(changed)

    def _suspect(self, changed: set[str]) -> set[str]:
        self._suspected |= changed
        self._since = time.time()
        return set()

    def _find_proof(self) -> set[str]:
        if not self._suspected or time.time() < self._since + PROOF_SECONDS:
            return set()
        suspected, self._suspected = self._suspected, set()
        self._in_a_row, self._is_proof = 0, True
        return suspected

    def _is_of_start(self, path: str) -> bool:
        """Say whether a file was last written while the service restarted."""
        try:
            written = os.stat(path).st_mtime
        except OSError:
            return False
        return self._begun - COARSE_SECONDS <= written <= self._ended + COARSE_SECONDS

    def _note_content(self, path: str) -> bool:
        """Say whether a file has other content than when it was last looked at; the first look does not know."""
        before = self._digests.pop(path, None)
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size > DIGEST_AT_MOST:
                    return True
                self._digests[path] = digest = hashlib.file_digest(file, "blake2b").digest()
        except OSError:
            # It was removed, or is being replaced.
            return True
        return digest != before


def _matches(path: PurePath, globs: Iterable[str]) -> bool:
    return any(path.match(each) for each in globs)


def _is_environment(directory: str) -> bool:
    return os.path.exists(os.path.join(directory, ENVIRONMENT_MARK))


def _watch(control: str, paths: list[str], wanted: Wanted) -> None:
    from watchfiles import watch

    # A file is watched by its directory, because editors, and those who deploy, put a new one in its place.
    watched = {os.path.dirname(path) for path in wanted.files} | {path for path in paths if os.path.isdir(path)}
    causes = Causes()
    # What changes during a restart is noted meanwhile, and comes afterwards, all of it at once.
    watching = watch(
        *watched,
        watch_filter=wanted,
        step=QUIET_MILLISECONDS,
        rust_timeout=FIRST_LOOK_MILLISECONDS,
        yield_on_timeout=True,
        raise_interrupt=False,
    )
    for count, changes in enumerate(watching):
        if not count:
            os.write(1, b"!")
        if not (changed := causes.find(path for _, path in changes)):
            continue
        what = f"{_describe(changed)} changed"
        say(f"{what}: restarting")
        if not _restart(control, f"--reload, because {what}"):
            return
        causes.end()


def _restart(control: str, by: str) -> bool:
    """Restart the service; say whether it is still there."""
    while True:
        try:
            client.restart(control, "serving", lambda event: None, by)
        except CommandFailed as error:
            # It starts, or another one goes on: what has changed may have come too late for that.
            if error.code is Exit.IN_PROGRESS or (error.event is not None and error.event.get("error") == "NotReady"):
                time.sleep(BUSY_PAUSE_SECONDS)
                continue
            if error.code is Exit.NO_SERVICE and not is_live(control):
                return False
            # The whole traceback came with the stderr of the process that has failed.
            say(f"the code before goes on serving: {str(error).splitlines()[0]}")
        return True


def _describe(paths: Iterable[str]) -> str:
    names = sorted({os.path.relpath(path) for path in paths})
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more have"


def _end_with_stdin(leave: Callable[[int], NoReturn] = os._exit) -> None:
    while os.read(0, 1024):
        pass
    leave(0)


if __name__ == "__main__":
    main()
