"""Named sockets: what is asked for is inherited where it fits, created where it does not, and never somebody else's.

A successor is a second registry with duplicates of the first one's descriptors, which is what comes over a channel.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import Entry, Kind, Until
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.errors import DescriptorMismatch, GarbledFrame
from tests.ports import find_free_port

type_of = {Kind.UNIX: socket.SOCK_STREAM, Kind.SEQPACKET: socket.SOCK_SEQPACKET, Kind.UNIX_DATAGRAM: socket.SOCK_DGRAM}


@pytest.fixture
def new_registry() -> Iterator[Callable[[], Registry]]:
    """Make registries that are closed at the end."""
    registries = []

    def make() -> Registry:
        registries.append(Registry())
        return registries[-1]

    yield make
    for registry in registries:
        registry.close(unlink=False)


@pytest.fixture
def registry(new_registry: Callable[[], Registry]) -> Registry:
    return new_registry()


@pytest.fixture
def succeed(new_registry: Callable[[], Registry]) -> Callable[[Registry], Registry]:
    """Make the registry of a successor."""

    def make(predecessor: Registry) -> Registry:
        descriptions, descriptors = predecessor.describe()
        successor = new_registry()
        duplicates = [os.dup(descriptor) for descriptor in descriptors]
        for duplicate in duplicates:
            # As a socket comes from whoever does not set close-on-exec.
            os.set_inheritable(duplicate, True)
        successor.inherit(json.loads(json.dumps(descriptions)), duplicates)
        return successor

    return make


@pytest.fixture
def reserved_port() -> Iterator[int]:
    """Hold a TCP port that a socket with SO_REUSEADDR may still bind, so that no other test is given it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def is_same_socket(one: Entry, other: Entry) -> bool:
    """Say whether two entries are duplicates of one socket of the kernel."""
    return os.fstat(one.sock.fileno()).st_ino == os.fstat(other.sock.fileno()).st_ino


def is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def has_nonblocking_flag(sock: socket.socket) -> bool:
    return bool(fcntl.fcntl(sock.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK)


# --- created ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "address", "family"),
    [
        ("127.0.0.1", "127.0.0.1:0", socket.AF_INET),
        ("127.1", "127.0.0.1:0", socket.AF_INET),
        ("", "0.0.0.0:0", socket.AF_INET),
        (None, "0.0.0.0:0", socket.AF_INET),
        ("::1", "[::1]:0", socket.AF_INET6),
        ("0:0::1", "[::1]:0", socket.AF_INET6),
        ("::", "[::]:0", socket.AF_INET6),
    ],
)
def test_tcp_and_udp_are_bound_and_do_not_listen(
    registry: Registry, host: str | None, address: str, family: socket.AddressFamily
) -> None:
    tcp = registry.obtain(Internet(host, 0))
    udp = registry.obtain(Internet(host, 0, is_datagram=True))
    assert (tcp.kind, tcp.name, tcp.address) == (Kind.TCP, f"tcp:{address}", address)
    assert (udp.kind, udp.name, udp.address) == (Kind.UDP, f"udp:{address}", address)
    for entry in tcp, udp:
        assert entry.sock.family == family
        assert entry.sock.getsockname()[1] != 0
        assert (entry.claimed, entry.inherited, entry.until) == (True, False, Until.DRAIN)
        assert has_nonblocking_flag(entry.sock)
        assert not entry.sock.get_inheritable()
    # With protocol 0 asyncio leaves TCP_NODELAY off.
    assert tcp.sock.proto == socket.IPPROTO_TCP
    assert not is_listening(tcp.sock)
    tcp.start_listening()
    udp.start_listening()
    assert is_listening(tcp.sock)


def test_all_of_ipv4_and_all_of_ipv6_share_a_port(registry: Registry) -> None:
    # The kernel would choose one for IPv6 that another process may have for IPv4.
    port = find_free_port()
    six, four = registry.obtain(Internet("::", port)), registry.obtain(Internet("", port))
    for entry in six, four:
        entry.start_listening()
    assert four.sock.getsockname() == ("0.0.0.0", port)


