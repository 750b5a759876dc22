"""Reads the server's own options, which ``--server-option NAME=VALUE`` passes on, as the types that it wants."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ecdysis_async._config.options import OptionError

__all__ = ["Wanted", "of_attributes", "of_function", "read"]

ON = ("true", "yes", "on", "1")
OFF = ("false", "no", "off", "0")

Wanted = Mapping[str, Any]
"""The type of each option that a server has, by its name."""


# What other servers call an option, in the order of SERVERS: what is right for one works with all that have it.
SERVERS = ("uvicorn", "hypercorn", "aiohttp", "websockets")
SYNONYMS: tuple[tuple[str | None, ...], ...] = (
    ("timeout_keep_alive", "keep_alive_timeout", "keepalive_timeout", None),
    ("ws_max_size", "websocket_max_message_size", None, "max_size"),
    ("ws_ping_interval", "websocket_ping_interval", None, "ping_interval"),
    ("ws_ping_timeout", None, None, "ping_timeout"),
    ("h11_max_incomplete_event_size", "h11_max_incomplete_size", None, None),
    ("date_header", "include_date_header", None, None),
    ("server_header", "include_server_header", None, None),
)

# The types that an annotation names by itself, if others of the same function cannot be looked up.
_PLAIN = {"bool": bool, "int": int, "float": float, "str": str}


def of_function(function: Callable[..., Any]) -> Wanted:
    """Return the options that a function takes by name."""
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # a name that is imported for type checkers only
        hints = {}
    wanted = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self":
            name_of_type = getattr(parameter.annotation, "__name__", parameter.annotation)
            plain = _PLAIN.get(str(name_of_type), _type_of(parameter.default))
            wanted[name] = hints.get(name, plain)
    return wanted


def of_attributes(kind: type) -> Wanted:
    """Return the options that a class has as its attributes."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:
        hints = {}
    return {
        name: hints.get(name, _type_of(value))
        for name, value in vars(kind).items()
        if not name.startswith("_") and not callable(value) and not isinstance(value, classmethod | staticmethod)
    }


def read(server: str, wanted: Wanted, given: Mapping[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """Read what was given for a server.

    Args:
        server: its name.
        wanted: the options that it has.
        given: the values, by name: text, or what TOML holds.
        ours: the options that ``ecdysis run`` sets itself.

    Raises:
        OptionError: there is no such option, ``ecdysis run`` sets it, or its value is of another type.
    """
    values = {}
    for said, value in given.items():
        name = said if said in wanted else _find_synonym(said, server) or said
        if name in ours:
            raise OptionError(f"server option {name}: `ecdysis run` sees to that itself: see `ecdysis run --help`")
        if name not in wanted:
            near = difflib.get_close_matches(name, [each for each in wanted if each not in ours], 1)
            hint = "".join(f": did you mean {each!r}?" for each in near)
            raise OptionError(f"{server} has no option {name!r}" + hint)
        values[name] = _convert(name, value, wanted[name])
    return values


def _find_synonym(name: str, server: str) -> str | None:
    """Return what a server calls an option of another one."""
    return next((names[SERVERS.index(server)] for names in SYNONYMS if name in names), None)


def _type_of(default: Any) -> Any:
    return type(default) if isinstance(default, bool | int | float | str | list) else Any


def _convert(name: str, value: Any, hint: Any) -> Any:
    if not isinstance(value, str):
        # TOML has types; what its lists hold is not checked.
        return value
    choices = _alternatives(hint)
    literals = [each for choice in choices if typing.get_origin(choice) is typing.Literal for each in choice.__args__]
    if value in literals:
        return value
    for choice in choices:
        if (made := _make(value, choice)) is not _UNFIT:
            return made
    if literals:
        raise OptionError(f"server option {name}: it is one of {', '.join(map(str, literals))}, and not {value!r}")
    kinds = " or ".join(_NAMES[each] for each in choices if each in _NAMES)
    if not kinds:
        raise OptionError(f"server option {name} cannot be given as text: serve by a main of your own")
    raise OptionError(f"server option {name}: {kinds} is needed, and not {value!r}")


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        found = [each for alternative in typing.get_args(hint) for each in _alternatives(alternative)]
        # A type that takes any text comes last.
        return sorted(found, key=lambda each: each in (str, Any))
    return [list if typing.get_origin(hint) in (list, Sequence) else hint]


_UNFIT = object()
_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", list: "a list"}


def _make(value: str, kind: Any) -> Any:
    text = value.lower()
    try:
        if kind is type(None):
            return None if text == "none" else _UNFIT
        if kind is bool:
            return True if text in ON else False if text in OFF else _UNFIT
        if kind is int or kind is float:
            return kind(value)
        if kind is list:
            return [each.strip() for each in value.split(",")]
        if kind is str or kind is Any:
            return value
    except ValueError:
        pass
    return _UNFIT
