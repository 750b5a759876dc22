"""The load generator against a server that makes mistakes on purpose: each is found, named, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import pytest

from ecdysis_async._proving.load import Load
from ecdysis_async._proving.plan import Kind, PlanError, Shape, Url
from ecdysis_async._proving.records import Ending, Fault, History
from ecdysis_async._proving.rules import check
from tests.ports import find_free_port
from tests.proving.faulty_server import HOST, FaultyServer, faulty_server

pytestmark = pytest.mark.backends("asyncio", "uvloop")

ENOUGH_MISTAKES = 3
PATIENCE_SECONDS = 10
# Where a client waits for what never comes: the proof gives it up after six times as long.
SHORT_PATIENCE_SECONDS = 0.5


async def load(kind: Kind, path: str) -> tuple[History, FaultyServer]:
    """Ask until the server has made some mistakes, or enough without any."""
    history = History()
    async with faulty_server() as (faulty, url):
        shape = Shape(kind, f"/{path}", rate=200, connections=3, expect=200, seconds=0.02)
        patience = SHORT_PATIENCE_SECONDS if path == "never" else PATIENCE_SECONDS
        clients = Load(url, [shape], history, patience=patience)
        running = asyncio.create_task(clients.run())
        while faulty.mistakes < ENOUGH_MISTAKES and len(history.exchanges) < 60 and not running.done():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
        clients.end()
        await running
    return history, faulty


@pytest.mark.parametrize("kind", [Kind.NEW, Kind.KEPT, Kind.SLOW, Kind.UPLOAD])
async def test_a_server_without_mistakes(kind: Kind) -> None:
    history, faulty = await load(kind, "right")
    assert check(history) == []
    assert faulty.mistakes == 0
    assert len(history.exchanges) >= 60
    assert all(each.answer is not None and each.answer.request == each.id for each in history.exchanges)
    assert {connection.ending for connection in history.connections} == {Ending.OURS}
    assert len(history.connections) == (3 if kind is Kind.KEPT else len(history.exchanges))


@pytest.mark.parametrize("kind", [Kind.NEW, Kind.KEPT])
@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("twice", Fault.REPEATED),
        ("swapped", Fault.ORDER),
        ("short", Fault.TRUNCATED),
        ("reset", Fault.RESET),
        ("nothing", Fault.UNANSWERED),
        ("never", Fault.TIMEOUT),
        ("noise", Fault.MALFORMED),
        ("error", Fault.STATUS),
    ],
)
async def test_each_mistake_is_found(kind: Kind, path: str, fault: Fault) -> None:
    history, faulty = await load(kind, path)
    found = Counter(finding.fault for finding in check(history))
    assert set(found) == {fault}
    assert found[fault] == faulty.mistakes


async def test_connections_that_are_closed_without_a_word() -> None:
    history, faulty = await load(Kind.KEPT, "closing")
    found = Counter(finding.fault for finding in check(history))
    # A request that was on its way when the connection ended is lost.
    assert set(found) <= {Fault.IDLE_CLOSED, Fault.UNANSWERED, Fault.RESET}
    assert found[Fault.IDLE_CLOSED] >= 1
    # When the load ended, one of each connection had not been noticed yet.
    assert faulty.mistakes - 3 <= found.total() <= faulty.mistakes


async def test_a_second_answer_that_follows_by_itself() -> None:
    history, faulty = await load(Kind.KEPT, "late")
    found = Counter(finding.fault for finding in check(history))
    assert set(found) == {Fault.REPEATED}
    assert found[Fault.REPEATED] <= faulty.mistakes


async def test_connections_whose_end_was_announced() -> None:
    history, faulty = await load(Kind.KEPT, "goodbye")
    assert check(history) == []
    endings = Counter(connection.ending for connection in history.connections)
    assert faulty.mistakes >= ENOUGH_MISTAKES
    # The client may be the first to close.
    assert len(history.connections) >= faulty.mistakes
    assert set(endings) <= {Ending.OURS, Ending.ANNOUNCED}


async def test_latency_counts_from_the_schedule() -> None:
    """A server that stalls for a moment delays all that was due meanwhile, and none of it is overlooked."""
    history = History()
    stall = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await stall.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    url = Url("http", HOST, server.sockets[0].getsockname()[1])
    clients = Load(url, [Shape(Kind.KEPT, rate=100, connections=1)], history, patience=30)
    running = asyncio.create_task(clients.run())
    await asyncio.sleep(0.5)
    stall.set()
    while len(history.exchanges) < 30 and not running.done():  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.01)
    clients.end()
    await running
    server.close()
    waits = sorted(each.latency for each in history.exchanges)
    # One was sent during the stall, on the one connection; those behind it were due meanwhile.
    assert len([wait for wait in waits if wait > 0.05]) > 10


async def test_what_is_not_served_is_left_out_or_told() -> None:
    async with faulty_server() as (_, url):
        history = History()
        optional = Shape(Kind.WEBSOCKET, "/right", optional=True)
        clients = Load(url, [Shape(Kind.NEW, "/right"), optional], history, patience=5)
        await clients.try_out()
        [note] = history.notes
        assert note.startswith("no WebSockets: /right answers with ")
        assert history.exchanges == []
        wanted = Load(url, [Shape(Kind.WEBSOCKET, "/right")], History(), patience=5)
        with pytest.raises(PlanError, match="websocket /right: "):
            await wanted.try_out()


async def test_nothing_listens() -> None:
    url = Url("http", HOST, find_free_port())
    with pytest.raises(PlanError, match=f"nothing listens at {url}"):
        await Load(url, [Shape(Kind.NEW)], History(), patience=5).try_out()
