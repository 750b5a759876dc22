"""Options of uvicorn's, gunicorn's and hypercorn's commands, as their users type them here too.

What has a counterpart is applied, and what has none is answered with what to do instead. The settings of a
``gunicorn.conf.py`` are read for that answer; the file is a program, and is never run here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .options import OptionError, Shape

__all__ = ["FOREIGN", "Foreign", "advise", "explain_gunicorn_config", "translate"]

WSGI = "it serves WSGI, which blocks: serve an ASGI application, or wrap this one (a2wsgi)"
LOGS = "the log goes to stderr, where a service manager keeps it; files by --log-config"
ELSEWHERE = "that is for who starts the service: see `ecdysis unit`"
NEEDLESS = "it is not needed here: leave it out"
ONE_LOG = "-"


@dataclass(frozen=True, slots=True)
class Foreign:
    """An option of another server's command.

    Attributes:
        flags: how it is written on the command line, the long form first; none where an option of ours has this name.
        keys: how configuration files call it.
        ours: the option that it is here, as on the command line.
        server_option: the option that it is of the server itself.
        advice: what to do instead, where it has no counterpart.
        shape: how it is written.
    """

    flags: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    ours: str | None = None
    server_option: str | None = None
    advice: str = ""
    shape: Shape = Shape.VALUE

    @property
    def parameter(self) -> str:
        """What the command line's library calls it."""
        return "foreign_" + self.name.strip("-").replace("-", "_")

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.flags[0].partition("/")[0]


def _of_server(name: str, *flags: str, shape: Shape = Shape.VALUE, keys: tuple[str, ...] = ()) -> Foreign:
    flag = name.replace("_", "-")
    long = f"--{flag}/--no-{flag}" if shape is Shape.SWITCH else f"--{flag}"
    return Foreign((long, *flags), keys, server_option=name, shape=shape)


def _unknown(advice: str, *flags: str, keys: tuple[str, ...] = (), is_switch: bool = False) -> Foreign:
    return Foreign(flags, keys, advice=advice, shape=Shape.SWITCH if is_switch else Shape.VALUE)


WORKER_CLASS = Foreign(("--worker-class", "-k"), ("worker_class",))
ACCESS_LOG = Foreign(("--access-logfile",), ("accesslog",))
ERROR_LOG = Foreign(("--error-logfile", "--log-file", "--error-log"), ("errorlog",))

# The counterparts of worker classes: options of ours, by their names.
WORKER_CLASSES: Mapping[str, Mapping[str, str]] = {
    "uvicorn.workers.UvicornWorker": {"server": "uvicorn"},
    "uvicorn_worker.UvicornWorker": {"server": "uvicorn"},
    "uvicorn.workers.UvicornH11Worker": {"server": "uvicorn", "loop": "asyncio", "http": "h11"},
    "uvicorn_worker.UvicornH11Worker": {"server": "uvicorn", "loop": "asyncio", "http": "h11"},
    "aiohttp.GunicornWebWorker": {"server": "aiohttp", "loop": "asyncio"},
    "aiohttp.GunicornUVLoopWebWorker": {"server": "aiohttp", "loop": "uvloop"},
    **{loop: {"loop": loop} for loop in ("asyncio", "uvloop", "trio")},
}

