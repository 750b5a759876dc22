"""The terminal that a service was started from: whether the service is in its foreground, and whether it is gone.

A terminal that is closed says so by SIGHUP, as an operator does who wants a restart. The process that somebody watches
and ends by Ctrl-C has nobody left then.
"""

from __future__ import annotations

import os
import signal

__all__ = ["is_in_foreground", "is_terminal_gone"]


def is_in_foreground() -> bool:
    """Say whether this process is to end with its terminal. Call it before SIGHUP has a handler.

    A daemon has no terminal, a shell's job in the background has left it to others, and nohup(1) ignores SIGHUP.
    """
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return False
    try:
        return _read_foreground_group() == os.getpgrp()
    except OSError:
        return False


def is_terminal_gone() -> bool:
    """Say whether this process, which had a terminal, has none any more."""
    try:
        _read_foreground_group()
    except OSError:
        return True
    return False


def _read_foreground_group() -> int:
    """Return the process group that the controlling terminal is given to.

    Raises:
        OSError: there is no controlling terminal (ENXIO), or it is closed (EIO, ENOTTY).
    """
    terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.tcgetpgrp(terminal)
    finally:
        os.close(terminal)
