"""One named socket: what it is, where it stands, and what is done with its queue. It waits for nothing."""

from __future__ import annotations

import array
import contextlib
import enum
import errno
import logging
import os
import select
import socket
import stat
import struct
import sys
from dataclasses import dataclass

from .owners import describe_owner

__all__ = ["BACKLOG", "Entry", "Kind", "Until", "address_of", "explain", "find_inode", "is_connected", "kind_of"]

# What may wait in the kernel's queue, also between a pause and the successor's first accept. The kernel takes the
# smaller one of this and net.core.somaxconn.
BACKLOG = 2048


# A filter of Berkeley's (socket(7), SO_ATTACH_FILTER): of what comes to a listening socket it drops each segment with
# SYN and without ACK, which is how a connection begins. It is shown the segment from its TCP header on, where byte 13
# has the flags. Code, jump if true, jump if not, constant: struct sock_filter of linux/filter.h.
_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("@HBBI")
_PROGRAM = struct.Struct("@HP")
_NO_NEWCOMERS = (
    (0x30, 0, 0, 13),  # load that byte
    (0x54, 0, 0, 0x12),  # of which these two flags: ACK and SYN
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # then drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # else pass it on, whole
)


class Kind(enum.Enum):
    """What a socket is, as far as accepting and reading from it go."""

    TCP = "tcp"
    UNIX = "unix"
    SEQPACKET = "seqpacket"
    UNIX_DATAGRAM = "unixgram"
    UDP = "udp"
    OTHER = "other"


class Until(enum.StrEnum):
    """How long a listener serves when the service stops without a successor."""

    DRAIN = "drain"
    EXIT = "exit"


_KINDS = {
    (socket.AF_INET, socket.SOCK_STREAM): Kind.TCP,
    (socket.AF_INET6, socket.SOCK_STREAM): Kind.TCP,
    (socket.AF_INET, socket.SOCK_DGRAM): Kind.UDP,
    (socket.AF_INET6, socket.SOCK_DGRAM): Kind.UDP,
}
# Where it is missing (Windows), this can be imported and TCP be served.
if hasattr(socket, "AF_UNIX"):
    _KINDS |= {
        (socket.AF_UNIX, socket.SOCK_STREAM): Kind.UNIX,
        (socket.AF_UNIX, socket.SOCK_SEQPACKET): Kind.SEQPACKET,
        (socket.AF_UNIX, socket.SOCK_DGRAM): Kind.UNIX_DATAGRAM,
    }

