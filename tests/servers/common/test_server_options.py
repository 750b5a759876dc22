"""Options of a server itself: read as the types that it wants, and refused with a hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import hypercorn.config
import pytest
import uvicorn
from aiohttp import web
from websockets.asyncio.server import serve as serve_websockets

from ecdysis_async._config.options import OptionError
from ecdysis_async.servers._common import server_options


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


def test_options_of_the_servers_there_are() -> None:
    for function, name, kind in (
        (uvicorn.Config.__init__, "timeout_keep_alive", int),
        (web.RequestHandler.__init__, "keepalive_timeout", float),
        (serve_websockets, "compression", str | None),
    ):
        assert server_options.of_function(function)[name] == kind
    assert server_options.of_attributes(hypercorn.config.Config)["keep_alive_timeout"] is float
