"""prometheus_client in a worker: what its files are called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from ecdysis_async._config.prometheus import name_metrics_files
name_metrics_files()
import os
from prometheus_client import Counter, Gauge
Counter("hits", "h").inc()
Gauge("busy", "b", multiprocess_mode="livesum").set(1)
if os.fork() == 0:
    Counter("more", "m").inc()
    os._exit(0)
os.wait()
print("ECDYSIS_METRICS_ID" in os.environ)
"""


def run(directory: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **variables},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout.strip()


def test_they_are_named_after_the_slot(tmp_path: Path) -> None:
    for _ in range(2):
        assert run(tmp_path, PROMETHEUS_MULTIPROC_DIR=str(tmp_path), ECDYSIS_METRICS_ID="slot0-1") == "False"
    ours = {path.name for path in tmp_path.iterdir() if "slot" in path.name}
    assert ours == {"counter_slot0-1.db", "gauge_livesum_slot0-1.db"}
    # What is forked has files of its own.
    assert len(list(tmp_path.glob("counter_[0-9]*.db"))) == 2


def test_without_a_directory_nothing_changes(tmp_path: Path) -> None:
    run(tmp_path, ECDYSIS_METRICS_ID="slot0-1")
    assert not list(tmp_path.iterdir())
