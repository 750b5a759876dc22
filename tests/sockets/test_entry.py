"""One named socket: its queue, its path, and the ways in which it turns clients away."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import Entry, Kind, kind_of
from ecdysis_async._sockets.registry import Registry


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry()
    yield registry
    registry.close(unlink=True)


@pytest.fixture
def tcp(registry: Registry) -> Entry:
    entry = registry.obtain(Internet("127.0.0.1", 0), backlog=5)
    entry.start_listening()
    return entry


def knock(entry: Entry) -> int:
    """Connect without waiting; return the error."""
    with socket.socket(entry.sock.family, entry.sock.type) as client:
        client.setblocking(False)
        return client.connect_ex(entry.sock.getsockname())


def test_start_listening_again_keeps_what_is_queued(tcp: Entry) -> None:
    assert not tcp.is_waited_for()
    with socket.create_connection(tcp.sock.getsockname()):
        tcp.start_listening()
        assert tcp.is_waited_for()
        accepted, _ = tcp.sock.accept()
        accepted.close()


def test_where_it_is_stands_beside_a_name_that_does_not_tell(registry: Registry, tcp: Entry) -> None:
    assert str(tcp) == f"tcp:127.0.0.1:0 (127.0.0.1:{tcp.sock.getsockname()[1]})"
    assert str(registry.obtain(Unix("@" + str(os.getpid())))) == f"unix:@{os.getpid()}"


def test_the_kind_is_what_the_kernel_says(registry: Registry, tmp_path: Path) -> None:
    for address in Unix(str(tmp_path / "s"), Kind.SEQPACKET), Internet("::1", 0), Internet("::1", 0, is_datagram=True):
        entry = registry.obtain(address)
        assert entry.kind is kind_of(entry.sock) is address.kind
        assert entry.has_queue is (address.kind is not Kind.UDP)


def test_newcomers_to_a_port_find_it_silent_and_those_who_wait_are_accepted(tcp: Entry) -> None:
    with socket.create_connection(tcp.sock.getsockname()):
        tcp.refuse_newcomers()
        # The queue is full with the one who waits: the next SYN is dropped, and repeated a second later (tcp(7)).
        assert knock(tcp) == errno.EINPROGRESS
        accepted, _ = tcp.sock.accept()
        accepted.close()
        assert not tcp.is_waited_for()


def test_newcomers_to_a_path_find_none_and_those_who_wait_are_accepted(registry: Registry, tmp_path: Path) -> None:
    entry = registry.obtain(Unix(str(tmp_path / "socket")))
    entry.start_listening()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(entry.address)
        entry.refuse_newcomers()
        assert knock(entry) == errno.ENOENT
        entry.sock.accept()[0].close()
    assert not entry.is_at_its_path()


def test_a_port_that_stops_listening_refuses_at_once(tcp: Entry) -> None:
    tcp.stop_listening()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(tcp.sock.getsockname())
    tcp.sock.close()
    tcp.stop_listening()


def test_what_others_may_accept_from_is_left_as_it_is(registry: Registry) -> None:
    entry = registry.adopt(socket.create_server(("127.0.0.1", 0)), name="adopted")
    entry.refuse_newcomers()
    entry.stop_listening()
    with socket.create_connection(entry.sock.getsockname()):
        entry.sock.accept()[0].close()


def test_permissions_come_with_the_commit_and_go_with_whoever_accepts_again(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    former = registry.obtain(Unix(str(path), mode=0o600))
    successor = Registry()
    try:
        descriptions, descriptors = registry.describe()
        successor.inherit(descriptions, [os.dup(each) for each in descriptors])
        group = 1 if os.geteuid() == 0 else os.getegid()
        entry = successor.obtain(Unix(str(path), mode=0o660, group=group))
        assert path.stat().st_mode & 0o777 == 0o600
        entry.start_listening()
        assert (path.stat().st_mode & 0o777, path.stat().st_gid) == (0o660, group)
        former.start_listening()
        assert path.stat().st_mode & 0o777 == 0o600
        # A file of somebody else's is left as it is.
        path.unlink()
        path.touch(mode=0o640)
        entry.start_listening()
        assert path.stat().st_mode & 0o777 == 0o640
        assert entry.has_lost_its_path()
    finally:
        successor.close(unlink=False)