_REMEDIES = {
    errno.EADDRINUSE: "another socket has this address, or one that includes it: stop that service, or take another",
    errno.EADDRNOTAVAIL: "no interface of this machine has this address",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE, a path needs a directory that may be written",
    errno.ENOENT: "the directory does not exist: create it first",
    errno.ENOSPC: "there is no room for a socket in its directory: make room there (df -i)",
}


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One registered socket.

    Attributes:
        name: what it is inherited by, together with its address.
        kind: what it is.
        address: as it was asked for, such as ``127.0.0.1:0``, ``[::1]:80``, ``/run/app.sock`` or ``@abstract``.
        sock: the socket, non-blocking, owned by the registry.
        until: how long it serves when the service stops.
        backlog: how many connections may wait to be accepted.
        inherited: whether it came from another process.
        claimed: whether this generation has asked for it.
        inode: device and inode of its path, where the service made that path; else None.
        number: the descriptor that the service manager passed it by to the first generation; None for all others.
        adopted: whether the application made it: then other processes may have it, and accept from it, as well.
        mode: permissions that its path shall have; None: as they are.
        group: the number of the group that its path shall belong to; None: as it is.
    """

    name: str
    kind: Kind
    address: str
    sock: socket.socket
    until: Until = Until.DRAIN
    backlog: int = BACKLOG
    inherited: bool = False
    claimed: bool = True
    inode: tuple[int, int] | None = None
    number: int | None = None
    adopted: bool = False
    mode: int | None = None
    group: int | None = None

    def __str__(self) -> str:
        # Its name, and where it really is, if the name does not tell: a port that the kernel has chosen.
        bound = address_of(self.sock)
        return self.name if bound in self.name else f"{self.name} ({bound})"

    def start_listening(self) -> None:
        """Let clients queue. Does nothing for a socket that listens already, or that has no queue of connections."""
        self.apply_permissions()
        if not self.has_queue:
            return
        # A connected socket that was adopted has no queue either.
        if self.is_listening() or is_connected(self.sock):
            return
        try:
            self.sock.listen(self.backlog)
        except OSError as error:
            raise explain(error, "listen on", self.address) from error

    def apply_permissions(self) -> None:
        """Give the path of an inherited socket the permissions that are asked for now.

        That comes with the commit, so that a restart that fails changes nothing. A generation that accepts again gives
        the path its own permissions back.
        """
        if (self.mode is None and self.group is None) or not self.is_at_its_path():
            return
        try:
            found = os.lstat(self.address)
            if self.group is not None and found.st_gid != self.group:
                os.chown(self.address, -1, self.group, follow_symlinks=False)
            if self.mode is not None and stat.S_IMODE(found.st_mode) != self.mode:
                os.chmod(self.address, self.mode)
        except OSError as error:
            logging.getLogger("ecdysis_async").warning(
                "the permissions of %s stay as they are: %s", self.address, error.strerror or error
            )

    def is_listening(self) -> bool:
        """Say whether clients can queue: another process that shares the socket may have put an end to that."""
        return bool(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def is_waited_for(self) -> bool:
        """Say whether somebody waits in the kernel's queue to be accepted, or a datagram to be read."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        # A socket that does not listen any more hangs up.
        return any(events & select.POLLIN for _, events in poll.poll(0))

    @property
    def has_queue(self) -> bool:
        """Whether clients wait here to be accepted: connections are made, and reset where the socket is closed."""
        return self.sock.type in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)

    def refuse_newcomers(self) -> None:
        """Let nobody queue any more, while those who do can still be accepted. There is no way back.

        A client of a Unix socket finds no path any more. A client of a TCP port finds it silent, and asks again in a
        second (tcp(7), the SYN that is repeated), when the socket is closed. Nothing changes where another process may
        accept from this socket as well: that is what the service did not make itself.

        There are kernels that want CAP_NET_ADMIN for a packet filter (6.18, seen). With a queue of length 0 alone, one
        client still gets into a queue that is empty, and is reset when the socket is closed. That costs a restart a
        client where one of several sockets of a port (SO_REUSEPORT) goes, and so the filter is tried first.
        """
        if not self.has_queue or not self._is_ours_alone:
            return
        if self.is_at_its_path():
            os.unlink(self.address)
        # Other systems take 0 for as many as possible.
        elif self.kind is Kind.TCP and sys.platform == "linux":
            # The application may have closed it. Where it was shut down, `listen` would open it again.
            with contextlib.suppress(OSError):
                if self.is_listening() and not self._filter_newcomers():
                    self.sock.listen(0)

    def _filter_newcomers(self) -> bool:
        """Let the kernel drop each segment by which a connection begins; say whether it does."""
        program = array.array("B", b"".join(_INSTRUCTION.pack(*each) for each in _NO_NEWCOMERS))
        try:
            self.sock.setsockopt(
                socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(len(_NO_NEWCOMERS), program.buffer_info()[0])
            )
        except OSError:
            return False
        return True

    def stop_listening(self) -> None:
        """Refuse the clients of a TCP port at once, though it is not closed yet: no process accepts here any more.

        Clients would otherwise wait as long as the drain takes, and be turned away all the same. Nothing changes where
        another process may accept from this socket as well.
        """
        if self.kind is Kind.TCP and self._is_ours_alone:
            # The application may have closed it.
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RD)

    @property
    def _is_ours_alone(self) -> bool:
        return not self.adopted and self.number is None

    def is_at_its_path(self) -> bool:
        """Say whether its path still leads to this very socket."""
        return self.inode is not None and find_inode(self.address) == self.inode

    def has_lost_its_path(self) -> bool:
        """Say whether it had a path, and no client finds it there any more."""
        return self.inode is not None and not self.is_at_its_path()


def join_host(host: str, port: int) -> str:
    """Write an address of the Internet as text; that of IPv6 stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_connected(sock: socket.socket) -> bool:
    """Say whether a socket has a peer."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def kind_of(sock: socket.socket) -> Kind:
    """Return what a socket is."""
    return _KINDS.get((socket.AddressFamily(sock.family), socket.SocketKind(sock.type)), Kind.OTHER)


def find_inode(path: str) -> tuple[int, int] | None:
    """Return device and inode of a path itself; None where nothing is known of it."""
    try:
        found = os.lstat(path)
    # It is not there, or not to be seen: either way it is not known to be ours.
    except OSError:
        return None
    return found.st_dev, found.st_ino


def address_of(sock: socket.socket) -> str:
    """Return where a socket stands, as text."""
    name = sock.getsockname()
    match sock.family:
        case socket.AF_INET | socket.AF_INET6:
            return join_host(name[0], name[1])
        case socket.AF_UNIX:
            # Abstract addresses are bytes that begin with a NUL.
            return "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else str(name)
        case _:
            return str(name)


def explain(error: OSError, verb: str, address: str) -> OSError:
    """Return the same error with the address in its text, and what to do about it."""
    text = f"cannot {verb} {address}: {error.strerror}"
    if (remedy := _REMEDIES.get(error.errno or 0)) is not None:
        port = address.rpartition(":")[2]
        if error.errno == errno.EADDRINUSE and port.isdecimal():
            remedy = f"{describe_owner(int(port))} has it: stop that one, or take another address"
        text += f" ({remedy})"
    return OSError(error.errno, text)
