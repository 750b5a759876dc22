"""Where a service listens, as people write it: ``HOST:PORT``, ``[v6]:PORT``, ``unix:PATH``, ``fd://NAME-OR-NUMBER``."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from .registry import BACKLOG, MAX_PORT, Entry, Registry

__all__ = ["Address", "Descriptor", "Internet", "Unix", "listen", "name_sockets", "parse_address", "resolve"]

# From 3 on: 0 to 2 are the standard streams, and sd_listen_fds(3) begins there as well.
FIRST_DESCRIPTOR = 3


@dataclass(frozen=True, slots=True)
class Internet:
    """TCP.

    Attributes:
        host: an address or a name; "" is every IPv4 address.
        port: 0 for one that the kernel chooses.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Unix:
    """A Unix socket; ``@name`` is an abstract address."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A socket that whoever started the service has passed: by its name in the socket unit, or by its number."""

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
    return Internet(host[1:-1] if is_bracketed else host, int(port))


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
        return [Internet("0.0.0.0", address.port)]  # noqa: S104 - what was asked for
    # With the scope of a link-local address, which Python leaves out of the first item.
    hosts = [socket.getnameinfo(target, socket.NI_NUMERICHOST)[0] for *_, target in found]
    return [Internet(host, address.port) for host in dict.fromkeys(hosts)]


def listen(registry: Registry, address: Address, *, backlog: int = BACKLOG, mode: int | None = None) -> list[Entry]:
    """Ask for the sockets of one address: inherited ones, those that the service manager has passed, or new ones.

    Args:
        registry: of this generation.
        address: where; names are looked up, which may block.
        backlog: how many connections may wait to be accepted.
        mode: permissions of a new Unix socket; None: those of the umask.

    Raises:
        OSError: it cannot be bound. LookupError: no such socket was passed. ValueError: a path is too long.
    """
    return [_listen(registry, each, backlog, mode) for each in resolve(address)]


def name_sockets(address: Address) -> list[str]:
    """Return what the sockets of one address are called in a registry, where nothing else was said.

    Raises:
        OSError: nobody knows that name.
    """
    return [
        f"tcp:{each}"
        if isinstance(each, Internet)
        else str(each)
        if isinstance(each, Descriptor)
        else f"unix:{each.path}"
        for each in resolve(address)
    ]


def _listen(registry: Registry, address: Address, backlog: int, mode: int | None) -> Entry:
    match address:
        case Internet(host, port):
            return registry.listen_tcp(host, port, backlog=backlog)
        case Unix(path):
            return registry.listen_unix(path, backlog=backlog, mode=mode)
        case Descriptor(name):
            try:
                return registry.claim(name)
            except LookupError:
                if not isinstance(name, int) or not _is_passed(registry, name):
                    raise
            # Passed by something else than systemd, which says nothing of it but the number on the command line.
            registry.activate({name: str(address)})
            return registry.claim(name)
    raise AssertionError(address)


def _is_passed(registry: Registry, number: int) -> bool:
    """Say whether a listening socket is open under a number, and is nobody's yet."""
    if registry.find(number) is not None:
        return False
    try:
        duplicate = socket.socket(fileno=os.dup(number))
    except OSError:  # nothing is open there, or no socket
        return False
    with duplicate:
        return bool(duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
