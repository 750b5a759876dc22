"""``--metrics``: no counter falls, whatever becomes of the processes that have counted."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.ports import find_free_port
from tests.scenarios.run.commands import (
    Running,
    Visitors,
    call,
    get,
    running,
    taking_over,
    wait_until,
    write_app,
)

pytestmark = pytest.mark.main_python_only

QUICK = ("--bind", "127.0.0.1:0", "--probation", "0.2", "--drain-timeout", "5", "--workers", "2", "--metrics")

Numbers = Mapping[tuple[str, ...], float]

# An application with metrics of its own. Each of its processes is busy with itself.
COUNTING = """
import os
from prometheus_client import Counter, Gauge
HITS = Counter("hits", "Requests.")
BUSY = Gauge("busy", "Processes.", multiprocess_mode="livesum")
EACH = Gauge("each", "Processes, one by one.")
BUSY.set(1)
EACH.set(1)
"""


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Return all numbers, by their names and labels."""
    status, text = get(port, "/metrics")
    assert status == 200, text
    return {
        (sample.name, *(f"{name}={label}" for name, label in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def is_counter(name: str) -> bool:
    return name.endswith(("_total", "_count", "_bucket", "_sum"))


class Scraper:
    """Scrapes all the time, as Prometheus does, and finds counters that fall."""

    def __init__(self, port: int) -> None:
        self.fallen: list[str] = []
        self.looks = 0
        self._port = port
        self._last: dict[tuple[str, ...], float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stopping.wait(0.02):
            try:
                numbers = scrape(self._port)
            except OSError:
                continue  # between two anchors nobody listens for a moment
            self.looks += 1
            for key, before in self._last.items():
                if is_counter(key[0]) and numbers.get(key, 0) < before:
                    self.fallen.append(f"{key}: {before} to {numbers.get(key)}")
            self._last.update(numbers)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.join()


def wait_for_number(port: int, key: tuple[str, ...], least: float) -> None:
    def is_there() -> bool:
        # A process that dies takes along what it had accepted, and between two anchors nobody listens for a moment.
        with contextlib.suppress(OSError):
            return scrape(port).get(key, 0) >= least
        return False

    wait_until(is_there, f"no {key}, or less than {least:g}")


@pytest.fixture
def health() -> int:
    return find_free_port()


def restart(run: Running, tmp_path: Path, *arguments: str, code: int = 0) -> None:
    done = call("restart", "--control", run.control, *arguments, cwd=tmp_path)
    assert done.returncode == code, done


def test_no_counter_falls(tmp_path: Path, health: int) -> None:
    """Over a restart, a release that fails, a crash, an upgrade of the anchor, and a takeover."""
    write_app(tmp_path / "main.py", "ok")
    options = (*QUICK, "--health-bind", f"127.0.0.1:{health}")
    with running(tmp_path, *options) as run:
        port = run.find_port()
        with Visitors(port) as visitors, Scraper(health) as scraper:
            visitors.wait_for("ok")
            restart(run, tmp_path)
            wait_for_number(health, ("ecdysis_restarts_total", "outcome=settled", "reason=none"), 1)
            assert scrape(health)["ecdysis_generation",] == 2
            write_app(tmp_path / "main.py", "ok", "raise RuntimeError('no')")
            restart(run, tmp_path, code=1)
            numbers = scrape(health)
            assert numbers["ecdysis_restarts_total", "outcome=failed", "reason=successor_failed"] == 1
            assert numbers["ecdysis_last_restart_successful",] == 0
            write_app(tmp_path / "main.py", "ok")
            with visitors.pausing():
                os.kill(run.status()["workers"][0]["pid"], signal.SIGKILL)
            wait_for_number(health, ("ecdysis_worker_restarts_total", "reason=crashed"), 1)
            wait_for_number(health, ("ecdysis_workers", "state=serving"), 2)
            restart(run, tmp_path, "--anchor")
            wait_until(lambda: run.status()["anchor"]["upgrades"] == 1, "it is not upgraded")
            with taking_over(run, tmp_path, *options) as newcomer:
                assert run.wait() == 0
                newcomer.wait_for("the restart is settled: generation 3")
                wait_for_number(health, ("ecdysis_restarts_total", "outcome=settled", "reason=none"), 2)
                wait_for_number(health, ("ecdysis_workers", "state=serving"), 2)
                # Each process has had its part in what was served. One was killed, and had last spoken a second before.
                least = len(visitors.answers) - 100
                wait_until(lambda: sum(find(health, "ecdysis_requests_total")) >= least, "some are lost")
                assert sum(find(health, "ecdysis_accept_gap_seconds_count")) >= 4
                visitors.end()
        assert scraper.looks > 5
        assert scraper.fallen == []
        assert visitors.failures == []


def find(port: int, name: str) -> list[float]:
    return [value for key, value in scrape(port).items() if key[0] == name]


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    write_app(tmp_path / "main.py", "ok", COUNTING)
    source = (tmp_path / "main.py").read_text()
    (tmp_path / "main.py").write_text(
        source.replace('    await send({"type": "http.resp', '    HITS.inc()\n    await send({"type": "http.resp', 1)
    )
    return tmp_path


@pytest.mark.parametrize("is_managed", [True, False], ids=["managed", "named by the environment"])
def test_the_metrics_of_the_application_outlast_its_processes(counting: Path, health: int, *, is_managed: bool) -> None:
    (counting / "prom").mkdir()
    (counting / "prom" / "counter_77.db").write_bytes(b"")
    where = ("--metrics-dir", "prom") if is_managed else ()
    variable = "" if is_managed else "prom"
    with running(
        counting, *QUICK, "--health-bind", f"127.0.0.1:{health}", *where, PROMETHEUS_MULTIPROC_DIR=variable
    ) as run:
        port = run.find_port()
        # What a former service has left is gone, where the directory is the service's.
        assert (counting / "prom" / "counter_77.db").exists() is not is_managed
        with Visitors(port) as visitors:
            visitors.wait_for("ok")
            names: set[str] = set()
            for _ in range(3):
                restart(run, counting, "--until", "drained")
                names.add(" ".join(sorted(path.name for path in (counting / "prom").iterdir())))
            visitors.end()
        assert visitors.failures == []
        assert len(names) <= 2, names
        if is_managed:
            numbers = scrape(health)
            assert numbers["hits_total",] == len(visitors.answers)
            assert numbers["busy",] == 2
            assert len([key for key in numbers if key[0] == "each"]) == 2
        else:
            assert ("hits_total",) not in scrape(health)


def test_a_directory_of_its_own_lives_as_long_as_the_service(counting: Path, health: int) -> None:
    options = ("--health-bind", f"127.0.0.1:{health}", "--metrics-dir", "auto")
    (counting / "tmp").mkdir()
    with running(counting, *QUICK, *options, TMPDIR=str(counting / "tmp")) as run:
        with Visitors(run.find_port()) as visitors:
            visitors.wait_for("ok")
            visitors.end()
        (directory,) = (counting / "tmp").iterdir()
        restart(run, counting, "--anchor")
        wait_until(lambda: run.status()["anchor"]["upgrades"] == 1, "it is not upgraded")
        restart(run, counting)
        assert list((counting / "tmp").iterdir()) == [directory]
        assert scrape(health)["hits_total",] == len(visitors.answers)
    assert not list((counting / "tmp").iterdir())


def test_an_application_that_removes_the_files_of_others_is_named(counting: Path, health: int) -> None:
    (counting / "prom").mkdir()
    source = (counting / "main.py").read_text()
    wipe = 'import glob, os\nfor each in glob.glob("prom/*.db"):\n    os.unlink(each)\n'
    (counting / "main.py").write_text(wipe + source)
    options = (*QUICK, "--health-bind", f"127.0.0.1:{health}")
    with running(counting, *options, PROMETHEUS_MULTIPROC_DIR="prom") as run:
        with Visitors(run.find_port()) as visitors:
            visitors.wait_for("ok")
        restart(run, counting)
        run.wait_for("files of metrics of all workers were removed from .*/prom: does the application")
