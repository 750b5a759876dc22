"""A service with an anchor, seen from outside: the process tests' service, several of it in one."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ecdysis_async.cli import client
from tests.scenarios.handoff.harness import PATIENCE_SECONDS, Conversation, Json, Refused, Service

MAIN = Path(__file__).with_name("main.py")


class AnchoredService(Service):
    """An anchor and its workers.

    Args:
        directory: for its files.
        loop: what the workers run on.
        workers: how many.
        at_anchor: code to run in the anchor before it starts.
        opens: whether the anchor opens the sockets; else the workers do.
        plan: more arguments of ``AnchorConfig``.
        handoffs: arguments of ``Settings``.
        before: what stands before the anchor's command line.
        settings: as for ``Service``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        loop: str = "asyncio",
        workers: int = 3,
        at_anchor: str = "",
        opens: bool = True,
        plan: Json | None = None,
        handoffs: Json | None = None,
        before: tuple[str, ...] = (),
        **settings: Any,
    ) -> None:
        run = directory / "run"
        run.mkdir(mode=0o700)
        self.control = str(run / "control")
        self.pid_file = directory / "pid"
        self.size = workers
        command = [*before, sys.executable, "-W", "error", str(MAIN), str(directory / "settings.json")]
        super().__init__(
            directory,
            loop,
            command=command,
            opens=opens,
            at_anchor=at_anchor,
            plan={"workers": workers, **(plan or {})},
            handoffs={"probation": 0.2, "drain_timeout": 10, "ready_timeout": PATIENCE_SECONDS, **(handoffs or {})},
            control=self.control,
            pid_file=str(self.pid_file),
            **settings,
        )

    @property
    def anchor(self) -> int:
        """The pid of the anchor."""
        return self.pids[0]

    def wait_until_serving(self) -> None:
        """Wait for all workers, and learn where they are."""
        super().wait_until_serving()
        self.wait_until(self.pid_file.exists, "it does not serve")
        # The file is there before the first of them accepts.
        self.wait_for_workers(lambda found: len(found) == self.size)

    def status(self) -> Json:
        """Return the anchor's status."""
        return client.status(self.control)

    def workers(self, state: str = "serving") -> dict[int, int]:
        """Return the pids of the workers in a state, by their slots."""
        found = {each["slot"]: each["pid"] for each in self.status()["workers"] if each["state"] == state}
        # Each has told of itself before it served.
        self._read_events()
        return found

    def wait_for_workers(self, is_so: Callable[[dict[int, int]], bool]) -> dict[int, int]:
        """Wait until the serving workers are as they should be."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so(found := self.workers()):
            assert time.monotonic() < deadline, f"there are {found}"
            time.sleep(0.02)
        return found

    def roll_out(self, until: str = "settled") -> Json:
        """Restart it all; return the report."""
        report: Json = client.restart(self.control, until, lambda event: None)["report"]
        return report

    def fail_to_roll_out(self) -> client.CommandFailed:
        """Restart it all in vain; return the failure."""
        try:
            report = self.roll_out()
        except client.CommandFailed as error:
            return error
        raise AssertionError(f"it has not failed: {report}")

    def talk_to(self, pid: int) -> Conversation:
        """Connect to one of the workers: until it is the one that answers."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            conversation = Conversation(self.address)
            if conversation.say("hello").answer()["pid"] == pid:
                return conversation
            conversation.close()
        raise AssertionError(f"{pid} does not answer")

    def hold(self, pid: int) -> Conversation:
        """Be in the middle of a request with one of the workers."""
        conversation = self.talk_to(pid)
        conversation.say("hold")
        self.wait_for("holding", pid=pid)
        return conversation

    def stop(self) -> None:
        """Stop it in good order, and see that nothing is left."""
        self.signal(self.anchor, signal.SIGTERM)
        self.wait_for_end()
        assert self.statuses[self.anchor] == 0

    def wait_for_end(self) -> None:
        """Wait until every process has ended, and see that nothing is left."""
        super().wait_for_end()
        assert not self.pid_file.exists()
        with contextlib.suppress(Refused), Conversation(self.control):
            raise AssertionError("somebody still listens on the control socket")

    def descriptors(self) -> int:
        """Return how many descriptors the anchor has open."""
        count: int = psutil.Process(self.anchor).num_fds()
        return count

    def proportional_bytes(self) -> int:
        """Return the anchor's share of the memory that it uses (PSS)."""
        rollup = Path(f"/proc/{self.anchor}/smaps_rollup").read_text()
        (line,) = [line for line in rollup.splitlines() if line.startswith("Pss:")]
        return int(line.split()[1]) * 1024


class Watchdog:
    """What systemd would hear of a service on NOTIFY_SOCKET.

    Attributes:
        address: where.
        count: how often its watchdog was fed.
    """

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "notify")
        self.count = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.address)
        # Who is not read by anybody waits.
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._sock.recv(65536):
            self.count += message == b"WATCHDOG=1"

    def close(self) -> None:
        """Hear no more."""
        self._sock.sendto(b"", self.address)
        self._thread.join()
        self._sock.close()


@contextlib.contextmanager
def anchored(directory: Path, *, serves: bool = True, **settings: Any) -> Iterator[AnchoredService]:
    """Run a service with an anchor for a test, as ``tests.scenarios.handoff.harness.running``."""
    service = AnchoredService(directory, **settings)
    try:
        service.start()
        if serves:
            service.wait_until_serving()
        yield service
        if any(map(service.is_alive, service.pids)):
            service.stop()
        service.check_log()
    finally:
        print(service.log)  # noqa: T201 - pytest shows it with a failure
        service.end()
