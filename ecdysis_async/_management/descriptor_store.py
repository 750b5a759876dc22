"""What systemd keeps for a service in case its last process is killed: the descriptor store (sd_notify(3), FDSTORE=1).

The main process parks its listening sockets there. Clients then wait in the kernel's queue, and are not refused, until
the next start gets the sockets back as LISTEN_FDS. The unit needs FileDescriptorStoreMax=, and systemd has to tell of
the store (FDSTORE in the environment, since 254).

State of the application may be parked as well. Each start is given it once: state that a program cannot cope with must
not keep the program from starting for ever.

The FDNAME= of a socket holds everything that the socket is recognised by. So one datagram parks one socket, and a
process that is killed at any moment leaves nothing half told. A socket has the same name in all generations.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import quote, unquote

from ecdysis_async._handoff.stash import InheritedStash, Version
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.claims import STATE_PREFIX
from ecdysis_async.errors import GarbledFrame

from .systemd import SOCKET_PREFIX, Systemd

__all__ = ["DescriptorStore"]

logger = logging.getLogger("ecdysis_async")

# FDNAME= takes printable ASCII without a colon, and so many characters (fd-util.c of systemd).
NAME_LENGTH = 255


class DescriptorStore:
    """The descriptor store, as one generation of the service uses it. systemd hears the main process alone.

    Args:
        systemd: the way there.
        limit: how many descriptors it takes, as FDSTORE says; "" or "0" where there is no store.

    Attributes:
        state: descriptors of the application's state that a process that is no more has parked, by name and version.
            A caller that takes a descriptor out has to close it.
    """

    def __init__(self, systemd: Systemd, limit: str) -> None:
        self.state: dict[tuple[str, Version], int] = {}
        self._systemd = systemd
        self._limit = int(limit) if systemd.is_there and limit.isdecimal() else 0
        self._parked: set[str] = set()
        # What an earlier process may have parked, and is removed if nobody wants it now.
        self._inherited: set[str] = set()
        self._complained = False

    @property
    def is_there(self) -> bool:
        """Whether there is such a store."""
        return self._limit > 0

    def recover(self, passed: Mapping[int, str], registry: Registry) -> dict[int, str]:
        """Take over what an earlier process of this service has parked; return what else the service manager passed.

        Args:
            passed: the name of each descriptor.
            registry: where the sockets go, not claimed by anybody yet.
        """
        others = {}
        for descriptor, name in passed.items():
            if not name.startswith((SOCKET_PREFIX, STATE_PREFIX)):
                others[descriptor] = name
                continue
            # A name comes twice where the kernel has not told systemd that the sockets are the same: kcmp(2) may be
            # forbidden.
            is_known = name in self._inherited
            self._inherited.add(name)
            if name.startswith(STATE_PREFIX):
                if (key := _parse_state(name)) is None or key in self.state:
                    os.close(descriptor)
                else:
                    self.state[key] = descriptor
            elif (description := _parse(name)) is None or is_known:
                # Another release has made the name.
                os.close(descriptor)
            else:
                registry.restore(*description, descriptor)
        return others

    def inherit(self, entries: Iterable[Entry]) -> None:
        """Know what the predecessor may have parked, so that what this generation does not use is removed."""
        self._inherited |= {_name_of(entry) for entry in entries}

    def park(self, entries: Iterable[Entry]) -> None:
        """See that the kept sockets are those on which clients can wait, of those that this service made itself."""
        if not (self.is_there and self._systemd.is_main):
            return
        wanted = {_name_of(entry): entry for entry in entries if entry.sock.fileno() != -1 and _is_worth_it(entry)}
        sockets = {name for name in self._parked | self._inherited if name.startswith(SOCKET_PREFIX)}
        for name in sockets - wanted.keys():
            self._remove(name)
        for name, entry in wanted.items():
            if name not in self._parked:
                self._store(name, entry.sock.fileno(), str(entry))

    def inherit_state(self, versions: Mapping[str, Version]) -> None:
        """Know what state the predecessor may have parked."""
        self._inherited |= {_name_of_state(name, version) for name, version in versions.items()}

    def keep(self, name: str, version: Version, descriptor: int) -> None:
        """Park a piece of the application's state, such as a memfd; the descriptor stays yours.

        After a crash it is in ``state``. What was parked under the same name before is replaced.
        """
        self.drop(name)
        self._store(_name_of_state(name, version), descriptor, name)

    def drop(self, name: str | None = None) -> None:
        """Let systemd close a piece of state, whatever its version; or all of them."""
        prefix = STATE_PREFIX if name is None else f"{STATE_PREFIX}{_quote(name)};"
        # systemd does not mind a name that it does not know.
        for full_name in [each for each in self._parked | self._inherited if each.startswith(prefix)]:
            self._remove(full_name)

    def read_state(self, stash: InheritedStash) -> None:
        """Let the application find in its stash what a crash has left."""
        for (name, version), descriptor in self.state.items():
            size = os.fstat(descriptor).st_size
            try:
                stash.receive([{"name": name, "version": version, "size": size}], [descriptor])
            except (OSError, GarbledFrame) as error:
                logger.warning("the stash %r that a crash has left cannot be read: %s", name, error)

    def release_state(self, is_kept: Callable[[str], bool]) -> None:
        """Park again what a crash has left, now that this start has survived it, as far as that is asked for.

        Args:
            is_kept: says whether the application wants the state of this name to be kept.
        """
        while self.state:
            (name, version), descriptor = self.state.popitem()
            if is_kept(name):
                self.keep(name, version, descriptor)
            os.close(descriptor)

    def close(self) -> None:
        """Close what nobody has taken out of ``state``; systemd's own copies stay."""
        while self.state:
            os.close(self.state.popitem()[1])

    def _store(self, name: str, descriptor: int, title: str) -> None:
        if not (self.is_there and self._systemd.is_main):
            return
        reason = ""
        if len(name) > NAME_LENGTH:
            reason = "its name and its address are too long together: give it a shorter name="
        elif len((self._parked | self._inherited) - {name}) >= self._limit:
            reason = f"there is room for {self._limit}: raise FileDescriptorStoreMax= in the unit's [Service]"
        else:
            try:
                # FDPOLL=0: systemd would remove a socket by itself once its peer is gone. Removing it is this object's
                # task.
                self._systemd.tell("FDSTORE=1", "FDPOLL=0", f"FDNAME={name}", descriptors=[descriptor])
            except OSError as error:
                # A socket is tried again with the next look (OwnManagement._tell_status).
                reason = f"{error.strerror}: raise the limit (ulimit -n, LimitNOFILE=)"
        if not reason:
            self._parked.add(name)
        elif not self._complained:
            self._complained = True
            logger.warning("systemd cannot keep %s for the case of a crash: %s", title, reason)

    def _remove(self, name: str) -> None:
        self._parked.discard(name)
        self._inherited.discard(name)
        self._systemd.tell("FDSTOREREMOVE=1", f"FDNAME={name}")


