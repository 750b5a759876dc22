"""The successor's process: the same program again, from where it was started, with nothing but what it shall have."""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from ecdysis_async._system import process as spawn_module
from ecdysis_async._system.claims import MARKER
from ecdysis_async._system.process import (
    UNKNOWN_STATUS,
    Launch,
    Process,
    describe_end,
    describe_exit,
    describe_launch,
    spawn,
    supported,
)
from ecdysis_async.errors import RestartError, RestartUnsupported, SpawnFailed

# These modules alone, without those above them: the package claims the channel when it is imported.
BELOW_THE_PACKAGE = f"""
import sys, types
package = sys.modules["ecdysis_async"] = types.ModuleType("ecdysis_async")
package.__path__ = [{str(Path(spawn_module.__file__).parents[1])!r}]
"""

# A service of DEPTH + 1 generations; the last one tells what it finds, and the others pass it on.
SERVICE = (
    BELOW_THE_PACKAGE
    + """
import json, os, socket, subprocess
from ecdysis_async._system.claims import take_channel
from ecdysis_async._system.process import describe_launch, spawn

RELEASE = "one"


def find_descriptors():
    numbers = [int(number) for number in os.listdir("/proc/self/fd")]
    return sorted(number for number in numbers if os.path.lexists(f"/proc/self/fd/{number}"))


def describe(channel):
    try:
        directory = os.getcwd()
    except FileNotFoundError:
        directory = None
    return {
        "release": RELEASE,
        "arguments": sys.argv[1:],
        "command": sys.orig_argv,
        "executable": sys.executable,
        "optimize": sys.flags.optimize,
        "options": sys._xoptions,
        "warnings": sys.warnoptions,
        "module": __spec__ and __spec__.name,
        "directory": directory,
        "descriptors": [number for number in find_descriptors() if number != channel.fileno()],
        "environment": dict(os.environ),
        "grandchild": subprocess.run(["env"], close_fds=False, capture_output=True, text=True).stdout,
        "inheritable": os.get_inheritable(channel.fileno()),
    }


def main():
    upward = take_channel()
    depth = int(os.environ["DEPTH"])
    if depth:
        exec(os.environ.get("BEFORE", ""))
        ours, theirs = socket.socketpair()
        launch, _ = describe_launch(None, {**os.environ, "DEPTH": str(depth - 1)}, None)
        process = spawn(launch, theirs, 2)
        theirs.close()
        text = ours.makefile().read()
        os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED)
    else:
        text = json.dumps(describe(upward))
    if upward is None:
        print(text)
    else:
        upward.makefile("w").write(text)


if __name__ == "__main__":
    main()
"""
)

PYTHONPATH = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])


