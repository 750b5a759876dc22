"""What one generation leaves to the next: made at the start or at the commit, whole, and gone where nobody needs it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import Clients, Conversation, Service

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]

every_loop = pytest.mark.backends("asyncio", "uvloop", "anyio", "trio")

MEGABYTES = 64

# What a generation does with what it was left, before ready() and after it, and what it leaves.
INHERIT = """
stash = ecdysis.inherited_stash
at_start = {name: [bytes(stash[name]).decode(), stash.version(name)] for name in stash}
try:
    stash["late"]
except KeyError as error:
    why_not = str(error)
tell("inherited", stash=at_start)

def early():
    return b"early of %d" % ecdysis.generation

async def late():
    await anyio.sleep(0)
    yield b"late of "
    yield b"%d" % ecdysis.generation

ecdysis.stash("early", early, at="start", version=ecdysis.generation)
ecdysis.stash("late", late, at="commit", version="v1")
"""

READ = "{name: [bytes(stash[name]).decode(), stash.version(name)] for name in stash}"

FAILING = """
def fail():
    raise ValueError("no state today")
ecdysis.stash("failing", fail, at={at!r})
"""

SLOW = """
async def wait_for_ever():
    tell("producing")
    await anyio.sleep_forever()
ecdysis.stash("slow", wait_for_ever, at={at!r})
"""


def holdings(pid: int) -> int:
    """Count what a process has of stashes, mapped and open."""
    held = sum("memfd:ecdysis-stash" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    for link in Path(f"/proc/{pid}/fd").iterdir():
        # A connection of the test's own may end meanwhile.
        with contextlib.suppress(FileNotFoundError):
            held += "memfd:ecdysis-stash" in os.readlink(link)
    return held


@every_loop
def test_it_is_read_at_the_start_and_after_the_commit(backend: str, run_service: Run) -> None:
    service = run_service(backend, at_start=INHERIT)
    assert service.wait_for("inherited")["stash"] == {}
    assert "has left no stash 'late'" in service.run("why_not")
    for generation in (2, 3):
        service.restart("settled")
        former = generation - 1
        early = {"early": [f"early of {former}", former]}
        assert service.wait_for("inherited")["stash"] == early
        assert "can be read after ready()" in service.run("why_not")
        assert service.run(READ) == early | {"late": [f"late of {former}", "v1"]}


@every_loop
def test_a_large_one_arrives_whole_and_blocks_nobody(backend: str, run_service: Run) -> None:
    """One that yields and one that returns; the loop goes on with its turns while they are written."""
    service = run_service(
        backend,
        at_start=f"""
import hashlib, time
MEGABYTE = bytes(range(256)) * 4096

def pieces():
    for number in range({MEGABYTES}):
        yield number.to_bytes(4) + MEGABYTE[4:]

def whole():
    begun = time.monotonic()
    made = bytearray().join(pieces())
    tell("made", seconds=time.monotonic() - begun)
    return made

def digest(view):
    return [len(view), hashlib.sha256(view).hexdigest()]

ecdysis.stash("pieces", pieces, at="start")
ecdysis.stash("whole", whole, at="commit")
""",
        ecdysis={"probation": 60},
    )
    expected = service.run("digest(whole())")
    service.forget_events()
    report = service.restart()
    # What is made at the commit is part of the gap.
    assert report["accept_gap"] > service.wait_for("made", pid=service.pids[0])["seconds"]
    for name in ("pieces", "whole"):
        assert service.run(f"digest(ecdysis.inherited_stash[{name!r}])") == expected
    # The predecessor has nothing of it any more, and this generation gives it back.
    assert holdings(service.pids[0]) == 0
    assert holdings(service.pids[1]) == 4
    service.run("view = ecdysis.inherited_stash.pop('whole')[1000:]\nlen(view)")
    service.run("del view\necdysis.inherited_stash.pop('pieces').nbytes")
    assert holdings(service.pids[1]) == 0
    # One that is still in use at the end of the block, and beyond it, disturbs nobody.
    service.restart()
    service.run("slice_to_the_end = ecdysis.inherited_stash['whole'][5:]\nlen(slice_to_the_end)")


@every_loop
def test_no_update_is_lost(backend: str, run_service: Run) -> None:
    """A counter goes on over generations: each request before the commit is counted once, and late ones are known."""
    service = run_service(
        backend,
        at_start="""
import __main__
answer, count, is_handed_on = __main__.answer, 0, False

def produce():
    global is_handed_on
    is_handed_on = True
    return b"%d" % count

async def answer_and_count(ecdysis, request):
    global count
    if request["do"] == "hello":
        if "count" in ecdysis.inherited_stash:
            count = int(bytes(ecdysis.inherited_stash.pop("count")))
        if is_handed_on:
            tell("late")
        else:
            count += 1
    return await answer(ecdysis, request)

