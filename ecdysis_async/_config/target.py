"""What ``ecdysis run`` serves: found by its name, made by its factory, and looked at for what it is.

Nothing here knows a server, and nothing is imported but the application itself.
"""

from __future__ import annotations

import difflib
import enum
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from ecdysis_async.errors import StartupError

__all__ = ["Kind", "find_kind", "load"]


class Kind(enum.Enum):
    """What can be served."""

    ASGI = "an ASGI application"
    AIOHTTP = "an aiohttp application"
    MAIN = "an async function of the Ecdysis"


async def load(target: str, *, app_dir: str = ".", factory: bool = False) -> Any:
    """Import a target, ``module:attribute``, and make the application where it is a factory.

    Args:
        target: attributes may be nested, as in ``main:api.app``.
        app_dir: goes first on ``sys.path``.
        factory: call it, and await what it returns where that is to be awaited.

    Raises:
        StartupError: there is no such module, or no such attribute; the text says where it was looked for.
        Exception: whatever the application's own code raised.
    """
    # Nothing else has to run yet, and what is imported has to be imported here.
    try:
        directory = os.path.abspath(app_dir)  # noqa: ASYNC240
    except FileNotFoundError as error:
        raise StartupError(
            f"{target} cannot be loaded: the working directory is gone; start the service in one that is there, or say "
            "an absolute --app-dir"
        ) from error
    if directory not in sys.path:
        sys.path.insert(0, directory)
    module, _, attribute = target.partition(":")
    found = _find_attribute(_import(module, directory), module, attribute)
    if not factory:
        return found
    if not callable(found):
        raise StartupError(f"{target} is no factory but {_name_type(found)}: leave --factory out")
    try:
        made = found()
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
        where = "its own package" if error.name != module.partition(".")[0] else f"{directory}, or on sys.path"
        near = difflib.get_close_matches(error.name, _modules_of(directory), 1)
        raise StartupError(
            f"there is no module {error.name!r} in {where}"
            + "".join(f": did you mean {each!r}?" for each in near)
            + ("" if near else ": is --app-dir right?")
        ) from None


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
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return [name.removesuffix(".py") for name in names if name.endswith(".py") or "." not in name]


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
