"""Where a service listens, read and bound.

Written as ``HOST:PORT``, ``*:PORT``, ``[v6]:PORT``, ``unix:PATH`` or ``fd://NAME-OR-NUMBER``.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass, replace
from typing import Any

from .entry import Kind, join_host

__all__ = ["Address", "Descriptor", "Internet", "Unix", "make_way", "name_sockets", "parse_address", "resolve"]

# From 3 on: 0 to 2 are the standard streams, and sd_listen_fds(3) begins there as well.
FIRST_DESCRIPTOR = 3

MAX_PORT = 65535
EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - what no host stands for, by the convention of the socket module

# sun_path has 108 bytes (unix(7)), the last of which is the NUL that ends a path.
MAX_UNIX_PATH = 107


@dataclass(frozen=True, slots=True)
class Internet:
    """A TCP or UDP port.

    Attributes:
        host: an address, or a name, which :func:`resolve` makes addresses of; None or "" is every IPv4 address, "::"
            every IPv6 address (and those only).
        port: 0 for one that the kernel chooses, once for all generations.
        is_datagram: whether it is UDP.
        reuse_port: whether several sockets may have this address (SO_REUSEPORT).
    """

    host: str | None
    port: int
    is_datagram: bool = False
    reuse_port: bool = False

    def __str__(self) -> str:
        return join_host(self.host or "", self.port)

    @property
    def kind(self) -> Kind:
        """What a socket there is."""
        return Kind.UDP if self.is_datagram else Kind.TCP

    @property
    def is_single(self) -> bool:
        """Whether only one socket can have it."""
        return self.port != 0 and not self.reuse_port

    @property
    def text(self) -> str:
        """The address, as a registry writes it.

        Raises:
            ValueError: the host is a name, or the port no port.
        """
        return self._locate()[2]

    def bind(self) -> socket.socket:
        """Return a new socket that is bound there.

        Raises:
            ValueError: as for ``text``. OSError: it cannot be bound.
        """
        family, target, _ = self._locate()
        if self.is_datagram:
            sock = socket.socket(family, socket.SOCK_DGRAM, socket.IPPROTO_UDP)
        else:
            sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if not self.is_datagram:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if self.reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(target)
        except BaseException:
            sock.close()
            raise
        return sock

    def _locate(self) -> tuple[socket.AddressFamily, Any, str]:
        """Return family, socket address and text. It never asks a name server, which would block."""
        if not 0 <= self.port <= MAX_PORT:
            raise ValueError(f"{self.port} is no port: it is between 0 and {MAX_PORT}")
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        try:
            found = socket.getaddrinfo(self.host or EVERY_ADDRESS, self.port, flags=flags)
        # UnicodeError: Python encodes host names by IDNA first.
        except (socket.gaierror, UnicodeError) as error:
            raise ValueError(
                f"{self.host!r} is no numeric address: resolve names first (getaddrinfo), or take 127.0.0.1, ::1, "
                "0.0.0.0 or ::"
            ) from error
        family, _, _, _, target = found[0]
        # With the scope of a link-local address, which Python leaves out of `target[0]`.
        text, _ = socket.getnameinfo(target, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        return family, target, join_host(text, self.port)


@dataclass(frozen=True, slots=True)
class Unix:
    """A Unix socket.

    Attributes:
        path: in the file system; or ``@name``, an abstract address.
        kind: whether it has connections, connections that keep the boundaries of messages, or datagrams.
        mode: permissions of a new path, in force from its first moment; None: those of the umask.
        group: the group that a new path belongs to; None: that of the process, or of the directory.
    """

    path: str
    kind: Kind = Kind.UNIX
    mode: int | None = None
    group: int | None = None

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def is_single(self) -> bool:
        """Whether only one socket can have it."""
        return True

    @property
    def is_abstract(self) -> bool:
        """Whether it stands in no file system."""
        return self.path.startswith(("@", "\0"))

    @property
    def text(self) -> str:
        """The address, as a registry writes it: absolute, since a successor may run in another directory.

        Raises:
            ValueError: the path is too long for a socket.
        """
        target = self._target()
        size = len(os.fsencode(target))
        if size > MAX_UNIX_PATH:
            raise ValueError(
                f"{self.path!r} is too long for a Unix socket: {size} bytes, and {MAX_UNIX_PATH} are possible; take a "
                "shorter one, such as one in /run"
            )
        return f"@{target[1:]}" if self.is_abstract else os.path.abspath(target)

    def bind(self) -> socket.socket:
        """Return a new socket that is bound there; a path that a killed process left behind is replaced.

        Raises:
            OSError: it cannot be bound, or another process, or another file, is there.
        """
        target = self._target()
        if not self.is_abstract:
            make_way(target)
        mode = None if self.is_abstract else self.mode
        sock = socket.socket(socket.AF_UNIX, _unix_type(self.kind))
        try:
            if mode is not None:
                # Linux gives the new path the mode of the socket's own inode, less the umask (unix_bind_bsd); so that
                # the path is at no time more open than it shall be.
                os.fchmod(sock.fileno(), mode)
            sock.bind(target)
            # The socket does not listen yet, so no client can connect.
            if self.group is not None and not self.is_abstract:
                _give_to_group(target, self.group)
            if mode is not None:
                os.chmod(target, mode)
        except BaseException:
            sock.close()
            raise
        return sock

    def _target(self) -> str:
        return f"\0{self.path[1:]}" if self.is_abstract else self.path


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A socket that was passed to this process: by its name in the socket unit, or by its number."""

    name: str | int

    def __str__(self) -> str:
        return f"fd://{self.name}"


