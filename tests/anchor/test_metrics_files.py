"""The files of prometheus_client: no more of them after many restarts, and of the dead only what they counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from ecdysis_async._anchor.metrics_files import (
    AUTO,
    DIRECTORY_KEY,
    MetricsFile,
    claim_file,
    drop_gauges,
    find_removed,
    prepare_directory,
    remove_directory,
)

# A worker that has counted something, and was killed.
PROGRAM = """
from ecdysis_async._config.prometheus import name_metrics_files
name_metrics_files()
import os
from prometheus_client import Counter, Gauge, Histogram
Counter("hits", "h").inc(2)
Histogram("seconds", "s").observe(1)
for mode in ("all", "liveall", "livesum", "livemax", "max", "sum", "mostrecent"):
    Gauge(mode, "g", multiprocess_mode=mode).inc(5)
os.kill(os.getpid(), 9)
"""


def work(file: MetricsFile) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, **file.variables}, timeout=100, check=False)


def collect(directory: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]
    return {
        sample.name: sample.value
        for family in registry.collect()
        for sample in family.samples
        if "le" not in sample.labels and not sample.name.endswith("_created")
    }


def test_the_next_worker_goes_on_with_them(tmp_path: Path) -> None:
    names: set[str] = set()
    for turn in range(1, 4):
        file = claim_file({}, None, str(tmp_path), 0, ())
        assert file == MetricsFile(str(tmp_path), "slot0-1")
        work(file)
        assert collect(tmp_path)["livesum"] == 5
        drop_gauges(file)
        found = collect(tmp_path)
        assert (found["hits_total"], found["seconds_count"]) == (2 * turn, turn)
        assert not {"all", "liveall", "livesum", "livemax"} & found.keys()
        # These are meant to outlast a process.
        assert found["max"] == found["sum"] == 5 * turn
        names.add(",".join(sorted(path.name for path in tmp_path.iterdir())))
    assert len(names) == 1


def test_one_that_drains_keeps_its_own() -> None:
    found = claim_file({DIRECTORY_KEY: "prom"}, "/srv", None, 0, {"slot0-1", "slot0-3"})
    assert found == MetricsFile("/srv/prom", "slot0-2")
    assert claim_file({}, "/srv", None, 0, ()) is None


def test_a_service_begins_with_none(tmp_path: Path) -> None:
    for name in ("counter_12.db", "gauge_livesum_7.db", "data.db", "counter_12.txt"):
        (tmp_path / name).touch()
    path = prepare_directory(str(tmp_path), None, None)
    assert {each.name for each in tmp_path.iterdir()} == {"data.db", "counter_12.txt"}
    # The code that follows goes on with them.
    (tmp_path / "counter_slot0-1.db").touch()
    assert prepare_directory(str(tmp_path), path, str(tmp_path)) == path
    assert (tmp_path / "counter_slot0-1.db").exists()
    remove_directory(path)
    assert tmp_path.exists()


def test_a_directory_of_its_own_goes_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = prepare_directory(AUTO, None, None)
    assert Path(path).parent == tmp_path
    assert os.stat(path).st_mode & 0o777 == 0o700
    assert prepare_directory(AUTO, path, AUTO) == path
    remove_directory(path)
    assert not os.path.exists(path)
    # Somebody has removed it: the service goes on with another one.
    assert prepare_directory(AUTO, path, AUTO) != path


def test_the_same_words_mean_the_same_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Code of another release, started in another place, goes on with the files."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    path = prepare_directory("prom", None, None)
    monkeypatch.chdir(tmp_path / "two")
    assert prepare_directory("prom", path, "prom") == path
    assert prepare_directory("other", path, "prom") == str(tmp_path / "two" / "other")


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wanted = str(tmp_path / "file" / "prom")
    with pytest.raises(OSError, match=r"--metrics-dir .*/file/prom cannot be made \(Not a directory\): let the"):
        prepare_directory(wanted, None, None)


def test_a_worker_that_removes_what_others_count_is_found_out(tmp_path: Path) -> None:
    for name in ("counter_slot0-1.db", "gauge_livesum_slot0-1.db"):
        (tmp_path / name).touch()
    file = claim_file({}, None, str(tmp_path), 1, ())
    assert file is not None
    # A gauge goes with its process.
    (tmp_path / "gauge_livesum_slot0-1.db").unlink()
    assert find_removed(file) == []
    (tmp_path / "counter_slot0-1.db").unlink()
    assert find_removed(file) == [str(tmp_path / "counter_slot0-1.db")]
