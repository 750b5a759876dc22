"""Which server a worker chooses for what it is told to serve, and how options for that server are read."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any, Literal

import hypercorn.config
import pytest
import uvicorn
from aiohttp import web
from websockets.asyncio.server import serve as serve_websockets

from ecdysis_async._config.options import OptionError, Options
from ecdysis_async.cli.worker import _choose_server
from ecdysis_async.errors import StartupError
from ecdysis_async.servers._common import server_options
from ecdysis_async.servers._common.forwarded import Trusted


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


def server(  # type: ignore[no-untyped-def]
    app: object,
    *,
    port: int = 80,
    keep_alive: float | None = 5,
    deflate: bool = True,
    parser: Literal["fast", "safe"] = "safe",
    names: list[str] | None = None,
    text: str | None = None,
    hook: Callable[[], None] | None = None,
    bare=3,  # noqa: ANN001
) -> None: ...


WANTED = server_options.of_function(server)


def read(**given: Any) -> dict[str, Any]:
    return server_options.read("server", WANTED, given, {"app", "port"})


def test_options_have_the_types_of_the_server() -> None:
    assert read(keep_alive="2.5", deflate="off", parser="fast", names="a, b", text="x", bare="7") == {
        "keep_alive": 2.5,
        "deflate": False,
        "parser": "fast",
        "names": ["a", "b"],
        "text": "x",
        "bare": 7,
    }
    assert read(keep_alive="none", text="none") == {"keep_alive": None, "text": None}
    assert read(keep_alive=3, names=["a"]) == {"keep_alive": 3, "names": ["a"]}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("port", "3", "`ecdysis run` sees to that itself"),
        ("keep_alve", "3", "server has no option 'keep_alve': did you mean 'keep_alive'?"),
        ("keep_alive", "x", "a number is needed, and not 'x'"),
        ("deflate", "x", "true or false is needed"),
        ("parser", "x", "it is one of fast, safe, and not 'x'"),
        ("hook", "x", "cannot be given as text"),
        ("bare", "x", "a whole number is needed"),
    ],
)
def test_options_that_no_server_has(name: str, value: str, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(**{name: value})
    assert expected in str(caught.value)


def test_trusted_proxies() -> None:
    trusted = Trusted("10.0.0.0/8, ::1,proxy")
    assert "10.1.2.3" in trusted and "::1" in trusted and "proxy" in trusted
    assert "127.0.0.1" not in trusted and "unix" not in trusted
    assert "127.0.0.1" in Trusted(None) and "192.0.2.7" not in Trusted(None)
    assert "anybody" in Trusted("*")
    # The last one that is no proxy of ours is the client: what stands before it, the client may have written.
    assert trusted.find_client("1.1.1.1, 192.0.2.7, 10.1.2.3") == "192.0.2.7"
    assert trusted.find_client("10.0.0.1, 10.0.0.2") == "10.0.0.1"
    assert trusted.find_client(" ") is None


def test_options_of_the_servers_there_are() -> None:
    for function, name, kind in (
        (uvicorn.Config.__init__, "timeout_keep_alive", int),
        (web.RequestHandler.__init__, "keepalive_timeout", float),
        (serve_websockets, "compression", str | None),
    ):
        assert server_options.of_function(function)[name] == kind
    assert server_options.of_attributes(hypercorn.config.Config)["keep_alive_timeout"] is float