def _is_worth_it(entry: Entry) -> bool:
    """Say whether clients can wait there, once it listens. What a socket unit holds open is safe anyway."""
    if entry.number is not None:
        return False
    is_datagram = entry.sock.type not in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
    return is_datagram or bool(entry.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _name_of(entry: Entry) -> str:
    """Return what it is parked as: unique by the inode of the socket itself, since names and addresses may repeat."""
    name = "*".join(map(_quote, entry.name.split(entry.address))) if entry.address else _quote(entry.name)
    path = "" if entry.inode is None else "-".join(map(str, entry.inode))
    fields = (str(os.fstat(entry.sock.fileno()).st_ino), name, _quote(entry.address), path)
    return SOCKET_PREFIX + ";".join(fields)


def _parse(full_name: str) -> tuple[str, str, tuple[int, int] | None] | None:
    """Return name, address and the path's inode of a parked socket; None where another release has named it."""
    match full_name.removeprefix(SOCKET_PREFIX).split(";"):
        case [_, name, address, ""]:
            inode = None
        case [_, name, address, path]:
            device, _, number = path.partition("-")
            if not (device.isdecimal() and number.isdecimal()):
                return None
            inode = int(device), int(number)
        case _:
            return None
    address = unquote(address)
    # Most names have the address in them. It is told once, because there is little room.
    return address.join(map(unquote, name.split("*"))), address, inode


def _name_of_state(name: str, version: Version) -> str:
    return f"{STATE_PREFIX}{_quote(name)};{_quote(json.dumps(version))}"


def _parse_state(full_name: str) -> tuple[str, Version] | None:
    """Return name and version of a parked piece of state; None where another release has named it."""
    name, _, version = full_name.removeprefix(STATE_PREFIX).partition(";")
    try:
        found = json.loads(unquote(version))
    except ValueError:
        return None
    return (unquote(name), found) if isinstance(found, str | int) else None


def _quote(text: str) -> str:
    return quote(text, safe="/[]@")
