"""An anchor as PID 1 of a container: it reaps orphans, hears signals, and ends with a status that tells."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from ecdysis_async.cli import client
from tests.scenarios.anchor.harness import AnchoredService, anchored

pytestmark = pytest.mark.main_python_only

# A child whose own child outlives it, and so becomes one of PID 1.
ORPHAN = """
import subprocess
subprocess.run(["sh", "-c", "sleep 0.3 & echo $!"], stdout=subprocess.PIPE).stdout.decode().strip()
"""

ZOMBIES = """
import psutil
[each.pid for each in psutil.process_iter(["status"]) if each.info["status"] == psutil.STATUS_ZOMBIE]
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, and unshare(1)")
def test_an_anchor_as_pid_1(tmp_path: Path) -> None:
    with anchored(tmp_path, serves=False, workers=2, before=("unshare", "--pid", "--fork", "--mount-proc")) as service:
        see_pid_1(service)


def see_pid_1(service: AnchoredService) -> None:
    # Pids that the service tells are those of its own namespace, and nobody's here.
    unshare = service.pids[0]
    service._know = lambda pid: None  # type: ignore[method-assign]
    service.addresses = service.wait_for("ready")["addresses"]
    service.wait_until(service.pid_file.exists, "it does not serve")
    assert service.status()["pid"] == 1

    orphan = service.run(ORPHAN)
    service.wait_until(lambda: not service.run(f"os.path.exists('/proc/{orphan}')"), "the orphan is not reaped")
    service.wait_until(lambda: service.run(ZOMBIES) == [], "there are zombies")

    assert service.roll_out("drained")["outcome"] == "settled"
    assert client.upgrade(service.control, lambda event: None)["pid"] == 1
    service.wait_until(lambda: service.run(ZOMBIES) == [], "there are zombies")

    (anchor,) = psutil.Process(unshare).children()
    anchor.send_signal(signal.SIGTERM)
    # unshare(1) ends with the status of its child.
    assert service.wait_for_death(unshare) == 0