ecdysis.stash("count", produce, at="commit")
__main__.answer = answer_and_count
""",
    )
    with Clients(service.address) as clients:
        for _ in range(3):
            clients.wait_for(service.restart("settled")["successor_pid"])
    assert (clients.refused, clients.lost) == ([], [])
    count = service.run("count")
    late = sum(event["event"] == "late" for event in service._events)
    assert count + late == len(clients.answers)


@pytest.mark.parametrize("at", ["start", "commit"])
@pytest.mark.backends("asyncio", "trio")
def test_a_producer_that_raises_costs_the_restart_only(backend: str, at: str, run_service: Run) -> None:
    service = run_service(backend, at_start=INHERIT)
    first = service.pids[0]
    service.run(FAILING.format(at=at))
    with Clients(service.address) as clients:
        for _ in range(2):
            failure = service.fail_to_restart()
            assert (failure["error"], failure["cause"]) == ("StashFailed", "ValueError")
            assert failure["phase"] == {"start": "start", "commit": "pause"}[at]
            assert "'failing' could not be made" in failure["text"]
            assert "no state today" in failure["text"]
            clients.wait_for(first)
        service.run("del ecdysis._stashes._orders['failing']")
        clients.wait_for(service.restart("settled")["successor_pid"])
    assert (clients.refused, clients.lost) == ([], [])
    assert service.run(READ)["late"] == ["late of 1", "v1"]
    assert holdings(first) == 0


# Each limit is over while the slow one is made, and not before, on a busy machine.
@pytest.mark.backends("uvloop")
@pytest.mark.parametrize(
    ("at", "ready_timeout", "limits", "remedy"),
    [("start", 8, {}, "raise ready_timeout"), ("commit", 60, {"PAUSE_SECONDS": 3}, 'at="start"')],
    ids=["start", "commit"],
)
def test_one_that_takes_too_long_is_given_up(
    backend: str, at: str, ready_timeout: float, limits: dict[str, float], remedy: str, run_service: Run
) -> None:
    service = run_service(backend, ecdysis={"ready_timeout": ready_timeout}, limits=limits)
    service.run(SLOW.format(at=at))
    failure = service.fail_to_restart()
    assert failure["error"] == "StashFailed", failure
    assert "the stash 'slow' was not made within" in failure["text"]
    assert remedy in failure["text"]
    service.run("del ecdysis._stashes._orders['slow']")
    assert service.ask()["pid"] == service.pids[0]


@pytest.mark.backends("uvloop", "trio")
@pytest.mark.parametrize("at", ["start", "commit"])
def test_a_restart_is_called_off_while_one_is_made(backend: str, at: str, run_service: Run) -> None:
    service = run_service(backend)
    first = service.pids[0]
    service.run(SLOW.format(at=at))
    cancel = """
with anyio.CancelScope() as scope:
    async with anyio.create_task_group() as group:
        group.start_soon(ecdysis.restart)
        while ecdysis._life.handover is None or ecdysis._life.handover._stash.making is None:
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()
await ecdysis._life.handover.over.wait()
ecdysis.last_report.error
"""
    assert service.run(cancel).startswith("the restart was called off")
    assert service.ask()["pid"] == first
    # And where the service is stopped meanwhile.
    with service.begin("restart", until="serving") as asking:
        for _ in range(2):
            service.wait_for("producing")
        service.signal(first, signal.SIGTERM)
        assert asking.answer()["error"] == "RestartWhileDraining"
    service.wait_for_end()


@every_loop
def test_a_successor_that_fails_discards_it_and_the_next_gets_a_new_one(backend: str, run_service: Run) -> None:
    service = run_service(backend, at_start=INHERIT, ecdysis={"probation": 60})
    first = service.pids[0]
    service.run("made = 0\ndef count():\n    global made\n    made += 1\n    return b'%d' % made")
    service.run("ecdysis.stash('made', count, at='start')")
    service.configure(at_start="raise OSError")
    service.expected_blemishes = ("Traceback (most",)
    assert service.fail_to_restart()["error"] == "SuccessorFailed"
    assert holdings(first) == 0
    service.configure(at_start=INHERIT)
    second = service.restart()["successor_pid"]
    assert service.run(READ) | {"made": ["2", 0]} == service.run(READ)
    service.signal(second, signal.SIGKILL)
    service.wait_for("predecessor", state="rolled back", pid=first)
    assert holdings(first) == 0
    service.restart()
    assert service.run(READ) == {"early": ["early of 1", 1], "late": ["late of 1", "v1"], "made": ["3", 0]}


@pytest.mark.backends("asyncio", "trio")
def test_a_predecessor_that_dies_has_left_what_it_made(backend: str, run_service: Run) -> None:
    service = run_service(backend, at_start=INHERIT)
    service.configure(at_start=INHERIT + "\nawait wait()")
    with Conversation(service.address) as asking:
        asking.say("restart", until="serving")
        service.wait_for("waiting")
        service.signal(service.pids[0], signal.SIGKILL)
        service.wait_for_death(service.pids[0])
    service.wait_for_log("goes on without it")
    service.release()
    service.wait_for("ready", generation=2)
    assert service.run(READ) == {"early": ["early of 1", 1]}
    why = "try:\n    stash['late']\nexcept KeyError as error:\n    why = str(error)\nwhy"
    assert "the predecessor died before it made the stash 'late'" in service.run(why)


@pytest.mark.backends("asyncio")
def test_nothing_is_left_behind(backend: str, run_service: Run) -> None:
    service = run_service(backend, at_start=INHERIT)
    # Two of one generation, each a mapping and a descriptor of it: not those of the ones before.
    assert {holdings(service.restart("settled")["successor_pid"]) for _ in range(4)} == {4}
