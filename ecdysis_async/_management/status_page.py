"""The live page of a service: one file without anything from elsewhere, which asks for ``status.json`` each second.

It is read-only, and shows nothing that might be secret: no environment, no command line, no request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecdysis_async._system.pages import read

from .health import Page

__all__ = ["SHOWN", "describe", "show"]

# What of a service's status the page may know.
SHOWN = (
    "generation",
    "pid",
    "state",
    "uptime",
    "connections",
    "listeners",
    "waiting_for",
    "restart",
    "draining",
    "workers",
)


# What of each process among them: the requests that it has are none of it.
SHOWN_OF_PROCESS = (
    "slot",
    "generation",
    "pid",
    "state",
    "uptime",
    "connections",
    "jobs",
    "ends_in",
    "requests",
    "rss",
    "silence",
)


def describe(status: Mapping[str, Any], restarts: Sequence[Mapping[str, Any]]) -> Page:
    """Return what the page asks for each second.

    Args:
        status: of the service, all of it.
        restarts: the last ones in short (``Ledger.recent``).
    """
    shown = {name: status[name] for name in SHOWN}
    for name in ("draining", "workers"):
        if shown[name] is not None:
            shown[name] = [{key: each[key] for key in SHOWN_OF_PROCESS if key in each} for each in shown[name]]
    return Page("application/json", json.dumps({**shown, "restarts": restarts}))


async def show() -> Page:
    """Return the page."""
    return _read()


@functools.cache
def _read() -> Page:
    text = read(Path(__file__).with_name("status_page.html"))
    sources = {
        name: " ".join(_hash(part) for part in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for name, tag in (("script-src", "script"), ("style-src", "style"))
    }
    # Nothing but what stands in the page itself is run, and nobody else is asked for anything.
    policy = "; ".join(
        [
            "default-src 'none'",
            *(f"{name} {hashes}" for name, hashes in sources.items()),
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return Page("text/html; charset=utf-8", text, headers)


def _hash(part: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
