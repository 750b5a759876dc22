"""A service as PID 1 of a container: of nothing but a namespace, or of runc, over a read-only view of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from tests.scenarios.systemd.machine import PATIENCE_SECONDS, PROJECT

# As container engines have it: the rest comes from the service's image.
CAPABILITIES = ["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETGID", "CAP_SETUID", "CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE"]

# This machine's root once more, in memory where runc makes its mount points.
MOUNT = """
mount -t tmpfs -o mode=755 tmpfs "$1/root"
mkdir "$1/root/upper" "$1/root/work" "$1/root/view"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/root/upper,workdir=$1/root/work" "$1/root/view"
exec "${@:2}"
"""


class Container:
    """A container that runs.

    Attributes:
        process: what runs it; its status becomes that of PID 1.
        log: where that one writes.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def first(self) -> psutil.Process:
        """PID 1, as this machine sees it."""
        return next(child for child in psutil.Process(self.process.pid).children() if _is_first(child.pid))

    def stop(self) -> int:
        """Do what container engines do first; return the status."""
        self.first.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something that tells nobody unasked."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            time.sleep(0.02)


@contextlib.contextmanager
def running(kind: str, directory: Path, command: Sequence[str], **environment: str) -> Iterator[Container]:
    """Run a command as PID 1 of a container; at the end nothing of it is left."""
    log = directory / "log"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), **environment}
    # So that what it leaves behind is found by whoever looks after the tests.
    environment |= {name: value for name, value in os.environ.items() if name == "TEST_GUARD"}
    with contextlib.ExitStack() as stack:
        match kind:
            case "unshare":
                outer = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command]
            case "runc":
                name = f"ecdysis-test-{os.getpid()}-{directory.name}"
                _write_bundle(directory, command, environment)
                runc = ["runc", "--root", str(directory / "state")]
                run = [*runc, "run", "--no-pivot", "--bundle", str(directory), name]
                inside = ["bash", "-ec", MOUNT, "bash", str(directory), *run]
                outer = ["unshare", "--mount", "--propagation=private", *inside]
                delete = [*runc, "delete", "--force", name]
                stack.callback(subprocess.run, delete, check=False, capture_output=True)
            case _:
                raise ValueError(kind)
        with log.open("ab") as output:
            process = subprocess.Popen(
                outer, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=directory
            )
        container = Container(process, log)
        try:
            yield container
        finally:
            if process.poll() is None:
                with contextlib.suppress(StopIteration, psutil.NoSuchProcess):
                    container.first.kill()
                process.kill()
            process.wait()


def has_runc() -> bool:
    """Say whether containers of runc can be had here."""
    return shutil.which("runc") is not None


def _is_first(pid: int) -> bool:
    """Say whether a process is PID 1 where it is."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith("NSpid:")).split()[-1] == "1"


def _write_bundle(directory: Path, command: Sequence[str], environment: dict[str, str]) -> None:
    for name in ("root", "state"):
        (directory / name).mkdir()
    # Of other file systems than the root's the overlay shows nothing.
    folders = dict.fromkeys(map(str, (directory, PROJECT, sys.prefix, sys.base_prefix)))
    binds = [
        {"destination": folder, "type": "bind", "source": folder, "options": ["rbind", "rw"]} for folder in folders
    ]
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(command),
            "env": [f"{name}={value}" for name, value in environment.items()],
            "cwd": str(directory),
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
            "noNewPrivileges": True,
        },
        "root": {"path": "root/view", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},
            *binds,
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
    }
    (directory / "config.json").write_text(json.dumps(config))
