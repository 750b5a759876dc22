"""The public names, their signatures and their hierarchy: what others build on."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import inspect
import os
import signal
import subprocess
import sys
from types import ModuleType

import pytest

import ecdysis_async
from ecdysis_async import Ecdysis, RestartError
from ecdysis_async._accepting import asyncio_datagrams, asyncio_servers
from ecdysis_async._system.claims import LINE_MARKER, MARKER
from ecdysis_async.cli.output import Exit

PUBLIC = {
    "DrainCount",
    "DrainInterrupt",
    "Ecdysis",
    "EcdysisError",
    "HandoffAborted",
    "InheritedStash",
    "NotReady",
    "Outcome",
    "Phase",
    "ReadyTimeout",
    "RestartError",
    "RestartInProgress",
    "RestartReport",
    "RestartUnsupported",
    "RestartWhileDraining",
    "RolledBack",
    "SpawnFailed",
    "StashFailed",
    "State",
    "SuccessorFailed",
    "TakeoverFailed",
    "WorkerExit",
    "current",
    "draining",
    "exclusive",
    "on_reopen_logs",
    "on_worker_exit",
    "run",
    "settled",
    "track",
    "until_draining",
}

OPTIONS = {
    "ready_timeout": 60,
    "drain_timeout": 30,
    "probation": 5,
    "max_draining": 8,
    "exit_timeout": 10,
    "restart_signals": (signal.SIGHUP, signal.SIGUSR2),
    "stop_signals": (signal.SIGTERM, signal.SIGINT),
    "pid_file": None,
    "control_socket": None,
    "systemd": None,
    "command": None,
    "environment": None,
    "env_file": None,
    "websocket_close": "spread",
    "takeover": None,
    "traces": False,
    "health_bind": None,
    "metrics": False,
    "status_page": False,
}

COROUTINES = {
    "create_datagram_endpoint",
    "create_server",
    "create_unix_server",
    "finished",
    "ready",
    "restart",
    "serve",
    "serve_forever",
    "start_server",
    "start_unix_server",
}
# Return the coroutine of the connection: one of its own around it would cost each request.
AWAITABLES = {"transfer", "until_draining"}
FUNCTIONS = {
    "adopt",
    "bind_udp",
    "bind_unix_datagram",
    "exclusive",
    "listen_fd",
    "listen_seqpacket",
    "listen_tcp",
    "listen_unix",
    "metrics",
    "stash",
    "stop",
    "track",
}
PROPERTIES = {
    "connections",
    "drain_timeout",
    "draining",
    "draining_generations",
    "generation",
    "inherited_stash",
    "is_successor",
    "last_report",
    "predecessor_pid",
    "settled",
    "state",
    "websocket_close",
}


def test_public_names() -> None:
    assert set(ecdysis_async.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(ecdysis_async, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        ecdysis_async.walk  # noqa: B018


def test_options_and_their_defaults() -> None:
    parameters = inspect.signature(Ecdysis).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == OPTIONS
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters.values())


def test_members() -> None:
    members = {name: getattr(Ecdysis, name) for name in dir(Ecdysis) if not name.startswith("_")}
    assert {name for name, member in members.items() if inspect.iscoroutinefunction(member)} == COROUTINES
    assert {name for name, member in members.items() if isinstance(member, property)} == PROPERTIES
    assert set(members) == COROUTINES | AWAITABLES | PROPERTIES | FUNCTIONS


def test_listeners_take_a_name_and_until() -> None:
    for name in FUNCTIONS - {"exclusive", "metrics", "stash", "stop", "track"}:
        parameters = inspect.signature(getattr(Ecdysis, name)).parameters
        assert {"name", "until"} <= set(parameters), name
        assert parameters["until"].default == "drain", name


def test_restart_and_stop() -> None:
    assert inspect.signature(Ecdysis.restart).parameters["until"].default == "serving"
    assert inspect.signature(Ecdysis.stop).parameters["partial"].default is False


def test_run_takes_the_loop_that_is_there() -> None:
    parameters = inspect.signature(ecdysis_async.run).parameters
    assert list(parameters)[:2] == ["main", "loop"]
    assert parameters["loop"].default == "auto"


@pytest.mark.parametrize(
    ("method", "module"),
    [
        ("create_server", asyncio_servers),
        ("create_unix_server", asyncio_servers),
        ("create_datagram_endpoint", asyncio_datagrams),
    ],
)
def test_servers_take_whatever_those_of_asyncio_take(method: str, module: ModuleType) -> None:
    theirs = inspect.signature(getattr(asyncio.BaseEventLoop, method)).parameters
    assert set(theirs) - {"self"} <= set(inspect.signature(getattr(module, method)).parameters)


def test_adapters_of_servers_begin_with_what_that_server_is_told() -> None:
    expected = {
        "uvicorn": ["ecdysis", "config"],
        "hypercorn": ["ecdysis", "app", "config"],
        "aiohttp": ["ecdysis", "app"],
    }
    for server, names in expected.items():
        serve = importlib.import_module(f"ecdysis_async.servers.{server}").serve
        assert inspect.iscoroutinefunction(serve)
        assert list(inspect.signature(serve).parameters)[: len(names)] == names


def test_exit_codes() -> None:
    assert {each.name: each.value for each in Exit if each < 128} == {
        "DONE": 0,
        "FAILED": 1,
        "USAGE": 2,
        "NO_SERVICE": 3,
        "IN_PROGRESS": 4,
        "ROLLED_BACK": 5,
        "UNKNOWN": 6,
        "PERMISSION": 7,
    }


def test_every_restart_error_is_one() -> None:
    for name in (
        "RestartInProgress",
        "NotReady",
        "SpawnFailed",
        "StashFailed",
        "SuccessorFailed",
        "ReadyTimeout",
        "RolledBack",
        "RestartWhileDraining",
        "RestartUnsupported",
    ):
        assert issubclass(getattr(ecdysis_async, name), RestartError), name


def test_an_error_shows_the_last_lines_of_stderr() -> None:
    error = ecdysis_async.SuccessorFailed("it died", phase="start", stderr="one\ntwo")
    assert str(error).splitlines()[-2:] == ["  | one", "  | two"]
    assert error.phase == "start"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ready_timeout": -1}, "ready_timeout is a number of seconds"),
        ({"ready_timeout": 0}, "no time at all"),
        ({"drain_timeout": float("nan")}, "drain_timeout is a number of seconds"),
        ({"probation": -0.1}, "probation is a number of seconds"),
        ({"max_draining": 0}, "max_draining"),
        ({"restart_signals": [signal.SIGTERM]}, "SIGTERM cannot both"),
        ({"stop_signals": [signal.SIGKILL]}, "SIGKILL cannot be handled"),
        ({"stop_signals": [4711]}, "4711"),
        ({"command": []}, "command is empty"),
        ({"control_socket": ""}, "a control socket is a path"),
        ({"control_socket": "@abstract"}, "a control socket is a path"),
        ({"systemd": True}, "NOTIFY_SOCKET is not set"),
        ({"takeover": "@abstract"}, "a control socket is a path"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_given(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ecdysis(**options)  # type: ignore[arg-type]


def test_a_command_in_one_string_is_refused_with_the_list_it_should_be() -> None:
    with pytest.raises(TypeError, match=r"\['python', 'app.py'\]"):
        Ecdysis(command="python app.py")


def test_current_outside_of_a_block() -> None:
    with pytest.raises(LookupError, match="async with Ecdysis"):
        ecdysis_async.current()


def test_a_service_on_trio_never_loads_asyncio() -> None:
    program = "import sys, ecdysis_async; ecdysis_async.Ecdysis; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_command_loads_nothing_of_a_service() -> None:
    program = "import sys, ecdysis_async.cli.control; print({'anyio', 'asyncio', 'rich'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"set()\n"


def test_the_version_is_the_one_that_is_packaged() -> None:
    program = "import sys, ecdysis_async; print(ecdysis_async.__version__, 'importlib.metadata' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == f"{importlib.metadata.version('ecdysis_async')} False\n"


def test_an_anchor_loads_nothing_of_what_only_a_worker_runs() -> None:
    program = (
        "import sys, ecdysis_async.cli.run, ecdysis_async.cli.anchor\n"
        "print([name for name in sys.modules if name.startswith('ecdysis_async._service')])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"[]\n"


@pytest.mark.parametrize("key", [MARKER, LINE_MARKER, "LISTEN_PID"])
def test_what_was_passed_is_claimed_with_the_package(key: str) -> None:
    """Before the application can start a process that would find it as well."""
    program = f"import os, ecdysis_async; print({key!r} in os.environ)"
    outcome = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, key: "1:2:3"}, capture_output=True, check=True
    )
    assert outcome.stdout == b"False\n"


def test_what_is_loaded_later_is_listed() -> None:
    program = "import ecdysis_async; print({*ecdysis_async.__all__} - {*dir(ecdysis_async)})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"set()\n"


# Windows is not at hand: what it lacks is taken away before the import. The loop, which stays, is made before that.
WITHOUT_THE_MEANS = """
import asyncio, os, select, signal, socket
import anyio, anyio._backends._asyncio

