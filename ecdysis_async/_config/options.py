"""The options of ``ecdysis run``: a table of what there is, how each is written, and what it is without being said.

One table, the fields of :class:`Options`, is the source of the command line, of the environment's ``ECDYSIS_*`` and of
the configuration file. Nothing here knows a server, a loop or the command line's library.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypedDict

from ecdysis_async._management.control_access import ControlAccess
from ecdysis_async._management.control_path import default_directories, locate
from ecdysis_async._sockets.addresses import Address, Internet
from ecdysis_async._sockets.entry import BACKLOG
from ecdysis_async.errors import StartupError
from ecdysis_async.settings import MAX_DRAINING, WebSocketClose

from .parsing import (
    OFF,
    find_group,
    number_of,
    one_of,
    optional,
    or_off,
    parse_addresses,
    parse_any_text,
    parse_cert_reqs,
    parse_command,
    parse_directory,
    parse_file,
    parse_group,
    parse_mode,
    parse_one_address,
    parse_path,
    parse_seconds,
    parse_settings,
    parse_size,
    parse_some_seconds,
    parse_switch,
    parse_target,
    parse_text,
    several,
)

__all__ = [
    "CONFIG",
    "DEFAULT_BIND",
    "OPTIONS",
    "SHORTHANDS",
    "Option",
    "OptionError",
    "Options",
    "Shape",
    "command_line_options",
    "is_short",
]

PREFIX = "ECDYSIS_"

# Permissions of Unix sockets where a group was named, and no mode.
GROUP_MODE = 0o660

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
DEFAULT_BIND = (Internet(DEFAULT_HOST, DEFAULT_PORT),)

# What a path of a Unix socket has room for (registry.MAX_UNIX_PATH), less the name of a lock file next to it.
MAX_CONTROL_PATH = 100


def is_short(path: str) -> bool:
    """Say whether a control socket can have this path."""
    return len(os.fsencode(path)) <= MAX_CONTROL_PATH


class UnixPermissions(TypedDict):
    """Permissions of Unix sockets, as ``listen`` takes them; None: those of the umask, or of the process.

    Attributes:
        mode: of the path.
        group: its number.
    """

    mode: int | None
    group: int | None


class OptionError(StartupError, ValueError):
    """An option that could not work; the text says which one, where it was read, and what would be right."""

    is_usage = True


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
        is_secret: whether its value is shown to nobody.
    """

    name: str
    help: str
    parse: Callable[[Any], Any]
    metavar: str = "TEXT"
    shape: Shape = Shape.VALUE
    aliases: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    is_secret: bool = False

    @property
    def key(self) -> str:
        """Its name on the command line, and in a configuration file."""
        return self.name.replace("_", "-")

    def explain(self, error: ValueError) -> str:
        """Say why a value could not be read; that of a secret is not quoted."""
        return "text is needed" if self.is_secret else str(error)

    @property
    def all_variables(self) -> tuple[str, ...]:
        """Its names in the environment, the most particular one first."""
        return (PREFIX + self.name.upper(), *self.variables)


