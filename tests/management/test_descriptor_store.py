"""What is told to the descriptor store, byte for byte, and how it is read; the rest is shown on a real systemd."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecdysis_async._management.descriptor_store import NAME_LENGTH, DescriptorStore
from ecdysis_async._management.systemd import Systemd
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import Until
from ecdysis_async._sockets.registry import Registry


class Manager:
    """A systemd that hears a generation, and takes everything that is sent along."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.setblocking(False)
        self.systemd = Systemd(str(path))
        self.systemd.begin()
        self.kept: dict[str, int] = {}

    async def take(self) -> list[str]:
        """Hear all there is to hear, and do it; return the names that are kept then."""
        await self.systemd.flush()
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self.sock, 4096, 4)
            except BlockingIOError:
                return sorted(self.kept)
            match message.decode().split("\n"):
                case ["FDSTORE=1", "FDPOLL=0", name]:
                    # Of the same socket systemd keeps one descriptor.
                    if self.kept.setdefault(name.removeprefix("FDNAME="), descriptors[0]) != descriptors[0]:
                        os.close(descriptors[0])
                case ["FDSTOREREMOVE=1", name]:
                    os.close(self.kept.pop(name.removeprefix("FDNAME=")))

    def start(self) -> dict[int, str]:
        """Return what a process gets that is started now."""
        return {os.dup(descriptor): name for name, descriptor in self.kept.items()}

    def close(self) -> None:
        self.sock.close()
        self.systemd.close()
        for descriptor in self.kept.values():
            os.close(descriptor)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry()
    yield registry
    registry.close(unlink=True)


@pytest.mark.backends("asyncio")
async def test_what_listens_is_parked_and_found_again(manager: Manager, registry: Registry, tmp_path: Path) -> None:
    store = DescriptorStore(manager.systemd, "16")
    asked = [
        registry.obtain(Internet("127.0.0.1", 0)),
        registry.obtain(Internet("::1", 0), name="a name: 100 %"),
        registry.obtain(Unix(str(tmp_path / "a;b*c")), until=Until.EXIT),
        registry.obtain(Internet("127.0.0.1", 0, is_datagram=True)),
    ]
    store.park(registry.entries)
    # Nobody can wait where nobody listens yet.
    assert len(await manager.take()) == 1
    registry.start_listening()
    store.park(registry.entries)
    assert len(await manager.take()) == 4
    store.park(registry.entries)
    assert all(name.isascii() and ":" not in name and len(name) <= NAME_LENGTH for name in manager.kept)
    bound = [entry.sock.getsockname() for entry in asked]
    for entry in asked:
        registry.release(entry)

    later = DescriptorStore(manager.systemd, "16")
    assert later.recover(manager.start(), registry) == {}
    found = [
        registry.obtain(Internet("127.0.0.1", 0)),
        registry.obtain(Internet("::1", 0), name="a name: 100 %"),
        registry.obtain(Unix(str(tmp_path / "a;b*c"))),
        registry.obtain(Internet("127.0.0.1", 0, is_datagram=True)),
    ]
    assert [entry.sock.getsockname() for entry in found] == bound
    assert all(entry.inherited for entry in found)
    registry.release(found[0])
    later.park(registry.entries)
    assert len(await manager.take()) == 3


