"""``--reload``, as the service sees it: a child that watches files, and asks for restarts by the control socket.

It is a child because watching needs threads and memory that a service, and an anchor above all, shall not have.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from ecdysis_async._system.process import Process, describe_exit
from ecdysis_async._system.signals import clean_mask
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import StartupError

__all__ = ["Watched", "require_watchfiles", "watch_files"]

logger = logging.getLogger("ecdysis_async")

WATCHER = "ecdysis_async.cli.reload"

# How long the child gets to end by itself once its pipe is closed, seconds.
END_GRACE_SECONDS = 2.0


def require_watchfiles() -> None:
    """Check that files can be watched.

    Raises:
        StartupError: the package that watches files is missing.
    """
    if importlib.util.find_spec("watchfiles") is None:
        raise StartupError("--reload needs watchfiles: pip install 'ecdysis_async[reload]'")


@dataclass(frozen=True, slots=True)
class Watched:
    """What is watched.

    Attributes:
        paths: files, and directories with all Python files below them.
        include: globs of other files below the directories.
        exclude: globs of files, and directories, that are left out.
    """

    paths: tuple[str, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def arguments(self, control: str) -> list[str]:
        """Return the command line of the watcher."""
        include, exclude = (
            (f"--include={each}" for each in self.include),
            (f"--exclude={each}" for each in self.exclude),
        )
        return [*include, *exclude, "--", control, *self.paths]


async def watch_files(control: str, watched: Watched) -> None:
    """Let a child watch until this is cancelled. If the child ends before that, the log says so, and no more.

    Args:
        control: the path of the control socket.
        watched: what it watches.
    """
    process, held, told = await run_in_thread(lambda: _start(watched.arguments(control)))
    try:
        await anyio.wait_readable(told)
        if os.read(told, 1):
            logger.info("watching %s: the service restarts when a file is saved", ", ".join(watched.paths))
        status = await process.wait()
        logger.error("nobody watches for changes any more: the watcher has ended (%s)", describe_exit(status))
    finally:
        # The child ends with this pipe.
        os.close(held)
        os.close(told)
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(END_GRACE_SECONDS):
                await process.wait()
            await process.end(0)
        process.close()


def _start(arguments: Sequence[str]) -> tuple[Process, int, int]:
    """Return the child, the end of a pipe that keeps it alive, and the end of a pipe on which it tells of itself."""
    with clean_mask():
        child = subprocess.Popen(
            [sys.executable, "-m", WATCHER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
    assert child.stdin is not None and child.stdout is not None
    with child.stdin, child.stdout:
        process = Process(child.pid, os.pidfd_open(child.pid))
        # The child is reaped by its pidfd, so Popen shall take it for dead.
        child.returncode = 0
        return process, os.dup(child.stdin.fileno()), os.dup(child.stdout.fileno())
