"""Descriptors on their way over a socket, each of them received or closed; and the three that a daemon may lack."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._system.descriptors import (
    MAX_PER_MESSAGE,
    DescriptorWriter,
    close_all,
    describe_place,
    duplicate_all,
    open_place,
    read_credentials,
    receive_with_descriptors,
    send_with_descriptors,
)
from ecdysis_async._system.shared_memory import make_memory

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "seqpacket"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    ends = socket.socketpair(socket.AF_UNIX, request.param)
    with ends[0], ends[1]:
        yield ends


def identify(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def test_what_is_received_is_what_was_sent_and_is_not_inherited(pair: Pair) -> None:
    ours, theirs = pair
    numbers = [ours.fileno(), theirs.fileno(), 0]
    assert send_with_descriptors(ours, b"three", numbers) == 5
    data, descriptors, lost, is_cut = receive_with_descriptors(theirs, 100)
    try:
        assert (data, lost, is_cut) == (b"three", False, False)
        assert [identify(number) for number in descriptors] == [identify(number) for number in numbers]
        assert not any(map(os.get_inheritable, descriptors))
    finally:
        close_all(descriptors)
    send_with_descriptors(ours, b"none", ())
    assert receive_with_descriptors(theirs, 100) == (b"none", [], False, False)
    ours.close()
    assert receive_with_descriptors(theirs, 100) == (b"", [], False, False)


def test_what_there_is_no_room_for_is_told(pair: Pair) -> None:
    ours, theirs = pair
    send_with_descriptors(ours, b"two", [0, 1])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        data, descriptors, lost, _ = receive_with_descriptors(theirs, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (data, descriptors, lost) == (b"two", [free], True)
    close_all(descriptors)


def test_duplicates_are_made_of_all_or_of_none() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            duplicate_all([0, 1])
        assert duplicate_all([0]) == [free]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(free)


def test_a_message_that_is_cut_says_so() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(b"longer")
        assert receive_with_descriptors(theirs, 4) == (b"long", [], False, True)


@pytest.mark.parametrize("count", [0, 1, MAX_PER_MESSAGE, MAX_PER_MESSAGE + 1, 2 * MAX_PER_MESSAGE + 1])
def test_many_descriptors_go_in_parts(count: int) -> None:
    ours, theirs = socket.socketpair()
    received, came = b"", 0
    with ours, theirs:
        writer = DescriptorWriter(b"message", [0] * count)
        while not writer.is_done:
            writer.write(ours)
            part = receive_with_descriptors(theirs, 100)
            received += part.data
            came += len(part.descriptors)
            close_all(part.descriptors)
    assert (received, came) == (b"message", count)


def test_what_was_not_written_is_written_later() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        message = bytes(range(256)) * 4096
        writer = DescriptorWriter(message, [0])
        received, came = b"", 0
        while len(received) < len(message):
            with contextlib.suppress(BlockingIOError):
                while not writer.is_done:
                    writer.write(ours)
            part = receive_with_descriptors(theirs, len(message))
            received += part.data
            came += len(part.descriptors)
            close_all(part.descriptors)
        assert writer.is_done
        assert (received == message, came) == (True, 1)


def test_who_is_at_the_other_end(pair: Pair) -> None:
    assert read_credentials(pair[0]) == (os.getpid(), os.geteuid(), os.getegid())


# Where it is a worker of `ecdysis run`, the one that was started so is the parent.
PROGRAM = """
import os
import ecdysis_async
from pathlib import Path

async def main(ecdysis):
    process = "self" if ecdysis is None else os.getppid()
    Path("found").write_text(" ".join(os.readlink(f"/proc/{process}/fd/{number}") for number in range(3)))
    raise ecdysis_async.StartupError("enough")

if __name__ == "__main__":
    ecdysis_async.run(main(None))
"""
COMMAND = ("-m", "ecdysis_async.cli", "run", "program:main", "--port", "0", "--control", "off")


@pytest.mark.parametrize("arguments", [("program.py",), COMMAND])
def test_closed_standard_descriptors_lead_to_nothing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    closing = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    subprocess.run((*closing, sys.executable, *arguments), cwd=tmp_path, timeout=60, check=False)
    assert (tmp_path / "found").read_text() == "/dev/null /dev/null /dev/null"


def test_what_another_process_has_open_is_found_by_its_place() -> None:
    descriptor = make_memory("ecdysis-test")
    try:
        os.write(descriptor, b"here")
        place = describe_place(descriptor)
        found = open_place(place, os.O_RDONLY)
        assert found is not None
        assert os.pread(found, 10, 0) == b"here"
        os.close(found)
        pid, number, device, inode = place
        for wrong in ([], [pid, number, device], [pid, number, device, inode + 1], [0, number, device, inode], None):
            assert open_place(wrong, os.O_RDONLY) is None  # type: ignore[arg-type] # another release may send anything
    finally:
        os.close(descriptor)
