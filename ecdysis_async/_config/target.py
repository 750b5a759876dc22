"""What ``ecdysis run`` serves: found by its name, made by its factory, and looked at for what it is.

Nothing here knows a server, and nothing is imported but the application itself.
"""

from __future__ import annotations

import ast
import difflib
import enum
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from typing import Any

from ecdysis_async.errors import StartupError

__all__ = ["Kind", "call_factory", "find_kind", "load", "require_source"]


class Kind(enum.Enum):
    """What can be served."""

    ASGI = "an ASGI application"
    AIOHTTP = "an aiohttp application"
    MAIN = "an async function of the Ecdysis"


def load(target: str, *, app_dir: str = ".") -> Any:
    """Import a target, ``module:attribute``. Call it where no loop runs: an application may run one at its import.

    Args:
        target: attributes may be nested, as in ``main:api.app``.
        app_dir: goes first on ``sys.path``.

    Raises:
        StartupError: there is no such module, or no such attribute; the text says where it was looked for.
        Exception: whatever the application's own code raised.
    """
    try:
        directory = os.path.abspath(app_dir)
    except FileNotFoundError as error:
        raise StartupError(
            f"{target} cannot be loaded: the working directory is gone; start the service in one that is there, or say "
            "an absolute --app-dir"
        ) from error
    if directory not in sys.path:
        sys.path.insert(0, directory)
    module, _, attribute = target.partition(":")
    return _find_attribute(_import(module, directory), module, attribute)


async def call_factory(factory: Any, target: str) -> Any:
    """Call a factory, and await what it returns where that is to be awaited.

    Raises:
        StartupError: it is no factory.
        Exception: whatever the application's own code raised.
    """
    if not callable(factory):
        raise StartupError(f"{target} is no factory but {_name_type(factory)}: leave --factory out")
    try:
        made = factory()
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise StartupError(f"{target} cannot be called without arguments, as a factory is: {error}") from None
        raise
    return await made if inspect.isawaitable(made) else made


def find_kind(app: Any, target: str) -> Kind:
    """Say what an application is.

    Raises:
        StartupError: it is nothing that can be served; the text says what may be meant.
    """
    # The module is loaded where somebody has made an application of it.
    web = sys.modules.get("aiohttp.web")
    if web is not None and isinstance(app, web.Application):
        return Kind.AIOHTTP
    if not callable(app):
        raise StartupError(
            f"{target} is {_name_type(app)}, and cannot be served: name an ASGI application, an aiohttp application, "
            "or an `async def main(ecdysis)`"
        )
    names = _required_parameters(app)
    if inspect.iscoroutinefunction(app) and names is not None and len(names) == 1:
        return Kind.MAIN
    if names == [] and not inspect.isclass(app):
        raise StartupError(f"{target} is a function without arguments: if it returns the application, add --factory")
    if names == ["environ", "start_response"]:
        raise StartupError(
            f"{target} is a WSGI application, which blocks: wrap it (a2wsgi), or let uvicorn do so by "
            "--server-option interface=wsgi"
        )
    return Kind.ASGI


def _import(module: str, directory: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Another missing module is one that the application asks for.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise _explain_missing_module(error.name, module, directory) from None


def _explain_missing_module(name: str, module: str, directory: str) -> StartupError:
    where = "its own package" if name != module.partition(".")[0] else f"{directory}, or on sys.path"
    near = difflib.get_close_matches(name, _modules_of(directory), 1)
    return StartupError(
        f"there is no module {name!r} in {where}"
        + "".join(f": did you mean {each!r}?" for each in near)
        + ("" if near else ": is --app-dir right?")
    )


def require_source(target: str, app_dir: str) -> None:
    """See that there is such a target, as far as its source tells: nothing of it is imported.

    Raises:
        StartupError: there is no such module, or nothing in it has the attribute's name.
    """
    module, _, attribute = target.partition(":")
    directory = os.path.abspath(app_dir)
    path: Sequence[str] | None = [directory, os.getcwd(), *sys.path]
    name, origin = "", None
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, path)
        if spec is None and "." not in name:
            # A package that is installed as editable may be found by a finder of its own.
            spec = importlib.util.find_spec(name)
        if spec is None:
            raise _explain_missing_module(name, module, directory)
        path = spec.submodule_search_locations
        if path is None and name != module:
            raise StartupError(f"there is no module {module!r}: {spec.origin} is no package")
        origin = spec.origin
    first = attribute.partition(".")[0]
    names = _names_in(origin)
    # A module of a package is its attribute once it was imported.
    modules = {name.removesuffix(".py") for each in path or () for name in _list(each)}
    if names is None or first in names | modules:
        return
    near = difflib.get_close_matches(first, [each for each in names if not each.startswith("_")], 1)
    raise StartupError(
        f"{module} has no attribute {first!r}"
        + "".join(f": did you mean {each!r}?" for each in near)
        + f" (it is {origin})"
    )


def _names_in(file: str | None) -> set[str] | None:
    """Return all names that a module may have; None where its source does not tell.

    Names inside of functions and classes are among them: a name too many does no harm here.
    """
    if file is None or not file.endswith(".py"):
        return None
    try:
        with open(file, "rb") as source:
            nodes = list(ast.walk(ast.parse(source.read())))
    except (OSError, SyntaxError, ValueError):
        return None
    names = set()
    for node in nodes:
        match node:
            case ast.Name(id=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.alias(name=name, asname=alias):
                names.add(alias or name.partition(".")[0])
    # Whatever is made by these, its name stands nowhere.
    return None if names & {"*", "__getattr__", "globals", "setattr", "exec", "vars"} else names


def _find_attribute(module: Any, name: str, attribute: str) -> Any:
    found, path = module, name
    for separator, part in zip(":" + "." * attribute.count("."), attribute.split("."), strict=True):
        try:
            found = getattr(found, part)
        except AttributeError:
            public = [each for each in dir(found) if not each.startswith("_")]
            near = difflib.get_close_matches(part, public, 1)
            raise StartupError(
                f"{path} has no attribute {part!r}"
                + "".join(f": did you mean {each!r}?" for each in near)
                + f" (it is {getattr(module, '__file__', None) or 'a package without a file'})"
            ) from None
        path += separator + part
    return found


def _modules_of(directory: str) -> list[str]:
    return [name.removesuffix(".py") for name in _list(directory) if name.endswith(".py") or "." not in name]


def _list(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _required_parameters(app: Callable[..., Any]) -> list[str] | None:
    """Name the positional parameters that have no default; None where that cannot be known."""
    try:
        parameters = inspect.signature(app).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in parameters if each.kind in positional and each.default is each.empty]


def _name_type(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
