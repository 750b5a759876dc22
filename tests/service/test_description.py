"""What a generation says of itself."""

from __future__ import annotations

import os

import anyio
import pytest

from ecdysis_async._connections.connection import Connection
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._service.description import Description
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.errors import SpawnFailed
from ecdysis_async.report import State
from tests.service.lives import a_life


@pytest.mark.backends("asyncio", "trio")
async def test_one_line_for_systemctl(backend: str) -> None:
    async with a_life() as (life, _):
        description = Description(life)
        life.state = State.SERVING
        assert description.line() == "generation 1 is serving, 0 connections"
        connection = Connection()
        life.plane.tracker.open(connection)
        life.handover = PredecessorSide(life.generation, lambda handover: None)
        life.handover.error = SpawnFailed("there is no such command")
        line = description.line()
        assert line.startswith("generation 1 is serving, 1 connection; the last restart failed: ")
        assert "no such command" in line
        life.plane.tracker.close(connection)


@pytest.mark.backends("asyncio", "trio")
async def test_status_is_told_as_data(backend: str) -> None:
    async with a_life() as (life, _):
        description = Description(life)
        entry = life.plane.registry.obtain(Internet("127.0.0.1", 0), name="web")
        status = description.status()
        port = entry.sock.getsockname()[1]
        assert status["listeners"] == [{"name": "web", "address": f"127.0.0.1:{port}", "kind": "tcp"}]
        told = {name: status[name] for name in ("generation", "pid", "state", "connections", "restart", "last_report")}
        assert told == {
            "generation": 1,
            "pid": os.getpid(),
            "state": "starting",
            "connections": 0,
            "restart": None,
            "last_report": None,
        }
        assert status["waiting_for"] is None
        life.drain_deadline = anyio.current_time() + 600
        assert (description.waiting_for() or "").startswith("0 connections, deadline in ")


@pytest.mark.backends("asyncio")
async def test_a_report_is_found_by_its_id(backend: str) -> None:
    async with a_life() as (life, _):
        description = Description(life)
        assert description.find_report("abc") is None
        report = life.last_report = PredecessorSide(life.generation, lambda handover: None).report
        assert description.find_report(report.id) is report
        assert description.find_report("abc") is None
