"""Several generations at once: old ones that drain while new ones come, and what each of them tells the newest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from tests.scenarios.handoff.harness import Lost, Service

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]

DRAINING = "[[each.generation, each.pid, each.connections] for each in ecdysis.draining_generations]"


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_three_generations_drain_at_once(backend: str, run_service: Run) -> None:
    """None of them delays a restart, each one serves what it has, and the newest knows of all."""
    service = run_service(backend, ecdysis={"drain_timeout": 600})
    with contextlib.ExitStack() as stack:
        held = []
        for generation in range(1, 4):
            held.append(stack.enter_context(service.begin("hold")))
            service.wait_for("holding", generation=generation)
            service.restart("settled")
        pids = service.pids
        assert service.ask() == {"generation": 4, "pid": pids[3]}
        service.wait_until(
            lambda: service.run(DRAINING) == [[1, pids[0], 1], [2, pids[1], 1], [3, pids[2], 1]],
            "the newest generation does not hear of the drains",
        )
        for generation in (1, 2, 3):
            answer = held[generation - 1].say("go on").answer()
            assert answer == {"generation": generation, "pid": pids[generation - 1]}
            held[generation - 1].close()
            service.wait_for_death(pids[generation - 1])
            service.wait_for_log(f"generation {generation} (pid {pids[generation - 1]}) has drained")
    service.wait_until(lambda: service.run(DRAINING) == [], "the newest generation does not let go of the dead")


@pytest.mark.backends("asyncio", "trio")
def test_one_too_many_is_hurried(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"drain_timeout": 600, "max_draining": 2})
    with contextlib.ExitStack() as stack:
        held = []
        for generation in range(1, 4):
            held.append(stack.enter_context(service.begin("hold")))
            service.wait_for("holding", generation=generation)
            if generation == 3:
                service.wait_until(
                    lambda: service.run(DRAINING) == [[1, service.pids[0], 1], [2, service.pids[1], 1]],
                    "the newest generation does not hear of the drains",
                )
            report = service.restart("settled")
        # Told to the caller of the restart, before it is cut.
        cost = f"generation 1 (pid {service.pids[0]}) with 1 connection"
        assert report["hurried"] == [cost]
        with pytest.raises(Lost):
            held[0].answer()
        assert service.wait_for_death(service.pids[0]) in (0, None)
        assert (
            "too many generations drain: the deadline of this one is now (max_draining); open connections: 1"
            in service.log
        )
        service.wait_for_log(
            f"1 of the connections of generation 1 (pid {service.pids[0]}) were cut before their deadline"
        )
        for conversation in held[1:]:
            conversation.say("go on").answer()


@pytest.mark.backends("asyncio", "trio")
def test_a_drain_is_heard_of_when_the_successor_has_ended(backend: str, run_service: Run) -> None:
    """The newest generation goes on listening to an old one whose own successor drained faster."""
    service = run_service(backend, ecdysis={"drain_timeout": 600})
    with service.begin("hold") as held:
        service.wait_for("holding", generation=1)
        service.restart("settled")
        service.restart("settled")
        service.wait_for_death(service.pids[1])
        service.wait_until(lambda: len(service.run(DRAINING)) == 1, "the second one has not left")
        held.say("go on").answer()
    service.wait_for_death(service.pids[0])
    service.wait_until(lambda: service.run(DRAINING) == [], "the first one has not left")
    service.wait_for_log(f"generation 1 (pid {service.pids[0]}) has drained")