FOREIGN: tuple[Foreign, ...] = (
    # Applied: they mean something to the server, and each server has its own name for some of them.
    _of_server("timeout_keep_alive", "--keep-alive", keys=("keepalive", "keep_alive_timeout")),
    _of_server("ws"),
    _of_server("ws_max_size", keys=("websocket_max_message_size",)),
    _of_server("ws_max_queue"),
    _of_server("ws_ping_interval", "--websocket-ping-interval", keys=("websocket_ping_interval",)),
    _of_server("ws_ping_timeout"),
    _of_server("ws_per_message_deflate"),
    _of_server("http"),
    _of_server("lifespan"),
    _of_server("interface"),
    _of_server("limit_concurrency"),
    _of_server("h11_max_incomplete_event_size"),
    _of_server("date_header", shape=Shape.SWITCH),
    _of_server("server_header", shape=Shape.SWITCH),
    WORKER_CLASS,
    ACCESS_LOG,
    ERROR_LOG,
    # The names that configuration files have for options of ours.
    *(
        Foreign(keys=(theirs,), ours=ours)
        for theirs, ours in {
            "bind": "--bind",
            "workers": "--workers",
            "backlog": "--backlog",
            "timeout": "--hang-timeout",
            "graceful_timeout": "--drain-timeout",
            "max_requests": "--max-requests",
            "max_requests_jitter": "--max-requests-jitter",
            "loglevel": "--log-level",
            "pidfile": "--pid-file",
            "pid_path": "--pid-file",
            "reload": "--reload",
            "use_reloader": "--reload",
            "forwarded_allow_ips": "--forwarded-allow-ips",
            "root_path": "--root-path",
            "certfile": "--certfile",
            "keyfile": "--keyfile",
            "ca_certs": "--ca-certs",
            "cert_reqs": "--cert-reqs",
            "ciphers": "--ciphers",
            "wsgi_app": "TARGET",
            "application_path": "TARGET",
            "logconfig": "--log-config",
            "reload_extra_files": "--reload-dirs",
        }.items()
    ),
    # There is no counterpart.
    _unknown(
        "each worker imports the application, so that a restart takes its new code: leave it out",
        *("--preload",),
        keys=("preload_app",),
        is_switch=True,
    ),
    _unknown(
        "a worker is one loop; blocking work goes to threads of the application's (anyio.to_thread): leave it out",
        *("--threads",),
        keys=("threads",),
    ),
    _unknown(
        "limit what is served at a time by --limit-concurrency", "--worker-connections", keys=("worker_connections",)
    ),
    _unknown("go to that directory first, or say --app-dir", "--chdir", keys=("chdir",)),
    _unknown(f"set the variable before, or in the file of --env-file; {ELSEWHERE}", "--env", "-e", keys=("raw_env",)),
    _unknown(f"start it as that user; {ELSEWHERE}", "--user", "-u", keys=("user",)),
    _unknown(f"start it as a user of that group; {ELSEWHERE}", "--group", "-g", keys=("group",)),
    _unknown("set it before; --unix-mode is for a Unix socket", "--umask", "-m", keys=("umask",)),
    _unknown(ELSEWHERE, "--daemon", "-D", keys=("daemon",), is_switch=True),
    _unknown(NEEDLESS, "--name", "-n", keys=("proc_name",)),
    _unknown(NEEDLESS, "--worker-tmp-dir", keys=("worker_tmp_dir",)),
    _unknown(
        "sockets are handed over, and shared by the workers: leave it out",
        "--reuse-port",
        keys=("reuse_port",),
        is_switch=True,
    ),
    _unknown(
        "stdout and stderr stay as they are: leave it out", "--capture-output", keys=("capture_output",), is_switch=True
    ),
    _unknown(
        "set it by --log-config (a formatter of uvicorn.access)", "--access-logformat", keys=("access_log_format",)
    ),
    _unknown("run `ecdysis check TARGET …`", "--check-config", keys=("check_config",), is_switch=True),
    _unknown("NO_COLOR=1 turns colours off", "--use-colors/--no-use-colors", is_switch=True),
    _unknown(
        'add it in the application, or in the file of --config: server-options = {headers = [["X-A", "b"]]}',
        *("--header",),
    ),
    _unknown("a changed file counts once it was still for 0.1 s: leave it out", "--reload-delay"),
    _unknown(
        "several protocols on several addresses: --bind is all there is", "--insecure-bind", keys=("insecure_bind",)
    ),
    _unknown("QUIC is not handed over: --bind is all there is", "--quic-bind", keys=("quic_bind",)),
    _unknown(
        "what the proxy sends is read by --proxy-headers and --forwarded-allow-ips",
        keys=("secure_scheme_headers", "proxy_protocol", "proxy_allow_ips"),
    ),
    _unknown(
        "limit it in the proxy",
        "--limit-request-line",
        "--limit-request-fields",
        "--limit-request-field_size",
        keys=("limit_request_line", "limit_request_fields", "limit_request_field_size"),
    ),
    _unknown(
        "gunicorn calls it in its own processes: use the application's lifespan",
        keys=(
            *("on_starting", "on_reload", "when_ready", "pre_fork", "post_fork", "post_worker_init", "worker_int"),
            *("worker_abort", "pre_exec", "pre_request", "post_request", "child_exit", "worker_exit"),
            *("nworkers_changed", "on_exit"),
        ),
    ),
)

_BY_KEY = {key: each for each in FOREIGN for key in each.keys}


