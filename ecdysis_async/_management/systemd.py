"""What a service and systemd tell each other: notifications, the watchdog, and the sockets of an activation.

The datagrams of sd_notify(3) and the variables of sd_listen_fds(3), without libsystemd. What is to be said, and when,
the supervisor decides; here it is only said if this process is the unit's main one, because systemd hears no other
(NotifyAccess=main). Nothing here blocks the loop, and no deafness of systemd ends a service.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable

import anyio

from ecdysis_async._system.threads import run_in_thread

__all__ = ["Systemd", "check_unit", "find_shortcoming", "find_systemd", "forbid_restart"]

logger = logging.getLogger("ecdysis_async")

# Before the name of each socket that this service has parked in the descriptor store.
SOCKET_PREFIX = "ecdysis;"

# How long systemd may take to read a message, and to answer a barrier, seconds. It takes milliseconds, unless it is
# stopped, or being executed anew.
SEND_SECONDS = 5.0

# Of systemd: since which version a service is told that it has a descriptor store (FDSTORE=).
TELLS_OF_STORE = 254

# Whether the machine runs systemd, as sd_booted(3) asks.
BOOTED = "/run/systemd/system"

# How long systemctl may take, seconds.
ASK_SECONDS = 2.0


def find_systemd(wanted: bool | None) -> Systemd:  # noqa: FBT001 - the setting as the user gave it
    """Return the way to systemd, or one that leads nowhere if there is none, or none is wanted.

    Args:
        wanted: None: if this process was given NOTIFY_SOCKET; True: it has to be there; False: never.

    Raises:
        ValueError: it is wanted and not there, or is of a kind that is not supported.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if wanted and not address:
        raise ValueError(
            "systemd=True, but NOTIFY_SOCKET is not set: put Type=notify into the unit's [Service], "
            "or leave systemd= out to run with and without it"
        )
    return Systemd("" if wanted is False else address, _read_watchdog())


def _read_watchdog() -> float | None:
    """Return WatchdogSec= in seconds, where it holds for this process (sd_watchdog_enabled(3))."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    # A successor has no WATCHDOG_PID: it becomes the main process later, and the watchdog passes over to it.
    is_ours = os.environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
    return int(microseconds) / 1e6 if is_ours and microseconds.isdecimal() and int(microseconds) else None


async def find_shortcoming(*, has_socket_unit: bool) -> str | None:
    """Return what the unit asks of a systemd that is too old for it, and what to do instead; None where it is not so.

    sd_notify(3) tells no version, and a systemd that does not understand a message says nothing. So systemctl is asked,
    and only where something may be amiss: this process has a systemd, has been executed by it and not in a container,
    and was told of no descriptor store, which is what those before 254 never tell of.

    Args:
        has_socket_unit: whether systemd itself listens, so that nothing has to be kept.
    """
    if has_socket_unit:
        return None
    is_executed = os.environ.get("SYSTEMD_EXEC_PID", str(os.getpid())) == str(os.getpid())
    if not (os.environ.get("NOTIFY_SOCKET") and is_executed) or "FDSTORE" in os.environ:
        return None
    if not os.path.isdir(BOOTED):  # noqa: ASYNC240 - it is in memory
        return None
    return await run_in_thread(_find_shortcoming, abandon_on_cancel=True)


def _find_shortcoming() -> str | None:
    words = _ask_systemctl("--version").split()
    version = words[1] if words[:1] == ["systemd"] and len(words) > 1 else ""
    if not version.isdecimal() or int(version) >= TELLS_OF_STORE:
        return None
    *slices, unit = _read_control_group() or [""]
    if not unit.endswith(".service"):
        return None
    manager = ["--user"] if any(each.startswith("user@") for each in slices) else []
    size = _ask_systemctl(*manager, "show", "--value", "--property=FileDescriptorStoreMax", unit).strip()
    if size in ("", "0"):
        return None
    return (
        f"systemd {version} is too old for FileDescriptorStoreMax={size}: a service is told of its descriptor store "
        f"since {TELLS_OF_STORE}, so nothing is kept there, and after a crash clients are refused until the next "
        "start. Take that line out, and let a socket unit listen (`ecdysis unit --socket`), which this one can do, too"
    )


def _ask_systemctl(*arguments: str) -> str:
    """Return what it says; "" where it is not there, or does not answer."""
    try:
        return subprocess.run(
            ["systemctl", *arguments],  # noqa: S607 - where it is, distributions do not agree
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=ASK_SECONDS,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _read_control_group() -> list[str]:
    """Return the path of this process' control group, down to the unit; none where it is in no such group."""
    with contextlib.suppress(OSError), open("/proc/self/cgroup", encoding="utf-8") as groups:
        for line in groups:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers in ("", "name=systemd") and ".service" in path:
                parts = path.split("/")
                while not parts[-1].endswith(".service"):
                    parts.pop()
                return parts
    return []


