"""The health address of a service without workers; tests/scenarios/handoff sees it over restarts."""

from __future__ import annotations

import json

import pytest

from ecdysis_async import Ecdysis
from ecdysis_async._service.health import Health, HealthSettings, describe_metrics
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.entry import Until
from ecdysis_async.report import State
from tests.service.lives import a_life


def test_a_page_needs_an_address() -> None:
    with pytest.raises(ValueError, match="need health_bind"):
        Ecdysis(metrics=True)
    with pytest.raises(ValueError, match="is no address"):
        Ecdysis(health_bind="127.0.0.1")


async def test_the_socket_serves_to_the_exit() -> None:
    async with a_life() as (life, _):
        health = Health(HealthSettings(Internet("127.0.0.1", 0), metrics=True), life, life.counting)
        await health.open()
        (entry,) = life.plane.registry.entries
        assert (entry.name, entry.until) == ("health", Until.EXIT)
        (server,) = health.servers()
        assert server.paths == ["/live", "/ready", "/metrics"]


async def test_its_own_numbers_are_shown() -> None:
    async with a_life() as (life, _):
        life.state = State.SERVING
        async with life.plane.tracker.track():
            families = describe_metrics(life, life.counting)
        numbers = {(family.name, *labels.values()): value for family in families for _, labels, value in family.samples}
        assert numbers["ecdysis_workers", "serving"] == 1
        # A job has no connection.
        assert numbers["ecdysis_connections", "serving"] == 0
        assert numbers["ecdysis_generation",] == 1
        assert numbers["ecdysis_requests_total", "0"] == 0
        assert numbers["ecdysis_worker_memory_bytes", "0"] > 0


async def test_the_page_has_its_data() -> None:
    async with a_life() as (life, _):
        settings = HealthSettings(Internet("127.0.0.1", 0), status_page=True)
        page = await Health(settings, life, life.counting).show_status()
        status = json.loads(page.text)
        assert (status["workers"], status["generation"], status["restarts"]) == (None, 1, [])
        assert "process" not in status
