"""What a proof shall do: which requests, which restarts, which limits. Data, and how it is read from text.

Everything that a user may have got wrong is found here, before anything is started.
"""

from __future__ import annotations

import enum
import importlib.util
import ipaddress
import math
import re
import tomllib
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

__all__ = [
    "Kind",
    "Plan",
    "PlanError",
    "Shape",
    "Step",
    "Url",
    "check_extra",
    "mix_requests",
    "order_steps",
    "read_requests",
]

# The load is bounded: a proof shows whether a restart loses something, and is no benchmark.
MAX_RATE = 2000.0
MAX_CONNECTIONS = 500
MAX_BODY_BYTES = 16 * 1024 * 1024

# How a mixed load is made of one rate.
SHARES = {"new": 0.4, "kept": 0.4, "slow": 0.06, "upload": 0.06, "websocket": 0.08}
SLOW_SECONDS = 1.0
UPLOAD_BYTES = 64 * 1024
WEBSOCKETS = 4

EXTRA = ("h11", "websockets")

PORTS = {"http": 80, "https": 443}


class PlanError(ValueError):
    """A plan that cannot be carried out; the text says what would be right."""


class Kind(enum.StrEnum):
    """What a client does with its connection."""

    NEW = "new"  # connect, ask once, close
    KEPT = "kept"  # ask again and again, at random moments
    SLOW = "slow"  # connect, and send one request in pieces
    UPLOAD = "upload"  # connect, and send a body in pieces
    WEBSOCKET = "websocket"  # keep a WebSocket, and send messages at random moments


class Step(enum.StrEnum):
    """What is done to the service under load."""

    RESTART = "restart"
    BROKEN = "broken release"  # the restart has to fail, and the old release to serve on
    SUCCESSOR_KILLED = "successor killed"  # as above
    PREDECESSOR_KILLED = "predecessor killed"  # the successor has to complete its start, and to serve


