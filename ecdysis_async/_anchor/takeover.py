"""The takeover of a whole anchor: another process goes on with its workers, its sockets and all it knows.

The state that an upgrade in place leaves to the same process (reexec.py) travels to another one here, and with it every
descriptor. Each side waits for the other's word before it acts, so that two never act at once. The newcomer begins at
the former anchor's last word, or at its death, proved by its pidfd. Everything here blocks. The former anchor waits for
the newcomer in a thread, so that a newcomer that stalls holds nobody up.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ecdysis_async._ipc.channel import READ_SIZE, Frame, FrameDecoder, encode
from ecdysis_async._management.takeover import ask_for_channel
from ecdysis_async._system.claims import LINE_MARKER
from ecdysis_async._system.descriptors import DescriptorWriter, find_pid, read_credentials, receive_with_descriptors
from ecdysis_async.errors import ChannelError, TakeoverFailed

from . import reexec

__all__ = ["UNREADABLE", "Takeover", "ask_for_service", "hear_taken", "let_go", "offer_service"]

STATE, TAKEN, GO = "state", "taken", "go"

MAX_STATE_BYTES = 64 * 1024 * 1024

# What comes of a state that is not as an anchor writes it.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

# How long either side may take over its next word, seconds. That is far more than it needs, and the former anchor hears
# nobody else meanwhile.
ANSWER_SECONDS = 5.0

# How long a newcomer may take in all, from the state to the word that it has taken it, seconds.
TAKE_SECONDS = 10.0

# How long the former anchor waits for room in the channel, seconds: nobody else is heard meanwhile.
SEND_SECONDS = 1.0

# An end of file comes a moment before the pidfd of a dying process is readable, milliseconds.
DEATH_GRACE_MILLISECONDS = 2000


@dataclass(slots=True)
class Takeover:
    """What a newcomer was given, and its way to say that it has taken it.

    Attributes:
        state: what the former anchor knew. Descriptors have the numbers in it that they have in this process.
        former_pid: the pid of the former anchor.
    """

    state: Mapping[str, Any]
    former_pid: int
    _sock: socket.socket
    _decoder: FrameDecoder
    _pidfd: int

    def confirm(self) -> None:
        """Say that the state is taken; return when this process is the anchor.

        Raises:
            TakeoverFailed: the former anchor goes on.
        """
        try:
            if self._hear_go():
                return
            # From here on the former anchor cannot say it any more. It may have said it in this moment.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)
            if self._hear_word():
                return
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            # The former anchor's last word may have been lost with it. If it is dead, nobody else is there to go on.
            if not poll.poll(DEATH_GRACE_MILLISECONDS):
                raise TakeoverFailed("the service did not hand over in the end, and goes on: its log says why")
        finally:
            self._sock.close()
            os.close(self._pidfd)

    def _hear_go(self) -> bool:
        try:
            _send(self._sock, TAKEN, {})
        except (ChannelError, OSError):
            return False
        return self._hear_word()

    def _hear_word(self) -> bool:
        try:
            frame = _receive(self._sock, self._decoder)
        except (ChannelError, OSError):
            return False
        frame.close()
        return frame.type == GO


def ask_for_service(path: str) -> Takeover:
    """Ask the anchor with a control socket for everything that it has.

    Raises:
        TakeoverFailed: no anchor is there, or it refuses, or cannot be understood; nothing has changed then.
    """
    sock = ask_for_channel(path, anchor=reexec.FORMAT)
    sock.settimeout(ANSWER_SECONDS)
    decoder = FrameDecoder()
    with contextlib.ExitStack() as received:
        # Everything that came is closed unless all of it can be taken over.
        received.callback(sock.close)
        received.callback(decoder.close)
        try:
            frame = _receive(sock, decoder)
            received.callback(frame.close)
            memory, pidfd, *descriptors = frame.descriptors
            state = json.loads(_read_memory(memory))
            if state["format"] != reexec.FORMAT:
                raise TakeoverFailed(
                    f"the service's state is of format {state['format']}, this release reads another one"
                )
            here = dict(zip(map(int, frame.body["numbers"]), descriptors, strict=True))
            former_pid = int(frame.body["pid"])
            # The kernel's word for who has made the channel.
            if former_pid != read_credentials(sock).pid or find_pid(pidfd) not in (None, former_pid):
                raise TakeoverFailed(
                    f"the service at {path} does not speak for itself: it says that it is {former_pid}"
                )
            _require_workers(state, here, former_pid)
            takeover = Takeover(_translate(state, here), former_pid, sock, decoder, pidfd)
        except (ChannelError, OSError, *UNREADABLE) as error:
            raise TakeoverFailed(f"what the service at {path} hands over cannot be read: {error!r}") from error
        received.pop_all()
    os.close(memory)
    return takeover


def offer_service(channel: socket.socket, state: Mapping[str, Any], numbers: Sequence[int]) -> None:
    """Tell another process of this state, and pass it the descriptors. This process goes on for the time being.

    Args:
        channel: the channel to the other process.
        state: see ``reexec.seal``.
        numbers: the descriptors that the state names.

    Raises:
        TakeoverFailed: the other process does not take it.
    """
    try:
        memory = reexec.seal(state)
        try:
            pidfd = os.pidfd_open(os.getpid())
            try:
                body = {"pid": os.getpid(), "numbers": list(numbers)}
                _send(channel, STATE, body, [memory, pidfd, *numbers], seconds=SEND_SECONDS)
            finally:
                os.close(pidfd)
        finally:
            os.close(memory)
    except (ChannelError, OSError) as error:
        raise _not_taken(error) from error


def hear_taken(channel: socket.socket) -> None:
    """Wait until the other process has taken the state.

    Raises:
        TakeoverFailed: it does not take it, or not in time.
    """
    try:
        frame = _receive(channel, FrameDecoder(), TAKE_SECONDS)
    except TimeoutError as error:
        raise TakeoverFailed(
            f"the process that asked for the service does not take it: it was silent for {TAKE_SECONDS:g} seconds"
        ) from error
    except (ChannelError, OSError) as error:
        raise _not_taken(error) from error
    frame.close()
    if frame.type != TAKEN:
        raise TakeoverFailed(f"it answers with {frame.type!r}")


def let_go(channel: socket.socket) -> None:
    """Let the other process go on; when it returns, this process has to end, without a further word.

    Raises:
        TakeoverFailed: the other process does not go on, so this one does.
    """
    try:
        _send(channel, GO, {}, seconds=SEND_SECONDS)
    except OSError as error:
        raise _not_taken(error) from error


def _not_taken(error: Exception) -> TakeoverFailed:
    return TakeoverFailed(f"the process that asked for the service does not take it: {error!r}")


def _read_memory(memory: int) -> bytes:
    """Return the sealed state.

    Raises:
        ValueError: it is no such memory.
    """
    found = os.fstat(memory)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_STATE_BYTES:
        raise ValueError(f"its state is no memory of at most {MAX_STATE_BYTES} bytes")
    return os.pread(memory, found.st_size, 0)


def _require_workers(state: Mapping[str, Any], here: Mapping[int, int], former_pid: int) -> None:
    """See that each process that is handed over is a worker: this anchor would end what is none.

    Raises:
        TakeoverFailed: one is not.
    """
    for worker in state["crew"]["workers"]:
        pid = find_pid(here[worker["pidfd"]])
        # One that has died meanwhile has no number any more, and its pidfd reaches nobody else.
        if pid is not None and (pid != worker["process"] or not (_is_child(pid, former_pid) or _has_line(pid))):
            raise TakeoverFailed(f"process {worker['process']}, which the service hands over, is no worker of it")


def _is_child(pid: int, parent: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # Behind the name, which may have spaces and parentheses: the state and the parent (proc(5)).
            return int(file.read().rpartition(b")")[2].split()[1]) == parent
    except (OSError, ValueError, IndexError):
        return False


def _has_line(pid: int) -> bool:
    """Say whether a process was started as a worker: by an anchor before the former one, whose child it is no more."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return any(each.startswith(f"{LINE_MARKER}=".encode()) for each in file.read().split(b"\0"))
    except OSError:
        return False


