"""A reserve of descriptors, in a process of its own whose table is full."""

from __future__ import annotations

import subprocess
import sys

import pytest

FULL = """
import contextlib, os, resource, socket, sys
from ecdysis_async._system.reserve import Reserve

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
kept = []

def use_up():
    with contextlib.suppress(OSError):
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))

def count():
    opened = []
    with contextlib.suppress(OSError):
        while True:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    for each in opened:
        os.close(each)
    return len(opened)

reserve = Reserve(10)
if sys.argv[1] == "in time":
    reserve.fill()
    reserve.fill()
use_up()
assert count() == 0
reserve.fill()
reserve.give_up()
reserve.give_up()
print(count())
reserve.fill()
assert count() == 0

opened = []
for _ in range(20):
    try:
        opened.append(reserve.open(lambda: os.open(os.devnull, os.O_RDONLY)))
    except OSError:
        break
print(len(opened))
assert count() == 0
for each in opened:
    os.close(each)
reserve.take_back()
assert count() == 0
reserve.give_up()
reserve.take_back()
print(count())
"""


@pytest.mark.parametrize(("when", "count"), [("in time", 10), ("too late", 0)])
def test_what_was_reserved_can_be_had_when_nothing_is_left(when: str, count: int) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, when], check=True, capture_output=True, text=True)
    # At once for a restart; one after the other for what is closed again; and all of them are back then.
    assert list(map(int, done.stdout.split())) == [count, count, count]
