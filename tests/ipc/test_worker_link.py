"""The line between an anchor and a worker: in order, each descriptor owned by one, and never waited for in vain."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator

import anyio
import pytest

from ecdysis_async._ipc import worker_link
from ecdysis_async._ipc.channel import Frame
from ecdysis_async._ipc.worker_link import (
    FromAnchor,
    FromWorker,
    WorkerLink,
    describe_loss,
    error_from_json,
    error_to_json,
)
from ecdysis_async.errors import ChannelClosed, ReadyTimeout, RestartError, SpawnFailed

Pair = tuple[WorkerLink, WorkerLink]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = map(WorkerLink, socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


async def test_messages_arrive_in_order_and_their_descriptors_are_closed_here(backend: str, pair: Pair) -> None:
    ours, theirs = pair
    assert ours.peer_pid == os.getpid()
    read_end, write_end = os.pipe()
    received: list[Frame] = []
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(ours.run)
            ours.tell(FromAnchor.WELCOME, {"seconds": 1})
            ours.tell(FromAnchor.SPAWNED, {"pid": 7}, [read_end])
            assert not ours.is_idle
            await ours.flush()
            assert ours.is_idle
            received += [await theirs.receive(), await theirs.receive()]
            task_group.cancel_scope.cancel()
    first, second = received
    assert (first.type, first.body, second.type, second.body) == ("welcome", {"seconds": 1}, "spawned", {"pid": 7})
    os.close(write_end)
    # The only read end left is the one that has arrived.
    assert os.read(second.descriptors[0], 1) == b""
    second.close()


async def test_more_that_is_told_meanwhile_keeps_nobody_waiting(
    backend: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair
    # The limit is for who reads nothing.
    monkeypatch.setattr(worker_link, "FLUSH_SECONDS", math.inf)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            ours.tell(FromWorker.BEAT, {"last": True})
            flushing = anyio.Event()

            async def flush() -> None:
                flushing.set()
                await ours.flush()
                task_group.cancel_scope.cancel()

            task_group.start_soon(flush)
            await flushing.wait()
            ours.tell(FromWorker.BEAT, {"last": False})
            task_group.start_soon(ours.run)
    assert ours.is_idle


async def test_who_is_gone_is_told_nothing_and_keeps_nobody_waiting(backend: str, pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    read_end, write_end = os.pipe()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            ours.tell(FromWorker.BEAT, {})
            task_group.start_soon(ours.run)
            await ours.flush()
        ours.tell(FromWorker.SPAWN, {}, [read_end])
    with pytest.raises(BrokenPipeError):
        os.write(write_end, b"x")
    os.close(write_end)
    with pytest.raises(ChannelClosed):
        ours.receive_nowait()


async def test_what_was_half_received_is_gone_on_with(backend: str, pair: Pair) -> None:
    ours, theirs = pair
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(ours.run)
            ours.tell(FromWorker.BEAT, {"n": 1})
            ours.tell(FromWorker.BEAT, {"n": 2})
            await ours.flush()
            task_group.cancel_scope.cancel()
        assert (await theirs.receive()).body == {"n": 1}
    heir = WorkerLink(socket.socket(fileno=os.dup(theirs.fileno())))
    heir.resume(theirs.pending)
    # It may have come with the first message, or be in the socket still.
    frame = await heir.receive()
    assert frame.body == {"n": 2}
    heir.close()


@pytest.mark.parametrize("error", [ReadyTimeout("too late", phase="initialise", stderr="words"), RestartError("no")])
def test_an_error_travels(error: RestartError) -> None:
    copy = error_from_json(error_to_json(error))
    assert (type(copy), str(copy), copy.phase) == (type(error), str(error), error.phase)


def test_an_error_of_another_release_is_a_restart_error() -> None:
    body = {**error_to_json(SpawnFailed("no")), "error": "OfTheFuture"}
    assert type(error_from_json(body)) is RestartError
    with pytest.raises(KeyError):
        error_from_json({})


def test_a_loss_says_what_to_raise() -> None:
    assert "ulimit -n" in describe_loss(Frame("restart", {}, lost_descriptors=True))