@pytest.mark.backends("asyncio")
async def test_a_path_that_was_removed_takes_its_socket_along(
    manager: Manager, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As systemd removes the runtime directory of a dynamic user; and whoever stands there then is not confused."""
    path = tmp_path / "app.sock"
    registry.obtain(Unix(str(path)))
    registry.start_listening()
    DescriptorStore(manager.systemd, "16").park(registry.entries)
    assert len(await manager.take()) == 1
    path.unlink()
    heir = Registry()
    try:
        store = DescriptorStore(manager.systemd, "16")
        assert store.recover(manager.start(), heir) == {}
        assert heir.entries == ()
        assert f"{path} was removed since the service ran last" in caplog.text
        (entry,) = (heir.obtain(Unix(str(path))),)
        assert not entry.inherited
        heir.start_listening()
        store.park(heir.entries)
        assert len(await manager.take()) == 1
        assert path.is_socket()
    finally:
        heir.close(unlink=True)


@pytest.mark.backends("asyncio")
async def test_what_nobody_claims_is_removed(manager: Manager, registry: Registry) -> None:
    for name in ("same", "same", "other"):
        registry.obtain(Internet("127.0.0.1", 0), name=name)
    registry.start_listening()
    DescriptorStore(manager.systemd, "16").park(registry.entries)
    assert len(await manager.take()) == 3
    heir = Registry()
    try:
        store = DescriptorStore(manager.systemd, "16")
        assert store.recover(manager.start(), heir) == {}
        heir.obtain(Internet("127.0.0.1", 0), name="same")
        heir.close_unclaimed()
        store.park(heir.entries)
        assert len(await manager.take()) == 1
    finally:
        heir.close(unlink=False)


@pytest.mark.backends("asyncio")
async def test_a_successor_removes_what_its_predecessor_had(manager: Manager, registry: Registry) -> None:
    registry.obtain(Internet("127.0.0.1", 0), name="old")
    registry.start_listening()
    DescriptorStore(manager.systemd, "16").park(registry.entries)
    await manager.take()
    store = DescriptorStore(manager.systemd, "16")
    store.inherit(registry.entries)
    store.park([])
    assert await manager.take() == []


@pytest.mark.backends("asyncio")
async def test_state_is_parked_replaced_and_dropped(manager: Manager, registry: Registry) -> None:
    store = DescriptorStore(manager.systemd, "16")
    for content in (b"first", b"second"):
        descriptor = os.memfd_create("state")
        os.write(descriptor, content)
        store.keep("a: state", content.decode(), descriptor)
        os.close(descriptor)
    assert len(await manager.take()) == 1
    later = DescriptorStore(manager.systemd, "16")
    assert later.recover(manager.start(), registry) == {}
    assert os.pread(later.state["a: state", "second"], 10, 0) == b"second"
    # Sockets come and go without it.
    later.park(registry.entries)
    assert len(await manager.take()) == 1
    later.drop("another")
    assert len(await manager.take()) == 1
    # A successor knows what was left to it, and replaces it by another version.
    heir = DescriptorStore(manager.systemd, "16")
    heir.inherit_state({"a: state": "second"})
    heir.keep("a: state", 3, later.state["a: state", "second"])
    [name] = await manager.take()
    assert unquote(name).endswith(";3")
    heir.drop()
    assert await manager.take() == []
    later.close()
    assert later.state == {}


@pytest.mark.backends("asyncio")
async def test_it_takes_no_more_than_there_is_room_for(
    manager: Manager, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        registry.obtain(Internet("127.0.0.1", 0))
    registry.start_listening()
    store = DescriptorStore(manager.systemd, "2")
    store.park(registry.entries)
    store.park(registry.entries)
    assert len(await manager.take()) == 2
    assert caplog.text.count("raise FileDescriptorStoreMax=") == 1
    for without in (DescriptorStore(manager.systemd, ""), DescriptorStore(Systemd(""), "16")):
        assert not without.is_there
        without.park(registry.entries)
    assert len(await manager.take()) == 2


def test_what_others_have_stored_is_left_to_them(registry: Registry) -> None:
    with socket.socket() as theirs, socket.socket() as broken:
        store = DescriptorStore(Systemd(""), "")
        passed = {theirs.fileno(): "theirs", broken.detach(): "ecdysis;of;another;release;then"}
        assert store.recover(passed, registry) == {theirs.fileno(): "theirs"}
        assert registry.entries == ()


@given(name=st.text(max_size=20), repeats=st.booleans())
def test_every_name_survives(name: str, repeats: bool) -> None:
    registry, heir = Registry(), Registry()
    try:
        entry = registry.obtain(Internet("127.0.0.1", 0), name=f"{name}127.0.0.1:0" if repeats else name or "x")
        registry.start_listening()
        systemd = Systemd("@nobody")
        systemd.begin()
        store = DescriptorStore(systemd, "1")
        store.park(registry.entries)
        assert len(systemd._messages) == 1 or "too long" in name
        text, (descriptor,) = systemd._messages[0]
        passed = {os.dup(descriptor): text.partition("FDNAME=")[2]}
        assert store.recover(passed, heir) == {}
        assert [(each.name, each.address) for each in heir.entries] == [(entry.name, entry.address)]
        systemd.close()
    finally:
        registry.close(unlink=False)
        heir.close(unlink=False)
