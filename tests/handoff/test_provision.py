"""What a successor is given: put into its channel before it lives, or sent when it asks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ecdysis_async._handoff.generation import Generation
from ecdysis_async._handoff.provision import Provision
from ecdysis_async._handoff.stash import Batch
from ecdysis_async._ipc.channel import Channel, Frame
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.errors import ChannelClosed
from tests.handoff.scripted import Host, a_generation


@dataclass(frozen=True)
class Start:
    """A predecessor that is about to start a successor, whose end of the channel the test reads."""

    provision: Provision
    generation: Generation
    host: Host
    near: Channel
    far: Channel

    async def receive(self) -> tuple[Frame, list[int]]:
        """Return a message, and the ports of the sockets in it."""
        frame = await self.far.receive()
        with contextlib.ExitStack() as stack:
            stack.callback(frame.close)
            count = len(frame.body["sockets"])
            _pidfd, _stderr, _pipe, *sockets = frame.descriptors[: 3 + count]
            ports = [stack.enter_context(socket.socket(fileno=os.dup(each))).getsockname()[1] for each in sockets]
        return frame, ports


@contextlib.contextmanager
def a_start() -> Iterator[Start]:
    near, far = (Channel(each) for each in socket.socketpair())
    with contextlib.closing(near), contextlib.closing(far), a_generation() as (generation, host):
        provision = Provision(generation, 2, "a1b2")
        with contextlib.closing(provision):
            yield Start(provision, generation, host, near, far)


def list_ports(host: Host) -> list[int]:
    return [entry.sock.getsockname()[1] for entry in host.registry.entries]


async def test_sockets_lie_in_the_channel_before_anybody_asks(backend: str) -> None:
    with a_start() as start:
        start.provision.send_ahead(start.near, stderr=2)
        frame, ports = await start.receive()
        assert (frame.type, frame.body["provision"], frame.body["generation"]) == ("listeners", True, 2)
        assert ports == list_ports(start.host)
        assert [entry.name for entry in start.provision.entries] == ["kept", "unwanted"]
        # A successor that knows that it may be so is told that nothing has changed.
        start.provision.is_known = True
        with start.provision.answer(Batch(), 2) as message:
            assert message == ({"as_before": True}, [])


async def test_a_successor_of_an_older_release_has_its_answer_already(backend: str) -> None:
    with a_start() as start:
        start.provision.send_ahead(start.near, stderr=2)
        with start.provision.answer(Batch(), 2) as message:
            assert message is None


@pytest.mark.parametrize("change", ["one more", "one less", "another one of the same name"])
async def test_what_has_changed_meanwhile_is_sent_anew(backend: str, change: str) -> None:
    with a_start() as start:
        start.provision.send_ahead(start.near, stderr=2)
        start.provision.is_known = True
        if change == "one more":
            start.host.registry.obtain(Internet("127.0.0.1", 0), name="new")
        else:
            start.host.registry.release(next(iter(start.host.registry.entries)))
        if change == "another one of the same name":
            start.host.registry.obtain(Internet("127.0.0.1", 0), name="kept")
        with start.provision.answer(Batch(), 2) as message:
            assert message is not None
            body, descriptors = message
            assert [each["name"] for each in body["sockets"]] == [each.name for each in start.provision.entries]
            assert len(descriptors) == 3 + len(start.provision.entries)
        assert start.provision.entries == list(start.host.registry.entries)


async def test_where_a_stash_is_due_at_the_start_nothing_is_sent_ahead(backend: str) -> None:
    with a_start() as start:
        start.generation.stashes.add("sessions", lambda: b"", at="start", version=1)
        start.provision.send_ahead(start.near, stderr=2)
        start.near.close()
        with pytest.raises(ChannelClosed):
            await start.far.receive()


def test_what_is_counted_survives_this_process() -> None:
    with a_start() as start:
        start.generation.count = lambda: {"accepted": 7}
        start.provision.keep_counts()
        last_word = start.provision.last_word
        assert last_word is not None and last_word is start.generation.last_word
        assert json.loads(last_word.read()) == {"accepted": 7}
        with start.provision.answer(Batch(), 2) as message:
            assert message is not None and message[0]["last_word"] is not None
        start.provision.close()
        assert start.generation.last_word is None
