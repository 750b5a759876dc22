"""What an anchor holds for its workers, and when it closes that."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._anchor.sockets import HeldSockets
from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.registry import Registry
from tests.anchor.puppets import make_report


@pytest.fixture
def held() -> Iterator[HeldSockets]:
    found = HeldSockets(GenerationLog(0))
    yield found
    found.close(unlink=True)


def names(registry: Registry) -> list[str]:
    return [entry.name for entry in registry.entries]


def create(held: HeldSockets, name: str = "created") -> None:
    """Let a worker create a socket."""
    theirs = Registry()
    try:
        theirs.obtain(Internet("127.0.0.1", 0), name=name)
        descriptions, descriptors = theirs.describe()
        held.take(descriptions, [os.dup(each) for each in descriptors])
    finally:
        theirs.close(unlink=True)


def test_what_a_worker_creates_is_held_and_shared(held: HeldSockets) -> None:
    held.service.obtain(Internet("127.0.0.1", 0), name="opened")
    create(held)
    assert names(held.service) == ["opened", "created"]
    descriptions, descriptors = held.share()
    # What the anchor has opened itself may be later than the worker.
    assert [each["name"] for each in descriptions] == ["opened", "created"]
    os.close(descriptors[0])
    with socket.socket(fileno=descriptors[1]) as shared:
        assert shared.getsockname() == held.service.entries[1].sock.getsockname()
        assert shared.fileno() != held.service.entries[1].sock.fileno()


def test_what_every_worker_has_is_not_shared(held: HeldSockets) -> None:
    """A worker without a free descriptor could not take it."""
    held.service.obtain(Internet("127.0.0.1", 0), name="first")
    held.note_start()
    held.service.obtain(Internet("127.0.0.1", 0), name="later")
    descriptions, descriptors = held.share()
    assert [each["name"] for each in descriptions] == ["later"]
    os.close(descriptors[0])


def test_what_is_held_already_is_closed(held: HeldSockets) -> None:
    create(held)
    (entry,) = held.service.entries
    descriptions, _ = held.service.describe()
    held.take(descriptions, [os.dup(entry.sock.fileno())])
    assert held.service.entries == (entry,)


def test_a_path_that_was_removed_is_held_anew_by_what_a_worker_has_made(
    held: HeldSockets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "socket"
    lost = held.service.obtain(Unix(str(path)))
    path.unlink()
    theirs = Registry()
    try:
        theirs.obtain(Unix(str(path)))
        descriptions, descriptors = theirs.describe()
        held.take(descriptions, [os.dup(each) for each in descriptors])
        new = held.service.entries[-1]
        assert (lost.has_lost_its_path(), new.is_at_its_path()) == (True, True)
        # The names are the same, and the first worker has made what the second one has inherited.
        reports = [
            make_report(unclaimed=[new.name], created=[new.name]),
            make_report(unclaimed=[new.name], inherited=[new.name]),
        ]
        held.drop_unclaimed(reports)
    finally:
        for entry in theirs.entries:
            entry.sock.close()
    assert held.service.entries == (new,)
    assert new.is_at_its_path()
    assert "was removed by somebody, and is there again" in caplog.text


def test_more_descriptors_than_descriptions_are_a_mistake(held: HeldSockets) -> None:
    """The caller closes what came, and the numbers may be other files' by a second time."""
    create(held)
    descriptions, descriptors = held.service.describe()
    with contextlib.closing(socket.socket(fileno=os.dup(descriptors[0]))) as known:
        with pytest.raises(ValueError, match="zip"):
            held.take([*descriptions, {"name": "a", "address": "b"}], [known.fileno()])
        assert known.getsockname() == held.service.entries[0].sock.getsockname()


def test_what_cannot_be_held_is_told(held: HeldSockets, caplog: pytest.LogCaptureFixture) -> None:
    read_end, write_end = os.pipe()
    os.close(write_end)
    held.take([{"name": "a", "address": "127.0.0.1:1", "inode": None}], [read_end])
    assert "what a worker has opened cannot be held" in caplog.text
    assert held.service.entries == ()


def test_what_no_worker_of_a_release_wants_is_closed(held: HeldSockets, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("wanted", "unwanted"):
        held.service.obtain(Internet("127.0.0.1", 0), name=name)
    held.drop_unclaimed([])
    held.drop_unclaimed([make_report(unclaimed=["unwanted"]), None])
    held.drop_unclaimed([make_report(unclaimed=["unwanted"]), make_report(unclaimed=["wanted"])])
    assert names(held.service) == ["wanted", "unwanted"]
    held.drop_unclaimed([make_report(unclaimed=["unwanted", "wanted"]), make_report(unclaimed=["unwanted"])])
    assert names(held.service) == ["wanted"]
    assert "no worker wants" in caplog.text


def test_what_systemd_has_passed_stays(held: HeldSockets, caplog: pytest.LogCaptureFixture) -> None:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    held.service.activate({sock.detach(): "web.socket"})
    (entry,) = held.service.entries
    held.drop_unclaimed([make_report(unclaimed=[entry.name])])
    assert held.service.entries == (entry,)
    assert "systemd has passed" in caplog.text
    # Every worker has it from its start.
    assert held.share() == ([], [])


def test_what_a_release_has_opened_that_was_taken_back_is_closed(held: HeldSockets) -> None:
    held.service.obtain(Internet("127.0.0.1", 0), name="old")
    before = set(held.service.entries)
    create(held)
    held.drop_newer(before)
    assert names(held.service) == ["old"]


def test_all_is_left_to_the_code_that_follows(held: HeldSockets, tmp_path: Path) -> None:
    held.service.obtain(Internet("127.0.0.1", 0), name="web")
    held.control.obtain(Unix(str(tmp_path / "control")), name="control")
    held.health.obtain(Internet("127.0.0.1", 0), name="health")
    described, numbers = held.describe()
    described = json.loads(json.dumps(described))
    assert numbers == [number for each in described.values() for number in each["descriptors"]]
    for each in described.values():
        each["descriptors"] = [os.dup(number) for number in each["descriptors"]]
    follower = HeldSockets(GenerationLog(0))
    follower.restore(described)
    try:
        for before, after in (
            (held.service, follower.service),
            (held.control, follower.control),
            (held.health, follower.health),
        ):
            assert [(entry.name, entry.address) for entry in after.entries] == [
                (entry.name, entry.address) for entry in before.entries
            ]
    finally:
        follower.close(unlink=False)


@pytest.mark.parametrize("is_first", [True, False], ids=["opened here", "left by a crash"])
@pytest.mark.parametrize("unlink", [True, False])
def test_a_path_is_removed_unless_it_is_the_next_start_s(unlink: bool, is_first: bool, tmp_path: Path) -> None:
    held = HeldSockets(GenerationLog(0))
    path = tmp_path / "socket"
    held.service.obtain(Unix(str(path)), name="web")
    if not is_first:
        described, numbers = held.service.describe()
        duplicates = [os.dup(number) for number in numbers]
        held.service.close(unlink=False)
        held.service.inherit(described, duplicates)
    held.close(unlink=unlink)
    assert path.exists() == (not unlink and not is_first)


def test_nobody_is_let_in_any_more(held: HeldSockets) -> None:
    entry = held.service.obtain(Internet("127.0.0.1", 0), name="web")
    entry.start_listening()
    address = entry.sock.getsockname()
    with socket.create_connection(address):
        held.refuse_newcomers()
        held.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
