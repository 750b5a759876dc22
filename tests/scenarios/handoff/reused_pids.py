"""What test_reused_pids.py runs as the first process of a pid namespace, where it may say who gets which pid.

In each case a process of a service dies, a stranger gets its number, and must neither be taken for it nor harmed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import spawn
from ecdysis_async.cli import main as run_command
from tests.scenarios.handoff.harness import PATIENCE_SECONDS, Lost, reap, running

AUTOMATIC_REAPING = "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)"


@contextlib.contextmanager
def stranger_with(pid: int) -> Iterator[None]:
    """Give the number of a dead process to another one, which leads a group too, and which any signal would end."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        # The next number after the one that is written, if it is free (proc(5)); and it is a moment after its pidfd
        # says that its process is dead, where nobody has to reap that.
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        # Its parent, which drained still when it died, may have left it to this process since.
        reap(pid)
        with subprocess.Popen(["sleep", "600"], process_group=0) as stranger:
            try:
                if stranger.pid == pid:
                    yield
                    assert stranger.poll() is None, f"the stranger was ended by {stranger.returncode}"
                    return
            finally:
                stranger.kill()
        assert time.monotonic() < deadline, f"{pid} is not free"


def exit_status(command: str, control: Path) -> object:
    """Run a command of ``ecdysis`` in this process."""
    sys.argv[1:] = [command, "--control", str(control)]
    try:
        run_command()
    except SystemExit as exit:
        return exit.code


def killed_service(directory: Path, loop: str) -> None:
    """What a killed service leaves behind names a stranger: the pid file, and the socket that its lock is beside."""
    pid_file, control = directory / "pid", directory / "control"
    names = {"pid_file": str(pid_file), "control_socket": str(control)}
    with running(directory, loop, ecdysis=names) as service:
        first = service.pids[0]
        service.signal(first, signal.SIGKILL)
        service.wait_for_death(first)
        with stranger_with(first):
            assert pid_file.read_text() == f"{first}\n"
            assert [exit_status(each, control) for each in ("status", "restart", "stop")] == [3, 3, 3]
            second = service.start_another()
            service.wait_until_serving()
            assert pid_file.read_text() == f"{second}\n"
            third = service.restart("settled")["successor_pid"]
            service.wait_for_death(second)
            service.wait_until(lambda: pid_file.read_text() == f"{third}\n", "the pid file has not moved")
            service.stop()
            assert not pid_file.exists()


def dead_predecessor(directory: Path, loop: str) -> None:
    """The predecessor's number lives on, and the successor knows that it is dead."""
    with running(directory, loop) as service:
        # The first one's number is that of their group as well, and free only once all of them are dead.
        second = service.restart("settled")["successor_pid"]
        service.arm("successor", "waiting", "stop-self")
        with service.begin("restart", until="settled") as asking:
            third = service.wait_for("fault")["target"]
            service.wait_until_stopped(third)
            service.signal(second, signal.SIGKILL)
            service.wait_for_death(second)
            with contextlib.suppress(Lost):
                asking.answer()
        with stranger_with(second), service.begin("hello") as waiting:
            service.signal(third, signal.SIGCONT)
            assert waiting.answer()["pid"] == third
            waiting.close()
            service.stop()


def dead_successor(directory: Path, loop: str) -> None:
    """The successor's number lives on, and the predecessor comes back."""
    with running(directory, loop, ecdysis={"probation": 60}, at_import=AUTOMATIC_REAPING) as service:
        first = service.pids[0]
        second = service.restart()["successor_pid"]
        service.wait_for("predecessor", state="probation")
        service.signal(first, signal.SIGSTOP)
        service.wait_until_stopped(first)
        service.signal(second, signal.SIGKILL)
        service.wait_for_death(second)
        with stranger_with(second), service.begin("hello") as waiting:
            service.signal(first, signal.SIGCONT)
            assert waiting.answer()["pid"] == first
            assert service.run("ecdysis.last_report.outcome") == "rolled back"
            waiting.close()
            service.stop()


def dead_group(directory: Path, loop: str) -> None:
    """A successor that systemd shall adopt is signalled as a group; one that somebody else has reaped is not."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = spawn(Launch(("sleep", "600"), None, dict(os.environ)), theirs, 2, is_kept=True)
    assert process.send_signal(signal.SIGKILL)
    assert select.select([process.pidfd], [], [], PATIENCE_SECONDS)[0]
    with stranger_with(process.pid):
        assert not process.send_signal(signal.SIGTERM)
    process.close()


CASES: dict[str, Callable[[Path, str], None]] = {
    case.__name__: case for case in (killed_service, dead_predecessor, dead_successor, dead_group)
}

if __name__ == "__main__":
    CASES[sys.argv[1]](Path(sys.argv[3]), sys.argv[2])