def test_errors_of_bind_name_address_and_remedy(registry: Registry) -> None:
    # 192.0.2.0/24 is for documentation (RFC 5737) and nobody's.
    with pytest.raises(OSError, match=r"cannot bind 192\.0\.2\.1:0: .*no interface") as raised:
        registry.obtain(Internet("192.0.2.1", 0))
    assert raised.value.errno == errno.EADDRNOTAVAIL
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot bind 127\.0\.0\.1:{port}: .*has it") as raised:
            registry.obtain(Internet("127.0.0.1", port))
        assert raised.value.errno == errno.EADDRINUSE
    assert not registry.entries


def test_asking_twice_fails_before_anything_listens(registry: Registry, reserved_port: int) -> None:
    udp_port = registry.obtain(Internet("127.0.0.1", 0, is_datagram=True)).sock.getsockname()[1]
    registry.obtain(Internet("127.0.0.1", reserved_port))
    for port, is_datagram in (reserved_port, False), (udp_port, True):
        with pytest.raises(OSError, match=f"127.0.0.1:{port}") as raised:
            registry.obtain(Internet("127.0.0.1", port, is_datagram=is_datagram))
        assert raised.value.errno == errno.EADDRINUSE
    # Two ports of the kernel's choice are two.
    assert registry.obtain(Internet("127.0.0.1", 0, is_datagram=True)).sock.getsockname()[1] != udp_port


def test_until_is_checked(registry: Registry) -> None:
    assert registry.obtain(Internet("127.0.0.1", 0), until="exit").until is Until.EXIT
    with pytest.raises(ValueError, match="never"):
        registry.obtain(Internet("127.0.0.1", 0), until="never")
    registry.close(unlink=True)


# --- inherited --------------------------------------------------------------------------------------------------------


def test_each_kind_is_inherited_by_its_default_name(
    registry: Registry, succeed: Callable[[Registry], Registry], tmp_path: Path
) -> None:
    def ask_for_all(registry: Registry) -> list[Entry]:
        return [
            registry.obtain(Internet("127.0.0.1", 0)),
            registry.obtain(Internet("::1", 0)),
            registry.obtain(Internet("127.0.0.1", 0, is_datagram=True)),
            registry.obtain(Unix(str(tmp_path / "stream"))),
            registry.obtain(Unix(str(tmp_path / "packets"), Kind.SEQPACKET)),
            registry.obtain(Unix(str(tmp_path / "datagrams"), Kind.UNIX_DATAGRAM)),
            registry.obtain(Unix(f"@{tmp_path.name}/{os.getpid()}")),
        ]

    created = ask_for_all(registry)
    for entry in created:
        entry.start_listening()
    successor = succeed(registry)
    assert [entry.name for entry in successor.unclaimed()] == [entry.name for entry in created]
    inherited = ask_for_all(successor)
    for old, new in zip(created, inherited, strict=True):
        assert is_same_socket(old, new)
        assert (new.inherited, new.claimed) == (True, True)
        assert (new.name, new.kind, new.address, new.inode) == (old.name, old.kind, old.address, old.inode)
        assert (new.sock.family, new.sock.type, new.sock.proto) == (old.sock.family, old.sock.type, old.sock.proto)
        assert not new.sock.get_inheritable()
    assert successor.unclaimed() == []
    assert list(successor.entries) == inherited


def test_inheriting_does_not_make_the_predecessors_socket_blocking(
    registry: Registry, succeed: Callable[[Registry], Registry]
) -> None:
    # Trap 3: O_NONBLOCK is shared by all duplicates.
    entry = registry.obtain(Internet("127.0.0.1", 0))
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        inherited = succeed(registry).obtain(Internet("127.0.0.1", 0))
    finally:
        socket.setdefaulttimeout(before)
    assert has_nonblocking_flag(entry.sock)
    assert inherited.sock.gettimeout() == 0


def test_a_claim_says_anew_how_long_it_serves(registry: Registry, succeed: Callable[[Registry], Registry]) -> None:
    registry.obtain(Internet("127.0.0.1", 0), until="drain", backlog=3)
    entry = succeed(registry).obtain(Internet("127.0.0.1", 0), until="exit", backlog=7)
    assert (entry.until, entry.backlog) == (Until.EXIT, 7)