Address = Internet | Unix | Descriptor


def parse_address(text: str) -> Address:
    """Read an address.

    Raises:
        ValueError: it is none; the text says what would be.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        # As a URL: unix:///run/app.sock.
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path:
            raise ValueError("unix: needs a path, as in unix:/run/app.sock")
        return Unix(path)
    if text.startswith("fd://"):
        name = text.removeprefix("fd://")
        if not name or (name.isdecimal() and int(name) < FIRST_DESCRIPTOR):
            raise ValueError("fd:// needs the name of a socket that was passed, or its number, as in fd://3")
        return Descriptor(int(name) if name.isdecimal() else name)
    host, colon, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isdecimal() or (":" in host and not is_bracketed):
        raise ValueError(
            f"{text!r} is no address: write HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000, unix:PATH, or "
            "fd://NAME-OR-NUMBER"
        )
    if int(port) > MAX_PORT:
        raise ValueError(f"{port} is no port: it is between 0 and {MAX_PORT}")
    host = host[1:-1] if is_bracketed else host
    # As systemd, nginx and others write every address.
    return Internet("" if host == "*" else host, int(port))


def resolve(address: Address) -> list[Address]:
    """Look up a host name; return an address for each that it stands for. It may ask a name server, which blocks.

    Raises:
        OSError: nobody knows that name.
    """
    if not isinstance(address, Internet):
        return [address]
    try:
        found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from None
    if not address.host:
        # None stands for every address of both families there; here, as in all of this library, for those of IPv4.
        return [replace(address, host=EVERY_ADDRESS)]
    # With the scope of a link-local address, which Python leaves out of the first item.
    hosts = [socket.getnameinfo(target, socket.NI_NUMERICHOST)[0] for *_, target in found]
    return [replace(address, host=host) for host in dict.fromkeys(hosts)]


def name_sockets(address: Address) -> list[str]:
    """Return what the sockets of one address are called in a registry, where nothing else was said.

    Raises:
        OSError: nobody knows that name.
    """
    return [f"tcp:{each}" if isinstance(each, Internet) else str(each) for each in resolve(address)]


def _give_to_group(path: str, group: int) -> None:
    try:
        os.chown(path, -1, group, follow_symlinks=False)
    except PermissionError as error:
        raise PermissionError(
            error.errno, f"it cannot be given to group {group}, of which this process must be a member"
        ) from error


def _unix_type(kind: Kind) -> socket.SocketKind:
    match kind:
        case Kind.UNIX_DATAGRAM:
            return socket.SOCK_DGRAM
        case Kind.SEQPACKET:
            return socket.SOCK_SEQPACKET
        case _:
            return socket.SOCK_STREAM


def make_way(path: str) -> None:
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
        raise OSError(outcome, os.strerror(outcome))
    if outcome != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    os.unlink(path)
