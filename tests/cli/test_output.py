"""Whoever reads what a command prints may leave: its exit status tells of the service alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from ecdysis_async.cli.output import has_reader, let_readers_leave
let_readers_leave()
for number in range(100_000):
    print("a line", number)
print("more", file=sys.stderr)
sys.exit(5 if has_reader() else 7)
"""


def run(*, closed: str = "", stdout: int | None = subprocess.DEVNULL) -> int:
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    if closed:
        command = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *command]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.DEVNULL, check=False, timeout=60).returncode


def test_a_reader_that_leaves_changes_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert run(stdout=write) == 7
    finally:
        os.close(write)


def test_a_full_disk_changes_nothing() -> None:
    with open("/dev/full", "wb") as full:
        assert run(stdout=full.fileno()) == 7


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(closed: str) -> None:
    assert run(closed=closed) == 5


def test_what_is_read_is_written() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (5, 100_000, "more\n")


def test_characters_that_a_terminal_does_not_know_are_no_error() -> None:
    program = PROGRAM.replace('"a line", number', r'"\u2588 \udcff"').replace("100_000", "1")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, "\\u2588 \\udcff\n")


@pytest.mark.parametrize("command", ["unit nobody:app", "prove nobody:app --header nonsense"])
def test_each_command_is_left_in_peace(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ecdysis_async.cli", *command.split()],
            stdout=write,
            stderr=write,
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=60,
        )
    finally:
        os.close(write)
    # What it was told cannot be, which is what its status says.
    assert done.returncode == 2


def test_who_interrupts_the_imports_sees_no_traceback() -> None:
    program = """
import sys
from ecdysis_async.cli import main

class Interrupted:
    def find_spec(name, *others):
        if name == "ecdysis_async.cli.client":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted)
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
