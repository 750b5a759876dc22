"""The plane of this process is found by those on its own loop, and by nobody else."""

from __future__ import annotations

import anyio.to_thread
import pytest

from ecdysis_async._accepting.data_plane import DataPlane, activate, active, deactivate
from ecdysis_async._accepting.gated_socket import SocketAcceptor
from ecdysis_async._sockets.addresses import Internet
from tests.planes import a_plane


async def test_a_plane_is_found_by_itself() -> None:
    async with a_plane() as plane:
        with pytest.raises(LookupError, match="async with Ecdysis"):
            active()
        activate(plane)
        try:
            assert active() is plane
            assert SocketAcceptor(plane.registry.obtain(Internet("127.0.0.1", 0))).plane is plane
            with pytest.raises(RuntimeError, match="already"):
                activate(DataPlane(plane.registry, plane.gate, plane.tracker))
        finally:
            deactivate()
        with pytest.raises(LookupError, match="async with Ecdysis"):
            active()
        deactivate()


async def test_a_plane_is_not_found_from_elsewhere() -> None:
    async def look() -> DataPlane:
        return active()

    async with a_plane() as plane:
        activate(plane)
        try:
            with pytest.raises(LookupError, match="another event loop"):
                await anyio.to_thread.run_sync(active)
            with pytest.raises(LookupError, match="another event loop"):
                await anyio.to_thread.run_sync(anyio.run, look)
        finally:
            deactivate()
