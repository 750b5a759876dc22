"""What a process of ``ecdysis run`` does: load the application, choose server and loop, enter ``Ecdysis`` and serve.

The application is imported before there is a loop, as other servers do it: a program may run one of its own meanwhile
(``asyncio.run``), or change how loops are made. It takes as long as it takes: a stop ends the process, and the death of
its anchor does. Whoever has started this process counts that time (``ready_timeout``). What is wrong with the
application is told once its predecessor can be told.

Which servers there are is seen when one is needed; none is imported before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ecdysis_async._config.gather import read_variables
from ecdysis_async._config.logging import configure_logging
from ecdysis_async._config.options import OptionError, Options
from ecdysis_async._config.prometheus import name_metrics_files
from ecdysis_async._config.target import Kind, call_factory, find_kind, load
from ecdysis_async._handoff.preflight import describe_release, tell
from ecdysis_async._management.status import describe_listeners
from ecdysis_async._service.anchor_watch import AnchorWatch
from ecdysis_async._service.ecdysis import Ecdysis, explain_taken
from ecdysis_async._sockets.addresses import name_sockets
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.entry import Kind as SocketKind
from ecdysis_async._system.claims import find_line, take_channel
from ecdysis_async._system.descriptors import read_credentials
from ecdysis_async._system.exit_deadline import ExitDeadline
from ecdysis_async._system.garbage import without_collections
from ecdysis_async._system.history import Note, history
from ecdysis_async._system.release import note_application
from ecdysis_async._system.stderr import say, write_lines
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async._system.tracebacks import describe_failure
from ecdysis_async._system.wording import speak_of_options
from ecdysis_async.errors import StartupError
from ecdysis_async.report import State

__all__ = ["check", "run"]

logger = logging.getLogger("ecdysis_async")

STARTUP_FAILED = 3
USAGE = 2

ASGI_SERVERS = ("uvicorn", "hypercorn")


def run(options: Options) -> int:
    """Serve until the service stops or a successor serves; return the exit code.

    Raises:
        Exception: what broke the service while it served.
    """
    return _run(options, _serve)


def check(options: Options) -> int:
    """Load what would be served, tell the process that has started this one what it is, and return the exit code."""
    return _run(options, _check)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What there is before the loop: a target that was imported, or why it was not.

    Attributes:
        environment: what this process had before the application could change it.
        begun: when the import began, by CLOCK_MONOTONIC.
        control_path: where the control socket may be found, before the application could change the directory.
        found: the target, if it was imported.
        failure: what the import has raised.
    """

    environment: Mapping[str, str]
    begun: float
    control_path: str | None
    found: Any = None
    failure: BaseException | None = None

    async def make(self, options: Options) -> Any:
        """Return what is to be served.

        Raises:
            StartupError: it cannot be.
            Exception: whatever the application raised, at its import or in its factory.
        """
        if self.failure is not None:
            raise self.failure
        return await call_factory(self.found, options.target) if options.factory else self.found


Main = Callable[[Options, _Loaded], Coroutine[Any, Any, None]]


def _run(options: Options, main: Main) -> int:
    speak_of_options()
    try:
        if options.env_file is not None:
            os.environ.update(read_variables(options.env_file))
        configure_logging(options)
        name_metrics_files()
        _require_loop(options.loop)
        loaded = _load(options)
        _run_on(options.loop, functools.partial(main, options, loaded))
    except OptionError as error:
        say(str(error))
        return USAGE
    except StartupError as error:
        say(str(error))
        return STARTUP_FAILED
    return 0


def _load(options: Options) -> _Loaded:
    """Import the target, before there is a loop; an error is kept for those who are to hear of it."""
    before = (dict(os.environ), time.monotonic(), options.control_path)
    pid = os.getpid()
    with contextlib.ExitStack() as resources:
        resources.enter_context(_ending_with_anchor(options))
        if options.loop != "trio":
            from ecdysis_async._accepting.loops import refusing_servers

            # One of three: see Options.
            resources.enter_context(refusing_servers(options.target, options.loop))  # type: ignore[arg-type]
        try:
            found = load(options.target, app_dir=options.app_dir)
            _require_own_process(options.target, pid)
            note_application(options.target.partition(":")[0])
            return _Loaded(*before, found)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is raised where it can be told
            return _Loaded(*before, failure=error)


