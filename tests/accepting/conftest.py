"""Fixtures of the tests of asyncio's servers: what the loop reports, and TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Any

import pytest
import trustme


@pytest.fixture
def reports() -> Iterator[list[dict[str, Any]]]:
    """Collect what the loop's exception handler is told; filled by `collect`."""
    contexts: list[dict[str, Any]] = []
    yield contexts
    contexts.clear()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context
