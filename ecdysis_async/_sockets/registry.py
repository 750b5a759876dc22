"""Named sockets: inherited from the predecessor or created, claimed by the application, and closed if nobody does.

Every socket that moves from generation to generation is an :class:`Entry` here, and the registry owns its descriptor.
Nothing in this module waits or accepts, and nothing listens before the supervisor says so.
"""

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ecdysis_async.errors import DescriptorMismatch, GarbledFrame

logger = logging.getLogger("ecdysis_async")

__all__ = ["Entry", "Kind", "Registry", "Until"]

# What may wait in the kernel's queue, also between a pause and the successor's first accept. The kernel takes the
# smaller one of this and net.core.somaxconn.
BACKLOG = 2048

MAX_PORT = 65535
EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - what no host stands for, by the convention of the socket module

# sun_path has 108 bytes (unix(7)), the last of which is the NUL that ends a path.
MAX_UNIX_PATH = 107


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

    def __str__(self) -> str:
        # Its name, and where it really is, if the name does not tell: a port that the kernel has chosen.
        bound = _address_of(self.sock)
        return self.name if bound in self.name else f"{self.name} ({bound})"

    def start_listening(self) -> None:
        """Let clients queue. Does nothing for a socket that listens already, or that has no queue of connections."""
        if not self.has_queue:
            return
        # A connected socket that was adopted has no queue either.
        if self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or _is_connected(self.sock):
            return
        try:
            self.sock.listen(self.backlog)
        except OSError as error:
            raise _explained(error, "listen on", self.address) from error

    def is_waited_for(self) -> bool:
        """Say whether somebody waits in the kernel's queue to be accepted, or a datagram to be read."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def has_queue(self) -> bool:
        """Whether clients wait here to be accepted: connections are made, and reset where the socket is closed."""
        return self.sock.type in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)

    def refuse_newcomers(self) -> None:
        """Let nobody queue any more, while those who do can still be accepted. There is no way back.

        Whoever comes to a Unix socket finds no path any more. Whoever comes to a TCP port finds it silent, and asks
        again in a second (tcp(7), the SYN that is repeated), when the socket is closed. Nothing changes where somebody
        else may accept from this socket as well: what the service did not make itself.
        """
        if not self.has_queue or not self._is_ours_alone:
            return
        if self.is_at_its_path():
            os.unlink(self.address)
        elif self.kind is Kind.TCP and sys.platform == "linux":
            program = array.array("B", b"".join(_INSTRUCTION.pack(*each) for each in _NO_NEWCOMERS))
            try:
                self.sock.setsockopt(
                    socket.SOL_SOCKET,
                    _SO_ATTACH_FILTER,
                    _PROGRAM.pack(len(_NO_NEWCOMERS), program.buffer_info()[0]),
                )
            except OSError:
                # There are kernels that want CAP_NET_ADMIN for it (6.18, seen). In a queue that is full nobody gets
                # either, but for one when it is empty.
                with contextlib.suppress(OSError):
                    self.sock.listen(0)

    def stop_listening(self) -> None:
        """Refuse whoever comes to a TCP port, at once, though it is not closed yet: no process accepts here any more.

        Else clients would wait as long as the drain takes, and be turned away all the same. Nothing changes where
        somebody else may accept from this socket as well.
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
        return self.inode is not None and _inode_of(self.address) == self.inode


