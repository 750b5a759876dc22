"""A real systemd, booted as PID 1 of namespaces of its own, once for all the tests of a process.

It needs root, the tools of util-linux, and Debian's archive for a systemd that knows ``Type=notify-reload`` (253).
The machine's own systemd stays as it is; any number of these run side by side.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["Machine", "Unavailable", "fetch", "running"]

PROJECT = Path(__file__).resolve().parents[3]
BOOT = Path(__file__).with_name("boot.sh")
PACKAGES = ("systemd", "libsystemd-shared", "libsystemd0")

# How long anything may take that takes a moment, also on a busy machine.
PATIENCE_SECONDS = 60.0


class Unavailable(Exception):
    """This machine cannot run a systemd of its own; the text says why."""


def fetch(cache: Path) -> Path:
    """Unpack systemd from the backports of this machine's Debian into a cache, once; return its directory.

    Raises:
        Unavailable: this is no Debian, or its archive cannot be reached.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Unavailable("systemd is taken from Debian's archive, and there is no apt-get here")
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    unpacked = cache / f"{codename}-backports"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        # Several test processes come here at the same time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not unpacked.exists():
            draft = cache / "draft"
            shutil.rmtree(draft, ignore_errors=True)
            try:
                _download(codename, draft)
            except subprocess.CalledProcessError as error:
                raise Unavailable(f"systemd could not be fetched: {error.cmd[0]} says {error.stderr}") from error
            (draft / "root").rename(unpacked)
            shutil.rmtree(draft)
    return unpacked


