"""What a service wakes up in: signals that its parent has blocked, and a terminal that is closed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.scenarios.run.commands import ECDYSIS, PATIENCE_SECONDS, make_environment, wait_until, write_app

pytestmark = pytest.mark.main_python_only

ANCHORED = [
    *ECDYSIS,
    "run",
    "main:app",
    "--port",
    "0",
    "--control",
    "./control",
    "--probation",
    "0.1",
    "--no-access-log",
]

# A program with an `Ecdysis` of its own, on the loop that its command line names.
PROGRAM = """
import logging, sys, anyio
from ecdysis_async import Ecdysis

logging.basicConfig(level=logging.INFO, format="%(message)s")

async def main():
    async with Ecdysis(probation=0.1, control_socket="./control") as ecdysis:
        ecdysis.listen_tcp("127.0.0.1", 0)
        await ecdysis.serve_forever()

anyio.run(main, backend=sys.argv[1].replace("uvloop", "asyncio"),
          backend_options={"use_uvloop": True} if sys.argv[1] == "uvloop" else {})
"""

# What stands between the test and the service, and becomes the service.
BLOCKING = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR2})
os.execvp(sys.argv[1], sys.argv[1:])
"""
IN_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""

KINDS = ["anchored", "asyncio", "uvloop", "trio"]


class Started:
    """A service behind a program that becomes it.

    Attributes:
        process: what was started.
    """

    def __init__(self, directory: Path, kind: str, before: str, *command: str, stdin: int = subprocess.DEVNULL) -> None:
        self._log = directory / "log"
        write_app(directory / "main.py", "hello")
        (directory / "program.py").write_text(PROGRAM)
        service = ANCHORED if kind == "anchored" else [sys.executable, "program.py", kind]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", before, *command, *service],
                cwd=directory, env=make_environment(directory, {}), stdin=stdin, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str) -> str:
        """Wait for a line of the log; return its last group."""
        wait_until(lambda: re.search(pattern, self.log) or "Traceback" in self.log, f"no {pattern!r} in the log")
        return re.findall(pattern, self.log)[-1]  # type: ignore[no-any-return]

    def end(self) -> None:
        """End what is left of it."""
        left = {self.process.pid, *map(int, re.findall(r"pid (\d+)", self.log))}
        for pid in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if "./control" in " ".join(process.cmdline()) or "program.py" in process.cmdline():
                    process.kill()
        self.process.wait(PATIENCE_SECONDS)


@contextlib.contextmanager
def started(
    directory: Path, kind: str, before: str, *command: str, stdin: int = subprocess.DEVNULL
) -> Iterator[Started]:
    service = Started(directory, kind, before, *command, stdin=stdin)
    try:
        yield service
    finally:
        print(service.log)  # noqa: T201 - pytest shows it with a failure
        service.end()


def read_masks(pid: int) -> set[str]:
    """Return what each thread of a process blocks; while one is made, or ends, it may block everything."""
    masks = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            masks |= set(re.findall(r"SigBlk:\s*(\w+)", (task / "status").read_text()))
    return masks


@pytest.mark.parametrize("kind", KINDS)
def test_signals_that_the_parent_blocks(kind: str, tmp_path: Path) -> None:
    with started(tmp_path, kind, BLOCKING) as service:
        service.wait_for(r"serving on")
        service.process.send_signal(signal.SIGHUP)
        pid = int(service.wait_for(r"the restart is settled: generation 2 \(pid (\d+)"))
        # The successor, and what it starts, has nothing of it.
        wait_until(lambda: read_masks(pid) == {"0" * 16}, "it blocks signals")
        os.kill(service.process.pid if kind == "anchored" else pid, signal.SIGTERM)
        wait_until(lambda: has_ended(pid), "it does not stop")
        assert service.process.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shell", [(), ("/bin/sh", "-c", '"$@"; exit $?', "sh")], ids=["alone", "in a shell"])
def test_a_terminal_that_is_closed(kind: str, shell: tuple[str, ...], tmp_path: Path) -> None:
    window, inside = os.openpty()
    with started(tmp_path, kind, IN_A_TERMINAL, *shell, stdin=inside) as service:
        os.close(inside)
        pid = int(service.wait_for(r"pid (\d+)\] .*serving on"))
        # An operator's signal, while somebody still looks on, is a restart as everywhere; it ends a plain service's
        # first process, and with that the place in the foreground.
        if kind == "anchored":
            os.kill(find_service(service, shell), signal.SIGHUP)
            pid = int(service.wait_for(r"the restart is settled: generation 2 \(pid (\d+)"))
        os.close(window)
        wait_until(lambda: has_ended(pid), "it lives on without its terminal")
        assert "the terminal is gone" in service.log


@pytest.mark.parametrize("kind", ["anchored", "asyncio"])
def test_nohup_outlives_its_terminal(kind: str, tmp_path: Path) -> None:
    window, inside = os.openpty()
    with started(tmp_path, kind, IN_A_TERMINAL, "nohup", stdin=inside) as service:
        os.close(inside)
        service.wait_for(r"serving on")
        os.close(window)
        # The signal is a restart, as for everything that has no terminal.
        service.wait_for(r"the restart is settled: generation 2 \(pid (\d+)")
        assert "the terminal is gone" not in service.log


def test_files_that_may_have_no_size_are_named(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "hello")
    limit = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", limit, *ANCHORED],
        cwd=tmp_path,
        env=make_environment(tmp_path, {}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 3
    assert "'File too large'): raise the limit of the size of files (ulimit -f, LimitFSIZE=)" in done.stderr


def find_service(service: Started, shell: tuple[str, ...]) -> int:
    process = psutil.Process(service.process.pid)
    return process.children()[0].pid if shell else process.pid


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
