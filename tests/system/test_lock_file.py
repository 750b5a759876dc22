"""The locks of a service: between real processes, to the death of their holders."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._system.lock_file import LockFile

HOLD = """
import sys
from ecdysis_async._system.lock_file import LockFile
locks = LockFile(int(sys.argv[1]))
locks.lock(sys.argv[2])
locks.write(sys.argv[2], {"holder": "the other process"})
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def locks() -> Iterator[LockFile]:
    with contextlib.closing(LockFile.make()) as found:
        yield found


@contextlib.contextmanager
def holding(locks: LockFile, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Let another process of the service hold a name."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(locks.fileno()), name],
        pass_fds=[locks.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def test_one_process_holds_a_name_until_it_dies(locks: LockFile) -> None:
    with holding(locks, "scheduler") as process:
        assert not locks.try_lock("scheduler")
        assert locks.read("scheduler") == {"holder": "the other process"}
        assert locks.try_lock("another name")
        process.kill()
        locks.lock("scheduler")
    assert locks.try_lock("scheduler")


def test_a_process_of_the_service_that_was_passed_none_finds_it(locks: LockFile) -> None:
    found = LockFile.open_of(locks.describe())
    assert found is not None
    with contextlib.closing(found):
        assert os.path.samestat(os.fstat(found.fileno()), os.fstat(locks.fileno()))
    pid, number, device, inode = locks.describe()
    for elsewhere in ([pid, number, device, inode + 1], [pid, 10**6, device, inode], [2**22 + 1, 3, 1, 1], []):
        assert LockFile.open_of(elsewhere) is None


def test_a_forked_child_holds_nothing(locks: LockFile) -> None:
    """Unlike a lock of flock(2), which would be held for as long as the child lives."""
    assert locks.try_lock("scheduler")
    with subprocess.Popen(["sleep", "600"], pass_fds=[locks.fileno()]) as child:
        locks.unlock("scheduler")
        with holding(locks, "scheduler"):
            pass
        child.kill()


def test_what_is_said_of_a_holder_may_be_missing(locks: LockFile) -> None:
    assert locks.read("nobody") == {}
    locks.close()
    locks.write("nobody", {"is": "lost"})
    assert locks.read("nobody") == {}
    locks.unlock("nobody")


def test_beside_a_control_socket_the_next_start_finds_it(tmp_path: Path) -> None:
    control = str(tmp_path / "control")
    with contextlib.closing(LockFile.make(control)) as killed, contextlib.closing(LockFile.make(control)) as anew:
        assert os.path.samestat(os.fstat(killed.fileno()), os.fstat(anew.fileno()))
        with holding(killed, "scheduler"):
            assert not anew.try_lock("scheduler")
        anew.remove(control)
        assert os.listdir(tmp_path) == []
        # By now it may be another service's.
        with contextlib.closing(LockFile.make(control)):
            killed.remove(control)
            assert os.listdir(tmp_path) == ["control.exclusive"]


@pytest.mark.parametrize("control", ["/nowhere/control", None, "fifo"])
def test_where_it_cannot_be_it_is_memory(tmp_path: Path, control: str | None) -> None:
    if control == "fifo":
        os.mkfifo(tmp_path / "fifo.exclusive")
        control = str(tmp_path / "fifo")
    with contextlib.closing(LockFile.make(control)) as locks:
        assert locks.try_lock("scheduler")
        locks.remove(control)