def test_an_address_that_changed_is_created(registry: Registry, succeed: Callable[[Registry], Registry]) -> None:
    # Trap 10.
    old = registry.obtain(Internet("127.0.0.1", 0), name="web")
    old.start_listening()
    successor = succeed(registry)
    new = successor.obtain(Internet("::1", 0), name="web")
    assert not new.inherited
    assert not is_listening(new.sock)
    assert [entry.address for entry in successor.unclaimed()] == ["127.0.0.1:0"]
    # Another kind at the same address is another socket.
    assert not successor.obtain(Internet("127.0.0.1", 0, is_datagram=True), name="web").inherited
    (closed,) = successor.close_unclaimed()
    assert closed.sock.fileno() == -1
    assert successor.unclaimed() == []
    # The predecessor's own still answers.
    socket.create_connection(old.sock.getsockname()).close()


def test_a_renamed_listener_is_inherited_by_its_address(
    registry: Registry, succeed: Callable[[Registry], Registry], tmp_path: Path, reserved_port: int
) -> None:
    port = reserved_port
    old = (
        registry.obtain(Internet("127.0.0.1", port), name="old"),
        registry.obtain(Unix(str(tmp_path / "socket")), name="old"),
    )
    registry.obtain(Internet("127.0.0.1", 0), name="old")
    successor = succeed(registry)
    new = (
        successor.obtain(Internet("127.0.0.1", port), name="new"),
        successor.obtain(Unix(str(tmp_path / "socket")), name="new"),
    )
    assert all(map(is_same_socket, old, new))
    # A port of the kernel's choice is known by its name alone.
    assert not successor.obtain(Internet("127.0.0.1", 0), name="new").inherited
    assert len(successor.unclaimed()) == 1


def test_equal_sockets_are_claimed_in_order_each_once(
    registry: Registry, succeed: Callable[[Registry], Registry]
) -> None:
    # Trap 10.
    first = registry.obtain(Internet("127.0.0.1", 0, reuse_port=True))
    port = first.sock.getsockname()[1]
    old = [registry.obtain(Internet("127.0.0.1", port, reuse_port=True)) for _ in range(3)]
    old_ephemeral = [registry.obtain(Internet("127.0.0.1", 0, is_datagram=True)) for _ in range(2)]
    successor = succeed(registry)
    new = [successor.obtain(Internet("127.0.0.1", port, reuse_port=True)) for _ in range(4)]
    new_ephemeral = [successor.obtain(Internet("127.0.0.1", 0, is_datagram=True)) for _ in range(3)]
    assert all(map(is_same_socket, old, new))
    assert all(map(is_same_socket, old_ephemeral, new_ephemeral))
    assert [entry.inherited for entry in new] == [True, True, True, False]
    assert [entry.inherited for entry in new_ephemeral] == [True, True, False]


def test_a_second_socket_of_a_port_takes_its_queue_along_and_an_inherited_one_does_not(
    registry: Registry, succeed: Callable[[Registry], Registry]
) -> None:
    # Trap 11: why a successor inherits every socket, also of a port that it could bind once more.
    port = registry.obtain(Internet("127.0.0.1", 0, reuse_port=True)).sock.getsockname()[1]
    registry.obtain(Internet("127.0.0.1", port, reuse_port=True))
    registry.start_listening()
    successor = succeed(registry)
    sockets = [successor.obtain(Internet("127.0.0.1", wanted, reuse_port=True)).sock for wanted in (0, port)]
    with contextlib.ExitStack() as stack:

        def connect() -> list[socket.socket]:
            address = ("127.0.0.1", port)
            return [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(200)]

        def answer() -> int:
            count = 0
            for sock in sockets:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        connection, _ = sock.accept()
                        with connection:
                            connection.send(b"x")
                        count += 1
            return count

        # The kernel spreads connections over the sockets of a port, and moves none.
        with socket.socket() as rival:
            rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            rival.bind(("127.0.0.1", port))
            rival.listen(200)
            clients = connect()
        answered, lost = answer(), 0
        for client in clients:
            try:
                assert client.recv(1) == b"x"
            except ConnectionResetError:
                lost += 1
        assert 0 < lost < len(clients) == lost + answered
        clients = connect()
        registry.close(unlink=False)
        assert answer() == len(clients)
        assert {client.recv(1) for client in clients} == {b"x"}


