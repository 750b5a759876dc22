"""What watches the files of a service in development, and asks for a restart when one is saved: a process of its own.

Started as ``python -m ecdysis_async.cli.reload CONTROL PATH...`` by the process that serves; it ends with its standard
input, which is a pipe from there. Its standard output is one back, on which it says, by one byte, that it watches.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from ecdysis_async._management.control_path import is_live
from ecdysis_async._system.stderr import say

from . import client
from .client import CommandFailed, Exit

__all__ = ["main"]

# Changes that come within so many milliseconds of each other are one.
QUIET_MILLISECONDS = 100

# It is known to watch once it has seen nothing, or something, for so long.
FIRST_LOOK_MILLISECONDS = 200

# How often to try again while another restart is in progress, seconds.
BUSY_PAUSE_SECONDS = 0.2


def main() -> NoReturn:
    """Watch until the service, or the process that has started this one, is gone."""
    control, *paths = sys.argv[1:]
    # Ctrl-C reaches this process too: it ends with the service, and has nothing to say about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    _watch(control, paths)
    sys.exit(0)


def _watch(control: str, paths: list[str]) -> None:
    from watchfiles import Change, PythonFilter, watch

    is_python = PythonFilter()
    files = {os.path.realpath(path) for path in paths if not os.path.isdir(path)}

    def is_wanted(change: Change, path: str) -> bool:
        return is_python(change, path) or os.path.realpath(path) in files

    # A file is watched by its directory, because editors, and those who deploy, put a new one in its place.
    watched = {os.path.dirname(path) for path in files} | {path for path in paths if os.path.isdir(path)}
    # What changes during a restart is noted meanwhile, and comes afterwards, all of it at once.
    watching = watch(
        *watched,
        watch_filter=is_wanted,
        step=QUIET_MILLISECONDS,
        rust_timeout=FIRST_LOOK_MILLISECONDS,
        yield_on_timeout=True,
        raise_interrupt=False,
    )
    for count, changes in enumerate(watching):
        if not count:
            os.write(1, b"!")
        if not changes:
            continue
        say(f"{_describe(path for _, path in changes)} changed: restarting")
        if not _restart(control):
            return


def _restart(control: str) -> bool:
    """Restart the service; say whether it is still there."""
    while True:
        try:
            client.restart(control, "serving", lambda event: None)
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
