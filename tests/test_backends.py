"""Each async test really runs on the three loops; plain tests get their names."""

from __future__ import annotations

import asyncio

import anyio
import pytest
import pytest_asyncio
import trio
import uvloop

from tests.conftest import BACKENDS


def running_backend() -> str:
    """Name the loop that runs this very code."""
    if trio.lowlevel.in_trio_run():
        return "trio"
    return "uvloop" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "asyncio"


async def test_an_async_test_runs_on_the_backend_it_is_told(backend: str) -> None:
    assert running_backend() == backend


async def test_an_async_test_needs_no_fixture(request: pytest.FixtureRequest) -> None:
    with anyio.fail_after(60):
        await anyio.lowlevel.checkpoint()
    assert running_backend() == request.getfixturevalue("backend")


@pytest.mark.backends("trio")
async def test_the_marker_chooses_backends() -> None:
    assert running_backend() == "trio"


@pytest_asyncio.fixture
async def loop_of_a_fixture() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


@pytest.mark.backends("asyncio", "uvloop")
async def test_an_async_fixture_shares_the_loop(loop_of_a_fixture: asyncio.AbstractEventLoop) -> None:
    assert loop_of_a_fixture is asyncio.get_running_loop()


def test_a_plain_test_gets_a_name_only(backend: str) -> None:
    assert backend in BACKENDS
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()