def forbid_restart() -> str | None:
    """Return why a restart would end the unit that this first generation runs in, and what to do; None if it would not.

    systemd itself has executed this process (SYSTEMD_EXEC_PID, systemd.exec(5), since 248), and has given it no socket
    to say on that another process is the main one from now on. Only a unit that lives as long as any of its processes
    (ExitType=cgroup) would outlive that, and a process cannot know it: ``systemd=False`` says so.
    """
    if os.environ.get("SYSTEMD_EXEC_PID") != str(os.getpid()) or os.environ.get("NOTIFY_SOCKET"):
        return None
    return (
        "this service of systemd has no notification socket: a restart would end it, because systemd takes the exit of "
        "the old process for the end of the service. Put Type=notify into the unit's [Service], also where it says "
        "Type=notify-reload, which systemd knows since 253; or set systemd=False if it says ExitType=cgroup"
    )


def check_unit() -> str | None:
    """Return what is wrong with the unit of this first generation, as far as a process can know; else None.

    Besides what forbids a restart that is a wrapper, where systemd has executed another process, which has started this
    one. Which NotifyAccess= there is, other than "none", a process cannot know.
    """
    if (reason := forbid_restart()) is not None:
        return reason
    executed = os.environ.get("SYSTEMD_EXEC_PID", "")
    if executed in ("", str(os.getpid())) or not os.environ.get("NOTIFY_SOCKET"):
        return None
    return (
        f"the unit's main process is pid {executed} and not this one, so systemd hears nothing from here unless "
        "the unit says NotifyAccess=all. Start this program without a wrapper, or by `exec` (ExecStart=)"
    )