def _download(codename: str, draft: Path) -> None:
    for directory in ("root", "lists/partial", "archives/partial"):
        (draft / directory).mkdir(parents=True)
    # Which archive, this machine's own settings say.
    lines = _run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages").splitlines()
    uris = [uri for uri, _, release in (line.partition(" ") for line in lines) if release == codename]
    if not uris:
        raise Unavailable(f"apt has no archive of {codename or 'this system'} in its settings")
    sources = draft / "sources.list"
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources.write_text(f"deb [signed-by={keyring}] {uris[0]} {codename}-backports main\n")
    options = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": draft / "lists",
        "Dir::Cache": draft,
        "Dir::State::Status": "/dev/null",
        "APT::Sandbox::User": "root",
        "Acquire::Check-Valid-Until": "false",
        "Acquire::http::Timeout": "20",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    _run(*apt, "update")
    _run(*apt, "download", *PACKAGES, directory=draft)
    root = draft / "root"
    for package in draft.glob("*.deb"):
        _run("dpkg", "-x", str(package), str(root))
    for name in ("lib", "bin", "sbin"):
        # As the machine's root has it: merged into /usr.
        if (root / name).exists():
            shutil.copytree(root / name, root / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(root / name)


def _run(*command: str, directory: Path | None = None) -> str:
    return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout


class Machine:
    """A running systemd.

    Args:
        systemd: where it is unpacked.
        directory: where the directories of all tests are.

    Attributes:
        directory: of the test that has it; seen inside at the same path as outside.
        units: where the unit files are.
    """

    def __init__(self, systemd: Path, directory: Path) -> None:
        self.directory = directory
        self.units = directory / f"units-{uuid.uuid4()}"
        self.units.mkdir()
        self._systemd = systemd
        self._pid = 0
        self._shared = directory
        self._is_reload_due = False

    def boot(self) -> None:
        """Start it, and wait until it takes commands.

        Raises:
            Unavailable: this machine does not let it.
        """
        self._cgroup = _unified_hierarchy() / f"ecdysis-test-{self.units.name}"
        try:
            self._cgroup.mkdir()
        except OSError as error:
            raise Unavailable(f"a control group cannot be made here: {error}") from error
        folders = self._folders()
        # A shell that enters the group before anything else: systemd takes where it starts for the root of its own.
        enter = f'echo $$ >"{self._cgroup}/cgroup.procs" && exec "$@"'
        unshare = ["unshare", "-m", "-p", "-f", "-C", "-u", "-i", "--propagation", "private", "--kill-child"]
        command = [
            "bash",
            "-c",
            enter,
            "bash",
            *unshare,
            "bash",
            str(BOOT),
            str(self._systemd),
            str(self.units),
            *folders,
        ]
        self._console = self.units / "console"
        with self._console.open("wb") as console:
            self._outer = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        while time.monotonic() < deadline and self._outer.poll() is None:
            with contextlib.suppress(OSError, IndexError, ValueError):
                self._pid = int(children.read_text().split()[0])
                if self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded"):
                    return
            time.sleep(0.02)
        raise Unavailable(f"systemd does not come up in namespaces here:\n{self.tell_console()}")

    def _folders(self) -> list[str]:
        return list(dict.fromkeys(map(str, (self._shared, PROJECT, sys.prefix, sys.base_prefix))))

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command inside; return what it says, on either stream where it may fail."""
        result = subprocess.run(
            ["nsenter", "-t", str(self._pid), "-a", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False, timeout=PATIENCE_SECONDS * 2,
        )  # fmt: skip
        assert result.returncode == 0 or not check, (
            f"{command}: {result.returncode}: {result.stdout}{self._how_it_ended()}"
        )
        return result.stdout

    def _how_it_ended(self) -> str:
        """Say how systemd itself has ended, where it has: then it is not the command that fails."""
        status = self._outer.poll()
        if status is None:
            return ""
        return f"systemd (pid {self._pid}) has ended, and so has unshare ({status}):\n{self.tell_console()}"

    def tell_console(self) -> str:
        """Return the last words of its console."""
        return self._console.read_text(errors="replace")[-2000:]

    def systemctl(self, *arguments: str) -> None:
        """Run systemctl, which must not fail."""
        self._reload_if_due()
        self.run("systemctl", *arguments)

    def execute_anew(self) -> None:
        """Let systemd execute itself, and wait until it takes commands again."""
        self._reload_if_due()
        self.run("systemctl", "daemon-reexec")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "Version=" not in self.run("systemctl", "show", "--property=Version", check=False):
            assert time.monotonic() < deadline, "systemd does not come back"

    def fails(self, *command: str) -> bool:
        """Run a command inside; say whether it fails."""
        self._reload_if_due()
        command = ("nsenter", "-t", str(self._pid), "-a", *command)
        return subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE_SECONDS * 2).returncode != 0

    def begin(self, *command: str) -> subprocess.Popen[bytes]:
        """Begin a command inside, and let it run."""
        self._reload_if_due()
        return subprocess.Popen(["nsenter", "-t", str(self._pid), "-a", *command], stdout=subprocess.DEVNULL)

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "--property", name, unit).strip()

    def install(self, unit: str, text: str) -> None:
        """Write a unit file; it is in force with the next command of systemctl."""
        (self.units / unit).parent.mkdir(exist_ok=True)
        (self.units / unit).write_text(text)
        self._is_reload_due = True

    def _reload_if_due(self) -> None:
        if self._is_reload_due:
            self._is_reload_due = False
            self.run("systemctl", "daemon-reload")

    def forget(self) -> None:
        """Let nothing be left of the units that a test has written, however they are."""
        units = shlex.join(path.name for path in self.units.iterdir() if path.suffix in (".service", ".socket"))
        for path in self.units.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix in (".service", ".socket"):
                path.unlink()
        if units:
            # Not in order: that would take as long as their connections.
            kill = f"systemctl stop --no-block {units}; systemctl kill --signal=KILL {units}; systemctl stop {units}"
            forget = f"systemctl reset-failed {units}; systemctl daemon-reload"
            self.run("sh", "-c", f"({kill}; {forget}) 2>/dev/null", check=False)
            left = self.run("systemctl", "list-units", "--all", "--plain", "--no-legend", *shlex.split(units)).strip()
            assert not left, f"systemd has not forgotten them: {left}"

    def let_others_in(self) -> None:
        """Let every user reach the program and the test's directory: what is above them is this machine's alone."""
        self.directory.chmod(0o755)
        for folder in (*self._folders(), str(self.directory)):
            self.run("chmod", "a+x", *(str(parent) for parent in Path(folder).parents))

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process, by its number inside; after a SIGSTOP, return once it does nothing any more.

        In the kernel it may still accept who comes between the signal and that.
        """
        self.run("kill", f"-{number.value}", str(pid))
        if number is signal.SIGSTOP:
            _wait_until_stopped(lambda: self.run("cat", f"/proc/{pid}/stat"))

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Let systemd itself do nothing, from outside: within its namespace nobody can stop it."""
        os.kill(self._pid, signal.SIGSTOP)
        _wait_until_stopped(Path(f"/proc/{self._pid}/stat").read_text)
        try:
            yield
        finally:
            os.kill(self._pid, signal.SIGCONT)

    def end(self) -> None:
        """End it, and everything that runs in it."""
        self._outer.kill()
        self._outer.wait()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._cgroup.exists():
            # Groups are removed from within, and only once their last process is gone.
            for path, _, _ in os.walk(self._cgroup, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(path)
            assert time.monotonic() < deadline, f"{self._cgroup} is still in use"
            time.sleep(0.005)


@contextlib.contextmanager
def running(systemd: Path, directory: Path) -> Iterator[Machine]:
    """Run a systemd; at the end nothing of it is left."""
    machine = Machine(systemd, directory)
    try:
        machine.boot()
        yield machine
    finally:
        machine.end()


def _wait_until_stopped(read_stat: Callable[[], str]) -> None:
    """Wait until a SIGSTOP has come into effect; proc_pid_stat(5)."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := read_stat()).rpartition(") ")[2].startswith("T"):
        assert time.monotonic() < deadline, f"it does not stop: {found}"
        time.sleep(0.005)


def _unified_hierarchy() -> Path:
    hybrid = Path("/sys/fs/cgroup/unified")
    return hybrid if hybrid.is_dir() else Path("/sys/fs/cgroup")
