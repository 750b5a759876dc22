"""What an anchor answers at its health address besides /live and /ready: metrics, and a page for people."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from ecdysis_async._management import status_page
from ecdysis_async._management.exposition import CONTENT_TYPE, write
from ecdysis_async._management.health import Page
from ecdysis_async._system.threads import run_in_thread

from . import status
from .config import HealthPage
from .metrics import describe_metrics
from .sockets import HeldSockets
from .state import AnchorState

__all__ = ["make_pages"]


def make_pages(state: AnchorState, sockets: HeldSockets) -> dict[str, Callable[[], Awaitable[Page]]]:
    """Return what makes each page that is configured, by its path."""
    pages: dict[str, Callable[[], Awaitable[Page]]] = {}
    if HealthPage.METRICS in state.config.pages:
        pages["/metrics"] = functools.partial(_show_metrics, state, sockets)
    if HealthPage.STATUS in state.config.pages:
        pages["/"] = status_page.show
        pages["/status.json"] = functools.partial(_show_status, state, sockets)
    return pages


async def _show_metrics(state: AnchorState, sockets: HeldSockets) -> Page:
    text = write(describe_metrics(state, sockets.service.entries))
    if state.metrics_dir is not None:
        text += await run_in_thread(functools.partial(_add_up, state.metrics_dir))
    return Page(CONTENT_TYPE, text)


def _add_up(directory: str) -> str:
    """Return the metrics of the application, of all workers together. It blocks."""
    # Imported here: an anchor that is not asked for them stays small.
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=directory)  # type: ignore[no-untyped-call]
    return generate_latest(registry).decode()


async def _show_status(state: AnchorState, sockets: HeldSockets) -> Page:
    return status_page.describe(status.describe_status(state, sockets.service.entries), state.ledger.recent)
