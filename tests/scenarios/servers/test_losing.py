"""What a restart costs an application in silence is told: tasks that nobody waits for, a stash that nobody reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ports import find_free_port
from tests.scenarios import programs

pytestmark = pytest.mark.main_python_only

PROGRAM = Path(__file__).with_name("losing.py")


def run(directory: Path, *, loop: str, websockets: str, anchored: bool = False) -> programs.Ended:
    return programs.run(directory, PROGRAM, find_free_port(), LOOP=loop, WS=websockets, anchored=anchored)


def check(ended: programs.Ended) -> None:
    # Each WebSocket has a place for its offer and the events, whatever serves it.
    assert ended.output == "None [False, True]\n", ended.log
    (line,) = [line for line in ended.log.splitlines() if "left behind at the end" in line]
    assert "generation 1" in line
    assert "task forgotten: forgotten at " in line
    assert "tracked:" not in line
    assert "track()` is waited for" in line
    assert ended.log.count("nobody has read what the predecessor has left: 'misspelt'") == 1


@pytest.mark.parametrize(
    ("loop", "websockets"), [("asyncio", "websockets-sansio"), ("uvloop", "wsproto"), ("asyncio", "websockets")]
)
def test_what_is_lost_is_named(loop: str, websockets: str, tmp_path: Path) -> None:
    check(run(tmp_path, loop=loop, websockets=websockets))


def test_what_is_lost_in_a_worker_is_named(tmp_path: Path) -> None:
    check(run(tmp_path, loop="auto", websockets="auto", anchored=True))