@dataclass(frozen=True, slots=True)
class Url:
    """Where the service listens: an address of loopback.

    Raises:
        PlanError: it is none.
    """

    scheme: str
    host: str
    port: int
    path: str = "/"

    @classmethod
    def parse(cls, text: str) -> Url:
        """Read it."""
        try:
            parts = urllib.parse.urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise PlanError(f"--url {text}: {error}") from None
        if parts.scheme not in PORTS or not parts.hostname:
            raise PlanError(f"--url {text}: write http://127.0.0.1:PORT/ (or https://)")
        return cls(parts.scheme, parts.hostname, port or PORTS[parts.scheme], parts.path or "/")

    def __post_init__(self) -> None:
        if self.host != "localhost" and not _is_loopback(self.host):
            raise PlanError(
                f"{self}: the load goes to loopback only, which {self.host} is not: "
                "use 127.0.0.1, [::1] or localhost, and run the command on the machine of the service"
            )

    @property
    def netloc(self) -> str:
        """Host and port, as the header Host has them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"


@dataclass(frozen=True, slots=True)
class Shape:
    """Requests of one kind.

    Attributes:
        kind: what their clients do.
        path: what is asked for.
        rate: how many a second, on the average, all clients together.
        method: GET, or POST where there is a body.
        connections: how many are kept, where the kind keeps them.
        body: how many bytes of it.
        headers: further ones.
        expect: the status of a right answer; None: the one that the first trial gets.
        seconds: over how long the request is sent, at the most, where the kind sends in pieces.
        optional: leave it out, with a note, where the application does not answer it.

    Raises:
        PlanError: what no request can be.
    """

    kind: Kind
    path: str = "/"
    rate: float = 10.0
    method: str = ""
    connections: int = 1
    body: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    expect: int | None = None
    seconds: float = SLOW_SECONDS
    optional: bool = False

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or not _is_plain(self.path) or " " in self.path:
            raise PlanError(f"path {self.path!r}: it begins with /, and has no spaces and only ASCII (%C3%BC for ü)")
        if self.method and not _TOKEN.fullmatch(self.method):
            raise PlanError(f"method {self.method!r}: a word such as PUT is needed")
        for name, value in self.headers:
            if not _TOKEN.fullmatch(name) or not _is_plain(value):
                raise PlanError(f"header {name!r}: the name is one word, and the value has only ASCII")
        if not 0 < self.rate <= MAX_RATE:
            raise PlanError(f"rate {self.rate:g}: it is above 0, and {MAX_RATE:g} requests a second at the most")
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise PlanError(f"connections {self.connections}: from 1 to {MAX_CONNECTIONS}")
        if not 0 <= self.body <= MAX_BODY_BYTES:
            raise PlanError(f"body {self.body}: up to {MAX_BODY_BYTES} bytes")
        if not 0 <= self.seconds < math.inf:
            raise PlanError(f"seconds {self.seconds}: a number, 0 or more")
        if not self.method:
            object.__setattr__(self, "method", "POST" if self.body else "GET")

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" if self.kind is Kind.WEBSOCKET else f"{self.kind} {self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One proof. Times are in seconds.

    Attributes:
        requests: the load.
        steps: what is done meanwhile, in this order.
        target: what ``ecdysis run`` serves for the proof.
        run_options: its other options.
        control: the control socket of a service that runs, or its name.
        command: starts a service of any kind.
        restart_command: restarts it; ``{pid}`` stands for the process of ``command``.
        url: where it listens; None: as the service says.
        identify_by: a header by which the application names the process or release that has answered.
        between: how long the service is left alone before, between and after the steps.
        patience: after how long an answer is late; it is lost after six times as long.
        restart_timeout: how long a restart may take.
        max_slowdown: how many times slower than the first generation a later one may be.
        log: a file for what the service writes; None: it is kept for errors only.

    Raises:
        PlanError: what contradicts itself.
    """

    requests: tuple[Shape, ...]
    steps: tuple[Step, ...]
    target: str | None = None
    run_options: tuple[str, ...] = ()
    control: str | None = None
    command: tuple[str, ...] = ()
    restart_command: tuple[str, ...] = ()
    url: Url | None = None
    identify_by: str | None = None
    between: float = 2.0
    patience: float = 10.0
    restart_timeout: float = 120.0
    max_slowdown: float = 2.0
    log: str | None = None

    def __post_init__(self) -> None:
        sources = [bool(each) for each in (self.target, self.control, self.command)]
        if sum(sources) > 1:
            raise PlanError("there is one service to prove: TARGET, --control of one that runs, or --command")
        if self.run_options and not self.target:
            raise PlanError(f"{' '.join(self.run_options)}: options of `ecdysis run` need a TARGET, such as main:app")
        if not any(sources) and not self.restart_command:
            raise PlanError("what shall be proved? TARGET, such as main:app; or --control, or --command")
        if self.restart_command and (self.target or self.control):
            raise PlanError("--restart-command is for a service of --command: this one has `ecdysis restart`")
        if self.command and not self.restart_command:
            raise PlanError("--command needs --restart-command, such as 'kill -HUP {pid}'")
        if self.restart_command and self.url is None:
            raise PlanError("--restart-command needs --url: where the service listens, such as http://127.0.0.1:8000/")
        if not self.command and any("{pid}" in word for word in self.restart_command):
            raise PlanError("--restart-command: {pid} is the process of --command, which is not there")
        if not self.target and (others := sorted({*self.steps} - {Step.RESTART})):
            raise PlanError(f"{', '.join(others)}: only a service that the proof itself has started, by a TARGET")
        if not self.requests:
            raise PlanError("without requests nothing can be lost: say at least one")
        if (rate := sum(shape.rate for shape in self.requests)) > MAX_RATE:
            raise PlanError(f"{rate:g} requests a second: {MAX_RATE:g} at the most, it is a proof and no benchmark")
        for name in ("between", "patience", "restart_timeout", "max_slowdown"):
            if not 0 < getattr(self, name) < math.inf:
                raise PlanError(f"--{name.replace('_', '-')}: a number above 0 is needed")