def test_it_goes_on_over_many_generations(registry: Registry, succeed: Callable[[Registry], Registry]) -> None:
    port = registry.obtain(Internet("127.0.0.1", 0)).sock.getsockname()[1]
    for _ in range(5):
        successor = succeed(registry)
        assert successor.obtain(Internet("127.0.0.1", 0)).sock.getsockname()[1] == port
        registry.close(unlink=False)
        registry = successor


def test_a_thousand_sockets(registry: Registry, succeed: Callable[[Registry], Registry]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        names = [str(number) for number in range(1000)]
        ports = [registry.obtain(Internet("127.0.0.1", 0), name=name).sock.getsockname()[1] for name in names]
        successor = succeed(registry)
        claimed = [
            successor.obtain(Internet("127.0.0.1", 0), name=name).sock.getsockname()[1] for name in reversed(names)
        ]
        assert claimed == list(reversed(ports))
        assert successor.unclaimed() == []
        successor.close(unlink=False)
        registry.close(unlink=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_broken_descriptions_close_every_descriptor(registry: Registry) -> None:
    # The guard of conftest.py would find one left open.
    def duplicates(count: int) -> list[int]:
        return [os.dup(listener.fileno()) for _ in range(count)]

    good = {"name": "a", "address": "127.0.0.1:0", "inode": None, "added by a later version": 1}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(DescriptorMismatch):
            registry.inherit([good], duplicates(2))
        with pytest.raises(DescriptorMismatch):
            registry.inherit([good, good], duplicates(1))
        with pytest.raises(GarbledFrame):
            registry.inherit([good, {"name": 1, "address": "x"}, good], duplicates(3))
        with pytest.raises(OSError, match="socket"):
            registry.inherit([good, good, good], [*duplicates(1), os.open("/dev/null", os.O_RDONLY), *duplicates(1)])
        assert not registry.entries
        registry.inherit([good], duplicates(1))
        assert [entry.name for entry in registry.unclaimed()] == ["a"]


# --- Unix paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", type_of)
def test_a_path_keeps_its_inode_until_the_full_stop(
    registry: Registry, succeed: Callable[[Registry], Registry], tmp_path: Path, kind: Kind
) -> None:
    # Trap 4.
    path = tmp_path / "socket"
    registry.obtain(Unix(str(path), kind)).start_listening()
    inode = path.stat().st_ino
    successor = succeed(registry)
    inherited = successor.obtain(Unix(str(path), kind))
    registry.close(unlink=False)
    assert path.stat().st_ino == inode
    with socket.socket(socket.AF_UNIX, type_of[inherited.kind]) as client:
        client.connect(str(path))
    successor.close(unlink=True)
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    link = tmp_path / "link"
    link.symlink_to(path)
    for refused in path, link, tmp_path:
        with pytest.raises(FileExistsError, match=f"cannot bind {refused}: .*no socket"):
            registry.obtain(Unix(str(refused)))
    assert path.read_text() == "data"


def test_asking_twice_for_a_path_fails(registry: Registry, tmp_path: Path) -> None:
    entry = registry.obtain(Unix(str(tmp_path / "socket")))
    for kind in type_of:
        with pytest.raises(OSError, match="in use"):
            registry.obtain(Unix(str(tmp_path / "socket"), kind))
    assert entry.is_at_its_path()
    registry.obtain(Unix(f"@{tmp_path.name}/{os.getpid()}"))
    with pytest.raises(OSError, match="in use"):
        registry.obtain(Unix(f"@{tmp_path.name}/{os.getpid()}"))


def test_a_directory_that_is_not_there(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot bind .*create it first"):
        registry.obtain(Unix(str(tmp_path / "nowhere" / "socket")))


def test_paths_that_are_too_long(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in "/" + "a" * 107, "@" + "a" * 107, "\u00fc" * 60:
        with pytest.raises(ValueError, match="too long for a Unix socket"):
            registry.obtain(Unix(str(path)))
    # A short way to a long one is possible, also when its file is stale.
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    monkeypatch.chdir(directory)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind("socket")
    entry = registry.obtain(Unix("socket"))
    assert entry.address == str(directory / "socket")
    monkeypatch.chdir(tmp_path)
    registry.close(unlink=True)
    assert not (directory / "socket").exists()


def test_a_path_that_is_gone_or_leads_elsewhere_is_made_afresh(
    registry: Registry, succeed: Callable[[Registry], Registry], tmp_path: Path
) -> None:
    for release in "one", "two":
        (tmp_path / release).mkdir()
    current = tmp_path / "current"
    current.symlink_to("one")
    registry.obtain(Unix(str(current / "moved"))).start_listening()
    registry.obtain(Unix(str(tmp_path / "removed"))).start_listening()
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(current)
    (tmp_path / "removed").unlink()
    successor = succeed(registry)
    for path in current / "moved", tmp_path / "removed":
        entry = successor.obtain(Unix(str(path)))
        assert not entry.inherited
        assert entry.is_at_its_path()
    assert len(successor.unclaimed()) == 2
    # And what the predecessor closes is not the path of its successor.
    registry.close(unlink=True)
    assert all(entry.is_at_its_path() for entry in successor.entries if entry.claimed)


def test_two_generations_remove_their_paths_at_once(
    registry: Registry, succeed: Callable[[Registry], Registry], tmp_path: Path
) -> None:
    """A full stop while several drain: each finds the path its own, and only one can remove it."""
    paths = [tmp_path / str(number) for number in range(200)]
    for path in paths:
        registry.obtain(Unix(str(path)))
    successor = succeed(registry)
    for path in paths:
        successor.obtain(Unix(str(path)))
    begin = threading.Barrier(2)

    def close(generation: Registry) -> None:
        begin.wait()
        generation.close(unlink=True)

    with ThreadPoolExecutor() as threads:
        for ending in [threads.submit(close, each) for each in (registry, successor)]:
            ending.result()
    assert not any(path.exists() for path in paths)
    assert not registry.entries
    assert not successor.entries


def test_only_its_own_path_is_unlinked(registry: Registry, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    entry = registry.obtain(Unix(str(theirs)))
    theirs.unlink()
    with socket.socket(socket.AF_UNIX) as somebody, socket.socket(socket.AF_UNIX) as adopted:
        somebody.bind(str(theirs))
        adopted.bind(str(tmp_path / "adopted"))
        registry.adopt(adopted, name="adopted")
        registry.release(entry, unlink=True)
        registry.close(unlink=True)
        assert theirs.exists()
        assert (tmp_path / "adopted").exists()


# --- adopted ----------------------------------------------------------------------------------------------------------


def test_an_adopted_socket_is_replaced_by_the_inherited_one(
    registry: Registry, succeed: Callable[[Registry], Registry]
) -> None:
    def build() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.bind(("127.0.0.1", 0))
        return sock

    own = build()
    port = own.getsockname()[1]
    entry = registry.adopt(own, name="own", until="exit")
    assert entry.sock is own
    assert (entry.kind, entry.address, entry.until) == (Kind.TCP, f"127.0.0.1:{port}", Until.EXIT)
    assert has_nonblocking_flag(own)
    with pytest.raises(ValueError, match="'own'"):
        registry.adopt(own, name="again")
    successor = succeed(registry)
    given = build()
    inherited = successor.adopt(given, name="own")
    assert is_same_socket(entry, inherited)
    assert (inherited.inherited, inherited.until) == (True, Until.DRAIN)
    assert given.fileno() == -1
    # Claimed once; a second one of this name is the application's own, and so is one of another type.
    second = build()
    assert successor.adopt(second, name="own").sock is second
    assert successor.unclaimed() == []
    inherited.start_listening()
    socket.create_connection(("127.0.0.1", port)).close()


def test_a_function_makes_the_socket_only_where_none_was_inherited(
    registry: Registry, succeed: Callable[[Registry], Registry]
) -> None:
    made: list[socket.socket] = []

    def make() -> socket.socket:
        # A successor could not bind this address a second time.
        made.append(socket.create_server(made[0].getsockname() if made else ("127.0.0.1", 0)))
        return made[-1]

    entry = registry.adopt(make, name="own")
    successor = succeed(registry)
    inherited = successor.adopt(make, name="own")
    assert len(made) == 1
    assert inherited.inherited
    assert inherited.sock.getsockname() == entry.sock.getsockname()
    with pytest.raises(OSError, match="in use"):
        successor.adopt(make, name="another")


@pytest.mark.parametrize(
    ("family", "kind", "expected"),
    [
        (socket.AF_INET, socket.SOCK_DGRAM, Kind.UDP),
        (socket.AF_INET6, socket.SOCK_STREAM, Kind.TCP),
        (socket.AF_UNIX, socket.SOCK_STREAM, Kind.UNIX),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, Kind.SEQPACKET),
        (socket.AF_UNIX, socket.SOCK_DGRAM, Kind.UNIX_DATAGRAM),
        (socket.AF_NETLINK, socket.SOCK_DGRAM, Kind.OTHER),
    ],
)
def test_any_socket_can_be_adopted(
    registry: Registry,
    succeed: Callable[[Registry], Registry],
    family: socket.AddressFamily,
    kind: socket.SocketKind,
    expected: Kind,
) -> None:
    entry = registry.adopt(socket.socket(family, kind), name="any")
    assert entry.kind is expected
    assert entry.inode is None
    again = succeed(registry).adopt(socket.socket(family, kind), name="any")
    assert again.inherited
    assert again.kind is expected
    other = succeed(registry).adopt(socket.socket(socket.AF_INET, socket.SOCK_STREAM), name="any")
    assert not other.inherited


def test_find_knows_the_very_socket(registry: Registry) -> None:
    entry = registry.obtain(Internet("127.0.0.1", 0))
    assert registry.find(entry.sock) is entry
    assert registry.find(entry.sock.fileno()) is entry
    with entry.sock.dup() as duplicate:
        assert registry.find(duplicate) is None
    assert registry.find(duplicate) is None
    registry.release(entry)
    assert not registry.entries
    assert entry.sock.fileno() == -1
    assert registry.find(entry.sock) is None


def test_what_is_released_already_is_released(registry: Registry, tmp_path: Path) -> None:
    kept = registry.obtain(Internet("127.0.0.1", 0))
    entry = registry.obtain(Unix(str(tmp_path / "socket")))
    registry.release(entry)
    registry.release(entry, unlink=True)
    assert registry.entries == (kept,)
    # Nobody knows any more whose socket it leads to.
    assert (tmp_path / "socket").exists()


def test_what_the_application_has_closed_itself_is_no_more_there(registry: Registry, tmp_path: Path) -> None:
    first, path = registry.obtain(Internet("127.0.0.1", 0)), registry.obtain(Unix(str(tmp_path / "s")))
    first.sock.close()
    path.sock.close()
    assert not registry.entries
    assert registry.describe() == ([], [])
    registry.start_listening()
    # Its address is free.
    again = registry.obtain(Internet("127.0.0.1", 0))
    assert list(registry.entries) == [again]
    registry.close(unlink=True)
    assert not (tmp_path / "s").exists()


def test_describe_leaves_the_descriptors_alone(registry: Registry) -> None:
    entries = [registry.obtain(Internet("127.0.0.1", 0), name=name) for name in "abc"]
    descriptions, descriptors = registry.describe(entries[1:])
    assert [description["name"] for description in descriptions] == ["b", "c"]
    assert descriptors == [entry.sock.fileno() for entry in entries[1:]]


@pytest.mark.parametrize("what", ["nothing", "dead", "live", "file"])
def test_only_a_dead_path_is_cleared_where_one_was_lost(registry: Registry, tmp_path: Path, what: str) -> None:
    path, kept = tmp_path / "socket", tmp_path / "kept"
    registry.obtain(Unix(str(path)))
    registry.obtain(Unix(str(kept)))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        if what == "file":
            path.touch()
        elif what != "nothing":
            other.bind(str(path))
        if what == "dead":
            other.close()
        registry.clear_dead_paths()
    assert path.exists() == (what in ("live", "file"))
    assert kept.exists()
    path.unlink(missing_ok=True)
