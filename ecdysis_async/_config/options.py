"""The options of ``ecdysis run``: what there is, where each is read from, and what it may be.

One table, the fields of :class:`Options`, is the source of the command line, of the environment's ``ECDYSIS_*`` and of
the configuration file. Nothing here knows a server, a loop or the command line's library.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import hashlib
import logging
import math
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ecdysis_async._management.control_path import default_directory, locate, prepare_directory
from ecdysis_async._sockets.addresses import Address, Internet, Unix, parse_address
from ecdysis_async._sockets.entry import BACKLOG
from ecdysis_async._system.launch import read_env_file
from ecdysis_async.errors import StartupError

__all__ = ["OFF", "Option", "OptionError", "Options", "Shape", "command_line_options", "find_control_path", "gather"]

logger = logging.getLogger("ecdysis_async")

PREFIX = "ECDYSIS_"

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
DEFAULT_BIND = (Internet(DEFAULT_HOST, DEFAULT_PORT),)

OFF = ("off", "none", "no", "false", "0", "")
ON = ("on", "yes", "true", "1")

# What a path of a Unix socket has room for (registry.MAX_UNIX_PATH), less the name of a lock file next to it.
MAX_CONTROL_PATH = 100


class OptionError(StartupError, ValueError):
    """An option that could not work; the text says which one, where it was read, and what would be right."""


class Shape(enum.Enum):
    """How an option is written on the command line."""

    VALUE = enum.auto()
    SWITCH = enum.auto()  # --name and --no-name
    MANY = enum.auto()  # may be given several times


@dataclass(frozen=True, slots=True)
class Option:
    """One option, wherever it is read from.

    Attributes:
        name: of the field; on the command line with hyphens, in the environment in capitals.
        help: one sentence.
        parse: makes the value of text, or of what TOML holds; takes its own results as well, and raises ValueError.
        metavar: what stands for the value.
        shape: how it is written.
        aliases: further names on the command line.
        variables: further names in the environment, as other servers have them.
    """

    name: str
    help: str
    parse: Callable[[Any], Any]
    metavar: str = "TEXT"
    shape: Shape = Shape.VALUE
    aliases: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name on the command line, and in a configuration file."""
        return self.name.replace("_", "-")

    @property
    def all_variables(self) -> tuple[str, ...]:
        """Its names in the environment, the most particular one first."""
        return (PREFIX + self.name.upper(), *self.variables)


# What values may be: each reads text, or what TOML holds, and raises ValueError with what would be right.


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"text is needed, not {value!r}")
    return value


def _any_text(value: Any) -> str:
    return "" if value == "" else _text(value)


def _optional(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def parse_optional(value: Any) -> Any:
        return None if value is None else parse(value)

    return parse_optional


def _file(value: Any) -> str:
    path = _text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path!r} here (the working directory is {os.getcwd()})")
    return path


def _directory(value: Any) -> str:
    path = _text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not os.path.isdir(path):
        raise ValueError(f"there is no directory {path!r} here (the working directory is {os.getcwd()})")
    return path


def _path(value: Any) -> str:
    return _text(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _seconds(value: Any) -> float:
    try:
        seconds = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"a number of seconds is needed, 0 or more, not {value!r}")
    return seconds


def _some_seconds(value: Any) -> float:
    if (seconds := _seconds(value)) == 0:
        raise ValueError("a number of seconds above 0 is needed")
    return seconds


def _number(least: int, of_what: str) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = int(value) if isinstance(value, int | str) and re.fullmatch(r"\d+", str(value)) else least - 1
        if number < least:
            raise ValueError(f"a number of {of_what} is needed, {least} or more, not {value!r}")
        return number

    return parse


