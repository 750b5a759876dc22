"""Orphans are reaped, and nobody's child is taken from it. In a process of its own: it takes every child's status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

PROGRAM = """
import os, select
from ecdysis_async._anchor.reaping import Reaper
from ecdysis_async._system.process import Process

def start(status):
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {status}"], {})
    pidfd = os.pidfd_open(pid)
    select.select([pidfd], [], [])
    return pid, pidfd

def is_zombie(pid):
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False

"""


def run(program: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM + program],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_an_orphan_is_reaped_and_a_child_that_somebody_waits_for_keeps_its_status() -> None:
    run("""
reaper = Reaper(reaps_orphans=True)
orphan, _ = start(1)
child = Process(*start(7))
reaper.reap()
assert not is_zombie(orphan)
assert child.returncode == 7
reaper.reap()
""")


def test_a_child_that_lives_is_left_alone() -> None:
    run("""
lives = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
Reaper(reaps_orphans=True).reap()
os.kill(lives, 9)
assert os.waitpid(lives, 0) == (lives, 9)
""")


@pytest.mark.parametrize("reaps", [True, False])
def test_nobody_is_reaped_while_a_process_is_being_started(reaps: bool) -> None:
    run(f"""
reaper = Reaper(reaps_orphans={reaps})
assert not reaper.is_spawning
with reaper.spawning(), reaper.spawning():
    orphan, _ = start(1)
    reaper.reap()
    assert reaper.is_spawning
    assert is_zombie(orphan)
assert not reaper.is_spawning
assert is_zombie(orphan) != {reaps}
""")
