"""A successor that breaks the handoff in the way that the file ``mode`` names; "service" runs the real one instead."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAGIC, HEADER = b"ECDY", struct.Struct("!4sII")


def frame(body: dict[str, Any], count: int, *, length: int | None = None) -> bytes:
    """Write a frame, as channel.py would, or with a length that is not its own."""
    payload = json.dumps(body).encode()
    return HEADER.pack(MAGIC, len(payload) if length is None else length, count) + payload


def main() -> None:
    """Break it, and stay: what a death is, the predecessor shall not learn from the channel."""
    mode = Path("mode").read_text(encoding="utf-8")
    if mode == "service":
        os.execv(sys.argv[1], sys.argv[1:])
    channel = socket.socket(fileno=int(os.environ["ECDYSIS_CHANNEL"].split(":")[0]))
    pidfd = os.pidfd_open(os.getpid())
    counters = os.memfd_create("counters")
    os.ftruncate(counters, 16)
    pipe = os.pipe()[0]

    def send(data: bytes, descriptors: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        channel.sendmsg([data], rights if descriptors else [])

    hello = {"type": "hello", "versions": [1, 1], "pid": os.getpid()}
    match mode:
        case "garbage":
            send(b"GET / HTTP/1.1\r\n\r\n")
        case "truncated":
            send(frame(hello, 2)[:-5], [pidfd, counters])
            channel.close()
        case "closed":
            channel.close()
        case "oversized":
            send(frame(hello, 0, length=2**31))
        case "no JSON":
            send(HEADER.pack(MAGIC, 2, 0) + b"{]")
        case "descriptor missing":
            send(frame(hello, 2), [pidfd])
        case "descriptor too many":
            send(frame(hello, 2), [pidfd, counters, pipe])
        case "no descriptors":
            send(frame(hello, 0))
        case "more descriptors than HELLO has":
            send(frame(hello, 3), [pidfd, counters, pipe])
        case "no pid":
            send(frame(hello | {"pid": None}, 2), [pidfd, counters])
        case "endless pid":
            send(frame(hello | {"pid": float("inf")}, 2), [pidfd, counters])
        case "unknown version":
            send(frame(hello | {"versions": [98, 99]}, 2), [pidfd, counters])
        case "no version":
            send(frame(hello | {"versions": "all"}, 2), [pidfd, counters])
        case "unknown message":
            send(frame({"type": "surprise"}, 0))
        case "hello twice":
            send(frame(hello, 2), [pidfd, counters])
            send(frame(hello, 2), [pidfd, counters])
        case "ready first":
            send(frame({"type": "ready", "claimed": [], "created": []}, 0))
        case "ready without names":
            send(frame(hello, 2), [pidfd, counters])
            send(frame({"type": "ready"}, 0))
        case "serving before commit":
            send(frame(hello, 2), [pidfd, counters])
            send(frame({"type": "serving", "opened_at": 0}, 0))
        case "counters that are no memory" | "counters that are too short":
            os.ftruncate(counters, 1)
            send(frame(hello, 2), [pidfd, pipe if mode.endswith("no memory") else counters])
            send(frame({"type": "ready", "claimed": [0], "created": []}, 0))
            while b"commit" not in channel.recv(65536):
                pass
            return
        case "nothing at all":
            pass
        case _:
            sys.exit(f"no such mode: {mode}")
    signal.pause()


main()