def _or_off(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let ``off`` (in TOML ``false``) and 0 mean that there is no limit."""

    def parse_or_off(value: Any) -> Any:
        if value is None or str(value).lower() in OFF:
            return None
        return parse(value)

    return parse_or_off


def _size(value: Any) -> int:
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", str(value), re.IGNORECASE)
    if found is None or isinstance(value, bool) or float(found[1]) == 0:
        raise ValueError(f"a size is needed, such as 512M or 1G, not {value!r}")
    return int(float(found[1]) * units[found[2].upper()])


def _mode(value: Any) -> int:
    # An integer is what was read before, or TOML's 0o660.
    text = value if isinstance(value, str) else oct(value) if isinstance(value, int) else ""
    found = re.fullmatch(r"(?:0o)?([0-7]{1,4})", text)
    if found is None or isinstance(value, bool):
        raise ValueError(f"permissions are octal digits, such as 660, not {value!r}")
    return int(found[1], 8)


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ON:
        return True
    if isinstance(value, str) and value.lower() in OFF:
        return False
    raise ValueError(f"on or off is needed, not {value!r}")


def _choice(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            near = difflib.get_close_matches(str(value).lower(), choices, 1)
            raise ValueError(f"it is one of {', '.join(choices)}, and not {value!r}" + _did_you_mean(near))
        return value.lower()

    return parse


def _cert_reqs(value: Any) -> str:
    names = ("none", "optional", "required")
    # As the numbers of the module ssl, which is how uvicorn has it.
    if str(value) in ("0", "1", "2"):
        return names[int(value)]
    return _choice(*names)(value)


def _address(value: Any) -> Address:
    return parse_address(value) if isinstance(value, str) else _instance(value, Address)


def _instance(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"text is needed, not {value!r}")  # noqa: TRY004 - one kind of error, for whoever reads it
    return value


def _several(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def parse_all(value: Any) -> tuple[Any, ...]:
        # In the environment, and by those who have but one.
        values = [each for each in re.split(r"[\s,]+", value) if each] if isinstance(value, str) else value
        if not isinstance(values, Sequence):
            raise ValueError(f"a list is needed, not {value!r}")  # noqa: TRY004 - as above
        return tuple(dict.fromkeys(parse(each) for each in values))

    return parse_all


def _addresses(value: Any) -> tuple[Address, ...]:
    addresses: tuple[Address, ...] = _several(_address)(value)
    if not addresses:
        raise ValueError("at least one address is needed")
    return addresses


def _settings(value: Any) -> Mapping[str, Any]:
    """Read NAME=VALUE, several of them, or a table."""
    if isinstance(value, Mapping):
        return MappingProxyType({name.replace("-", "_"): each for name, each in value.items()})
    settings = {}
    for each in shlex.split(value) if isinstance(value, str) else value:
        name, equals, text = str(each).partition("=")
        if not name or not equals:
            raise ValueError(f"write NAME=VALUE, not {each!r}")
        settings[name.strip().replace("-", "_")] = text
    return MappingProxyType(settings)


def _target(value: Any) -> str:
    text = _text(value)
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


def _option(default: Any, parse: Callable[[Any], Any], help: str, **more: Any) -> Any:
    is_optional = default is None
    metadata = {"option": {"parse": _optional(parse) if is_optional else parse, "help": help, **more}}
    # A mapping, also one that cannot be changed, is no default to Python 3.11.
    given: Any = {"default_factory": lambda: default} if isinstance(default, Mapping) else {"default": default}
    return dataclasses.field(**given, metadata=metadata, repr=not more.get("is_secret"))


@dataclass(frozen=True)
class Options:
    """All that ``ecdysis run`` is told. Times are in seconds.

    Raises:
        OptionError: an option that could not work.
    """

    target: str = dataclasses.field(
        metadata={"option": {"parse": _target, "help": "What to serve, as MODULE:ATTRIBUTE.", "metavar": "TARGET"}}
    )
    config: str | None = _option(
        None, _file, "A TOML file of these options; the command line and the environment win.", metavar="PATH"
    )
    factory: bool = _option(False, _switch, "TARGET is called, and returns what to serve.", shape=Shape.SWITCH)
    app_dir: str = _option(".", _directory, "Where modules are looked for first.", metavar="DIRECTORY")
    bind: tuple[Address, ...] = _option(
        DEFAULT_BIND,
        _addresses,
        "Where to listen: HOST:PORT, [IPV6]:PORT, unix:PATH or fd://NAME-OR-NUMBER; several times for several.",
        metavar="ADDRESS",
        shape=Shape.MANY,
        aliases=("-b",),
    )
    unix_mode: int | None = _option(None, _mode, "Permissions of new Unix sockets; else the umask's.", metavar="OCTAL")
    backlog: int = _option(
        BACKLOG, _number(1, "connections"), "How many connections may wait to be accepted.", metavar="N"
    )
    workers: int = _option(
        1,
        _number(1, "workers"),
        "How many processes serve.",
        metavar="N",
        aliases=("-w",),
        variables=("WEB_CONCURRENCY",),
    )
    server: str = _option(
        "auto",
        _choice("auto", "uvicorn", "hypercorn", "aiohttp", "websockets", "main"),
        "What serves TARGET: auto looks at it. main: TARGET is an async function of the Ecdysis, and serves itself.",
        metavar="NAME",
    )
    loop: str = _option(
        "auto",
        _choice("auto", "asyncio", "uvloop", "trio"),
        "The event loop: auto is uvloop where it is installed.",
        metavar="NAME",
    )
    control: str = _option(
        "auto",
        _text,
        "The control socket: a path, a name in the default directory, or off.",
        metavar="PATH",
    )
    pid_file: str | None = _option(None, _path, "Names the process to signal.", metavar="PATH", aliases=("--pid", "-p"))
    ready_timeout: float = _option(60.0, _some_seconds, "How long a new release may take to start.", metavar="SECONDS")
    drain_timeout: float = _option(
        30.0,
        _seconds,
        "How long connections of an old release may take to finish.",
        metavar="SECONDS",
        aliases=("--graceful-timeout",),
        variables=("ECDYSIS_GRACEFUL_TIMEOUT",),
    )
    transfer: bool = _option(
        True, _switch, "Move idle connections to the new release instead of closing them.", shape=Shape.SWITCH
    )
    probation: float = _option(
        5.0, _seconds, "How long a new release serves before the restart is final.", metavar="SECONDS"
    )
    hang_timeout: float | None = _option(
        None, _or_off(_seconds), "Replace a worker whose loop does not turn for this long.", metavar="SECONDS"
    )
    max_requests: int | None = _option(
        None, _or_off(_number(1, "requests")), "Replace a worker after so many requests.", metavar="N"
    )
    max_requests_jitter: int = _option(
        0, _number(0, "requests"), "Add a random number up to this to max-requests.", metavar="N"
    )
    max_rss: int | None = _option(
        None, _or_off(_size), "Replace a worker that uses more memory than this, such as 512M.", metavar="SIZE"
    )
    lame_duck: float = _option(
        0.0, _seconds, "On SIGTERM go on serving for so long, while /ready says 503.", metavar="SECONDS"
    )
    health_bind: Address | None = _option(  # noqa: RUF009 - as the others, whose types ruff sees through
        None, _address, "Where /live and /ready answer for load balancers.", metavar="ADDRESS"
    )
    takeover: str | None = _option(
        None, _path, "Take the sockets over from the service with this control socket.", metavar="PATH"
    )
    reload: bool = _option(False, _switch, "Restart whenever a file of the program is saved.", shape=Shape.SWITCH)
    reload_dirs: tuple[str, ...] = _option(
        (),
        _several(_directory),
        "What reload watches, instead of app-dir.",
        metavar="DIRECTORY",
        shape=Shape.MANY,
        aliases=("--reload-dir",),
        variables=("ECDYSIS_RELOAD_DIR",),
    )
    env_file: str | None = _option(
        None, _file, "KEY=VALUE lines for the environment, read again at each restart.", metavar="PATH"
    )
    log_level: str | None = _option(
        None,
        _choice("critical", "error", "warning", "info", "debug", "trace"),
        "How much is logged; info, unless log-config says.",
        metavar="NAME",
    )
    log_config: str | None = _option(None, _file, "Logging set up by an ini, .json or .yaml file.", metavar="PATH")
    access_log: bool = _option(True, _switch, "Log each request, where the server does.", shape=Shape.SWITCH)
    proxy_headers: bool = _option(
        True, _switch, "Believe X-Forwarded-Proto and -For of trusted proxies.", shape=Shape.SWITCH
    )
    forwarded_allow_ips: str | None = _option(
        None,
        _any_text,
        "Which proxies are trusted: addresses, networks, or *; else 127.0.0.1 and ::1.",
        metavar="LIST",
        variables=("FORWARDED_ALLOW_IPS",),
    )
    root_path: str = _option("", _any_text, "Where a proxy has mounted the application.", metavar="PATH")
    certfile: str | None = _option(
        None, _file, "Serve TLS with this certificate chain.", metavar="PATH", aliases=("--ssl-certfile",)
    )
    keyfile: str | None = _option(
        None, _file, "The certificate's key; else it is in certfile.", metavar="PATH", aliases=("--ssl-keyfile",)
    )
    keyfile_password: str | None = _option(
        None,
        _any_text,
        "What the key is encrypted with; better given as a variable.",
        aliases=("--ssl-keyfile-password",),
        is_secret=True,
    )
    ca_certs: str | None = _option(
        None,
        _file,
        "Authorities that certificates of clients are checked by.",
        metavar="PATH",
        aliases=("--ssl-ca-certs",),
    )
    cert_reqs: str = _option(
        "none",
        _cert_reqs,
        "Whether clients need a certificate: none, optional or required.",
        metavar="NAME",
        aliases=("--ssl-cert-reqs",),
    )
    ciphers: str | None = _option(None, _text, "TLS ciphers, as OpenSSL lists them.", aliases=("--ssl-ciphers",))
    server_options: Mapping[str, Any] = _option(
        (),
        _settings,
        "An option of the server itself, such as timeout_keep_alive=20; several times for several.",
        metavar="NAME=VALUE",
        shape=Shape.MANY,
        aliases=("--server-option",),
        variables=("ECDYSIS_SERVER_OPTION",),
    )

    def __post_init__(self) -> None:
        for option in OPTIONS:
            try:
                value = option.parse(getattr(self, option.name))
            except ValueError as error:
                raise OptionError(f"{option.name}: {error}") from None
            object.__setattr__(self, option.name, value)
        if self.keyfile and not self.certfile:
            raise OptionError("keyfile needs a certfile: the certificate that the key belongs to")
        if self.cert_reqs != "none" and not self.ca_certs:
            raise OptionError(f"cert_reqs {self.cert_reqs} needs ca_certs: who has signed the clients' certificates")
        if self.ca_certs and not self.certfile:
            raise OptionError("ca_certs needs a certfile: without TLS no client shows a certificate")
        if self.max_requests_jitter and self.max_requests is None:
            raise OptionError("max_requests_jitter needs max_requests, which it adds to")

    @property
    def control_path(self) -> str | None:
        """Where the control socket is, or None where there shall be none."""
        if self.control.lower() in OFF:
            return None
        if self.control != "auto":
            return locate(self.control)
        # The same in all generations, and another one for each service: told by what it serves, and where.
        name = re.sub(r"[^\w.@-]+", "-", f"{self.target} {self.bind[0]}").strip("-")
        path = os.path.join(default_directory(), f"{name}.sock")
        if len(os.fsencode(path)) > MAX_CONTROL_PATH:
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            path = os.path.join(default_directory(), f"{digest}.sock")
        return os.path.abspath(path)

    @property
    def is_tls(self) -> bool:
        """Whether TLS is served."""
        return self.certfile is not None


def find_control_path(options: Options) -> str | None:
    """Return where the control socket can be, or None where there shall be none, or cannot be one. It may block."""
    path = options.control_path
    if path is not None and options.control == "auto":
        # Nobody has asked for it: a home that cannot be written to is no reason not to serve.
        try:
            prepare_directory(path)
        except OSError as error:
            logger.warning("there is no control socket, say where by --control PATH: %s", error.strerror or error)
            return None
    return path


OPTIONS: tuple[Option, ...] = tuple(
    Option(name=field.name, **{name: value for name, value in field.metadata["option"].items() if name != "is_secret"})
    for field in dataclasses.fields(Options)
)

# The ways of uvicorn to say where to listen; each adds to `bind`.
SHORTHANDS: tuple[Option, ...] = (
    Option("host", f"Listen on this address or name; {DEFAULT_HOST} if only --port is given.", _any_text, "HOST"),
    Option("port", f"Listen on this port; {DEFAULT_PORT} if only --host is given.", _number(0, "a port"), "PORT"),
    Option("uds", "Listen on a Unix socket: short for --bind unix:PATH.", _path, "PATH"),
    Option("fd", "Listen on a socket that was passed: short for --bind fd://NAME-OR-NUMBER.", lambda v: v, "NAME"),
)

CONFIG = next(each for each in OPTIONS if each.name == "config")

# What a place says of an option that it does not name. Not None, which is a value: `--hang-timeout off` is said.
_UNSAID = object()

_WHERE = ("bind", *(each.name for each in SHORTHANDS))


def command_line_options() -> tuple[Option, ...]:
    """Return what the command line takes besides TARGET, in the order of its help."""
    options = [each for each in OPTIONS if each.name not in ("target", "config")]
    position = [each.name for each in options].index("bind") + 1
    return (CONFIG, *options[:position], *SHORTHANDS, *options[position:])


def gather(given: Mapping[str, Any], environment: Mapping[str, str]) -> Options:
    """Put the options together: the command line goes before the environment, and that before the file.

    What an env file has counts as the environment. It blocks on files.

    Args:
        given: what the command line says, by the names of the options, as text; ``config`` and the shorthands too.
        environment: the variables of this process.

    Raises:
        OptionError: an option that could not work, or that there is none of; the text says where it was read.
    """
    command_line = _Source(lambda option: f"--{option.key}", given)
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


_BY_NAME = {each.name: each for each in (*OPTIONS, *SHORTHANDS)}


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
            raise OptionError(f"{self.label(option)}: {error}") from None


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
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"the configuration file {path} cannot be read: {error}") from None
    known = {name: each for name, each in _BY_NAME.items() if each is not CONFIG}
    values = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise OptionError(f"{path}: there is no option {key!r}" + _did_you_mean(known[each].key for each in near))
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


def _did_you_mean(names: Iterable[str]) -> str:
    return "".join(f": did you mean {name!r}?" for name in names)
