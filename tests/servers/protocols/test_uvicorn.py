"""Which of uvicorn's protocols can move, and that all of them know their connection."""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import inspect
import itertools
import operator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ecdysis_async._accepting.asyncio_servers import create_server
from ecdysis_async._connections.connection import Connection, current_connection
from ecdysis_async.servers._protocols.http import UnreadOnly
from ecdysis_async.servers._protocols.uvicorn import SEAMS, UvicornTransfer, _Cycle, choose_transfer, follow_switch
from tests.accepting.serving import LOCALHOST, Echo, a_client, an_open_plane, answers


@pytest.mark.parametrize(
    ("name", "attribute"), [(name, attribute) for name, attributes in SEAMS.items() for attribute in attributes]
)
def test_uvicorn_has_what_is_used_of_it(name: str, attribute: str) -> None:
    module, _, class_name = name.partition(":")
    kind = getattr(importlib.import_module(module), class_name)
    assigned = inspect.unwrap(kind.__init__).__code__.co_names
    assert hasattr(kind, attribute) or attribute in assigned, (
        f"uvicorn {uvicorn.__version__} has no {attribute} in {name} any more: see SEAMS, and what uses it"
    )
    if attribute == "run_asgi":
        assert inspect.iscoroutinefunction(kind.run_asgi), "a request's task runs something else: see UvicornRequests"


@pytest.mark.parametrize("known", [H11Protocol, HttpToolsProtocol])
def test_protocols_of_which_it_is_known_whether_they_are_idle_move_between_requests(
    known: type[asyncio.Protocol],
) -> None:
    assert type(choose_transfer(Echo, follow_switch(known))) is UvicornTransfer


def test_other_protocols_move_until_they_are_read_from() -> None:
    assert follow_switch(Echo) is Echo
    assert type(choose_transfer(Echo, Echo)) is UnreadOnly


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_protocol_handles_its_data_in_the_context_of_its_connection() -> None:
    seen: list[Connection | None] = []

    class Asks(Echo):
        def data_received(self, data: bytes) -> None:
            seen.append(current_connection.get())
            super().data_received(data)

    async with an_open_plane() as plane:
        server = await create_server(plane, Asks, LOCALHOST, 0)
        server.adapt(keeps_context=True)
        with a_client(server) as first, a_client(server) as second:
            assert await answers(first)
            assert await answers(second)
            assert seen == list(plane.tracker.connections())
    assert current_connection not in contextvars.copy_context()


@pytest.mark.parametrize("add", [operator.add, itertools.chain, lambda headers, others: list(headers) + others])
@pytest.mark.parametrize("is_last", [True, False])
def test_the_goodbye_is_among_the_headers_however_uvicorn_adds_them(add: Any, *, is_last: bool) -> None:
    cycle = SimpleNamespace(scope={}, default_headers=[(b"server", b"uvicorn")])
    _Cycle(None, cycle).say_goodbye_if(lambda: is_last)
    goodbye = [(b"connection", b"close")] if is_last else []
    assert list(add(cycle.default_headers, [(b"age", b"0")])) == [(b"server", b"uvicorn"), *goodbye, (b"age", b"0")]