def run_service(
    command: Sequence[str | Path], directory: Path, *, before: str = "", depth: int = 1, **environment: str
) -> dict[str, Any]:
    """Start a service, let it restart, and return what its last generation finds."""
    finished = subprocess.run(
        list(map(str, command)),
        cwd=directory,
        env={
            **os.environ,
            "PWD": str(directory),
            "PYTHONPATH": PYTHONPATH,
            "BEFORE": before,
            "DEPTH": str(depth),
            **environment,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stderr == ""
    assert finished.returncode == 0
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


@pytest.fixture
def service(tmp_path: Path) -> Path:
    path = tmp_path / "service.py"
    path.write_text(SERVICE)
    return path


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """Make an interpreter with a path of its own."""
    path = tmp_path / "bin" / "own-python"
    path.parent.mkdir()
    path.symlink_to(sys.executable)
    return path


@pytest.fixture
def theirs() -> Iterator[socket.socket]:
    """Make the end of a channel that a child gets."""
    here, there = socket.socketpair()
    with here, there:
        yield there


@pytest.fixture
def start(theirs: socket.socket) -> Iterator[Callable[..., Process]]:
    """Start commands; they are ended, and reaped, with the test."""
    started = []

    def start(*command: str) -> Process:
        process = spawn(launch_of(*command), theirs, 2)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED)
        process.close()


def launch_of(*command: str) -> Launch:
    launch, _ = describe_launch(command, None, None)
    return launch


def stop(process: Process) -> None:
    """Stop it, and return once it is stopped: signals that wait beside SIGSTOP may be served before it."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def is_alive(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


# --- the command line (trap 9) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "module"),
    [
        (["service.py"], None),
        (["-m", "service"], "service"),
        (["-m", "package"], "package.__main__"),
        (["-c", "import service; service.main()"], "service"),
        (["-Ic", f"import sys; sys.path += {sys.path!r}\n{SERVICE}"], None),
        (["directory"], "__main__"),
    ],
    ids=["file", "module", "package", "code", "isolated code", "directory"],
)
def test_the_same_program_runs_again(service: Path, program: list[str], module: str | None) -> None:
    for name in "package", "directory":
        (service.parent / name).mkdir()
        (service.parent / name / "__main__.py").write_text(SERVICE)
    command = [sys.executable, *program, "--bind", "127.0.0.1:0"]
    found = run_service(command, service.parent, before="os.chdir('/')", depth=2)
    assert found["command"] == command
    assert found["arguments"] == ["--bind", "127.0.0.1:0"]
    assert found["module"] == module
    assert found["directory"] == str(service.parent)


def test_flags_of_the_interpreter_are_kept(service: Path) -> None:
    flags = ["-OO", "-Xutf8=1", "-X", "int_max_str_digits=5000", "-W", "error::UserWarning"]
    found = run_service([sys.executable, *flags, "service.py"], service.parent)
    assert found["optimize"] == 2
    assert found["options"] == {"utf8": "1", "int_max_str_digits": "5000"}
    assert found["warnings"] == ["error::UserWarning"]


@pytest.mark.parametrize("path", ["./service", "bin/../service"])
def test_a_console_script_runs_again(service: Path, path: str) -> None:
    (service.parent / "bin").mkdir()
    script = service.parent / "service"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(service.parent)!r})\n{SERVICE}")
    script.chmod(0o755)
    found = run_service([path, "--workers", "2"], service.parent, before="os.chdir('/')")
    assert found["command"] == [sys.executable, path, "--workers", "2"]
    assert found["arguments"] == ["--workers", "2"]


def test_a_relative_interpreter_is_found_from_the_start_directory(service: Path, interpreter: Path) -> None:
    found = run_service(["bin/own-python", "service.py"], service.parent, before="os.chdir('/')", depth=2)
    assert found["command"] == [str(interpreter), "service.py"]
    assert found["executable"] == str(interpreter)


def test_an_interpreter_of_the_path_is_found_without_it(service: Path, interpreter: Path) -> None:
    path = f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"
    # Found on PATH by a shell, which leaves the bare name in argv[0].
    command = ["sh", "-c", "exec own-python service.py"]
    found = run_service(command, service.parent, before="os.environ['PATH'] = '/usr/bin:/bin'", PATH=path)
    # As it was found, not what it is a symlink to: a virtual environment is known by that name.
    assert found["command"] == [str(interpreter), "service.py"]
    assert found["executable"] == str(interpreter)


def test_a_frozen_program_is_its_own_interpreter(service: Path) -> None:
    before = "sys.frozen = True; sys.orig_argv[0] = './no/such/program'"
    found = run_service([sys.executable, "service.py"], service.parent, before=before)
    assert found["command"] == [sys.executable, "service.py"]


@pytest.mark.parametrize("arguments", [["-"], []])
def test_a_program_on_standard_input_cannot_run_again(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "from ecdysis_async.errors import RestartUnsupported\n"
        "from ecdysis_async._system.process import describe_launch\n"
        "try:\n"
        "    describe_launch(None, None, None)\n"
        "except RestartUnsupported as error:\n"
        "    print(error)\n"
        "print(describe_launch(['true'], None, None)[0].arguments)\n"
    )
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        input=code,
        capture_output=True,
        text=True,
        check=True,
    )
    message, arguments_line = finished.stdout.splitlines()
    assert "standard input" in message
    assert "command=" in message
    assert arguments_line == "('true',)"


def test_an_empty_command_is_refused() -> None:
    with pytest.raises(RestartUnsupported, match="empty"):
        describe_launch([], None, None)


# --- the working directory (trap 9) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_current_symlink_that_moved_is_followed(tmp_path: Path, is_absolute: bool) -> None:
    for release in "one", "two":
        directory = tmp_path / release
        directory.mkdir()
        (directory / "service.py").write_text(SERVICE.replace('RELEASE = "one"', f"RELEASE = {release!r}"))
    current = tmp_path / "current"
    current.symlink_to("one")
    move = f"os.symlink('two', {str(tmp_path / 'next')!r}); os.rename({str(tmp_path / 'next')!r}, {str(current)!r})"
    script = current / "service.py" if is_absolute else "service.py"
    found = run_service([sys.executable, script], current, before=f"if RELEASE == 'one': {move}", depth=2)
    assert found["release"] == "two"
    assert found["directory"] == str(tmp_path / "two")
    # So that the next move is followed as well.
    assert found["environment"]["PWD"] == str(current)


@pytest.mark.parametrize("shell_directory", ["/", "/nowhere", "relative", ""])
def test_a_pwd_that_is_elsewhere_is_not_believed(service: Path, shell_directory: str) -> None:
    found = run_service([sys.executable, "service.py"], service.parent, before="os.chdir('/')", PWD=shell_directory)
    assert found["directory"] == str(service.parent)
    assert found["environment"]["PWD"] == str(service.parent)


def test_a_deleted_directory_does_not_break_the_restart(service: Path, tmp_path: Path) -> None:
    directory = tmp_path / "deleted"
    directory.mkdir()
    before = f"if os.path.exists({str(directory)!r}): os.rmdir({str(directory)!r})"
    # The second generation begins in it, and has a successor of its own.
    found = run_service([sys.executable, service], directory, before=before, depth=2)
    assert found["directory"] is None


# --- what the child gets ----------------------------------------------------------------------------------------------


def test_only_the_channel_is_inherited(service: Path) -> None:
    before = "os.set_inheritable(os.open('/dev/null', os.O_RDONLY), True)"
    found = run_service([sys.executable, "service.py"], service.parent, before=before)
    assert found["descriptors"] == [0, 1, 2]


def test_nothing_of_the_handoff_reaches_grandchildren(service: Path) -> None:
    # Trap 7.
    found = run_service([sys.executable, "service.py"], service.parent, depth=2)
    assert MARKER not in found["environment"]
    assert MARKER not in found["grandchild"]
    assert not found["inheritable"]


def test_variables_of_this_process_alone_are_left_out() -> None:
    private = dict.fromkeys(
        ["LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", MARKER], "1"
    )
    kept = {"WATCHDOG_USEC": "1", "NOTIFY_SOCKET": "@notify", "A": "b"}
    launch, keys = describe_launch(["true"], private | kept, None)
    assert launch.environment.pop("PWD") == launch.directory
    assert launch.environment == kept
    assert keys == ()


def test_the_environment_of_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDED_LATER", "1")
    launch, _ = describe_launch(["true"], None, None)
    assert launch.environment == {**os.environ, "PWD": launch.directory}


async def test_its_stderr_is_the_one_given(theirs: socket.socket) -> None:
    reading, writing = os.pipe()
    process = spawn(launch_of("sh", "-c", "echo to stderr >&2"), theirs, writing)
    os.close(writing)
    with open(reading, "rb") as stream:
        assert await anyio.to_thread.run_sync(stream.read) == b"to stderr\n"
    assert await process.wait() == 0
    process.close()


# --- the env file -----------------------------------------------------------------------------------------------------


def test_an_env_file_is_read_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "env"
    path.write_text("# settings\nA=1\nexport B='two words'\nC=${A}\nNO_VALUE\nKEPT=file\n")
    environment = {"KEPT": "environment", "OTHER": "x"}
    first, keys = describe_launch(["true"], environment, path)
    assert keys == ("A", "B", "C", "KEPT")
    del first.environment["PWD"]
    assert first.environment == {"A": "1", "B": "two words", "C": "${A}", "KEPT": "file", "OTHER": "x"}
    # The second generation has them in its environment, and reads a file without some of them.
    path.write_text("A=2\n")
    for key, value in first.environment.items():
        monkeypatch.setenv(key, value)
    second, keys = describe_launch(["true"], None, path, keys)
    assert keys == ("A",)
    assert second.environment["A"] == "2"
    assert second.environment["OTHER"] == "x"
    assert not {"B", "C", "KEPT"} & set(second.environment)


def test_an_explicit_environment_keeps_what_an_env_file_once_had(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("PORT=81\n")
    first, keys = describe_launch(["true"], {"PORT": "80"}, path)
    assert first.environment["PORT"] == "81"
    path.write_text("")
    second, keys = describe_launch(["true"], {"PORT": "80"}, path, keys)
    assert second.environment["PORT"] == "80"
    assert keys == ()


def test_an_env_file_is_relative_to_the_start_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env").write_text("A=1\n")
    monkeypatch.setattr(spawn_module, "_START_DIRECTORY", str(tmp_path))
    launch, _ = describe_launch(["true"], {}, "env")
    assert launch.environment == {"A": "1", "PWD": str(tmp_path)}


@pytest.mark.parametrize("content", [None, b"A=\xff\n"])
def test_an_env_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "env"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RestartError, match=f"the env file {path} cannot be read"):
        describe_launch(["true"], None, path)


def test_without_python_dotenv_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dotenv", None)
    with pytest.raises(RestartError, match=r"pip install 'ecdysis_async\[env-file\]'"):
        describe_launch(["true"], None, tmp_path / "env")
    describe_launch(["true"], None, None)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        (None, 0, r"No such file.*restore it, or set command="),
        ("#!/no/such/interpreter\n", 0o755, r"No such file.*interpreter"),
        ("#!/bin/sh\n", 0o644, r"Permission denied.*chmod \+x"),
        ("\0\1\2", 0o755, r"Exec format error.*#!"),
    ],
)
async def test_an_exec_fails_and_then_succeeds(
    theirs: socket.socket, tmp_path: Path, content: str | None, mode: int, expected: str
) -> None:
    program = tmp_path / "program"
    if content is not None:
        program.write_text(content)
        program.chmod(mode)
    with pytest.raises(SpawnFailed, match=f"cannot start '{program}': {expected}") as raised:
        spawn(launch_of(str(program)), theirs, 2)
    assert raised.value.phase == "start"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    process = spawn(launch_of(str(program)), theirs, 2)
    assert await process.wait() == 7
    process.close()


def test_a_directory_that_vanished_is_named(theirs: socket.socket, tmp_path: Path) -> None:
    launch = Launch(("true",), str(tmp_path / "gone"), dict(os.environ))
    with pytest.raises(SpawnFailed, match=r"cannot start 'true' in '.*gone': No such file"):
        spawn(launch, theirs, 2)


def test_arguments_that_no_kernel_takes(theirs: socket.socket) -> None:
    with pytest.raises(SpawnFailed, match="null"):
        spawn(launch_of("true", "a\0b"), theirs, 2)
    with pytest.raises(SpawnFailed, match="shorten"):
        spawn(launch_of("true", "x" * 10_000_000), theirs, 2)


def test_what_is_no_text_is_a_failure_like_others(theirs: socket.socket) -> None:
    variables: dict[str, Any] = {**os.environ, "PORT": 8000}
    with pytest.raises(SpawnFailed, match=r"cannot start 'true': .*int"):
        spawn(Launch(("true",), None, variables), theirs, 2)


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.backends("asyncio")
@pytest.mark.parametrize("is_kept", [False, True])
async def test_no_memory_is_copied_to_start_it(backend: str, theirs: socket.socket, is_kept: bool) -> None:
    """DESIGN.md, trap 12: after a fork each page that this process writes to is a fault, and the fork is a stall."""
    pages = 4096
    with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for generation in range(2):
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = generation
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            if generation == 0:
                # The first touch of each: what is counted is what is meant.
                assert faults >= pages
                process = spawn(launch_of("true"), theirs, 2, is_kept=is_kept)
                await process.wait()
                process.close()
    assert faults < pages // 2


async def test_any_number_of_tasks_may_wait(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    first = anyio.CancelScope()
    codes: list[int] = []

    async def wait(scope: anyio.CancelScope) -> None:
        with scope:
            codes.append(await process.wait())

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, first)
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                tasks.start_soon(wait, anyio.CancelScope())
            await anyio.wait_all_tasks_blocked()
            # The one that watches for all of them gives up.
            first.cancel()
            await anyio.wait_all_tasks_blocked()
            process.send_signal(signal.SIGUSR1)
    assert codes == [-signal.SIGUSR1] * 3
    assert await process.wait() == process.returncode == -signal.SIGUSR1


@pytest.mark.parametrize("status", [0, 1, 255])
async def test_the_exit_status_is_returned(start: Callable[..., Process], status: int) -> None:
    assert await start("sh", "-c", f"exit {status}").wait() == status


async def test_cancelling_a_wait_leaves_it_to_the_next(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    for _ in range(3):
        with anyio.move_on_after(0.001):
            await process.wait()
        assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL


async def test_end_asks_before_it_kills(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    assert await process.end(30) == -signal.SIGTERM
    # Over, and whoever has the number now is not touched.
    process.send_signal(signal.SIGKILL)
    assert await process.end(30) == -signal.SIGTERM


async def test_end_kills_what_is_stopped(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    stop(process)
    with anyio.fail_after(60):
        assert await process.end(0.01) == -signal.SIGKILL


async def test_end_kills_at_once_when_it_is_cancelled(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    stop(process)
    with anyio.fail_after(60), anyio.move_on_after(0.01) as scope:
        await process.end(600)
    assert scope.cancelled_caught
    assert process.returncode == -signal.SIGKILL


async def test_a_child_that_somebody_else_reaped(start: Callable[..., Process]) -> None:
    process = start("true")
    await anyio.to_thread.run_sync(os.waitpid, process.pid, 0)
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == UNKNOWN_STATUS


async def test_signals_are_sent_to_the_living(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    assert process.send_signal(signal.SIGTERM)
    assert await process.wait() == -signal.SIGTERM
    assert not process.send_signal(signal.SIGTERM)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not signal its child")
async def test_one_of_another_user_is_left_alive(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    os.setresuid(65534, 65534, 0)
    try:
        assert not process.send_signal(signal.SIGTERM)
        assert await process.end(grace=0.01) == UNKNOWN_STATUS
        assert process.returncode is None
    finally:
        os.setresuid(0, 0, 0)
    assert process.send_signal(signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL


def test_it_outlives_the_object_without_a_warning(start: Callable[..., Process]) -> None:
    process = start("sleep", "600")
    pidfd = os.dup(process.pidfd)
    process.close()
    process.close()
    gc.collect()
    # A Popen that is created afterwards reaps those that were forgotten; not this one.
    subprocess.run(["true"], check=True)
    assert is_alive(pidfd)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    process.returncode = -signal.SIGKILL
    os.close(pidfd)


@pytest.mark.backends("asyncio")
async def test_a_hundred_children_leave_nothing(theirs: socket.socket) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        process = await anyio.to_thread.run_sync(spawn, launch_of("true"), theirs, 2)
        assert await process.wait() == 0
        process.close()
        assert not os.path.exists(f"/proc/{process.pid}/stat")
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_describe_exit() -> None:
    assert describe_exit(0) == "exit status 0"
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL"
    assert describe_exit(-(signal.SIGRTMIN + 3)) == f"killed by signal {signal.SIGRTMIN + 3}"
    assert (describe_end(7), describe_end(-signal.SIGKILL)) == ("ended with exit status 7", "was killed by SIGKILL")


def test_supported_here() -> None:
    assert supported()


def test_platforms_without_the_means_can_import_it() -> None:
    code = (
        f"{BELOW_THE_PACKAGE}\n"
        "import os, signal, socket\n"
        "import anyio\n"
        "for module, names in {\n"
        "    os: ['pidfd_open', 'waitid', 'P_PIDFD', 'WEXITED', 'CLD_EXITED', 'fchmod'],\n"
        "    signal: ['pidfd_send_signal', 'SIGKILL'],\n"
        "    socket: ['AF_UNIX', 'CMSG_SPACE', 'SCM_RIGHTS', 'MSG_CMSG_CLOEXEC', 'MSG_NOSIGNAL'],\n"
        "}.items():\n"
        "    for name in names:\n"
        "        delattr(module, name)\n"
        "import ecdysis_async._ipc.channel\n"
        "from ecdysis_async._sockets.registry import Registry\n"
        "from ecdysis_async._system.process import supported\n"
        "assert not supported()\n"
        "registry = Registry()\n"
        "assert registry.listen_tcp('127.0.0.1', 0).kind.value == 'tcp'\n"
        "registry.close(unlink=True)\n"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, env={**os.environ, "PYTHONPATH": PYTHONPATH}
    )
