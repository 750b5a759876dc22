"""Log files that were moved away, as logrotate(8) does it: their paths are opened anew, and those files closed.

Those of :mod:`logging` and of loguru are found here; the application says itself how others are opened anew.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import anyio

__all__ = ["Reopen", "on_reopen_logs", "reopen_logs", "reopen_logs_of_application"]

Reopen = Callable[[], object]
"""Opens log files of the application's own anew; what it returns is awaited where that is to be awaited."""

F = TypeVar("F", bound=Reopen)

logger = logging.getLogger("ecdysis_async")


# How long a function of the application's may take, seconds: older generations are told after it.
REOPEN_SECONDS = 10.0

# What the application wants to be told, in this process: also before its Ecdysis is there, and under another server.
_reopeners: list[Reopen] = []


def on_reopen_logs(reopen: F) -> F:
    """Have a function called whenever log files shall be opened anew (``ecdysis reopen-logs``, SIGUSR1); return it.

    It is for files that neither :mod:`logging` nor loguru has opened, and may stand as a decorator. It is called on the
    loop of each process of the service: of every worker, and of older generations that still drain. It may be async.
    An error is logged, and keeps nothing else from being opened anew; so is one that takes longer than ten seconds, and
    is cancelled then. Where no ``Ecdysis`` runs it is never called.

    Args:
        reopen: is called without arguments.
    """
    _reopeners.append(reopen)
    return reopen


async def reopen_logs_of_application() -> int:
    """Let the application open its own log files anew; return how many functions have done so."""
    count = 0
    for reopen in tuple(_reopeners):
        try:
            done = reopen()
            if inspect.isawaitable(done):
                with anyio.fail_after(REOPEN_SECONDS):
                    await done
        except Exception:
            logger.exception("a log file of the application's own was not opened anew: mend what the traceback names")
        else:
            count += 1
    return count


def reopen_logs() -> int:
    """Let each handler whose file was moved or removed open its path again; return how many did.

    Those of :mod:`logging` that write to a file, wherever they hang: at a logger, behind a ``MemoryHandler``, or in the
    listener of a ``QueueHandler``. One that cannot keeps the file that it has, and the log says so. It looks at files:
    call it in a thread.
    """
    count = 0
    for handler in _file_handlers():
        try:
            count += _reopen(handler)
        except Exception as error:  # noqa: BLE001 - an application's own kind of handler may raise whatever it likes
            logger.warning(
                "the log file %s cannot be opened anew, and what was its file is written to as before: %s; let uid %d "
                "create and write it (logrotate.conf(5): create, su), and reopen the logs again",
                handler.baseFilename,
                error,
                os.geteuid(),
            )
    return count + _reopen_loguru()


def _file_handlers() -> Iterator[logging.FileHandler]:
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.Logger.manager.loggerDict))]
    left = [handler for logger in loggers for handler in logger.handlers]
    seen: set[int] = set()
    while left:
        handler = left.pop()
        if id(handler) in seen:
            continue
        seen.add(id(handler))
        if isinstance(handler, logging.FileHandler):
            yield handler
        # MemoryHandler has a target, and QueueHandler, since Python 3.12, a listener: by name, because neither module
        # is loaded where nobody uses it.
        listener = getattr(handler, "listener", None)
        behind = [getattr(handler, "target", None), *getattr(listener, "handlers", ())]
        left += [each for each in behind if isinstance(each, logging.Handler)]


def _reopen(handler: logging.FileHandler) -> bool:
    handler.acquire()
    try:
        stream = handler.stream
        # None: nothing was logged yet (delay=True). Closed: a rotation of its own has failed.
        if stream is None or (not stream.closed and _is_at(stream.fileno(), handler.baseFilename)):
            return False
        # Appending, because another process may have opened the new file before.
        handler.mode = handler.mode.replace("w", "a")
        # Open the new file before the other is closed. A handler without a file opens it with its next line, and where
        # that fails it raises at the caller who logs. Where it fails here, the file that was moved is better than none.
        handler.stream = handler._open()  # noqa: SLF001 - CPython's: subclasses override it, and a rotation calls it
        with contextlib.suppress(OSError):  # what a full disk does not take; it is closed all the same
            stream.close()
        return True
    finally:
        handler.release()


def _reopen_loguru() -> int:
    """Let each file that loguru writes to, and that was moved or removed, be opened anew; return how many were.

    loguru has a switch for that (``watch=True``), which looks at the file before each line, and no function to ask for
    it. What is used of loguru is as in its release 0.7.
    """
    loguru = sys.modules.get("loguru")
    if loguru is None:
        return 0
    count = 0
    try:
        for handler in list(loguru.logger._core.handlers.values()):  # noqa: SLF001 - loguru's
            sink = handler._sink  # noqa: SLF001 - loguru's
            if type(sink).__name__ == "FileSink":
                lock = handler._queue_lock if handler._enqueue else handler._protected_lock()  # noqa: SLF001 - loguru's
                with lock:
                    count += _reopen_sink(sink)
    except AttributeError as error:
        logger.warning(
            "this release of loguru does not show its log files (%s): open them with watch=True, or see to them by "
            "ecdysis_async.on_reopen_logs",
            error,
        )
    except OSError as error:
        logger.warning(
            "a log file of loguru's cannot be opened anew, and what was its file is written to as before: %s", error
        )
    return count


def _reopen_sink(sink: Any) -> bool:
    before, path = sink._file, sink._file_path  # noqa: SLF001 - loguru's
    # None: nothing was logged yet (delay=True).
    if before is None or _is_at(before.fileno(), path):
        return False
    # Appending, because another process may have opened the new file before.
    sink._kwargs["mode"] = sink._kwargs["mode"].replace("w", "a")  # noqa: SLF001 - loguru's
    sink._create_file(path)  # noqa: SLF001 - loguru's
    with contextlib.suppress(OSError):  # what a full disk does not take; it is closed all the same
        before.close()
    return True


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        # It was removed; or it cannot even be seen, by a process that is not root any more.
        return False
