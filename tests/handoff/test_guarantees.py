"""The guarantees of the design, one by one, each on a real service under a client that never stops asking."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.handoff.harness import Clients, Service

Run = Callable[..., Service]

every_loop = pytest.mark.backends("asyncio", "uvloop", "anyio", "trio")


@every_loop
def test_nobody_is_refused_and_one_generation_accepts_at_a_time(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    with Clients(service.address) as clients:
        for generation in range(2, 7):
            report = service.restart()
            assert (report["outcome"], report["generation"]) == ("serving", generation)
            assert service.ask() == {"generation": generation, "pid": report["successor_pid"]}
            clients.wait_for(lambda pid, newest=report["successor_pid"]: pid == newest)
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == service.pids == list(dict.fromkeys(clients.answers))
    service.stop()
