"""What a service tells systemd: the notifications of sd_notify(3), and the watchdog, without libsystemd.

The management of the service decides what is said, and when. It is sent if this process is the unit's main one, because
systemd hears no other (NotifyAccess=main). Nothing here blocks the loop, and no deafness of systemd ends a service.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable

import anyio

from ecdysis_async._system.reserve import Reserve

__all__ = ["Systemd", "find_systemd"]

logger = logging.getLogger("ecdysis_async")

# Before the name of each socket that this service has parked in the descriptor store.
SOCKET_PREFIX = "ecdysis;"

# How long systemd may take to read a message, and to answer a barrier, seconds. It takes milliseconds, unless it is
# stopped, or being executed anew.
SEND_SECONDS = 5.0

# A socket for one message, and a pipe for a barrier: what is kept for the moment in which no other descriptor is left.
RESERVED = 3


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
    if not is_ours or not microseconds.isdecimal() or len(microseconds) > len(str(2**64)):
        return None
    return int(microseconds) / 1e6 or None


class Systemd:
    """Tells systemd of one generation, from :meth:`begin` to :meth:`name_main`; at other times it is silent.

    An object without an address does nothing, so nobody has to ask for it before telling it something.

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
        # What is still to be sent, with the descriptors that go along, which this object owns.
        self._messages: deque[tuple[str, tuple[int, ...]]] = deque()
        self._wakeup = anyio.Event()
        # Clients may use up all descriptors. A service that fell silent then would be taken for dead by the watchdog,
        # and its restart, which is the remedy, could not make the successor the main process.
        self._reserve = Reserve(RESERVED)
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
        """Speak from now on, because this process is the unit's main one. A second call does nothing."""
        if self.is_there and not self.begun.is_set():
            self._is_main = True
            self.begun.set()
            if self.watchdog is not None:
                self.tell("WATCHDOG=1")

    async def wait_until_main(self) -> None:
        """Return when this process is, or was, the unit's main one; at once where there is no systemd."""
        if self.is_there:
            await self.begun.wait()

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
        # It is one datagram. By the time in it, systemd takes it for an answer to its SIGHUP (systemd.service(5)).
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now}", _extension(limit))

    def ask_for_time(self, seconds: float) -> None:
        """Say that what goes on may take so many seconds from now, instead of the unit's own timeouts."""
        self.tell(_extension(seconds))

    async def run(self) -> None:
        """Send what is told, and pet the watchdog as often as it takes, as long as the loop turns."""
        self._reserve.fill()
        try:
            async with anyio.create_task_group() as task_group:
                if self.watchdog is not None:
                    task_group.start_soon(self._pet, self.watchdog / 2)
                while True:
                    await self.flush()
                    self._wakeup = anyio.Event()
                    if not self._messages:
                        await self._wakeup.wait()
        finally:
            self._reserve.give_up()

    async def name_main(self, pid: int, *assignments: str) -> None:
        """Make another process the unit's main one, and be silent; returns when systemd has taken note.

        Cancelled, systemd may or may not have heard of it.
        """
        self.tell(f"MAINPID={pid}", *assignments)
        self._is_main = False
        await self._synchronize()

    async def flush(self) -> None:
        """Send what was told so far."""
        async with self._sending:
            while self._messages:
                text, descriptors = self._messages[0]
                await self._send(text.encode(), *descriptors)
                self._forget_first()

    async def synchronize(self) -> None:
        """Return when systemd has read all that was told: who exits earlier may not be heard (sd_notify_barrier(3)).

        A process that systemd does not take for the main one was not heard, and does not wait.
        """
        if self._is_main:
            await self._synchronize()

    async def _synchronize(self) -> None:
        await self.flush()
        try:
            read_end, write_end = self._reserve.open(os.pipe)
        except OSError as error:
            self._tell_deaf(error)
            return
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
            self._reserve.take_back()

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
        """Send one datagram. The first one that does not arrive is logged; the service goes on without them."""
        try:
            # The socket is connected anew each time, because systemd may be executed anew. It is connected at all,
            # because the kernel then says when there is room in the receiver's queue (unix(7)).
            with self._reserve.open(_make_socket) as sock, anyio.fail_after(SEND_SECONDS):
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
            self._tell_deaf(error)
            return False
        finally:
            self._reserve.take_back()

    def _tell_deaf(self, error: OSError) -> None:
        if not self._is_deaf:
            logger.warning("systemd does not hear this service (NOTIFY_SOCKET=%r): %r", self._address, error)
        self._is_deaf = True


def _make_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def _extension(seconds: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={int(min(seconds, sys.maxsize / 1e6) * 1e6)}"