def _option(default: Any, parse: Callable[[Any], Any], help: str, **more: Any) -> Any:
    is_optional = default is None
    metadata = {"option": {"parse": optional(parse) if is_optional else parse, "help": help, **more}}
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
        metadata={"option": {"parse": parse_target, "help": "What to serve, as MODULE:ATTRIBUTE.", "metavar": "TARGET"}}
    )
    config: str | None = _option(
        None,
        parse_file,
        "A TOML file of these options; the command line and the environment win.",
        metavar="PATH",
        aliases=("-c",),
    )
    factory: bool = _option(False, parse_switch, "TARGET is called, and returns what to serve.", shape=Shape.SWITCH)
    app_dir: str = _option(".", parse_directory, "Where modules are looked for first.", metavar="DIRECTORY")
    bind: tuple[Address, ...] = _option(
        DEFAULT_BIND,
        parse_addresses,
        "Where to listen: HOST:PORT, [IPV6]:PORT, unix:PATH or fd://NAME-OR-NUMBER; several times for several. "
        "*:PORT is every address of IPv4, [::]:PORT every one of IPv6, and those only.",
        metavar="ADDRESS",
        shape=Shape.MANY,
        aliases=("-b",),
    )
    unix_mode: int | None = _option(
        None, parse_mode, "Permissions of Unix sockets; else the umask's, or 660 with unix-group.", metavar="OCTAL"
    )
    unix_group: str | None = _option(
        None,
        parse_group,
        "The group of Unix sockets, such as a proxy's: a name or a number.",
        metavar="GROUP",
    )
    backlog: int = _option(
        BACKLOG, number_of(1, "connections"), "How many connections may wait to be accepted.", metavar="N"
    )
    workers: int = _option(
        1,
        number_of(1, "workers"),
        "How many processes serve.",
        metavar="N",
        aliases=("-w",),
        variables=("WEB_CONCURRENCY",),
    )
    server: str = _option(
        "auto",
        one_of("auto", "uvicorn", "hypercorn", "aiohttp", "websockets", "main"),
        "What serves TARGET: auto looks at it. main: TARGET is an async function of the Ecdysis, and serves itself.",
        metavar="NAME",
    )
    loop: str = _option(
        "auto",
        one_of("auto", "asyncio", "uvloop", "trio"),
        "The event loop: auto is uvloop where it is installed.",
        metavar="NAME",
    )
    control: str = _option(
        "auto",
        parse_text,
        "The control socket: a path, a name in the default directory, or off.",
        metavar="PATH",
    )
    control_mode: int | None = _option(
        None, parse_mode, "Permissions of the control socket; else 600, or 660 with control-group.", metavar="OCTAL"
    )
    control_group: str | None = _option(
        None, parse_group, "The group whose members may command the service too: a name or a number.", metavar="GROUP"
    )
    pid_file: str | None = _option(
        None, parse_path, "Names the process to signal.", metavar="PATH", aliases=("--pid", "-p")
    )
    ready_timeout: float = _option(
        60.0, parse_some_seconds, "How long a new release may take to start.", metavar="SECONDS"
    )
    drain_timeout: float = _option(
        30.0,
        parse_seconds,
        "How long connections of an old release may take to finish.",
        metavar="SECONDS",
        aliases=("--graceful-timeout", "--timeout-graceful-shutdown"),
        variables=("ECDYSIS_GRACEFUL_TIMEOUT",),
    )
    exit_timeout: float = _option(
        10.0,
        parse_seconds,
        "How long an old process may take to end once it has drained; then it is ended by force.",
        metavar="SECONDS",
    )
    max_draining: int = _option(
        MAX_DRAINING,
        number_of(1, "releases"),
        "How many old releases may drain at once; the oldest one beyond it ends, and the restart says what that costs.",
        metavar="N",
    )
    transfer: bool = _option(
        True, parse_switch, "Move idle connections to the new release instead of closing them.", shape=Shape.SWITCH
    )
    websocket_close: str = _option(
        WebSocketClose.SPREAD.value,
        one_of(*(each.value for each in WebSocketClose)),
        "When an old release closes WebSockets: spread over its drain, or together at its beginning, for rooms.",
        metavar="NAME",
    )
    probation: float = _option(
        5.0, parse_seconds, "How long a new release serves before the restart is final.", metavar="SECONDS"
    )
    one_at_a_time: bool = _option(
        False,
        parse_switch,
        "Let the old release end before the new one starts, for what only one may have open; clients wait meanwhile.",
        shape=Shape.SWITCH,
    )
    hang_timeout: float | None = _option(
        None,
        or_off(parse_seconds),
        "Replace a worker whose loop does not turn for this long.",
        metavar="SECONDS",
        aliases=("--timeout", "-t"),
    )
    max_requests: int | None = _option(
        None,
        or_off(number_of(1, "requests")),
        "Replace a worker after so many requests.",
        metavar="N",
        aliases=("--limit-max-requests",),
    )
    max_requests_jitter: int = _option(
        0,
        number_of(0, "requests"),
        "Add a random number up to this to max-requests.",
        metavar="N",
        aliases=("--limit-max-requests-jitter",),
    )
    max_rss: int | None = _option(
        None, or_off(parse_size), "Replace a worker that uses more memory than this, such as 512M.", metavar="SIZE"
    )
    lame_duck: float = _option(
        0.0, parse_seconds, "On SIGTERM go on serving for so long, while /ready says 503.", metavar="SECONDS"
    )
    health_bind: Address | None = _option(  # noqa: RUF009 - as the others, whose types ruff sees through
        None, parse_one_address, "Where /live and /ready answer for load balancers.", metavar="ADDRESS"
    )
    metrics: bool = _option(
        False, parse_switch, "Answer /metrics at the health address too, for Prometheus.", shape=Shape.SWITCH
    )
    metrics_dir: str | None = _option(
        None,
        parse_path,
        "Where prometheus_client of all workers keeps the application's metrics, made empty at the start; or auto.",
        metavar="DIRECTORY",
    )
    traces: bool = _option(
        False,
        parse_switch,
        "Tell restarts as traces of OpenTelemetry, to where OTEL_TRACES_EXPORTER says.",
        shape=Shape.SWITCH,
    )
    status_page: bool = _option(
        False, parse_switch, "Answer / at the health address too, by a page for people.", shape=Shape.SWITCH
    )
    takeover: str | None = _option(
        None, parse_path, "Take the sockets over from the service with this control socket.", metavar="PATH"
    )
    reload: bool = _option(False, parse_switch, "Restart whenever a file of the program is saved.", shape=Shape.SWITCH)
    reload_dirs: tuple[str, ...] = _option(
        (),
        several(parse_directory),
        "What reload watches, instead of app-dir.",
        metavar="DIRECTORY",
        shape=Shape.MANY,
        aliases=("--reload-dir",),
        variables=("ECDYSIS_RELOAD_DIR",),
    )
    reload_include: tuple[str, ...] = _option(
        (),
        several(parse_text),
        "What reload watches besides *.py: a glob, such as *.html.",
        metavar="GLOB",
        shape=Shape.MANY,
        aliases=("--reload-includes",),
    )
    reload_exclude: tuple[str, ...] = _option(
        (),
        several(parse_text),
        "What reload does not watch: a glob, such as generated_*.py, or a directory.",
        metavar="GLOB",
        shape=Shape.MANY,
        aliases=("--reload-excludes",),
    )
    env_file: str | None = _option(
        None, parse_file, "KEY=VALUE lines for the environment, read again at each restart.", metavar="PATH"
    )
    command: tuple[str, ...] | None = _option(
        None,
        parse_command,
        "What is run as each worker, instead of this command line: another `ecdysis run` that serves the same.",
        metavar="COMMAND-LINE",
    )
    log_level: str | None = _option(
        None,
        one_of("critical", "error", "warning", "info", "debug", "trace"),
        "How much is logged; info, unless log-config says.",
        metavar="NAME",
    )
    log_config: str | None = _option(None, parse_file, "Logging set up by an ini, .json or .yaml file.", metavar="PATH")
    access_log: bool = _option(True, parse_switch, "Log each request, where the server does.", shape=Shape.SWITCH)
    proxy_headers: bool = _option(
        True, parse_switch, "Believe X-Forwarded-Proto and -For of trusted proxies.", shape=Shape.SWITCH
    )
    forwarded_allow_ips: str | None = _option(
        None,
        parse_any_text,
        "Which proxies are trusted: addresses, networks, or *; else 127.0.0.1 and ::1.",
        metavar="LIST",
        variables=("FORWARDED_ALLOW_IPS",),
    )
    root_path: str = _option("", parse_any_text, "Where a proxy has mounted the application.", metavar="PATH")
    certfile: str | None = _option(
        None, parse_file, "Serve TLS with this certificate chain.", metavar="PATH", aliases=("--ssl-certfile",)
    )
    keyfile: str | None = _option(
        None, parse_file, "The certificate's key; else it is in certfile.", metavar="PATH", aliases=("--ssl-keyfile",)
    )
    keyfile_password: str | None = _option(
        None,
        parse_any_text,
        "What the key is encrypted with; better given as a variable.",
        aliases=("--ssl-keyfile-password",),
        is_secret=True,
    )
    ca_certs: str | None = _option(
        None,
        parse_file,
        "Authorities that certificates of clients are checked by.",
        metavar="PATH",
        aliases=("--ssl-ca-certs",),
    )
    cert_reqs: str = _option(
        "none",
        parse_cert_reqs,
        "Whether clients need a certificate: none, optional or required.",
        metavar="NAME",
        aliases=("--ssl-cert-reqs",),
    )
    ciphers: str | None = _option(None, parse_text, "TLS ciphers, as OpenSSL lists them.", aliases=("--ssl-ciphers",))
    server_options: Mapping[str, Any] = _option(
        (),
        parse_settings,
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
                raise OptionError(f"{option.name}: {option.explain(error)}") from None
            object.__setattr__(self, option.name, value)
        if self.control != "auto" and self.control.lower() not in OFF:
            try:
                locate(self.control)
            except ValueError as error:
                raise OptionError(f"control: {error}") from None
        if self.keyfile and not self.certfile:
            raise OptionError("keyfile needs a certfile: the certificate that the key belongs to")
        if self.cert_reqs != "none" and not self.ca_certs:
            raise OptionError(f"cert_reqs {self.cert_reqs} needs ca_certs: who has signed the clients' certificates")
        if self.ca_certs and not self.certfile:
            raise OptionError("ca_certs needs a certfile: without TLS no client shows a certificate")
        for name in ("metrics", "status_page"):
            if getattr(self, name) and self.health_bind is None:
                page = {"metrics": "/metrics answers", "status_page": "the page is"}[name]
                raise OptionError(f"{name} needs health_bind: the address where {page}, such as 127.0.0.1:9000")
        if self.max_requests_jitter and self.max_requests is None:
            raise OptionError("max_requests_jitter needs max_requests, which it adds to")

    @property
    def values(self) -> dict[str, Any]:
        """The value of each option by its name; mappings are plain ones."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    @classmethod
    def restore(cls, values: Mapping[str, Any]) -> Self:
        """Return options that have been checked before; the files that they name may be gone since then.

        Raises:
            ValueError: they are another release's.
        """
        if set(values) != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError("there are other options by now")
        options = cls.__new__(cls)
        for name, value in values.items():
            object.__setattr__(options, name, value)
        return options

    @property
    def control_path(self) -> str | None:
        """Where the control socket is, or None where there shall be none."""
        if self.control.lower() in OFF:
            return None
        if self.control != "auto":
            return locate(self.control)
        return self.default_control_paths[0]

    @property
    def default_control_paths(self) -> list[str]:
        """Where the control socket may be that nobody has asked for, the best place first; too long ones come last."""
        # The same in all generations, and another one for each service: told by what it serves, and where.
        name = re.sub(r"[^\w.@-]+", "-", f"{self.target} {self.bind[0]}").strip("-")
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        paths = []
        for directory in default_directories():
            path = os.path.join(directory, f"{name}.sock")
            paths.append(path if is_short(path) else os.path.join(directory, f"{digest}.sock"))
        return sorted(map(os.path.abspath, paths), key=lambda path: not is_short(path))

    @property
    def control_access(self) -> ControlAccess:
        """Who may use the control socket."""
        return ControlAccess(self.control_mode, find_group(self.control_group) if self.control_group else None)

    @property
    def unix_permissions(self) -> UnixPermissions:
        """What permissions Unix sockets have."""
        if self.unix_group is None:
            return {"mode": self.unix_mode, "group": None}
        return {"mode": GROUP_MODE if self.unix_mode is None else self.unix_mode, "group": find_group(self.unix_group)}

    @property
    def is_tls(self) -> bool:
        """Whether TLS is served."""
        return self.certfile is not None


OPTIONS: tuple[Option, ...] = tuple(
    Option(name=field.name, **field.metadata["option"]) for field in dataclasses.fields(Options)
)

# The ways of uvicorn to say where to listen; each adds to `bind`.
SHORTHANDS: tuple[Option, ...] = (
    Option("host", f"Listen on this address or name; {DEFAULT_HOST} if only --port is given.", parse_any_text, "HOST"),
    Option("port", f"Listen on this port; {DEFAULT_PORT} if only --host is given.", number_of(0, "a port"), "PORT"),
    Option("uds", "Listen on a Unix socket: short for --bind unix:PATH.", parse_path, "PATH"),
    Option("fd", "Listen on a socket that was passed: short for --bind fd://NAME-OR-NUMBER.", lambda v: v, "NAME"),
)

CONFIG = next(each for each in OPTIONS if each.name == "config")


def command_line_options() -> tuple[Option, ...]:
    """Return what the command line takes besides TARGET, in the order of its help."""
    options = [each for each in OPTIONS if each.name not in ("target", "config")]
    position = [each.name for each in options].index("bind") + 1
    return (CONFIG, *options[:position], *SHORTHANDS, *options[position:])