def _require_own_process(target: str, pid: int) -> None:
    """See that this is still the process that was started, and has what it was started with; if not, end it.

    Nothing is closed on the way out: by these numbers there may be other descriptors now, or the other process'.
    """
    if os.getpid() != pid:
        complaint = "goes into the background while it is imported (os.fork): a service manager, or `&`, does that for "
        complaint += "`ecdysis run`"
    elif (line := find_line()) is not None and not _is_open(line.fileno()):
        complaint = "closes descriptors while it is imported that are not its own (os.closerange)"
    else:
        return
    say(f"{target} {complaint}: take that out")
    os._exit(STARTUP_FAILED)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _ending_with_anchor(options: Options) -> Iterator[None]:
    """End this process where its anchor dies while it imports the application: as a stop does, and then by force."""
    if (line := find_line()) is None:
        yield
        return
    end = ExitDeadline(lambda kept: write_lines("the anchor is gone: this worker is ended while it starts"))
    watch = AnchorWatch(line, tuple, lambda: _end(end, options.exit_timeout))
    watch.watch(read_credentials(line).pid)
    try:
        yield
    finally:
        watch.close()


def _end(end: ExitDeadline, seconds: float) -> None:
    end.set(seconds, unconditionally=True)
    # The signal is caught by the application now, or by nobody.
    os.kill(os.getpid(), signal.SIGTERM)


async def _check(options: Options, loaded: _Loaded) -> None:
    try:
        app = await loaded.make(options)
        server = _choose_server(app, options)
        if options.is_tls:
            from ecdysis_async.servers._common.listening import make_ssl_context

            make_ssl_context(options)
        if options.server_options and server != "main":
            _load_adapter(server).read_options(options)
    except (OptionError, StartupError):
        raise
    except (Exception, SystemExit) as error:
        write_lines(describe_failure(error))
        raise StartupError(f"{options.target} cannot start: {type(error).__name__}: {error}") from error
    module = sys.modules[options.target.partition(":")[0]]
    file = getattr(module, "__file__", None)
    sockets: list[str] = []
    for address in options.bind if server != "main" else ():
        try:
            sockets += await run_in_thread(functools.partial(name_sockets, address))
        except OSError as error:
            raise StartupError(error.strerror or str(error)) from error
    await tell(
        take_channel(),
        describe_release(
            sockets if server != "main" else None,
            loaded.environment,
            target=options.target,
            server=server,
            file=file,
            real_file=os.path.realpath(file) if file is not None else None,  # noqa: ASYNC240 - nothing else runs here
            control=loaded.control_path,
        ),
    )


def _require_loop(loop: str) -> None:
    """Check that the loop of that name is there.

    Raises:
        StartupError: it is not installed.
    """
    if loop in ("trio", "uvloop") and importlib.util.find_spec(loop) is None:
        raise StartupError(f"{loop} is not installed: pip install 'ecdysis_async[{loop}]'")


def _run_on(loop: str, main: Callable[[], Any]) -> None:
    """Run a coroutine function on the loop of that name."""
    if loop == "trio":
        import trio

        trio.run(main)
    else:
        from ecdysis_async._accepting.loops import run as run_gated

        run_gated(main, loop=loop)  # type: ignore[arg-type] # one of three: see Options


def _describe_serving(options: Options, server: str, entries: Sequence[Entry], control_path: str | None) -> str:
    """Say in one line what is served, where, and by what."""
    scheme = {"main": "", "websockets": "ws"}.get(server, "http")
    if scheme and options.is_tls:
        scheme += "s"
    version = "" if server == "main" else f" {_find_version(server)}"
    places = ", ".join(_describe_place(entry, scheme) for entry in entries if entry.address != control_path)
    control = f", control socket {control_path}" if control_path is not None else ""
    return f"serving on {places or 'nothing'}: {options.target} by {server}{version} on {_name_loop(options)}{control}"


