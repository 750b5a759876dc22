"""The options of one process: the command line goes before the environment, and that before the file."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ecdysis_async._management.control_path import prepare_directory
from ecdysis_async._sockets.addresses import Address, Internet, Unix, parse_address
from ecdysis_async._system.launch import read_env_file

from .foreign import advise, explain_gunicorn_config
from .options import (
    CONFIG,
    DEFAULT_HOST,
    DEFAULT_PORT,
    OPTIONS,
    SHORTHANDS,
    Option,
    OptionError,
    Options,
    Shape,
    is_short,
)
from .parsing import did_you_mean

__all__ = ["find_control_path", "gather", "read_variables"]

logger = logging.getLogger("ecdysis_async")

_BY_NAME = {each.name: each for each in (*OPTIONS, *SHORTHANDS)}

# What a place says of an option that it does not name. None is a value: `--hang-timeout off` says it.
_UNSAID = object()

_WHERE = ("bind", *(each.name for each in SHORTHANDS))


def gather(given: Mapping[str, Any], environment: Mapping[str, str]) -> Options:
    """Put the options together: the command line goes before the environment, and that before the file.

    What an env file has counts as the environment. It blocks on files.

    Args:
        given: what the command line says, by the names of the options, as text; ``config`` and the shorthands too.
        environment: the variables of this process.

    Raises:
        OptionError: an option that could not work, or that there is none of; the text says where it was read.
    """
    command_line = _Source(lambda option: option.metavar if option.name == "target" else f"--{option.key}", given)
    variables = _read_environment(environment)
    config = _first((command_line, variables), CONFIG)
    file = _Source(str, {}) if config is _UNSAID else _read_config(config)
    env_file = _first((command_line, variables, file), _BY_NAME["env_file"])
    if env_file is not _UNSAID:
        variables = _read_environment({**environment, **read_variables(env_file)})
    sources = (command_line, variables, file)
    values = {option.name: _first(sources, option) for option in OPTIONS}
    if values["target"] is _UNSAID:
        raise OptionError("TARGET is missing: what to serve, as MODULE:ATTRIBUTE, such as main:app")
    values["bind"] = _read_addresses(sources)
    said = [source.read(_BY_NAME["server_options"]) for source in reversed(sources)]
    values["server_options"] = {name: value for each in said if each is not _UNSAID for name, value in each.items()}
    return Options(**{name: value for name, value in values.items() if value is not _UNSAID})


def read_variables(env_file: str) -> dict[str, str]:
    """Read an env file.

    Raises:
        OptionError: it cannot be read, or the package that reads such files is not installed.
    """
    try:
        return read_env_file(env_file)
    except Exception as error:
        raise OptionError(str(error)) from error


def find_control_path(options: Options) -> str | None:
    """Return where the control socket can be; None where there shall be none, or cannot be one. It may block."""
    path = options.control_path
    if path is None or options.control != "auto":
        return path
    # A directory that cannot be written to is no reason not to serve where nobody has asked for this socket.
    obstacles = []
    for each in options.default_control_paths:
        if not is_short(each):
            obstacles.append(f"{each} is too long for a socket")
            continue
        try:
            prepare_directory(each)
        except OSError as error:
            obstacles.append(f"{os.path.dirname(each)}: {error.strerror or error}")
        else:
            if os.access(os.path.dirname(each), os.W_OK | os.X_OK):
                return each
            obstacles.append(f"{os.path.dirname(each)} cannot be written to")
    logger.warning("there is no control socket, say where by --control PATH: %s", "; ".join(obstacles))
    return None


@dataclass(frozen=True, slots=True)
class _Source:
    """One place that options are read from.

    Attributes:
        label: what an option is called there.
        values: what it says.
    """

    label: Callable[[Option], str]
    values: Mapping[str, Any]

    def read(self, option: Option) -> Any:
        """Return an option's value, or _UNSAID where this place does not say."""
        value = self.values.get(option.name)
        if value is None or (option.shape is Shape.MANY and value == ()):
            return _UNSAID
        try:
            return option.parse(value)
        except ValueError as error:
            raise OptionError(f"{self.label(option)}: {option.explain(error)}") from None


def _first(sources: Iterable[_Source], option: Option) -> Any:
    """Return what the first place says that says anything."""
    return next((value for each in sources if (value := each.read(option)) is not _UNSAID), _UNSAID)


def _read_environment(environment: Mapping[str, str]) -> _Source:
    names: dict[str, str] = {}
    for option in (*OPTIONS, *SHORTHANDS):
        # A variable that is set to nothing is as good as none: that is how they are taken back in unit files.
        name = next((each for each in option.all_variables if environment.get(each)), None)
        if name is not None:
            names[option.name] = name
    values = {name: environment[variable] for name, variable in names.items()}
    return _Source(lambda option: f"the variable {names[option.name]}", values)


def _read_config(path: str) -> _Source:
    if path.endswith(".py"):
        raise OptionError(explain_gunicorn_config(path))
    # Imported here, because most services have no such file.
    import tomllib

    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    # ValueError: no TOML, no UTF-8, or a number of thousands of digits. RecursionError: nested deeper than is followed.
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"the configuration file {path} cannot be read: {error}") from None
    known = {name: each for name, each in _BY_NAME.items() if each is not CONFIG}
    values = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            if (advice := advise(name)) is not None:
                raise OptionError(f"{path}: {key!r} is an option of another server's; here: {advice}")
            near = difflib.get_close_matches(name, known, 1)
            raise OptionError(f"{path}: there is no option {key!r}" + did_you_mean(known[each].key for each in near))
        values[name] = value
    return _Source(lambda option: f"{path}: {option.key}", values)


def _read_addresses(sources: Sequence[_Source]) -> Any:
    """Find where to listen: what the first place that says anything of it says."""
    for index, source in enumerate(sources):
        said = {name for name in _WHERE if source.read(_BY_NAME[name]) is not _UNSAID}
        if not said:
            continue
        addresses = list(source.read(_BY_NAME["bind"])) if "bind" in said else []
        if said & {"host", "port"}:
            # One of the two may be said further down, as in `ECDYSIS_HOST=0.0.0.0 ecdysis run main:app --port 80`.
            host, port = (_first(sources[index:], _BY_NAME[name]) for name in ("host", "port"))
            host = DEFAULT_HOST if host is _UNSAID else host.removeprefix("[").removesuffix("]")
            addresses.append(_parsed(source, "port", Internet(host, DEFAULT_PORT if port is _UNSAID else port)))
        if "uds" in said:
            addresses.append(Unix(source.read(_BY_NAME["uds"])))
        if "fd" in said:
            addresses.append(_parsed(source, "fd", f"fd://{source.read(_BY_NAME['fd'])}"))
        return tuple(dict.fromkeys(addresses))
    return _UNSAID


def _parsed(source: _Source, name: str, address: Address | str) -> Address:
    try:
        return parse_address(str(address))
    except ValueError as error:
        raise OptionError(f"{source.label(_BY_NAME[name])}: {error}") from None