def _translate(state: dict[str, Any], here: Mapping[int, int]) -> dict[str, Any]:
    """Name descriptors by the numbers that they have in this process."""
    for worker in state["crew"]["workers"]:
        worker["pidfd"], worker["line"] = here[worker["pidfd"]], here[worker["line"]]
    for sockets in state["sockets"].values():
        sockets["descriptors"] = [here[number] for number in sockets["descriptors"]]
    state["signals"] = here[state["signals"]]
    # A former anchor of an earlier release has none.
    if "lock_file" in state:
        state["lock_file"] = here[state["lock_file"]]
    return state


def _send(
    sock: socket.socket,
    type: str,
    body: Mapping[str, Any],
    descriptors: Sequence[int] = (),
    *,
    seconds: float = ANSWER_SECONDS,
) -> None:
    deadline = time.monotonic() + seconds
    writer = DescriptorWriter(encode(type, body, len(descriptors)), descriptors)
    while not writer.is_done:
        _limit(sock, deadline)
        writer.write(sock)


def _limit(sock: socket.socket, deadline: float) -> None:
    """Let the next call on a socket wait until a deadline at most: that is for a whole word, however slowly it comes.

    Raises:
        TimeoutError: it is over.
    """
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError("its word is not complete in time")
    sock.settimeout(left)


def _receive(sock: socket.socket, decoder: FrameDecoder, seconds: float = ANSWER_SECONDS) -> Frame:
    deadline = time.monotonic() + seconds
    while True:
        _limit(sock, deadline)
        received = receive_with_descriptors(sock, READ_SIZE)
        frames = decoder.feed(received.data, received.descriptors, lost_descriptors=received.lost_descriptors)
        if frames:
            frames[0].require_descriptors()
            return frames[0]
        if not received.data:
            decoder.end()
            raise ConnectionResetError("the other end has left")
