"""A real Prometheus that scrapes through restarts, and what the project has for it: alert rules and a dashboard."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.ports import find_free_port
from tests.scenarios.run.commands import PROJECT, Visitors, call, running, wait_until, write_app
from tests.scenarios.servers import programs

pytestmark = pytest.mark.main_python_only

METRICS = PROJECT / "docs" / "metrics"

# How many restarts there are; by hand it may be more.
RESTARTS = int(os.environ.get("RESTARTS", "2"))


def ask(port: int, query: str) -> list[dict[str, Any]]:
    """Return what Prometheus answers; nothing while it does not answer."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=30) as response:
        found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found
    return []


def measure(port: int, query: str) -> float | None:
    found = ask(port, query)
    return float(found[0]["value"][1]) if found else None


def load_dashboard() -> Any:
    spec = importlib.util.spec_from_file_location("make_dashboard", METRICS / "make_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_alerts_are_rules_and_do_what_they_say() -> None:
    promtool = programs.find("promtool")
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts-test.yaml"]):
        done = subprocess.run(
            [promtool, *command], cwd=METRICS, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_up_to_date() -> None:
    module = load_dashboard()
    assert json.loads((METRICS / "dashboard.json").read_text()) == json.loads(json.dumps(module.make()))


def test_prometheus_scrapes_through_restarts(tmp_path: Path) -> None:
    """No counter is seen to begin anew, each query of the dashboard is one, and so is each alert's."""
    prometheus, promtool = programs.find("prometheus"), programs.find("promtool")
    write_app(tmp_path / "main.py", "ok")
    health, port = find_free_port(), find_free_port()
    configuration = {
        "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "1s"},
        "rule_files": [str(METRICS / "alerts.yaml")],
        "scrape_configs": [{"job_name": "app", "static_configs": [{"targets": [f"127.0.0.1:{health}"]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(configuration))
    command = [prometheus, "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    options = ("--bind", "127.0.0.1:0", "--probation", "0.2", "--workers", "2", "--metrics")
    with (
        running(tmp_path, *options, "--health-bind", f"127.0.0.1:{health}") as run,
        programs.running([*command, "--storage.tsdb.path=data"], tmp_path),
        Visitors(run.find_port()) as visitors,
    ):
        wait_until(lambda: measure(port, "ecdysis_generation") == 1, "it scrapes nothing")
        for _ in range(RESTARTS):
            done = call("restart", "--control", run.control, cwd=tmp_path)
            assert done.returncode == 0, done
        assert call("restart", "--anchor", "--control", run.control, cwd=tmp_path).returncode == 0
        settled = 'ecdysis_restarts_total{outcome="settled"}'
        wait_until(lambda: measure(port, settled) == RESTARTS, "the restarts are not seen")
        wait_until(lambda: run.status()["anchor"]["upgrades"] == 1, "it is not upgraded")
        upgraded_at = time.time()
        wait_until(
            lambda: (measure(port, "timestamp(ecdysis_generation)") or 0) > upgraded_at + 1, "it scrapes no more"
        )
        resets = ask(port, 'resets({__name__=~"ecdysis_.*_(total|count|bucket|sum)"}[1d]) > 0')
        assert resets == []
        assert not ask(port, 'ALERTS{alertstate="firing"}')
        # A scrape that takes too long, on a busy machine, leaves a gap until the next one.
        least = len(visitors.answers) / 2
        wait_until(lambda: (measure(port, "sum(ecdysis_requests_total)") or 0) >= least, "requests are not counted")
        for panel in load_dashboard().make()["panels"]:
            for target in panel["targets"]:
                query = re.sub(r"\$(job|instance)", ".*", target["expr"])
                query = query.replace("$__rate_interval", "1m").replace("$__interval", "1m")
                subprocess.run(
                    [promtool, "query", "instant", f"http://127.0.0.1:{port}", query],
                    check=True,
                    capture_output=True,
                    timeout=60,
                )
                # What is shown at once, at least, has something to show.
                if "[" not in query:
                    wait_until(functools.partial(ask, port, query), f"{query} shows nothing")
        seen = {
            "restarts": measure(port, settled),
            "scrapes": measure(port, "count_over_time(up[1d])"),
            "scrapes that failed": measure(port, "count_over_time((up == 0)[1d:250ms])") or 0,
            "requests counted": measure(port, "sum(ecdysis_requests_total)"),
            "connections closed": measure(port, "sum(ecdysis_connections_closed_total)"),
        }
    # By hand (`RESTARTS=100 pytest -s`) it is these figures that somebody wants.
    sys.stdout.write(f"{seen | {'answers': len(visitors.answers), 'failures': len(visitors.failures)}}\n")
    assert visitors.failures == []