class Systemd:
    """The voice of one generation at systemd. It is silent until :meth:`begin`, and after :meth:`name_main`.

    Args:
        address: what NOTIFY_SOCKET says: a path, or "@name" for an abstract address; "" where there is no systemd, and
            so never anything to say.
        watchdog: within how many seconds systemd wants to hear of a sound loop, if it does.

    Attributes:
        watchdog: within how many seconds systemd wants to hear of a sound loop; None if it does not.
        begun: set once this process is the unit's main one.
        is_sound: says whether the service is as it should be besides this loop; while it is not, the watchdog is left
            unfed.

    Raises:
        ValueError: the address is of another kind.
    """

    def __init__(self, address: str, watchdog: float | None = None) -> None:
        if address and not address.startswith(("/", "@")):
            raise ValueError(f"NOTIFY_SOCKET={address} is neither a path nor an abstract address: set systemd=False")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = watchdog if address else None
        self._is_main = False
        self._is_deaf = False
        self._status = ""
        # With the descriptors that go along, owned by this object.
        self._messages: deque[tuple[str, tuple[int, ...]]] = deque()
        self._wakeup = anyio.Event()
        # Two tasks may send, and READY must not overtake RELOADING.
        self._sending = anyio.Lock()
        self.begun = anyio.Event()
        self.is_sound: Callable[[], bool] = lambda: True

    @property
    def is_there(self) -> bool:
        """Whether there is a systemd to speak to."""
        return bool(self._address)

    @property
    def is_main(self) -> bool:
        """Whether systemd takes this process for the unit's main one."""
        return self._is_main

    def begin(self) -> None:
        """Speak from now on: this process is the unit's main one. Only the first time counts."""
        if self.is_there and not self.begun.is_set():
            self._is_main = True
            self.begun.set()
            if self.watchdog is not None:
                self.tell("WATCHDOG=1")

    def tell(self, *assignments: str, descriptors: Iterable[int] = ()) -> None:
        """Let ``run`` send a message, after those before it. A process that is not the main one says nothing.

        Args:
            assignments: its lines.
            descriptors: what goes along; they stay the caller's, and may be closed at once.
        """
        if self._is_main:
            self._messages.append(("\n".join(assignments), tuple(map(os.dup, descriptors))))
            self._wakeup.set()

    def tell_status(self, text: str) -> None:
        """Say in one line where the service stands; nothing if that is what was said last."""
        line = " ".join(text.split())
        if self._is_main and line != self._status:
            self._status = line
            self.tell(f"STATUS={line}")

    def tell_failure(self, error: BaseException, status: int = 1) -> None:
        """Say why the service ends, and with which exit status: ERRNO= and EXIT_STATUS= of sd_notify(3)."""
        code = error.code if isinstance(error, SystemExit) else None
        assignments = [f"EXIT_STATUS={code if isinstance(code, int) else status}"]
        if isinstance(error, OSError) and error.errno:
            assignments.insert(0, f"ERRNO={error.errno}")
        self.tell(*assignments)

    def tell_reloading(self, limit: float) -> None:
        """Say that a restart has begun, which may take so many seconds; READY=1 has to follow."""
        # One datagram: systemd takes it for an answer to its SIGHUP only by this time (systemd.service(5)).
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now}", _extension(limit))

    def ask_for_time(self, seconds: float) -> None:
        """Say that what goes on may take so many seconds from now, whatever the unit's timeouts say."""
        self.tell(_extension(seconds))

    async def run(self) -> None:
        """Send what is told, and pet the watchdog as often as it takes, as long as the loop turns."""
        async with anyio.create_task_group() as task_group:
            if self.watchdog is not None:
                task_group.start_soon(self._pet, self.watchdog / 2)
            while True:
                await self.flush()
                self._wakeup = anyio.Event()
                if not self._messages:
                    await self._wakeup.wait()

    async def name_main(self, pid: int, *assignments: str) -> None:
        """Make another process the unit's main one, and be silent; returns when systemd has taken note.

        Cancelled, systemd may or may not have heard of it.
        """
        self.tell(f"MAINPID={pid}", *assignments)
        self._is_main = False
        await self.synchronize()

    async def flush(self) -> None:
        """Send what was told so far."""
        async with self._sending:
            while self._messages:
                text, descriptors = self._messages[0]
                await self._send(text.encode(), *descriptors)
                self._forget_first()

    async def synchronize(self) -> None:
        """Return when systemd has read all that was told: who exits earlier may not be heard (sd_notify_barrier(3))."""
        await self.flush()
        read_end, write_end = os.pipe()
        try:
            try:
                async with self._sending:
                    is_sent = await self._send(b"BARRIER=1", write_end)
            finally:
                os.close(write_end)
            # systemd closes its copy when it comes to this message.
            with anyio.move_on_after(SEND_SECONDS if is_sent else 0):
                await anyio.wait_readable(read_end)
        finally:
            os.close(read_end)

    def close(self) -> None:
        """Forget what was not sent."""
        while self._messages:
            self._forget_first()

    def _forget_first(self) -> None:
        for descriptor in self._messages.popleft()[1]:
            os.close(descriptor)

    async def _pet(self, pause: float) -> None:
        while True:
            if self.is_sound():
                self.tell("WATCHDOG=1")
            await anyio.sleep(pause)

    async def _send(self, message: bytes, *descriptors: int) -> bool:
        """Send one datagram. That it does not arrive is said once; the service goes on without it."""
        try:
            # Connected anew each time, as systemd may be executed anew, and because only then the kernel says when
            # there is room in the receiver's queue (unix(7)).
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, anyio.fail_after(SEND_SECONDS):
                sock.setblocking(False)
                sock.connect(self._address)
                while True:
                    try:
                        socket.send_fds(sock, [message], descriptors)
                    except BlockingIOError:
                        await anyio.wait_writable(sock)
                    else:
                        return True
        except OSError as error:
            if not self._is_deaf:
                logger.warning("systemd does not hear this service (NOTIFY_SOCKET=%r): %r", self._address, error)
            self._is_deaf = True
            return False


def _extension(seconds: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={int(min(seconds, sys.maxsize / 1e6) * 1e6)}"