async def main():
    import ecdysis_async
    async with ecdysis_async.Ecdysis() as ecdysis:
        await ecdysis.ready()
        try:
            await ecdysis.restart()
        except ecdysis_async.RestartUnsupported as error:
            print(ecdysis.state.value, error)

with asyncio.Runner() as runner:
    runner.get_loop()
    for name in ("SIGHUP", "SIGKILL", "SIGSTOP", "SIGUSR1", "SIGUSR2", "pidfd_send_signal"):
        delattr(signal, name)
    for name in ("pipe2", "pidfd_open", "memfd_create", "MFD_CLOEXEC"):
        delattr(os, name)
    for name in ("SCM_RIGHTS", "MSG_CMSG_CLOEXEC", "SO_REUSEPORT", "AF_UNIX"):
        delattr(socket, name)
    del select.poll
    os.name = "nt"
    runner.run(main())
"""


def test_a_platform_without_the_means_serves_and_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_MEANS], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "no signals can be handled" in done.stderr
    assert done.stdout.startswith("serving a restart needs pidfds")


async def test_asyncio_servers_say_what_to_use_on_trio(backend: str) -> None:
    async with Ecdysis(restart_signals=(), stop_signals=()) as ecdysis:
        if backend == "trio":
            with pytest.raises(RuntimeError, match="listen_tcp"):
                await ecdysis.start_server(_never_called, "127.0.0.1", 0)
        else:
            server = await ecdysis.start_server(_never_called, "127.0.0.1", 0)
            assert isinstance(server, asyncio.AbstractServer)
        await ecdysis.ready()


async def _never_called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    raise AssertionError("nobody connects")