def _describe_place(entry: Entry, scheme: str) -> str:
    address = describe_listeners([entry])[0]["address"]
    if entry.kind is SocketKind.UNIX:
        return f"unix:{address}"
    return f"{scheme}://{address}" if scheme and entry.kind is SocketKind.TCP else address


def _find_version(server: str) -> str:
    # Most say it themselves. For others the machinery of packages is loaded, which takes a tenth of the whole start.
    told = getattr(importlib.import_module(server), "__version__", None)
    if told is not None:
        return str(told)
    from importlib.metadata import version

    return version(server)


def _name_loop(options: Options) -> str:
    if options.loop == "trio":
        return "trio"
    # asyncio is there already, and is not loaded for the sake of services on trio.
    loop = sys.modules["asyncio"].get_running_loop()
    return "uvloop" if any(each.__module__.startswith("uvloop") for each in type(loop).__mro__) else "asyncio"


async def _serve(options: Options, loaded: _Loaded) -> None:
    async with Ecdysis(
        ready_timeout=options.ready_timeout,
        drain_timeout=options.drain_timeout,
        exit_timeout=options.exit_timeout,
        max_draining=options.max_draining,
        probation=options.probation,
        pid_file=options.pid_file,
        env_file=options.env_file,
        websocket_close=options.websocket_close,  # type: ignore[arg-type] # one of two: see Options
        traces=options.traces,
    ) as ecdysis:
        try:
            app = await loaded.make(options)
            server = _choose_server(app, options)
            history.note(Note.STEP, what=f"load {options.target}", begun=loaded.begun)
            ecdysis.describe_serving = functools.partial(_describe_serving, options, server)
            if server == "main":
                await app(ecdysis)
            else:
                await _load_adapter(server).run(ecdysis, app, options)
        except StartupError:
            raise
        except (Exception, SystemExit) as error:
            if ecdysis.state not in (State.STARTING, State.WAITING):
                raise
            # Here and nowhere else: a predecessor reads it, and its restart answers with it.
            write_lines(describe_failure(error))
            text = f"{options.target} cannot start: {type(error).__name__}: {error}"
            if (taken := explain_taken(ecdysis, error)) is not None:
                text = f"{text}. {taken}"
            raise StartupError(text) from error


def _load_adapter(server: str) -> Any:
    with without_collections():
        return importlib.import_module(f"ecdysis_async.servers.{server}")


def _choose_server(app: Any, options: Options) -> str:
    """Find what serves an application, and see that it is there and fits the loop.

    Raises:
        StartupError: nothing does; the text says what would.
    """
    server, target = options.server, options.target
    if server == "websockets":
        if not inspect.iscoroutinefunction(app):
            raise StartupError(f"{target} is no handler of WebSockets, which is an `async def handler(websocket)`")
    elif "interface" not in options.server_options:
        server = _server_of(find_kind(app, target), options)
    elif server == "auto":
        server = "uvicorn"
    if server == "main":
        return server
    if importlib.util.find_spec(server) is None:
        raise StartupError(f"{target} needs {server}, which is not installed: pip install 'ecdysis_async[{server}]'")
    if options.loop == "trio" and server != "hypercorn":
        raise StartupError(f"{server} does not run on trio: choose another loop, or hypercorn, which does")
    return server


def _server_of(kind: Kind, options: Options) -> str:
    fitting = {Kind.ASGI: ASGI_SERVERS, Kind.AIOHTTP: ("aiohttp",), Kind.MAIN: ("main",)}[kind]
    if options.server not in ("auto", *fitting):
        raise StartupError(
            f"{options.target} is {kind.value}, which {options.server} does not serve: leave --server out, or take "
            + " or ".join(fitting)
        )
    if options.server != "auto" or kind is not Kind.ASGI:
        return options.server if options.server != "auto" else fitting[0]
    if options.loop == "trio":
        return "hypercorn"
    return next((each for each in ASGI_SERVERS if importlib.util.find_spec(each) is not None), "uvicorn")
