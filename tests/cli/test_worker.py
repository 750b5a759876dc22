"""Which server a worker chooses for what it is told to serve."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
from aiohttp import web

from ecdysis_async._config.options import Options
from ecdysis_async.cli.worker import _choose_server
from ecdysis_async.errors import StartupError


async def asgi(scope: Any, receive: Any, send: Any) -> None: ...


async def main(ecdysis: Any) -> None: ...


def missing(*names: str) -> Callable[[str], ModuleSpec | None]:
    find_spec = importlib.util.find_spec
    return lambda name: None if name in names else find_spec(name)


@pytest.mark.parametrize(
    ("app", "options", "expected"),
    [
        (asgi, {}, "uvicorn"),
        (asgi, {"loop": "trio"}, "hypercorn"),
        (asgi, {"server": "hypercorn"}, "hypercorn"),
        (main, {}, "main"),
        (main, {"server": "websockets"}, "websockets"),
        (main, {"loop": "trio"}, "main"),
        (web.Application(), {}, "aiohttp"),
        (lambda environ, start_response: None, {"server_options": {"interface": "wsgi"}}, "uvicorn"),
    ],
)
def test_the_server_fits_the_application(app: Any, options: dict[str, Any], expected: str) -> None:
    assert _choose_server(app, Options("a:b", **options)) == expected


def test_hypercorn_serves_where_uvicorn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", missing("uvicorn"))
    assert _choose_server(asgi, Options("a:b")) == "hypercorn"


@pytest.mark.parametrize(
    ("app", "options", "expected"),
    [
        (asgi, {"server": "aiohttp"}, "a:b is an ASGI application, which aiohttp does not serve"),
        (main, {"server": "uvicorn"}, "a:b is an async function of the Ecdysis, which uvicorn does not serve"),
        (asgi, {"server": "uvicorn", "loop": "trio"}, "uvicorn does not run on trio"),
        (web.Application(), {"loop": "trio"}, "aiohttp does not run on trio"),
        (Options, {"server": "websockets"}, "a:b is no handler of WebSockets"),
        (asgi, {}, "a:b needs uvicorn, which is not installed: pip install 'ecdysis_async[uvicorn]'"),
    ],
)
def test_what_does_not_fit(app: Any, options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "not installed" in expected:
        monkeypatch.setattr(importlib.util, "find_spec", missing("uvicorn", "hypercorn"))
    with pytest.raises(StartupError) as caught:
        _choose_server(app, Options("a:b", **options))
    assert expected in str(caught.value)
