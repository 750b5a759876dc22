"""What the command says: whole, wherever it goes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

PROGRAM = """
from ecdysis_async._system import messages
messages.say("two lines\\nof one message")
messages.write_lines("another")
"""


def test_a_message_is_one_write() -> None:
    """However Python's streams are buffered: several processes write there, each between two writes of another."""
    reader, writer = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with reader:
        with writer:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            subprocess.run([sys.executable, "-c", PROGRAM], check=True, stderr=writer.fileno(), env=environment)
        # A record is what one write has written.
        assert [reader.recv(1000) for _ in range(3)] == [b"ecdysis: two lines\nof one message\n", b"another\n", b""]


def test_a_message_that_has_no_place_to_go_ends_nothing() -> None:
    command = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-c", PROGRAM]
    subprocess.run(command, check=True)
