"""Who may command a service: the mode and the group of its control socket, and what the kernel says of a client."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from dataclasses import dataclass

from ecdysis_async._system.descriptors import Credentials, read_credentials

__all__ = ["ControlAccess"]

DEFAULT_MODE = 0o600
GROUP_MODE = 0o660

# socket(7), since Linux 4.13; the module socket does not have it. Where another number means it (MIPS, PA-RISC, SPARC),
# the kernel refuses this one, and the groups are looked up.
SO_PEERGROUPS = 59
# What getsockopt of the module socket has room for at most, bytes. Of a process in more groups they are looked up.
GROUPS_SIZE = 1024


@dataclass(frozen=True, slots=True)
class ControlAccess:
    """Who may command a service besides its own user and root.

    Attributes:
        given_mode: the permissions of the socket; None: for its user alone, and its group where there is one.
        group: the number of the group whose members may; None: nobody else.
    """

    given_mode: int | None = None
    group: int | None = None

    @property
    def mode(self) -> int:
        """The permissions of the socket."""
        if self.given_mode is not None:
            return self.given_mode
        return DEFAULT_MODE if self.group is None else GROUP_MODE

    @property
    def admitted_group(self) -> int | None:
        """The group whose members may; that of the service where only a mode was given that lets a group in."""
        if self.group is None and self.mode & stat.S_IWGRP:
            return os.getegid()
        return self.group

    def admits(self, sock: socket.socket) -> bool:
        """Say whether the process at the other end may command the service, as the kernel saw it when it connected."""
        peer = read_credentials(sock)
        if peer.uid in (0, os.geteuid()):
            return True
        group = self.admitted_group
        return group is not None and (group == peer.gid or group in _read_groups(sock, peer))

    def refusal(self, sock: socket.socket) -> str:
        """Say who may, to a client that may not."""
        others = f", root, or a member of group {group}" if (group := self.admitted_group) is not None else ", or root"
        uid = read_credentials(sock).uid
        return f"uid {uid} may not control a service of uid {os.geteuid()}: ask as that user{others}"

    def apply(self, path: str) -> None:
        """Give a socket that was inherited what is asked for now. It blocks.

        Raises:
            OSError: this process may not.
        """
        found = os.lstat(path)
        if self.group is not None and found.st_gid != self.group:
            os.chown(path, -1, self.group, follow_symlinks=False)
        if stat.S_IMODE(found.st_mode) != self.mode and stat.S_ISSOCK(found.st_mode):
            os.chmod(path, self.mode)

    def find_obstacle(self, path: str) -> str | None:
        """Return the first directory on the way to the socket that the group may not pass; None if there is none."""
        if self.group is None:
            return None
        directory = os.path.dirname(path)
        while True:
            found = os.stat(directory)
            passes = found.st_mode & (stat.S_IXGRP if found.st_gid == self.group else stat.S_IXOTH)
            if not passes:
                return directory
            if (parent := os.path.dirname(directory)) == directory:
                return None
            directory = parent


def _read_groups(sock: socket.socket, peer: Credentials) -> set[int]:
    """Return the supplementary groups of the process at the other end."""
    size = struct.calcsize("I")
    with contextlib.suppress(OSError):  # before Linux 4.13, in a sandbox, or too many of them
        groups = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_SIZE)
        return set(struct.unpack(f"{len(groups) // size}I", groups))
    # Imported here, because there are platforms without it, on which nobody has a control socket.
    import pwd

    with contextlib.suppress(KeyError):  # it has no name here
        return set(os.getgrouplist(pwd.getpwuid(peer.uid).pw_name, peer.gid))
    return set()
