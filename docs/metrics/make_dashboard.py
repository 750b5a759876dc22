"""Writes dashboard.json, for Grafana: ``python docs/metrics/make_dashboard.py``. A test sees that it is up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dashboard.json")

WIDTH, HEIGHT = 12, 8


def select(name: str) -> str:
    """Return a metric of the chosen services."""
    return f'{name}{{job=~"$job", instance=~"$instance"}}'


def rate(name: str) -> str:
    """Return how fast a counter rises, each second."""
    return f"rate({select(name)}[$__rate_interval])"


def rise(name: str, within: str) -> str:
    """Return how far a counter has risen within a time."""
    return f"increase({select(name)}[{within}])"


def add_up(labels: str, numbers: str) -> str:
    """Return the sum of all numbers with the same labels."""
    return f"sum by ({labels}) ({numbers})"


def find_mean_phase() -> str:
    """Return how long each phase took in the mean."""
    parts = [add_up("phase", rise(f"ecdysis_restart_phase_seconds_{part}", "1h")) for part in ("sum", "count")]
    return " / ".join(parts)


def find_gap(share: float) -> str:
    """Return the accept gap that a share of all is below."""
    return f"histogram_quantile({share}, {add_up('le', rise('ecdysis_accept_gap_seconds_bucket', '1h'))})"


# Each panel's title, type and unit, and its queries with their legends.
PANELS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("Generation", "stat", "none", [(select("ecdysis_generation"), "{{instance}}")]),
    ("The last restart succeeded: 1", "stat", "none", [(select("ecdysis_last_restart_successful"), "{{instance}}")]),
    ("Workers", "timeseries", "none", [(add_up("state", select("ecdysis_workers")), "{{state}}")]),
    ("Connections", "timeseries", "none", [(add_up("state", select("ecdysis_connections")), "{{state}}")]),
    (
        "Restarts",
        "timeseries",
        "none",
        [(add_up("outcome, reason", rise("ecdysis_restarts_total", "$__interval")), "{{outcome}}: {{reason}}")],
    ),
    (
        "How connections end",
        "timeseries",
        "ops",
        [(add_up("reason", rate("ecdysis_connections_closed_total")), "{{reason}}")],
    ),
    ("Phases of a restart, mean", "timeseries", "s", [(find_mean_phase(), "{{phase}}")]),
    ("Accept gap", "timeseries", "s", [(find_gap(0.5), "p50"), (find_gap(0.99), "p99")]),
    (
        "Requests per second",
        "timeseries",
        "reqps",
        [(add_up("slot", rate("ecdysis_requests_total")), "worker {{slot}}")],
    ),
    ("Memory", "timeseries", "bytes", [(add_up("slot", select("ecdysis_worker_memory_bytes")), "worker {{slot}}")]),
    (
        "Workers that were started anew",
        "timeseries",
        "none",
        [(add_up("reason", rise("ecdysis_worker_restarts_total", "$__interval")), "{{reason}}")],
    ),
    ("Clients that wait to be accepted", "timeseries", "none", [(select("ecdysis_socket_backlog"), "{{listener}}")]),
]


def make() -> dict[str, Any]:
    """Return the dashboard."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = [
        {
            "id": number + 1,
            "title": title,
            "type": kind,
            "datasource": source,
            "gridPos": {"x": WIDTH * (number % 2), "y": HEIGHT * (number // 2), "w": WIDTH, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend, "datasource": source}
                for index, (expression, legend) in enumerate(targets)
            ],
        }
        for number, (title, kind, unit, targets) in enumerate(PANELS)
    ]
    variables: list[dict[str, Any]] = [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
    for name, matcher in (("job", ""), ("instance", '{job=~"$job"}')):
        query = f"label_values(ecdysis_generation{matcher}, {name})"
        variables.append(
            {
                "name": name,
                "type": "query",
                "datasource": source,
                "definition": query,
                "query": {"query": query, "refId": name},
                "includeAll": True,
                "multi": True,
                "refresh": 2,
                "current": {"text": "All", "value": "$__all"},
            }
        )
    return {
        "title": "ecdysis",
        "uid": "ecdysis",
        "tags": ["ecdysis"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-6h", "to": "now"},
        # A restart is a line through all panels.
        "annotations": {
            "list": [
                {
                    "name": "Restarts",
                    "datasource": source,
                    "enable": True,
                    "iconColor": "purple",
                    "expr": f"changes({select('ecdysis_generation')}[$__interval]) > 0",
                    "titleFormat": "restart of {{instance}}",
                }
            ]
        },
        "templating": {"list": variables},
        "panels": panels,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(), indent=2) + "\n", encoding="utf-8")
