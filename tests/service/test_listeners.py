"""Sockets and servers belong to a generation, and to the loops that can serve them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ecdysis_async import Ecdysis

ASKED_FOR: dict[str, Callable[[Ecdysis], object]] = {
    "listen_tcp": lambda ecdysis: ecdysis.listen_tcp("127.0.0.1", 0),
    "listen_unix": lambda ecdysis: ecdysis.listen_unix("@nobody"),
    "listen_seqpacket": lambda ecdysis: ecdysis.listen_seqpacket("@nobody"),
    "listen_fd": lambda ecdysis: ecdysis.listen_fd("web"),
    "bind_udp": lambda ecdysis: ecdysis.bind_udp("127.0.0.1", 0),
    "bind_unix_datagram": lambda ecdysis: ecdysis.bind_unix_datagram("@nobody"),
}


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_socket_is_asked_for_within_the_block(name: str) -> None:
    with pytest.raises(RuntimeError, match="not entered"):
        ASKED_FOR[name](Ecdysis())


@pytest.mark.backends("trio")
async def test_servers_of_asyncio_are_refused_elsewhere(backend: str) -> None:
    async with Ecdysis(restart_signals=(), stop_signals=()) as ecdysis:
        for name in ("start_server", "start_unix_server", "create_server", "create_unix_server"):
            with pytest.raises(RuntimeError, match=r"serve\(\)"):
                await getattr(ecdysis, name)(None)
        with pytest.raises(RuntimeError, match=r"serve\(\)"):
            await ecdysis.create_datagram_endpoint(None)  # type: ignore[arg-type]
        await ecdysis.ready()


async def test_each_call_returns_the_socket_of_its_kind(backend: str) -> None:
    async with Ecdysis(restart_signals=(), stop_signals=()) as ecdysis:
        tcp = ecdysis.listen_tcp("127.0.0.1", 0, name="web")
        assert ecdysis.bind_udp("127.0.0.1", 0).getsockname()[1]
        await ecdysis.ready()
        assert tcp.getsockname()[1]
