"""prometheus_client in a worker: its files are named after the slot, so that the next worker goes on with them."""

from __future__ import annotations

import importlib.util
import os

from ecdysis_async._system.claims import find_metrics_id
from ecdysis_async.errors import StartupError

__all__ = ["name_metrics_files", "require_prometheus_client"]

DIRECTORY_KEY = "PROMETHEUS_MULTIPROC_DIR"


def require_prometheus_client() -> None:
    """See that prometheus_client is installed.

    Raises:
        StartupError: it is not.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise StartupError("--metrics-dir needs prometheus_client: pip install 'ecdysis_async[metrics]'")


def name_metrics_files() -> None:
    """Let prometheus_client name its files as the anchor wants. Call it before the application is imported."""
    id, pid = find_metrics_id(), os.getpid()
    if id is None or DIRECTORY_KEY not in os.environ or importlib.util.find_spec("prometheus_client") is None:
        return
    from prometheus_client import values

    def find_identifier() -> str | int:
        # What the application forks has files of its own: two processes must not write to one.
        return id if os.getpid() == pid else os.getpid()

    # The documented way to name them after something else than the process.
    values.ValueClass = values.MultiProcessValue(find_identifier)  # type: ignore[no-untyped-call]
