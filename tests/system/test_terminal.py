"""The terminal of a service: in its foreground or not, there or gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]

# Becomes the leader of a session with stdin as its terminal, looks, lets the terminal be closed, and looks again.
LOOKS = """
import fcntl, os, select, signal, sys, termios
sys.path.insert(0, sys.argv[2])
from ecdysis_async._system.terminal import is_in_foreground, is_terminal_gone

os.setsid()
if sys.argv[1] != "no terminal":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "background":
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpgrp())
        os._exit(0)
    os.waitpid(child, 0)
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
foreground = is_in_foreground()
signal.signal(signal.SIGHUP, lambda *_: None)
gone = is_terminal_gone()
print(foreground, gone, flush=True)
poll = select.poll()
poll.register(0, select.POLLHUP)
poll.poll()
print(is_terminal_gone())
"""


@pytest.mark.parametrize(
    ("where", "before"),
    [
        ("foreground", "True False"),
        ("background", "False False"),
        ("nohup", "False False"),
        ("no terminal", "False True"),
    ],
)
def test_what_a_process_sees_of_its_terminal(where: str, before: str) -> None:
    window, inside = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", LOOKS, where, PROJECT], stdin=inside, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(inside)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == before
        os.close(window)
        assert process.stdout.read().strip() == "True"
    assert process.returncode == 0
