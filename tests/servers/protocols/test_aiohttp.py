"""Where aiohttp's parser is taken for empty, a fresh one reads on as it would have."""

from __future__ import annotations

import asyncio
import importlib
import random

import aiohttp
import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser

from ecdysis_async.servers._protocols.aiohttp import SEAMS, FollowedParser, missing_seams
from tests.scenarios.transfer.test_cuts import make_requests


class Reader:
    """What is read of a stream: each request's path and body."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.parser = FollowedParser(HttpRequestParser(BaseProtocol(loop), loop, 2**16))
        self.found: list[tuple[str, object]] = []

    def feed(self, data: bytes) -> None:
        messages, _, _ = self.parser.feed_data(data)
        for message, body in messages:
            self.parser.message_consumed()
            self.found.append((message.path, body))

    async def read(self) -> list[tuple[str, bytes]]:
        return [(path, await body.read()) for path, body in self.found]  # type: ignore[attr-defined]


@pytest.mark.backends("asyncio")
async def test_nothing_is_left_in_a_parser_that_is_taken_for_empty() -> None:
    source = random.Random("aiohttp")
    empty = 0
    for _ in range(20):
        requests = make_requests(source, ("GET", "length", "chunks"))
        # Heads that nearly end, and an empty line that nobody asked for.
        stream = b"".join(requests) + source.choice((b"", b"\r\n")) + b"GET /last HTTP/1.1\r\nHost: a\r\nA: \r\n\r\n"
        whole = Reader()
        whole.feed(stream)
        expected = await whole.read()
        assert len(expected) == len(requests) + 1
        for cut in range(len(stream) + 1):
            before, after = Reader(), Reader()
            pieces = sorted(source.randint(0, cut) for _ in range(2))
            for start, end in zip([0, *pieces], [*pieces, cut], strict=True):
                before.feed(stream[start:end])
            if before.parser.is_empty:
                empty += 1
                after.feed(stream[cut:])
                assert [*await before.read(), *await after.read()] == expected
    # After each that has no body, or one in chunks; and before all.
    assert empty > 20 * 3


@pytest.mark.parametrize(
    ("name", "attribute"), [(name, attribute) for name, attributes in SEAMS.items() for attribute in attributes]
)
def test_aiohttp_has_what_is_used_of_it(name: str, attribute: str) -> None:
    module, _, class_name = name.partition(":")
    kind = getattr(importlib.import_module(module), class_name)
    assigned = kind.__init__.__code__.co_names
    assert hasattr(kind, attribute) or attribute in assigned, (
        f"aiohttp {aiohttp.__version__} has no {attribute} in {name} any more: see SEAMS, and what uses it"
    )


def test_an_application_that_makes_its_requests_otherwise_is_told_apart() -> None:
    with pytest.warns(DeprecationWarning, match="discouraged"):

        class Own(web.Application):
            def _make_request(self, *arguments: object) -> web.Request:
                raise NotImplementedError

    assert missing_seams(web.Application()) == []
    assert missing_seams(Own()) == ["Application._make_request(_cls=)"]
