"""Workers whose loop is blocked, and a restart, which is the usual remedy for that."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.scenarios.anchor.harness import AnchoredService
from tests.scenarios.handoff.harness import Conversation

pytestmark = pytest.mark.main_python_only

Run = Callable[..., AnchoredService]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_blocked_worker_is_replaced_and_leaves_when_it_wakes_up(run_anchor: Run, loop: str) -> None:
    service = run_anchor(workers=2, loop=loop, handoffs={"drain_timeout": 600}, ecdysis={"drain_timeout": 600})
    before = service.workers()
    with service.talk_to(before[0]) as hung:
        hung.say("run", code="block()")
        service.wait_for("blocked", pid=before[0])
        report = service.roll_out()
        after = service.workers()
        assert report["outcome"] == "settled"
        (what,) = report["unanswered"]
        assert what.startswith(f"worker 0 (pid {before[0]}) did not answer for ")
        assert len(after) == 2
        assert not set(after.values()) & set(before.values())
        # The other one has handed over as ever.
        assert [each["predecessor_pid"] for each in report["workers"]] == [service.anchor, before[1]]
        (silent,) = [each for each in service.status()["workers"] if each["pid"] == before[0]]
        assert silent["state"] == "draining"
        assert silent["silence"] > 2
        service.release()
        assert hung.answer() is None
        # Until its loop has read that it is replaced, it may accept one more client, and answers it.
        with Conversation(service.address) as conversation:
            assert conversation.say("hello").answer()["pid"] in {before[0], *after.values()}
        service.wait_for("finished", pid=before[0])
        # What it has accepted, it goes on answering.
        assert hung.say("hello").answer()["pid"] == before[0]
        for _ in range(20):
            with Conversation(service.address) as conversation:
                assert conversation.say("hello").answer()["pid"] in after.values()
    service.wait_for_death(before[0])
    service.wait_for_log("this worker did not answer, and was replaced")
    assert service.roll_out("drained")["unanswered"] == []


@pytest.mark.parametrize(("loop", "is_stopped"), [("asyncio", False), ("uvloop", False), ("trio", True)])
def test_one_that_does_not_wake_up_is_ended_at_its_deadline(run_anchor: Run, loop: str, *, is_stopped: bool) -> None:
    """That is how long the one who waits for the drain waits, and no longer."""
    service = run_anchor(workers=1, loop=loop, handoffs={"drain_timeout": 1}, ecdysis={"drain_timeout": 1})
    (hung,) = service.workers().values()
    with service.talk_to(hung) as conversation:
        if is_stopped:
            service.signal(hung, signal.SIGSTOP)
            service.wait_until_stopped(hung)
        else:
            conversation.say("run", code="block()")
            service.wait_for("blocked", pid=hung)
        report = service.roll_out("drained")
    assert len(report["unanswered"]) == 1
    assert not service.is_alive(hung)
    service.wait_for_log(f"worker pid {hung} was replaced, and does not answer: it is ended by force")
    assert service.roll_out("drained")["unanswered"] == []


def test_a_broken_release_costs_a_blocked_worker_nothing(run_anchor: Run) -> None:
    service = run_anchor(workers=1)
    service.expected_blemishes = ("Traceback (most",)
    (hung,) = service.workers().values()
    with service.talk_to(hung) as conversation:
        conversation.say("run", code="block()")
        service.wait_for("blocked", pid=hung)
        service.configure(at_start='raise RuntimeError("a broken release")')
        assert "a broken release" in str(service.fail_to_roll_out())
        service.release()
        assert conversation.answer() is None
        assert conversation.say("hello").answer()["pid"] == hung
    service.configure(at_start="")
    assert service.workers() == {0: hung}
    # The orders that it slept through are none any more.
    report = service.roll_out("drained")
    assert [each["predecessor_pid"] for each in report["workers"]] == [hung]


ASK = """
scope = anyio.CancelScope()
async def ask():
    with scope:
        await ecdysis.restart()
ecdysis._task_group.start_soon(ask)
None
"""


def test_a_restart_that_is_called_off_ends_the_successor_of_a_hung_worker(run_anchor: Run) -> None:
    service = run_anchor(workers=2)
    before = service.workers()
    with service.talk_to(before[0]) as hung, service.talk_to(before[1]) as other:
        hung.say("run", code="block()")
        service.wait_for("blocked", pid=before[0])
        service.configure(at_start="await anyio.sleep_forever()")
        other.say("run", code=ASK).answer()
        successor = service.wait_for("entered", generation=2)["pid"]
        other.say("run", code="scope.cancel()").answer()
        assert service.wait_for_death(successor) != 0
        service.wait_for_log("failed")
        service.release()
        assert hung.answer() is None
        assert hung.say("hello").answer()["pid"] == before[0]
    service.configure(at_start="")
    assert service.workers() == before
    assert service.roll_out()["unanswered"] == []
