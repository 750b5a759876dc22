"""What the value of an option may be. Each function here reads text, or what TOML holds, and takes its own results too.

What cannot be read is a :class:`ValueError`, whose text says what would be right.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ecdysis_async._sockets.addresses import Address, parse_address

__all__ = [
    "OFF",
    "did_you_mean",
    "find_group",
    "number_of",
    "one_of",
    "optional",
    "or_off",
    "parse_addresses",
    "parse_any_text",
    "parse_cert_reqs",
    "parse_directory",
    "parse_file",
    "parse_group",
    "parse_mode",
    "parse_one_address",
    "parse_path",
    "parse_seconds",
    "parse_settings",
    "parse_size",
    "parse_some_seconds",
    "parse_switch",
    "parse_target",
    "parse_text",
    "several",
]

OFF = ("off", "none", "no", "false", "0", "")
ON = ("on", "yes", "true", "1")

# The kernel's gid_t, whose last number means "as it is" (chown(2)).
MAX_GROUP = 2**32 - 2


def parse_text(value: Any) -> str:
    """Read text of at least one character, without NUL."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"text is needed, not {value!r}")
    return value


def parse_any_text(value: Any) -> str:
    """Read text, which may be empty."""
    return "" if value == "" else parse_text(value)


def optional(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let None mean that nothing is said."""

    def parse_optional(value: Any) -> Any:
        return None if value is None else parse(value)

    return parse_optional


def parse_file(value: Any) -> str:
    """Read the path of a file that is there."""
    path = parse_text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path!r} here (the working directory is {os.getcwd()})")
    return path


def parse_directory(value: Any) -> str:
    """Read the path of a directory that is there."""
    path = parse_text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not os.path.isdir(path):
        raise ValueError(f"there is no directory {path!r} here (the working directory is {os.getcwd()})")
    return path


def parse_command(value: Any) -> tuple[str, ...]:
    """Read a command line: text as a shell would take it apart, or its words."""
    try:
        words = shlex.split(value) if isinstance(value, str) else [parse_any_text(each) for each in value]
    except TypeError:
        raise ValueError(f"a command line is text, or a list of words, not {value!r}") from None
    if not words:
        raise ValueError("a command line names a program")
    return tuple(words)


def parse_path(value: Any) -> str:
    """Read a path, whatever is there."""
    return parse_text(os.fspath(value) if isinstance(value, os.PathLike) else value)


def parse_seconds(value: Any) -> float:
    """Read a finite number of seconds, 0 or more."""
    try:
        seconds = float(value) if not isinstance(value, bool) else math.nan
    # OverflowError: a whole number beyond what a float can hold.
    except (OverflowError, TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"a number of seconds is needed, 0 or more, not {value!r}")
    return seconds


def parse_some_seconds(value: Any) -> float:
    """Read a finite number of seconds above 0."""
    if (seconds := parse_seconds(value)) == 0:
        raise ValueError("a number of seconds above 0 is needed")
    return seconds


def number_of(least: int, of_what: str) -> Callable[[Any], int]:
    """Return what reads a whole number, ``least`` or more."""

    def parse(value: Any) -> int:
        number = int(value) if isinstance(value, int | str) and re.fullmatch(r"\d+", str(value)) else least - 1
        if number < least:
            raise ValueError(f"a number of {of_what} is needed, {least} or more, not {value!r}")
        return number

    return parse


def or_off(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let ``off`` (in TOML ``false``) and 0 mean that there is no limit."""

    def parse_or_off(value: Any) -> Any:
        if value is None or str(value).lower() in OFF:
            return None
        return parse(value)

    return parse_or_off


def parse_size(value: Any) -> int:
    """Read a size in bytes, such as ``512M``; a unit is a power of 1024."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", str(value), re.IGNORECASE)
    if found is None or isinstance(value, bool) or not 0 < float(found[1]) < math.inf:
        raise ValueError(f"a size is needed, such as 512M or 1G, not {value!r}")
    return int(float(found[1]) * units[found[2].upper()])


def parse_mode(value: Any) -> int:
    """Read permissions, as octal digits."""
    # An integer is what was read before, or TOML's 0o660.
    text = value if isinstance(value, str) else oct(value) if isinstance(value, int) else ""
    found = re.fullmatch(r"(?:0o)?([0-7]{1,4})", text)
    if found is None or isinstance(value, bool):
        raise ValueError(f"permissions are octal digits, such as 660, not {value!r}")
    return int(found[1], 8)


def parse_group(value: Any) -> str:
    """Read the name, or the number, of a group that there is."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text:
        raise ValueError(f"a group is a name or a number, not {value!r}")
    find_group(text)
    return text


def find_group(text: str) -> int:
    """Return the number of a group.

    Raises:
        ValueError: there is none of this name.
    """
    # Imported here, because there are platforms without it, and without control sockets.
    import grp

    if text.isdecimal():
        if int(text) > MAX_GROUP:
            raise ValueError(f"there is no group {text}: a number up to {MAX_GROUP} is possible")
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {text!r}: getent group lists those that there are") from None


def parse_switch(value: Any) -> bool:
    """Read whether something is on."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ON:
        return True
    if isinstance(value, str) and value.lower() in OFF:
        return False
    raise ValueError(f"on or off is needed, not {value!r}")


def one_of(*choices: str) -> Callable[[Any], str]:
    """Return what reads one of these words, in any case."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            near = difflib.get_close_matches(str(value).lower(), choices, 1)
            raise ValueError(f"it is one of {', '.join(choices)}, and not {value!r}" + did_you_mean(near))
        return value.lower()

    return parse


def parse_cert_reqs(value: Any) -> str:
    """Read whether clients need a certificate; also as the numbers of the module ssl, as uvicorn has it."""
    names = ("none", "optional", "required")
    if str(value) in ("0", "1", "2"):
        return names[int(value)]
    return one_of(*names)(value)


def parse_one_address(value: Any) -> Address:
    """Read an address; one that was read before is taken as it is."""
    return parse_address(value) if isinstance(value, str) else _instance(value, Address)


def _instance(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"text is needed, not {value!r}")  # noqa: TRY004 - one kind of error, for whoever reads it
    return value


def several(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what reads a list: of text, separated by blanks or commas, or of items. Each counts once."""

    def parse_all(value: Any) -> tuple[Any, ...]:
        values = [each for each in re.split(r"[\s,]+", value) if each] if isinstance(value, str) else value
        if not isinstance(values, Sequence):
            raise ValueError(f"a list is needed, not {value!r}")  # noqa: TRY004 - as above
        return tuple(dict.fromkeys(parse(each) for each in values))

    return parse_all


def parse_addresses(value: Any) -> tuple[Address, ...]:
    """Read at least one address."""
    addresses: tuple[Address, ...] = several(parse_one_address)(value)
    if not addresses:
        raise ValueError("at least one address is needed")
    return addresses


def parse_settings(value: Any) -> Mapping[str, Any]:
    """Read NAME=VALUE, several of them, or a table."""
    if isinstance(value, Mapping):
        return MappingProxyType({name.replace("-", "_"): each for name, each in value.items()})
    words = shlex.split(value) if isinstance(value, str) else value
    if not isinstance(words, Sequence):
        raise ValueError(f"a table, or a list of NAME=VALUE, is needed, not {value!r}")  # noqa: TRY004 - as above
    settings = {}
    for each in words:
        name, equals, text = str(each).partition("=")
        if not name or not equals:
            # What it is may be a password.
            raise ValueError("write NAME=VALUE, such as timeout_keep_alive=20")
        settings[name.strip().replace("-", "_")] = text
    return MappingProxyType(settings)


def parse_target(value: Any) -> str:
    """Read ``MODULE:ATTRIBUTE``; a path of a file is answered with what is meant."""
    text = parse_text(value)
    if text.endswith("()"):
        raise ValueError(f"TARGET is MODULE:ATTRIBUTE, and not {text!r}: did you mean {text[:-2]} --factory?")
    module, colon, attribute = text.partition(":")
    is_path = module.endswith(".py") or "/" in module
    name = module.removesuffix(".py").strip("./").replace("/", ".")
    if not colon or is_path or not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        hint = f"{name}:{attribute or 'app'}"
        is_good = re.fullmatch(r"[\w.]+:[\w.]+", hint) and hint != text
        raise ValueError(
            f"TARGET is MODULE:ATTRIBUTE, and not {text!r}"
            + (f": did you mean {hint}?" if is_good else ", such as main:app")
        )
    return text


def did_you_mean(names: Iterable[str]) -> str:
    """Ask for each of these names whether it was meant."""
    return "".join(f": did you mean {name!r}?" for name in names)
