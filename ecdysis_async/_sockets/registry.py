"""Named sockets: inherited from the predecessor or created, claimed by the application, and closed if nobody does.

Every socket that moves from generation to generation is an :class:`Entry` here, and the registry owns its descriptor.
Nothing in this module waits or accepts, and nothing listens before the service says so.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ecdysis_async.errors import DescriptorMismatch, GarbledFrame

from .addresses import EVERY_ADDRESS, Address, Descriptor, Internet, Unix, make_way, resolve
from .entry import BACKLOG, Entry, Until, address_of, explain, find_inode, is_connected, kind_of

__all__ = ["Registry", "listen"]

logger = logging.getLogger("ecdysis_async")


class Registry:
    """All named sockets of one generation: what it was given, and what it has made.

    What was given is nobody's until the application asks for it, by :meth:`obtain`, :meth:`claim` or :meth:`adopt`.
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
                # TCP_NODELAY, which costs 44 ms per keep-alive request.
                sock = socket.socket(fileno=rest[0])
                del rest[0]
                entry = Entry(
                    name,
                    kind_of(sock),
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
                # O_NONBLOCK is shared with the predecessor, who listens on a duplicate: it only ever goes on.
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
            if is_connected(sock) and sock.type != socket.SOCK_DGRAM:
                logger.warning(
                    "the service manager has passed a connection (%s), where a service listens: it is closed. "
                    "Put Accept=no into the socket unit, and name its service app.service, not app@.service",
                    name,
                )
                sock.close()
                continue
            sock.setblocking(False)
            address = address_of(sock)
            self._entries.append(
                Entry(name, kind_of(sock), address, sock, inherited=True, claimed=False, number=number)
            )

    def restore(self, name: str, address: str, inode: tuple[int, int] | None, descriptor: int) -> None:
        """Register a socket that an earlier process of this service had, as :meth:`inherit` does with a live one's.

        One whose path has gone since is closed: no client finds it any more, and another one will have its name.
        """
        sock = socket.socket(fileno=descriptor)
        sock.set_inheritable(False)
        sock.setblocking(False)
        entry = Entry(name, kind_of(sock), address, sock, inherited=True, claimed=False, inode=inode)
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

    def obtain(
        self,
        address: Internet | Unix,
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        backlog: int = BACKLOG,
    ) -> Entry:
        """Return the socket at an address: inherited, passed by the service manager, or new and not yet listening.

        Args:
            address: where, and of which kind.
            name: what it is inherited by; None: its address, as it was asked for. So even a port that the kernel chose
                stays the same over all generations.
            until: whether it ends with the drain of a stop, or serves to the exit.
            backlog: how many connections may wait to be accepted.

        Raises:
            ValueError: the host is a name, the port no port, or the path too long for a socket.
            OSError: it cannot be bound, or another service is there; the text says where and what can be done.
        """
        kind, text = address.kind, address.text
        name, until = name or f"{kind.value}:{text}", Until(until)
        permissions = (address.mode, address.group) if isinstance(address, Unix) else (None, None)

        def fits(inherited: Entry) -> bool:
            # A path that was removed, or now leads elsewhere (a directory in it is a symlink that has moved), is made
            # afresh: clients do not find the inherited socket there.
            return (inherited.kind, inherited.address) == (kind, text) and (
                inherited.inode is None or inherited.is_at_its_path()
            )

        # The inherited one with this name and address comes first, where several have the name.
        found = self._claim(lambda inherited: inherited.name == name and fits(inherited), until, backlog, permissions)
        if found is None:
            # Passed under this very name: then the address is the socket unit's business.
            found = self._claim(
                lambda passed: passed.number is not None and (passed.kind, passed.name) == (kind, name), until, backlog
            )
        if found is None:
            found = self._claim(
                lambda passed: passed.number is not None and passed.kind is kind and _covers(passed, text),
                until,
                backlog,
            )
        if found is None and address.is_single:
            # Renamed between the generations: the address cannot be bound a second time, and there is but one of it.
            found = self._claim(fits, until, backlog, permissions)
        return self._create(address, name, until, backlog) if found is None else found

    def adopt(
        self, given: socket.socket | Callable[[], socket.socket], *, name: str, until: Until | str = Until.DRAIN
    ) -> Entry:
        """Take over a socket that the application built, or a function builds.

        Where one of the same name, family and type was inherited, the inherited one takes its place and the given one
        is closed: the entry's ``sock`` is the one to use. A function is not called where one of that name was
        inherited.

        Raises:
            ValueError: it is registered already.
        """
        until = Until(until)
        if isinstance(given, socket.socket):
            sock = given
        else:
            if (claimed := self._claim(lambda inherited: inherited.name == name, until, BACKLOG)) is not None:
                return claimed
            sock = given()
        if (entry := self.find(sock)) is not None:
            raise ValueError(f"this socket is registered already, as {entry.name!r}")

        def is_successor(inherited: Entry) -> bool:
            return inherited.name == name and (inherited.sock.family, inherited.sock.type) == (sock.family, sock.type)

        if (claimed := self._claim(is_successor, until, BACKLOG)) is not None:
            sock.close()
            return claimed
        sock.set_inheritable(False)
        sock.setblocking(False)
        entry = Entry(name, kind_of(sock), address_of(sock), sock, until, adopted=True)
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
            # It stays where this process was root when it made it, and is not any more, and where the file system has
            # become read-only; the next start replaces it.
            with contextlib.suppress(OSError):
                os.unlink(entry.address)
        entry.sock.close()
        self.on_release()

    def clear_dead_paths(self) -> None:
        """Remove what a successor that has failed left where a socket's path was lost: nobody listens there.

        The next restart makes the path anew. One that leads to a live socket is somebody's, and stays.
        """
        for entry in self.entries:
            if entry.has_lost_its_path():
                # It stays where another program, or a file that is no socket, is there.
                with contextlib.suppress(OSError):
                    make_way(entry.address)

    def give_back(self, entry: Entry) -> None:
        """Undo that a socket was asked for: what was inherited is nobody's again, and a new one is closed."""
        if not entry.inherited:
            self.release(entry, unlink=True)
        elif entry in self._entries:
            self._entries[self._entries.index(entry)] = replace(entry, claimed=False)

    def close(self, *, unlink: bool) -> None:
        """Close everything.

        Args:
            unlink: this is a full stop: remove the paths of Unix sockets too, those that the service made itself
                and that still lead to its own sockets.
        """
        for entry in tuple(self._entries):
            self.release(entry, unlink=unlink)

    def _create(self, address: Internet | Unix, name: str, until: Until, backlog: int) -> Entry:
        """Bind a new socket."""
        kind, text = address.kind, address.text
        try:
            # Two sockets with SO_REUSEADDR may be bound to one port as long as neither listens: it would only fail
            # after the commit.
            if address.is_single and any(
                entry.claimed and (entry.kind, entry.address) == (kind, text) for entry in self.entries
            ):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            sock = address.bind()
        except OSError as error:
            raise explain(error, "bind", text) from error
        sock.setblocking(False)
        inode = find_inode(text) if isinstance(address, Unix) and not address.is_abstract else None
        mode, group = (address.mode, address.group) if isinstance(address, Unix) else (None, None)
        entry = Entry(name, kind, text, sock, until, backlog, inode=inode, mode=mode, group=group)
        self._entries.append(entry)
        return entry

    def _claim(
        self,
        fits: Callable[[Entry], bool],
        until: Until,
        backlog: int,
        permissions: tuple[int | None, int | None] = (None, None),
    ) -> Entry | None:
        """Claim the first unclaimed entry that fits. Equal ones (SO_REUSEPORT) are so claimed in order, each once."""
        mode, group = permissions
        for index, entry in enumerate(self._entries):
            if not entry.claimed and fits(entry):
                claimed = replace(entry, claimed=True, until=until, backlog=backlog, mode=mode, group=group)
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


def listen(
    registry: Registry,
    address: Address,
    *,
    backlog: int = BACKLOG,
    mode: int | None = None,
    group: int | None = None,
) -> list[Entry]:
    """Ask for the sockets of one address: inherited ones, those that the service manager has passed, or new ones.

    Args:
        registry: of this generation.
        address: where; names are looked up, which may block.
        backlog: how many connections may wait to be accepted.
        mode: permissions of a Unix socket; None: those of the umask, or of the inherited one.
        group: the number of the group that a Unix socket belongs to; None: that of the process, or the inherited one's.

    Raises:
        OSError: it cannot be bound. LookupError: no such socket was passed. ValueError: a path is too long.

    On an error everything is as it was before.
    """
    opened: list[Entry] = []
    try:
        for each in resolve(address):
            opened.append(_listen(registry, each, backlog, mode, group))  # noqa: PERF401 - those before an error are given back
    except BaseException:
        for entry in opened:
            registry.give_back(entry)
        raise
    return opened


def _listen(registry: Registry, address: Address, backlog: int, mode: int | None, group: int | None) -> Entry:
    match address:
        case Internet():
            return registry.obtain(address, backlog=backlog)
        case Unix():
            return registry.obtain(replace(address, mode=mode, group=group), backlog=backlog)
        case Descriptor(name):
            try:
                return registry.claim(name)
            except LookupError:
                if not isinstance(name, int) or not _is_passed(registry, name):
                    raise
            # Passed by something else than systemd, which says nothing of it but the number on the command line.
            registry.activate({name: str(address)})
            return registry.claim(name)


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
