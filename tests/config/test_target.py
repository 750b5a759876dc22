"""What ``ecdysis run`` is told to serve: found, made, and looked at; and what is said where that fails."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from ecdysis_async._config.target import Kind, call_factory, find_kind, load, require_source
from ecdysis_async.errors import StartupError

Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write the program whose target is loaded: the module ``service_to_load``, in the working directory."""
    monkeypatch.chdir(tmp_path)
    path, modules = sys.path[:], set(sys.modules)

    def write(text: str) -> None:
        (tmp_path / "service_to_load.py").write_text(text)

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("service_to_load"):
            del sys.modules[name]


def get(target: str, **options: Any) -> Any:
    name = f"service_to_load:{target}"
    is_factory = options.pop("factory", False)
    found = load(name, **options)
    return asyncio.run(call_factory(found, name)) if is_factory else found


def test_attributes_may_be_nested(write: Write) -> None:
    write("class api:\n class inner:\n  app = 'found'")
    assert get("api.inner.app") == "found"


@pytest.mark.parametrize("definition", ["def make(): return 'made'", "async def make(): return 'made'"])
def test_a_factory_is_called_and_awaited(definition: str, write: Write) -> None:
    write(definition)
    assert get("make", factory=True) == "made"


def test_the_application_directory_goes_first(write: Write, tmp_path: Path) -> None:
    write("app = 'here'")
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "service_to_load.py").write_text("app = 'there'")
    assert get("app", app_dir="release") == "there"


@pytest.mark.parametrize(
    ("text", "target", "factory", "expected"),
    [
        ("app = 1", "ap", False, "service_to_load has no attribute 'ap': did you mean 'app'?"),
        ("class a: b = 1", "a.c", False, "service_to_load:a has no attribute 'c'"),
        ("app = 1", "app", True, "service_to_load:app is no factory but an int: leave --factory out"),
        ("def app(x): pass", "app", True, "service_to_load:app cannot be called without arguments"),
    ],
)
def test_what_is_not_there(text: str, target: str, factory: bool, expected: str, write: Write) -> None:
    write(text)
    with pytest.raises(StartupError) as caught:
        get(target, factory=factory)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("service_to_lod:app", "there is no module 'service_to_lod' in {here}, or on sys.path: did you mean 'service_"),
        ("xyzzy:app", "there is no module 'xyzzy' in {here}, or on sys.path: is --app-dir right?"),
        ("service_to_load.inner:app", "there is no module 'service_to_load.inner' in its own package"),
    ],
)
def test_no_such_module(target: str, expected: str, write: Write, tmp_path: Path) -> None:
    write("")
    with pytest.raises(StartupError) as caught:
        load(target)
    assert expected.format(here=tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import a_module_that_is_missing", ModuleNotFoundError),
        ("from service_to_load import nothing", ImportError),
        ("1 / 0", ZeroDivisionError),
        ("def f(:", SyntaxError),
        ("raise SystemExit('no database')", SystemExit),
    ],
)
def test_the_applications_own_errors_are_its_own(text: str, error: type[BaseException], write: Write) -> None:
    write(text)
    with pytest.raises(error):
        get("app")


def test_an_error_in_a_factory_is_its_own(write: Write) -> None:
    write("def make(): return len(3)")
    with pytest.raises(TypeError, match="has no len"):
        get("make", factory=True)


async def asgi(scope: Any, receive: Any, send: Any) -> None: ...


class Asgi:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class Asgi2:
    def __init__(self, scope: Any) -> None: ...


async def main(ecdysis: Any) -> None: ...


def test_kinds() -> None:
    assert find_kind(asgi, "a:b") is find_kind(Asgi(), "a:b") is find_kind(Asgi2, "a:b") is Kind.ASGI
    assert find_kind(main, "a:b") is Kind.MAIN
    assert find_kind(web.Application(), "a:b") is Kind.AIOHTTP


def make() -> None: ...


def wsgi(environ: Any, start_response: Any) -> None: ...


@pytest.mark.parametrize(
    ("app", "expected"),
    [
        ({}, "a:b is a dict, and cannot be served"),
        (make, "if it returns the application, add --factory"),
        (wsgi, "a:b is a WSGI application"),
    ],
)
def test_what_cannot_be_served(app: Any, expected: str) -> None:
    with pytest.raises(StartupError) as caught:
        find_kind(app, "a:b")
    assert expected in str(caught.value)


SOURCES = {
    "names": "import os\nfrom json import loads as read\nif os: app = 1\nasync def main(): ...\n",
    "stars": "from json import *\n",
    "made": "globals()['app'] = 1\n",
    "broken": "def\n",
}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("names:app", None),
        ("names:app.nested", None),
        ("names:main", None),
        ("names:read", None),
        ("names:ap", "names has no attribute 'ap': did you mean 'app'?"),
        ("stars:app", None),
        ("made:app", None),
        # The process that starts it hears of that.
        ("broken:app", None),
        ("nmaes:app", "there is no module 'nmaes'"),
        ("package:inner", None),
        ("package:app", "package has no attribute 'app'"),
        ("package.inner:app", None),
        ("package.outer:app", "there is no module 'package.outer' in its own package"),
        ("names.inner:app", "names.py is no package"),
        ("json:loads", None),
    ],
)
def test_a_target_is_looked_for_without_being_imported(target: str, expected: str | None, tmp_path: Path) -> None:
    for name, text in SOURCES.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise AssertionError")
    (tmp_path / "package" / "inner.py").write_text("raise AssertionError; app = 1")
    if expected is None:
        require_source(target, str(tmp_path))
        return
    with pytest.raises(StartupError) as caught:
        require_source(target, str(tmp_path))
    assert expected in str(caught.value)