class Registry:
    """All named sockets of one generation.

    The methods that ask for a socket return the inherited one where there is one of the same kind, name and address
    that was not claimed before, and create it otherwise: bound, and not yet listening. Without a name, the address is
    the name, as it was asked for; so even a port that the kernel chose stays the same over all generations.
    """

    def __init__(self) -> None:
        # Called when a socket was let go of.
        self.on_release: Callable[[], None] = lambda: None
        self._entries: list[Entry] = []
        # Whether paths of Unix sockets are removed from here; the ones that a worker has are its anchor's.
        self.owns_paths = True

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everything registered, in the order it came, but for what the application has closed itself since then."""
        return tuple(entry for entry in self._entries if entry.sock.fileno() != -1)

    def inherit(self, descriptions: Sequence[dict[str, Any]], descriptors: Sequence[int]) -> None:
        """Register sockets of the predecessor, which :meth:`describe` described; the descriptors are taken over.

        Raises:
            DescriptorMismatch: there are more, or fewer, descriptors than descriptions.
            GarbledFrame: a description is none.
            OSError: a descriptor is no socket.

        On an error none is registered and all descriptors are closed.
        """
        entries: list[Entry] = []
        rest = list(descriptors)
        try:
            if len(descriptions) != len(rest):
                raise DescriptorMismatch(f"{len(rest)} descriptors came with {len(descriptions)} descriptions")
            for description in descriptions:
                name, address, inode, number = _parse(description)
                adopted = description.get("adopted") is True
                # Family, type and protocol come from the kernel: with another protocol asyncio does not set
                # TCP_NODELAY, which costs 44 ms per keep-alive request (DESIGN.md, trap 19).
                sock = socket.socket(fileno=rest[0])
                del rest[0]
                entry = Entry(
                    name,
                    _kind(sock),
                    address,
                    sock,
                    inherited=True,
                    claimed=False,
                    inode=inode,
                    number=number,
                    adopted=adopted,
                )
                entries.append(entry)
                sock.set_inheritable(False)
                # O_NONBLOCK is shared with the predecessor, who listens on a duplicate (trap 3): it only ever goes on.
                sock.setblocking(False)
        except BaseException:
            for entry in entries:
                entry.sock.close()
            for descriptor in rest:
                os.close(descriptor)
            raise
        self._entries += entries

    def activate(self, names: Mapping[int, str]) -> None:
        """Register sockets that the service manager passed; the descriptors are taken over.

        They are claimed by their name, whatever address is asked for with it, or by the address they are bound to, or
        by :meth:`claim`. A path among them is the manager's, and never unlinked.

        Args:
            names: the name of each, by its descriptor. Names may repeat.
        """
        for number, name in names.items():
            sock = socket.socket(fileno=number)
            if _is_connected(sock) and sock.type != socket.SOCK_DGRAM:
                logger.warning(
                    "the service manager has passed a connection (%s), where a service listens: it is closed. "
                    "Put Accept=no into the socket unit, and name its service app.service, not app@.service",
                    name,
                )
                sock.close()
                continue
            sock.setblocking(False)
            address = _address_of(sock)
            self._entries.append(Entry(name, _kind(sock), address, sock, inherited=True, claimed=False, number=number))

    def restore(self, name: str, address: str, inode: tuple[int, int] | None, descriptor: int) -> None:
        """Register a socket that an earlier process of this service had, as :meth:`inherit` does with a live one's.

        One whose path has gone since is closed: no client finds it any more, and another one will have its name.
        """
        sock = socket.socket(fileno=descriptor)
        sock.set_inheritable(False)
        sock.setblocking(False)
        entry = Entry(name, _kind(sock), address, sock, inherited=True, claimed=False, inode=inode)
        if inode is not None and not entry.is_at_its_path():
            logger.warning("%s was removed since the service ran last: whoever waited there is lost", address)
            sock.close()
            return
        self._entries.append(entry)

    def claim(self, name: str | int, *, until: Until | str = Until.DRAIN) -> Entry:
        """Claim a socket that the service manager passed, by its name, or by the number it was passed by (from 3).

        Where several have one name, each call claims the next one of them.

        Raises:
            LookupError: there is none, or it is claimed already; the text says which there are.
        """
        claimed = self._claim(
            lambda entry: entry.number is not None and name in (entry.name, entry.number), Until(until), BACKLOG
        )
        if claimed is None:
            passed = [entry for entry in self.entries if entry.number is not None]
            there = ", ".join(f"{entry.number}: {entry}{', claimed' if entry.claimed else ''}" for entry in passed)
            raise LookupError(
                f"the service manager passed no socket {name!r} that is not claimed yet; there is {there or 'none'} "
                "(FileDescriptorName= in the socket unit, --fdname of systemd-socket-activate)"
            )
        return claimed

    def describe(self, entries: Iterable[Entry] | None = None) -> tuple[list[dict[str, Any]], list[int]]:
        """Return what a successor needs to inherit: descriptions for JSON, and the descriptors, which stay ours."""
        chosen = self.entries if entries is None else list(entries)
        descriptions: list[dict[str, Any]] = [
            {"name": entry.name, "address": entry.address, "inode": entry.inode}
            | ({} if entry.number is None else {"number": entry.number})
            | ({"adopted": True} if entry.adopted else {})
            for entry in chosen
        ]
        return descriptions, [entry.sock.fileno() for entry in chosen]

    def listen_tcp(
        self,
        host: str | None,
        port: int,
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        backlog: int = BACKLOG,
        reuse_port: bool = False,
    ) -> Entry:
        """Ask for a TCP listener.

        Args:
            host: a numeric address; None or "" is every IPv4 address, "::" every IPv6 address (and those only).
            port: 0 lets the kernel choose, once for all generations.
            name: what it is inherited by.
            until: whether it ends with the drain of a stop, or serves to the exit.
            backlog: how many connections may wait to be accepted.
            reuse_port: allow several listeners on one address (SO_REUSEPORT).

        Raises:
            ValueError: the host is a name, or the port no port.
            OSError: it cannot be bound; the text says to what and what can be done.
        """
        return self._internet(socket.SOCK_STREAM, host, port, name, until, backlog, reuse_port=reuse_port)

    def bind_udp(
        self,
        host: str | None,
        port: int,
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        reuse_port: bool = False,
    ) -> Entry:
        """Ask for a UDP socket; arguments and errors are those of :meth:`listen_tcp`."""
        return self._internet(socket.SOCK_DGRAM, host, port, name, until, BACKLOG, reuse_port=reuse_port)

    def listen_unix(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        backlog: int = BACKLOG,
        mode: int | None = None,
    ) -> Entry:
        """Ask for a Unix stream listener.

        Args:
            path: in the file system, or "@name" for an abstract address. A path that a killed process left behind
                is replaced.
            name: what it is inherited by.
            until: whether it ends with the drain of a stop, or serves to the exit.
            backlog: how many connections may wait to be accepted.
            mode: permissions of a new path, in force from its first moment; None: those of the umask.

        Raises:
            ValueError: the path is too long for a socket.
            OSError: it cannot be bound, or somebody else is there; the text says where and what can be done.
        """
        return self._unix(socket.SOCK_STREAM, path, name, until, backlog, mode)

    def listen_seqpacket(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        backlog: int = BACKLOG,
        mode: int | None = None,
    ) -> Entry:
        """Ask for a Unix listener that keeps message boundaries; see :meth:`listen_unix`."""
        return self._unix(socket.SOCK_SEQPACKET, path, name, until, backlog, mode)

    def bind_unix_datagram(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        mode: int | None = None,
    ) -> Entry:
        """Ask for a Unix datagram socket; see :meth:`listen_unix`."""
        return self._unix(socket.SOCK_DGRAM, path, name, until, BACKLOG, mode)

    def adopt(self, sock: socket.socket, *, name: str, until: Until | str = Until.DRAIN) -> Entry:
        """Take over a socket that the application built.

        Where one of the same name, family and type was inherited, that one takes its place and the given one is
        closed: the entry's ``sock`` is the one to use.

        Raises:
            ValueError: it is registered already.
        """
        if (entry := self.find(sock)) is not None:
            raise ValueError(f"this socket is registered already, as {entry.name!r}")
        until = Until(until)

        def is_successor(inherited: Entry) -> bool:
            return inherited.name == name and (inherited.sock.family, inherited.sock.type) == (sock.family, sock.type)

        if (claimed := self._claim(is_successor, until, BACKLOG)) is not None:
            sock.close()
            return claimed
        sock.set_inheritable(False)
        sock.setblocking(False)
        entry = Entry(name, _kind(sock), _address_of(sock), sock, until, adopted=True)
        self._entries.append(entry)
        return entry

    def start_listening(self) -> None:
        """Let clients queue on every socket, also where nobody accepts yet.

        Raises:
            OSError: an address is taken, by a socket that was not listening when this one was bound.
        """
        for entry in self.entries:
            entry.start_listening()

    def find(self, sock: socket.socket | int) -> Entry | None:
        """Return the entry that a socket object, or a descriptor, belongs to."""
        descriptor = sock if isinstance(sock, int) else sock.fileno()
        if descriptor < 0:
            return None
        return next((entry for entry in self._entries if entry.sock.fileno() == descriptor), None)

    def unclaimed(self) -> list[Entry]:
        """Return what was inherited and nobody has asked for."""
        return [entry for entry in self._entries if not entry.claimed]

    def close_unclaimed(self, *, unlink: bool = False) -> list[Entry]:
        """Close what was inherited and nobody has asked for, and return it. The predecessor still has its own.

        What the service manager passed stays: it passes it no second time, holds it open itself all the while, and a
        later release may ask for it again.

        Args:
            unlink: the predecessor is dead: remove the paths of Unix sockets too, as :meth:`close` does.
        """
        unclaimed = [entry for entry in self.unclaimed() if entry.number is None]
        for entry in unclaimed:
            self.release(entry, unlink=unlink)
        return unclaimed

    def release(self, entry: Entry, *, unlink: bool = False) -> None:
        """Close one socket and forget it; with ``unlink``, remove its path, as :meth:`close` does.

        Does nothing for one that was released before: a server may be closed after its socket, which nobody wanted
        any more, or after everything.
        """
        if entry not in self._entries:
            return
        self._entries.remove(entry)
        # Before the close: as long as the socket is open, no other file can get its inode number.
        if unlink and self.owns_paths and entry.is_at_its_path():
            # Generations that drain at a full stop have no heir, and each removes it: another one may have been faster.
            # It stays where this process was root when it made it, and is not any more; the next start replaces it.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                os.unlink(entry.address)
        entry.sock.close()
        self.on_release()

    def close(self, *, unlink: bool) -> None:
        """Close everything.

        Args:
            unlink: this is a full stop: remove the paths of Unix sockets too, those that the service made itself
                and that still lead to its own sockets.
        """
        for entry in tuple(self._entries):
            self.release(entry, unlink=unlink)

    def _internet(
        self,
        type: socket.SocketKind,
        host: str | None,
        port: int,
        name: str | None,
        until: Until | str,
        backlog: int,
        *,
        reuse_port: bool,
    ) -> Entry:
        family, target, address = _resolve(host, port)

        def create() -> socket.socket:
            protocol = socket.IPPROTO_TCP if type is socket.SOCK_STREAM else socket.IPPROTO_UDP
            sock = socket.socket(family, type, protocol)
            try:
                if type is socket.SOCK_STREAM:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family is socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if reuse_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                sock.bind(target)
            except BaseException:
                sock.close()
                raise
            return sock

        return self._ask(
            _KINDS[family, type], address, name, until, backlog, create, is_single=port != 0 and not reuse_port
        )

    def _unix(
        self,
        type: socket.SocketKind,
        path: str | os.PathLike[str],
        name: str | None,
        until: Until | str,
        backlog: int,
        mode: int | None,
    ) -> Entry:
        target, address = _locate(path)

        def create() -> socket.socket:
            if not address.startswith("@"):
                _make_way(target)
            sock = socket.socket(socket.AF_UNIX, type)
            try:
                if mode is not None and not address.startswith("@"):
                    # Linux gives the new path the mode of the socket's own inode, less the umask (unix_bind_bsd); so
                    # that the path is at no time more open than it shall be.
                    os.fchmod(sock.fileno(), mode)
                sock.bind(target)
                if mode is not None and not address.startswith("@"):
                    os.chmod(address, mode)
            except BaseException:
                sock.close()
                raise
            return sock

        return self._ask(_KINDS[socket.AF_UNIX, type], address, name, until, backlog, create, is_single=True)

    def _ask(
        self,
        kind: Kind,
        address: str,
        name: str | None,
        until: Until | str,
        backlog: int,
        create: Callable[[], socket.socket],
        *,
        is_single: bool,
    ) -> Entry:
        """Claim an inherited socket, or create it."""
        name, until = name or f"{kind.value}:{address}", Until(until)

        def fits(inherited: Entry) -> bool:
            # A path that was removed, or now leads elsewhere (a directory in it is a symlink that has moved), is made
            # afresh: clients do not find the inherited socket there.
            return (inherited.kind, inherited.address) == (kind, address) and (
                inherited.inode is None or inherited.is_at_its_path()
            )

        claimed = self._claim(lambda inherited: inherited.name == name and fits(inherited), until, backlog)
        if claimed is None:
            # Passed under this very name: then the address is the socket unit's business. The one with the address that
            # is asked for came first, above, where several have the name.
            claimed = self._claim(
                lambda passed: passed.number is not None and (passed.kind, passed.name) == (kind, name), until, backlog
            )
        if claimed is None:
            claimed = self._claim(
                lambda passed: passed.number is not None and passed.kind is kind and _covers(passed, address),
                until,
                backlog,
            )
        if claimed is None and is_single:
            # Renamed between the generations: the address cannot be bound a second time, and there is but one of it.
            claimed = self._claim(fits, until, backlog)
        if claimed is not None:
            return claimed
        try:
            # Two sockets with SO_REUSEADDR may be bound to one port as long as neither listens: it would only fail
            # after the commit.
            if is_single and any(
                entry.claimed and (entry.kind, entry.address) == (kind, address) for entry in self.entries
            ):
                raise _error(errno.EADDRINUSE)
            sock = create()
        except OSError as error:
            raise _explained(error, "bind", address) from error
        sock.setblocking(False)
        is_path = kind in (Kind.UNIX, Kind.SEQPACKET, Kind.UNIX_DATAGRAM) and not address.startswith("@")
        inode = _inode_of(address) if is_path else None
        entry = Entry(name, kind, address, sock, until, backlog, inode=inode)
        self._entries.append(entry)
        return entry

    def _claim(self, fits: Callable[[Entry], bool], until: Until, backlog: int) -> Entry | None:
        """Claim the first unclaimed entry that fits. Equal ones (SO_REUSEPORT) are so claimed in order, each once."""
        for index, entry in enumerate(self._entries):
            if not entry.claimed and fits(entry):
                claimed = replace(entry, claimed=True, until=until, backlog=backlog)
                self._entries[index] = claimed
                return claimed
        return None


def _covers(passed: Entry, address: str) -> bool:
    """Say whether a socket stands at an address; one for both IPv6 and IPv4 (``ListenStream=80``) stands at both."""
    if passed.address == address:
        return True
    host, _, port = address.rpartition(":")
    return (
        host == EVERY_ADDRESS
        and passed.address == f"[::]:{port}"
        and not passed.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    )


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _kind(sock: socket.socket) -> Kind:
    return _KINDS.get((socket.AddressFamily(sock.family), socket.SocketKind(sock.type)), Kind.OTHER)


def _resolve(host: str | None, port: int) -> tuple[socket.AddressFamily, Any, str]:
    """Return family, socket address and text of a numeric address. Never asks a name server: that would block."""
    if not 0 <= port <= MAX_PORT:
        raise ValueError(f"{port} is no port: it is between 0 and {MAX_PORT}")
    try:
        found = socket.getaddrinfo(host or EVERY_ADDRESS, port, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)
    # UnicodeError: Python encodes host names by IDNA first.
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"{host!r} is no numeric address: resolve names first (getaddrinfo), or take 127.0.0.1, ::1, 0.0.0.0 or ::"
        ) from error
    family, _, _, _, target = found[0]
    # With the scope of a link-local address, which Python leaves out of `target[0]`.
    text, _ = socket.getnameinfo(target, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    return family, target, _join(text, port)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _locate(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return what to bind a Unix socket to, and its address as text."""
    text = os.fspath(path)
    if text.startswith(("@", "\0")):
        target, address = "\0" + text[1:], "@" + text[1:]
    else:
        # Absolute, since a successor may run in another directory.
        target, address = text, os.path.abspath(text)
    if len(os.fsencode(target)) > MAX_UNIX_PATH:
        raise ValueError(
            f"{text!r} is too long for a Unix socket: {len(os.fsencode(target))} bytes, and {MAX_UNIX_PATH} are "
            "possible; take a shorter one, such as one in /run"
        )
    return target, address