def translate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a command line says, with the options of other servers as those that they are here.

    Args:
        given: by the names of options, and by ``Foreign.parameter``.

    Raises:
        OptionError: one has no counterpart; the text says what to do.
    """
    known = {each.parameter: each for each in FOREIGN if each.flags}
    ours = {name: value for name, value in given.items() if name not in known}
    for name, each in known.items():
        if (value := given.get(name)) is None:
            continue
        try:
            found = dict(_apply(each, value))
        except ValueError as error:
            raise OptionError(f"{each.name}: {error}") from None
        settings = [f"{key.removeprefix('server_option.')}={found.pop(key)}" for key in list(found) if "." in key]
        # What is said in so many words goes first.
        ours["server_options"] = (*settings, *(ours.get("server_options") or ()))
        ours |= {key: said for key, said in found.items() if ours.get(key) is None}
    return ours


def _apply(each: Foreign, value: Any) -> Iterator[tuple[str, Any]]:
    """Return the options of ours that stand for one of another server's; a server's own are called server_option.NAME.

    Raises:
        ValueError: there are none.
    """
    if each is WORKER_CLASS:
        name = str(value).removeprefix("egg:gunicorn#")
        if name not in WORKER_CLASSES:
            known = ", ".join(WORKER_CLASSES)
            is_wsgi = name in ("sync", "gthread", "gevent", "eventlet", "tornado", "gevent_wsgi", "gevent_pywsgi")
            raise ValueError(f"{value!r}: {WSGI}" if is_wsgi else f"{value!r} is not known here, only {known}")
        for key, said in WORKER_CLASSES[name].items():
            yield ("server_option.http" if key == "http" else key), said
    elif each is ACCESS_LOG:
        if value not in (ONE_LOG, "None", ""):
            raise ValueError(f"{LOGS}; --access-log and --no-access-log say whether requests are logged")
        yield "access_log", value == ONE_LOG
    elif each is ERROR_LOG:
        if value != ONE_LOG:
            raise ValueError(LOGS)
    elif each.server_option is not None:
        yield f"server_option.{each.server_option}", value
    else:
        raise ValueError(each.advice)


def advise(key: str) -> str | None:
    """Say what a setting of another server's configuration file is here; None where nobody has such a one."""
    each = _BY_KEY.get(key.replace("-", "_"))
    return _describe(each, None) if each is not None else None


def explain_gunicorn_config(path: str) -> str:
    """Say what the settings of a gunicorn.conf.py are here, a line for each. Only its text is read.

    Raises:
        OptionError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            module = ast.parse(file.read(), path)
    except (OSError, SyntaxError, ValueError) as error:
        raise OptionError(f"the configuration file {path} cannot be read: {error}") from None
    lines = [f"  {left}: {right}" for left, right in _explain_statements(module)]
    return "\n".join(
        [
            f"{path} is a program for gunicorn, and is not run here; a file of options is TOML (workers = 4)."
            + (" What it sets is here:" if lines else " It sets nothing that is known here."),
            *lines,
        ]
    )


def _explain_statements(module: ast.Module) -> Iterator[tuple[str, str]]:
    for statement in module.body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=key)], value=value)
                | ast.AnnAssign(target=ast.Name(id=key), value=ast.expr() as value)
            ):
                each = _BY_KEY.get(key)
                if each is not None:
                    yield f"{key} = {ast.unparse(value)}", _describe(each, value)
            case ast.FunctionDef(name=key) if key in _BY_KEY:
                yield f"def {key}", _describe(_BY_KEY[key], None)


def _describe(each: Foreign, value: ast.expr | None) -> str:
    """Say what an option is here, with its value where that stands in the file."""
    if each.advice:
        return each.advice
    try:
        literal = ast.literal_eval(value) if value is not None else None
    except ValueError:
        literal = None
    if each.ours is not None:
        return _write(each.ours, value, literal)
    if each.server_option is not None:
        return _write(each.name, value, literal)
    if literal is None:
        return each.name
    try:
        found = dict(_apply(each, literal))
    except ValueError as error:
        return str(error)
    words = []
    for key, said in found.items():
        name = f"--{key.removeprefix('server_option.').replace('_', '-')}"
        words.append(f"{'' if said is not False else '--no-'}{name}" if isinstance(said, bool) else f"{name} {said}")
    return " ".join(words) or NEEDLESS


def _write(option: str, value: ast.expr | None, literal: Any) -> str:
    if value is None:
        return option
    if option == "TARGET":
        return f"TARGET {literal}" if literal else option
    match literal:
        case None:
            return f"{option}, with what that comes to"
        case True:
            return option
        case False:
            return "leave it out"
        case list() | tuple():
            return " ".join(f"{option} {each}" for each in literal)
    return f"{option} {literal}"
