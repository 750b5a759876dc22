"""Trap 15: a number that another process has by now is nobody of this service, wherever the service had noted it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import PROJECT

pytestmark = pytest.mark.main_python_only

SCRIPT = Path(__file__).with_name("reused_pids.py")


@pytest.fixture
def namespace() -> list[str]:
    """What begins a command line that runs in a pid namespace of its own, and ends with it."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or not Path("/proc/sys/kernel/ns_last_pid").exists():
        pytest.skip("only root chooses pids, in a pid namespace of a Linux that can (CONFIG_CHECKPOINT_RESTORE)")
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    attempt = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if attempt.returncode:
        pytest.skip(f"no pid namespace is to be had here: {attempt.stderr}")
    return command


@pytest.mark.parametrize(
    ("case", "loop"),
    [("killed_service", "asyncio"), ("dead_predecessor", "trio"), ("dead_successor", "uvloop"), ("dead_group", "none")],
)
def test_a_stranger_with_a_known_pid(case: str, loop: str, namespace: list[str], tmp_path: Path) -> None:
    process = subprocess.run(
        [*namespace, sys.executable, "-W", "error", str(SCRIPT), case, loop, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