def check_extra() -> None:
    """See that the libraries are there that speak HTTP and WebSocket.

    Raises:
        PlanError: one is missing.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise PlanError(f"a proof needs {' and '.join(missing)}: pip install 'ecdysis_async[prove]'")


def order_steps(restarts: int, *, broken: bool, successor: bool, predecessor: bool) -> tuple[Step, ...]:
    """Return the restarts with the faults between them, the last of all being a restart where there are enough.

    Raises:
        PlanError: there is nothing to do.
    """
    chosen = {Step.BROKEN: broken, Step.SUCCESSOR_KILLED: successor, Step.PREDECESSOR_KILLED: predecessor}
    faults = [step for step, is_chosen in chosen.items() if is_chosen]
    steps: list[Step] = []
    for number in range(max(restarts, len(faults))):
        steps += [Step.RESTART] if number < restarts else []
        steps += faults[number : number + 1]
    if not steps:
        raise PlanError("there is nothing to prove: at least one restart is needed")
    return tuple(steps)


def mix_requests(
    paths: Sequence[str],
    *,
    rate: float,
    connections: int,
    upload_path: str | None = None,
    websocket_path: str | None = None,
    header: Sequence[tuple[str, str]] = (),
) -> tuple[Shape, ...]:
    """Return a load of all kinds.

    Args:
        paths: what is asked for.
        rate: how many requests a second, of all kinds together.
        connections: how many are kept.
        upload_path: where bodies go; None: to the first path, where the application takes them.
        websocket_path: where WebSockets are; None: at the first path, where the application has them.
        header: goes with each request.
    """
    common: dict[str, Any] = {"headers": tuple(header)}
    shapes = []
    for path in paths:
        for kind in (Kind.NEW, Kind.KEPT, Kind.SLOW):
            kept = max(1, connections // len(paths)) if kind is Kind.KEPT else 1
            shapes.append(Shape(kind, path, rate * SHARES[kind] / len(paths), connections=kept, **common))
    upload = Shape(
        Kind.UPLOAD,
        upload_path or paths[0],
        rate * SHARES[Kind.UPLOAD],
        body=UPLOAD_BYTES,
        optional=upload_path is None,
        **common,
    )
    websocket = Shape(
        Kind.WEBSOCKET,
        websocket_path or paths[0],
        rate * SHARES[Kind.WEBSOCKET],
        connections=WEBSOCKETS,
        optional=websocket_path is None,
        **common,
    )
    return (*shapes, upload, websocket)


def read_requests(text: str, name: str) -> tuple[Shape, ...]:
    """Read a file of requests: TOML, with a table ``[[request]]`` for each shape.

    Args:
        text: what is in it.
        name: its name, for errors.

    Raises:
        PlanError: something in it is no request.
    """
    try:
        tables = tomllib.loads(text).get("request")
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{name}: {error}") from None
    if not isinstance(tables, list) or not tables:
        raise PlanError(f'{name}: there is no [[request]], such as\n[[request]]\nkind = "kept"\npath = "/"\nrate = 20')
    shapes = []
    for number, table in enumerate(tables, 1):
        try:
            shapes.append(_read_shape(table))
        except (PlanError, TypeError) as error:
            raise PlanError(f"{name}, request {number}: {error}") from None
    return tuple(shapes)


def _read_shape(table: Mapping[str, Any]) -> Shape:
    types: dict[str, Any] = {each.name: each.type for each in fields(Shape)}
    for key, value in table.items():
        if key not in types:
            raise PlanError(f"{key!r} is unknown: there are {', '.join(types)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_right = {
            "rate": is_number,
            "seconds": is_number,
            "connections": isinstance(value, int),
            "body": isinstance(value, int),
            "expect": isinstance(value, int),
            "optional": isinstance(value, bool),
            "headers": isinstance(value, dict),
        }.get(key, isinstance(value, str))
        if not is_right:
            raise PlanError(f"{key} = {value!r} is of the wrong type")
    known = dict(table)
    kind = known.pop("kind", "new")
    if kind not in set(Kind):
        raise PlanError(f"kind {kind!r}: there are {', '.join(Kind)}")
    headers = tuple((key, str(value)) for key, value in known.pop("headers", {}).items())
    if kind == Kind.UPLOAD:
        known.setdefault("body", UPLOAD_BYTES)
    return Shape(Kind(kind), headers=headers, **known)


# What methods and names of headers are (RFC 9110, 5.6.2).
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
