"""Hears what services say on an abstract address, and tells systemd, each in the name of the process that has said it.

Every systemd of today listens on a path. Others do not: earlier ones, and programs that take its place.
"""

from __future__ import annotations

import array
import os
import socket
import sys


def main(name: str) -> None:
    """Pass on everything, and the descriptors that come along."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as services,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
    ):
        services.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        services.bind(f"\0{name}")
        systemd.connect(os.environ["NOTIFY_SOCKET"])
        systemd.send(b"READY=1")
        while True:
            message, ancillary, _, _ = services.recvmsg(65536, 4096)
            # Root may speak for others: unix(7), SCM_CREDENTIALS.
            systemd.sendmsg([message], ancillary)
            for _, kind, data in ancillary:
                if kind == socket.SCM_RIGHTS:
                    for descriptor in array.array("i", data):
                        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1])
