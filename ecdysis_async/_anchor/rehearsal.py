"""The rehearsal: what new code needs is opened and closed again, before the former code lets go of anything.

It runs in another process than the former code: in a child that tries the new code of an upgrade in place, or in the
anchor that takes over. What the service holds already is not touched. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from ecdysis_async._management.control_access import ControlAccess
from ecdysis_async._management.control_path import ControlLock, prepare_directory
from ecdysis_async._management.control_server import NAME, obtain_control_socket
from ecdysis_async._management.pid_file import PidFile
from ecdysis_async._sockets.registry import Registry, listen

from .config import AnchorConfig

__all__ = ["rehearse"]


def rehearse(config: AnchorConfig, sockets: Mapping[str, Any], pid: int) -> None:
    """Open what a configuration asks for and the service does not hold yet, and close it again.

    Args:
        config: what the new code is to run.
        sockets: what the former code holds (``HeldSockets.describe``).
        pid: the process that will run the new code.

    Raises:
        OSError, LookupError, ValueError: something cannot be opened; the text says what to do.
        KeyError, TypeError: the former code describes its sockets otherwise.
    """
    if config.settings.pid_file is not None:
        pid_file = PidFile(config.settings.pid_file)
        if not pid_file.names(pid):
            pid_file.prepare()
            pid_file.discard()
    if config.control_path is not None:
        with _imitated(sockets["control"]) as registry:
            _rehearse_control(config.control_path, config.control_access, registry)
    if config.health is not None:
        with _imitated(sockets["health"]) as registry:
            listen(registry, config.health)
    with _imitated(sockets["service"]) as registry:
        for open_sockets in config.open_sockets.values():
            open_sockets(registry)


def _rehearse_control(path: str, access: ControlAccess, registry: Registry) -> None:
    held = [entry for entry in registry.entries if (entry.name, entry.address) == (NAME, path)]
    if any(entry.is_at_its_path() for entry in held):
        # Its permissions are changed by whoever will serve it.
        prepare_directory(path, is_shared=access.group is not None)
        return
    lock = ControlLock(path)
    try:
        entry = obtain_control_socket(path, access, lock, registry)
        registry.release(entry, unlink=True)
    finally:
        lock.release()


@contextlib.contextmanager
def _imitated(held: Mapping[str, Any]) -> Iterator[Registry]:
    """Make a registry in which stand-ins are in the place of the sockets that the service holds.

    With the sockets themselves, a child that does not end would keep the service's addresses.
    """
    registry = Registry()
    descriptions = held["descriptions"]
    # A former release does not say of what kind they are.
    kinds = held.get("kinds") or [_guess_kind(each["address"]) for each in descriptions]
    stand_ins = [socket.socket(*kind).detach() for kind in kinds]
    registry.inherit(descriptions, stand_ins)
    try:
        yield registry
    finally:
        for entry in registry.entries:
            if entry.number is not None and entry.sock.fileno() not in stand_ins:
                # It was passed to this process, which has no other one, and will want it again.
                entry.sock.detach()
            registry.release(entry, unlink=not entry.inherited)


def _guess_kind(address: str) -> tuple[int, int]:
    if address.startswith(("/", "@")):
        return socket.AF_UNIX, socket.SOCK_STREAM
    return socket.AF_INET6 if address.startswith("[") else socket.AF_INET, socket.SOCK_STREAM
