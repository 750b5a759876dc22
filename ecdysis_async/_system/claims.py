"""What was passed to this process: taken once, with the first import of the package, and handed out once.

A process is passed a channel, a line or sockets as open descriptors, and a variable says which number is which. The
application may start a process at any time after its first import. That process would find the variable, or hold the
descriptors, as well. So this module takes both when it is imported, and starts nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Mapping

from .forking import withhold_from_children
from .history import history
from .import_times import import_times
from .stacks import hear_questions

__all__ = [
    "METRICS_ID_KEY",
    "PRIVATE_KEYS",
    "find_line",
    "find_metrics_id",
    "is_awaited",
    "is_check",
    "is_worker",
    "mark",
    "mark_restart",
    "restart_id",
    "take_activation",
    "take_channel",
    "take_last_word",
    "take_line",
    "take_lock_file",
]

# "<descriptor>:<st_dev>:<st_ino>" of the channel to the predecessor. The inode is there because the number alone would
# be believed by any process that gets the variable and has something else open under it.
MARKER = "ECDYSIS_CHANNEL"
# The same for the line between a worker and the anchor that it works for.
LINE_MARKER = "ECDYSIS_LINE"
# The same for the memory with the state of an anchor that executes itself anew, or lets the new code try it.
ANCHOR_MARKER = "ECDYSIS_ANCHOR"
ANCHOR_CHECK_MARKER = "ECDYSIS_ANCHOR_CHECK"
# The id of the restart that starts this process, and device and inode of the channel that it belongs to: a process in
# between may have let the variable through to a later one, which has a channel of its own.
RESTART_KEY = "ECDYSIS_RESTART"
# What a worker's metrics files of prometheus_client are called after, instead of its pid.
METRICS_ID_KEY = "ECDYSIS_METRICS_ID"
# The same for the file of the service's locks (lock_file.py).
LOCK_FILE_MARKER = "ECDYSIS_LOCK_FILE"
# The same for the memory with what the predecessor has counted, which it goes on writing until the commit.
LAST_WORD_MARKER = "ECDYSIS_LAST_WORD"
# Set for a process that tells over the channel what it is, and ends: it is no generation.
CHECK_KEY = "ECDYSIS_CHECK"
# Where the processes of this service write down what happens.
HISTORY_KEY = "ECDYSIS_HISTORY"

# Addressed to this process and to no other: its markers, the sockets it was activated with (sd_listen_fds(3)), and who
# must pet the watchdog (sd_watchdog_enabled(3)). WATCHDOG_USEC and NOTIFY_SOCKET hold for the successor as well.
PRIVATE_KEYS = (
    MARKER,
    LINE_MARKER,
    ANCHOR_MARKER,
    ANCHOR_CHECK_MARKER,
    LOCK_FILE_MARKER,
    LAST_WORD_MARKER,
    CHECK_KEY,
    RESTART_KEY,
    METRICS_ID_KEY,
    HISTORY_KEY,
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
)

# SD_LISTEN_FDS_START of sd_listen_fds(3): what a process is activated with begins behind stdin, stdout and stderr.
FIRST_DESCRIPTOR = 3

# More than a process can have, unless fs.nr_open is raised (proc(5)), and so many digits has no such number.
MAX_DESCRIPTORS = 2**20
COUNT_DIGITS = 7

# What sd_listen_fds_with_names(3) calls a socket that was given no name.
ANONYMOUS = "unknown"

# Before the name of each piece of its state that this service has parked in systemd's descriptor store.
STATE_PREFIX = "ecdysis-stash;"

# What a terminal, or an operator who means the anchor, sends to the whole process group: the anchor acts upon it.
_ANCHORS_SIGNALS = ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


def mark(descriptor: int) -> str:
    """Return the marker of a descriptor, for the variable of the process that is passed it."""
    found = os.fstat(descriptor)
    return f"{descriptor}:{found.st_dev}:{found.st_ino}"


def mark_restart(restart: str, channel: int) -> str:
    """Return what tells a process, by its first line, which restart it was started for.

    Args:
        restart: the id.
        channel: the descriptor of the process' end of the channel.
    """
    found = os.fstat(channel)
    return f"{restart}:{found.st_dev}:{found.st_ino}"


def claim_socket(key: str) -> socket.socket | None:
    """Return the Unix stream socket that a variable names; None if there is none.

    The variable is taken out of the environment, so that no process started from here takes itself for the one that is
    meant. A marker that does not fit what is open under its number is ignored.
    """
    descriptor = _claim_descriptor(key, stat.S_ISSOCK)
    if descriptor is None:
        return None
    sock = socket.socket(fileno=descriptor)
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.detach()
        return None
    sock.set_inheritable(False)
    # The application may fork while it is imported, before anything takes this: see forking.py.
    withhold_from_children(sock)
    return sock


def _claim_descriptor(key: str, is_kind: Callable[[int], bool]) -> int | None:
    """Return the descriptor that a variable names, which is taken out of the environment; None if there is none.

    Args:
        key: the variable.
        is_kind: says of a file's mode whether it is what is meant.
    """
    marker = os.environ.pop(key, None)
    if marker is None:
        return None
    try:
        descriptor, device, inode = map(int, marker.split(":"))
        found = os.fstat(descriptor)
    # It came through a process in between, which does not have the descriptor; or somebody else wrote it.
    except (ValueError, OverflowError, OSError):
        return None
    return descriptor if (found.st_dev, found.st_ino) == (device, inode) and is_kind(found.st_mode) else None


def claim_activation() -> dict[int, str]:
    """Return the sockets that systemd has passed to this process: the name of each, by its descriptor.

    ``LISTEN_*`` is taken out of the environment, so that no process started from here takes the sockets for its own. A
    descriptor that is no socket (ListenFIFO=, a file) is left as it is, unless an earlier process of the service has
    parked it.
    """
    pid, count, names, _ = (
        os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
    )
    # The variables of another process came through a shell, or through a service that does not take them out.
    if pid != str(os.getpid()) or not count.isdecimal() or len(count) > COUNT_DIGITS:
        return {}
    sockets = {}
    given = names.split(":")
    for index in range(min(int(count), MAX_DESCRIPTORS)):
        descriptor = FIRST_DESCRIPTOR + index
        # A program that ran before in this process may have closed it.
        with contextlib.suppress(OSError):
            # systemd passes them without CLOEXEC, because it executes this program with them.
            os.set_inheritable(descriptor, False)
            name = (given[index] if index < len(given) else "") or ANONYMOUS
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode) or name.startswith(STATE_PREFIX):
                sockets[descriptor] = name
    return sockets


_channel: socket.socket | None = claim_socket(MARKER)
if _channel is not None:
    # A process that ends before anything takes the channel has nobody else who closes it.
    atexit.register(_channel.close)


def _claim_restart() -> str:
    restart, _, marker = os.environ.pop(RESTART_KEY, "").partition(":")
    is_ours = _channel is not None and mark(_channel.fileno()).partition(":")[2] == marker
    return restart if is_ours and restart.isalnum() else ""


_restart_id = _claim_restart()

_line: socket.socket | None = claim_socket(LINE_MARKER)
_is_worker = _line is not None
if _line is not None:
    atexit.register(_line.close)
if _is_worker and threading.current_thread() is threading.main_thread():
    # These signals are caught from now on, because a worker that still imports its application would die of Ctrl-C
    # with a traceback. A handler ends with an exec: what the application starts does not ignore them.
    for _name in _ANCHORS_SIGNALS:
        signal.signal(signal.Signals[_name], lambda number, frame: None)

_lock_file = _claim_descriptor(LOCK_FILE_MARKER, stat.S_ISREG)
if _lock_file is not None:
    os.set_inheritable(_lock_file, False)

_last_word = _claim_descriptor(LAST_WORD_MARKER, stat.S_ISREG)
if _last_word is not None:
    os.set_inheritable(_last_word, False)

# A user's variable of this name has no channel with it, over which this process could tell what it is.
_is_check = os.environ.pop(CHECK_KEY, None) is not None and _channel is not None

_metrics_id = os.environ.pop(METRICS_ID_KEY, None)

_activation: Mapping[int, str] = claim_activation()

_history_path = os.environ.pop(HISTORY_KEY, None)
if _history_path is not None and _channel is not None and not _is_check:
    # From the first import on, because it is the imports, and a start that hangs, which somebody may want explained.
    history.open(_history_path)
    if _restart_id:
        history.write_from_now_on()
    import_times.begin()
    hear_questions()


def take_channel() -> socket.socket | None:
    """Return the channel to the process that has started this one, once; None if there is none, or it was taken."""
    global _channel
    sock, _channel = _channel, None
    return sock


def restart_id() -> str:
    """Return the id of the restart that this process was started for; empty for none, or where nobody has told."""
    return _restart_id


def take_line() -> socket.socket | None:
    """Return the line to the anchor, once; None if this process is no worker, or the line was taken."""
    global _line
    sock, _line = _line, None
    return sock


def find_line() -> socket.socket | None:
    """Return the line to the anchor as long as nobody has taken it; it stays the property of who does."""
    return _line


def take_lock_file() -> int | None:
    """Return the descriptor of the service's locks, once; None if this process was passed none, or it was taken."""
    global _lock_file
    descriptor, _lock_file = _lock_file, None
    return descriptor


def take_last_word() -> int | None:
    """Return the descriptor of the predecessor's last word, once; None if there is none, or it was taken."""
    global _last_word
    descriptor, _last_word = _last_word, None
    return descriptor


def take_activation() -> Mapping[int, str]:
    """Return the sockets that systemd has passed to this process, once: the name of each, by its descriptor."""
    global _activation
    activation, _activation = _activation, {}
    return activation


def find_metrics_id() -> str | None:
    """Return what the metrics files of this worker are called after; None where they have its pid."""
    return _metrics_id


def is_worker() -> bool:
    """Say whether this process was started by an anchor, to be one of its workers."""
    return _is_worker


def is_awaited() -> bool:
    """Say whether this process was started to serve, and nothing in it does so yet: its program is still imported."""
    return _channel is not None or _line is not None


def is_check() -> bool:
    """Say whether this process was started to tell what it is, and to end."""
    return _is_check