def _make_way(path: str) -> None:
    """Remove a socket path that nobody is bound to any more.

    Raises:
        OSError: something else is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "there is a file that is no socket; remove it, or take another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        # A datagram socket, because it never leaves a connection in somebody's queue, and because it tells a stream
        # socket that does not listen yet (EPROTOTYPE) from one that is gone (ECONNREFUSED).
        outcome = probe.connect_ex(path)
    if outcome == errno.EACCES:
        raise _error(outcome)
    if outcome != errno.ECONNREFUSED:
        raise _error(errno.EADDRINUSE)
    os.unlink(path)


def _inode_of(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    # Not there, or not to be seen: either way it is not known to be ours.
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _address_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    match sock.family:
        case socket.AF_INET | socket.AF_INET6:
            return _join(name[0], name[1])
        case socket.AF_UNIX:
            # Abstract addresses are bytes that begin with a NUL.
            return "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else str(name)
        case _:
            return str(name)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _explained(error: OSError, verb: str, address: str) -> OSError:
    """Return the same error with the address in its text, and what to do about it."""
    text = f"cannot {verb} {address}: {error.strerror}"
    if remedy := _REMEDIES.get(error.errno or 0):
        text += f" ({remedy})"
    return OSError(error.errno, text)


def _parse(description: dict[str, Any]) -> tuple[str, str, tuple[int, int] | None, int | None]:
    match description:
        case {"name": str(name), "address": str(address), "inode": [int(device), int(inode)]}:
            return name, address, (device, inode), None
        case {"name": str(name), "address": str(address), "number": int(number)}:
            return name, address, None, number
        case {"name": str(name), "address": str(address)}:
            return name, address, None, None
        case _:
            raise GarbledFrame(f"a listener is described by name and address, not by {description!r}")
