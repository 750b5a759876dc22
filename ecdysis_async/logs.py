"""Log files that were moved away, as logrotate(8) does it: closed, so that the next line opens the path anew."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

__all__ = ["reopen_logs"]


def reopen_logs() -> int:
    """Let each handler whose file was moved or removed open its path again; return how many there were.

    Those of :mod:`logging` that write to a file, wherever they hang: at a logger, behind a ``MemoryHandler``, or in the
    listener of a ``QueueHandler``. It looks at files: call it in a thread.
    """
    return sum(_reopen(handler) for handler in _file_handlers())


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
        # None: nothing was logged yet (delay=True), or it waits for its next line already.
        if stream is None or _is_at(stream.fileno(), handler.baseFilename):
            return False
        with contextlib.suppress(OSError):  # a full disk must not keep the descriptor of the file that is gone
            stream.flush()
        stream.close()
        # As it stands after delay=True. Appending, because another process may have opened the new file before.
        handler.stream = None
        handler.mode = handler.mode.replace("w", "a")
        return True
    finally:
        handler.release()


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
