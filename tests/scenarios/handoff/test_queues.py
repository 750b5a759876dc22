"""Who waits in the kernel's queue when a service stops: answered by exactly one side, and never reset."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import Clients, Conversation, Refused, Service

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]

LOOPS = ("asyncio", "uvloop", "anyio", "trio")
every_loop = pytest.mark.backends(*LOOPS)

# From now on one generation does not look at its sockets, and stops all of a sudden, with everyone still in the queue.
STOP_WITHOUT_LOOKING = "block()\necdysis.stop()\nNone"


def queue(stack: contextlib.ExitStack, address: object, number: int = 5) -> list[Conversation]:
    return [stack.enter_context(Conversation(address)).say("hello") for _ in range(number)]


@pytest.mark.parametrize(
    ("loop", "kind"),
    [*((loop, "tcp") for loop in LOOPS), ("asyncio", "unix"), ("trio", "unix"), ("uvloop", "adopted")],
)
def test_who_queues_at_a_stop_is_answered(loop: str, kind: str, run_service: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listeners = {"tcp": [["listen_tcp", ["127.0.0.1", 0], {}]], "unix": [["listen_unix", [path], {}]], "adopted": []}
    adopt = "taken = socket.create_server(('127.0.0.1', 0))\nlisteners.append(ecdysis.adopt(taken, name='taken'))"
    service = run_service(loop, listeners=listeners[kind], at_start=adopt if kind == "adopted" else "")
    first = service.pids[0]
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(service.begin("run", code=STOP_WITHOUT_LOOKING))
        service.wait_for("blocked")
        # More than asyncio accepts in the one turn in which it is stopped.
        waiting = queue(stack, service.address, 120 if loop == "asyncio" else 5)
        service.release()
        assert control.answer() is None
        for conversation in waiting:
            assert conversation.answer()["pid"] == first
            conversation.close()
    service.wait_for_end()
    assert service.statuses[first] == 0
    assert not Path(path).exists()


@every_loop
def test_newcomers_are_refused_and_not_reset_while_a_queue_is_answered(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"drain_timeout": 600})
    with service.begin("hold") as busy, Clients(service.address) as many, Clients(service.address) as more:
        for clients in (many, more):
            clients.wait_for(service.pids[0])
        service.wait_for("holding")
        service.signal(service.pids[0], signal.SIGTERM)
        # Each is by now, or about to be, a second after its first attempt; and not only when all others have drained.
        service.wait_until(lambda: bool(many.refused and more.refused), "nobody is refused")
        assert service.is_alive(service.pids[0])
        assert busy.say("go on").answer()["pid"] == service.pids[0]
        busy.close()
        assert service.wait_for_death(service.pids[0]) == 0
    assert (many.lost, more.lost) == ([], [])


@pytest.mark.parametrize(
    ("loop", "whom"),
    [("asyncio", "predecessor"), ("uvloop", "successor"), ("anyio", "predecessor"), ("trio", "successor")],
)
def test_a_stop_after_the_commit_leaves_the_queue_to_the_successor(loop: str, whom: str, run_service: Run) -> None:
    service = run_service(loop, ecdysis={"probation": 60})
    first = service.pids[0]
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(service.begin("hello"))
        control.answer()
        second = service.restart()["successor_pid"]
        blocked = stack.enter_context(service.begin("run", code="block()"))
        service.wait_for("blocked", pid=second)
        waiting = queue(stack, service.address)
        if whom == "predecessor":
            control.say("run", code="ecdysis.stop()").answer()
            service.wait_for("predecessor", state="settled", pid=first)
            # It has done what there is for it to do with its sockets, and left them to the other one.
            service.wait_for("finished", pid=first)
        else:
            service.signal(second, signal.SIGTERM)
        service.release()
        blocked.answer()
        for conversation in waiting:
            assert conversation.answer()["pid"] == second
            conversation.close()
        control.close()
        blocked.close()
    service.wait_for_end()
    assert [service.statuses[pid] for pid in (first, second)] in ([0, 0], [0, None])
    assert service.accepting_turns() == [first, second]


@pytest.mark.backends("asyncio", "trio")
def test_a_stop_after_the_commit_answers_what_the_successor_does_not_claim(backend: str, run_service: Run) -> None:
    listeners = [["listen_tcp", ["127.0.0.1", 0], {"name": name}] for name in ("new", "old")]
    service = run_service(backend, ecdysis={"probation": 60}, listeners=listeners)
    first = service.pids[0]
    service.configure(listeners=listeners[:1])
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(service.begin("hello"))
        control.answer()
        assert service.restart()["unclaimed"] == ["old"]
        control.say("run", code=STOP_WITHOUT_LOOKING)
        service.wait_for("blocked", pid=first)
        waiting = queue(stack, service.addresses[1], 120 if backend == "asyncio" else 5)
        service.release()
        control.answer()
        for conversation in waiting:
            assert conversation.answer()["pid"] == first
            conversation.close()
    service.wait_for_end()


@pytest.mark.backends("trio")
def test_a_stop_after_the_successor_was_called_back_leaves_the_queue_to_this_generation(
    backend: str, run_service: Run
) -> None:
    service = run_service(backend, ecdysis={"probation": 60})
    first = service.pids[0]
    recall = (
        "from ecdysis_async._handoff.protocol import PredecessorEvent\n"
        "ecdysis._life.handover.post(PredecessorEvent.RECALL)"
    )
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(service.begin("hello"))
        control.answer()
        service.restart()
        busy = stack.enter_context(service.begin("hold"))
        service.wait_for("holding")
        control.say("run", code=recall).answer()
        # The other one accepts no more, and lives on for what it has.
        service.wait_for("predecessor", state="rolled back")
        control.say("run", code=STOP_WITHOUT_LOOKING)
        service.wait_for("blocked", pid=first)
        waiting = queue(stack, service.address)
        service.release()
        control.answer()
        for conversation in waiting:
            assert conversation.answer()["pid"] == first
            conversation.close()
        assert busy.say("go on").answer()["generation"] == 2
    service.wait_for_end()


@pytest.mark.backends("asyncio", "trio")
def test_a_stop_while_the_successor_starts_leaves_the_queue_to_this_generation(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    first = service.pids[0]
    service.configure(at_start="tell('asleep')\nawait anyio.sleep_forever()")
    with contextlib.ExitStack() as stack:
        asking = stack.enter_context(service.begin("restart", until="serving"))
        service.wait_for("asleep")
        control = stack.enter_context(service.begin("run", code=STOP_WITHOUT_LOOKING))
        service.wait_for("blocked", pid=first)
        waiting = queue(stack, service.address)
        service.release()
        control.answer()
        for conversation in waiting:
            assert conversation.answer()["pid"] == first
            conversation.close()
        assert asking.answer()["error"] == "RestartWhileDraining"
    service.wait_for_end()
    assert service.accepting_turns() == [first]


@pytest.mark.backends("asyncio", "trio")
def test_a_second_signal_does_not_wait_for_a_queue(backend: str, run_service: Run) -> None:
    """Where nothing can be accepted, for want of descriptors, the queue would never end."""
    service = run_service(backend, ecdysis={"drain_timeout": 600})
    first = service.pids[0]
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1,) * 2)"
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(service.begin("hello"))
        control.answer()
        control.say("run", code=limit).answer()
        queue(stack, service.address)
        for _ in range(2):
            service.signal(first, signal.SIGTERM)
            control.say("hello").answer()
        service.wait_for("finished")
    assert service.wait_for_death(first) == 0
    with pytest.raises(Refused):
        Conversation(service.address)
    service.expected_blemishes = ("Traceback (most",)
