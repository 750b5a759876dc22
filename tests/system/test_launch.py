"""What is run as the successor: the same program, from the same place, with the environment of now."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async._system import launch
from ecdysis_async._system.claims import MARKER
from ecdysis_async._system.launch import Launch, describe_launch
from ecdysis_async.errors import RestartError, RestartUnsupported

# These modules alone, without those above them: the package claims the channel when it is imported.
BELOW_THE_PACKAGE = f"""
import sys, types
package = sys.modules["ecdysis_async"] = types.ModuleType("ecdysis_async")
package.__path__ = [{str(Path(launch.__file__).parents[1])!r}]
"""

# A service of DEPTH + 1 generations; the last one tells what it finds, and the others pass it on.
SERVICE = (
    BELOW_THE_PACKAGE
    + """
import json, os, socket, subprocess
from ecdysis_async._system.claims import take_channel
from ecdysis_async._system.launch import Launch, describe_launch
from ecdysis_async._system.process import spawn

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


# --- the command line ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    # What is above a directory is looked up before it is run: an interpreter finds its environment by its path.
    ("path", "follower"),
    [("./service", "./service"), ("bin/../service", "service")],
)
def test_a_console_script_runs_again(service: Path, path: str, follower: str) -> None:
    (service.parent / "bin").mkdir()
    script = service.parent / "service"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(service.parent)!r})\n{SERVICE}")
    script.chmod(0o755)
    found = run_service([path, "--workers", "2"], service.parent, before="os.chdir('/')")
    assert found["command"] == [sys.executable, os.path.join(service.parent, follower), "--workers", "2"]
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
    service.write_text("import sys\nsys.frozen = True; sys.orig_argv[0] = './no/such/program'\n" + SERVICE)
    found = run_service([sys.executable, "service.py"], service.parent)
    assert found["executable"] == sys.executable


@pytest.mark.parametrize("arguments", [["-"], []])
def test_a_program_on_standard_input_cannot_run_again(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "from ecdysis_async.errors import RestartUnsupported\n"
        "from ecdysis_async._system.launch import describe_launch\n"
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


# --- the working directory -----------------------------------------------------------------------------------


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


def test_the_environment_is_the_one_that_was_given(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "os.environ['MADE'] = 'by the application'\n"
        "from ecdysis_async._system.launch import describe_launch\n"
        "environment = describe_launch(['true'], None, None)[0].environment\n"
        "print(environment['GIVEN'], 'MADE' in environment)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "GIVEN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.split() == ["1", "False"]


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
        monkeypatch.setitem(launch._GIVEN, key, value)
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
    monkeypatch.setattr(launch, "_START_DIRECTORY", str(tmp_path))
    described, _ = describe_launch(["true"], {}, "env")
    assert described.environment == {"A": "1", "PWD": str(tmp_path)}


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


def test_a_release_that_is_pinned_is_found_behind_a_link_that_has_moved(tmp_path: Path) -> None:
    """A script's first line may name the interpreter by way of the link, though the script is found without it."""
    real, current = tmp_path / "1", tmp_path / "current"
    (real / "bin").mkdir(parents=True)
    (real / "bin/python").symlink_to(sys.executable)
    script = real / "bin/serve"
    script.write_text(f"#!{current}/bin/python -I\n")
    current.symlink_to("1")
    arguments = (
        f"{current}/bin/serve",
        "run",
        f"--env-file={current}/.env",
        "--app-dir",
        str(current),
        "a=b",
        "main:app",
    )
    environment = {"PWD": str(current), "PATH": f"{current}/bin:/usr/bin", "OTHER": str(current)}
    pinned = Launch(arguments, str(current), environment).pin()
    assert pinned == Launch(
        (
            f"{real}/bin/python",
            "-I",
            f"{real}/bin/serve",
            "run",
            f"--env-file={real}/.env",
            "--app-dir",
            str(real),
            "a=b",
            "main:app",
        ),
        str(real),
        {"PWD": str(real), "PATH": f"{real}/bin:{os.path.realpath('/usr/bin')}", "OTHER": str(current)},
    )
    assert pinned.pin() == pinned
    relative = Launch(("bin/serve",), str(current), {}).pin()
    assert relative.arguments == (f"{real}/bin/python", "-I", f"{real}/bin/serve")
    assert Launch(("serve", "-v"), None, {}).pin() == Launch(("serve", "-v"), None, {})


def test_a_script_behind_a_long_path_is_pinned_with_the_interpreter_of_its_second_line(tmp_path: Path) -> None:
    real, current = tmp_path / "1", tmp_path / "current"
    real.mkdir()
    (real / "python").symlink_to(sys.executable)
    (real / "serve").write_text(f"#!/bin/sh\n'''exec' \"{current}/python\" \"$0\" \"$@\"\n' '''\n")
    current.symlink_to("1")
    pinned = Launch((f"{current}/serve",), None, {}).pin()
    assert pinned.arguments == (f"{real}/python", f"{real}/serve")


def test_a_program_is_found_beside_where_a_link_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter takes `current/..` for the directory in which the link lies."""
    (tmp_path / "code" / "2").mkdir(parents=True)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "current").symlink_to(tmp_path / "code" / "2")
    monkeypatch.setattr(launch, "_START_DIRECTORY", str(tmp_path / "links" / "current"))
    monkeypatch.setattr(launch, "_COMMAND", ["../venv/bin/python", "-m", "app"])
    found, _ = launch.describe_launch(None, {}, None)
    assert found.arguments == (str(tmp_path / "code" / "venv" / "bin" / "python"), "-m", "app")


@pytest.mark.parametrize(
    ("options", "program"),
    [
        ("-m debugpy --listen 5678", "-m ecdysis_async.cli run main:app"),
        ("-m debugpy --listen 127.0.0.1:5678 --wait-for-client --configure-subProcess true", "main.py run"),
        ("-m debugpy --connect 5678", "-c pass"),
        ("", "-m ecdysis_async.cli run main:app -m debugpy"),
        ("", "main.py debugpy"),
    ],
)
def test_a_debugger_in_front_is_left_to_the_first_process(options: str, program: str) -> None:
    command = ["python", "-X", "frozen_modules=off", *options.split(), *program.split()]
    assert launch.leave_debugger(command) == ["python", "-X", "frozen_modules=off", *program.split()]
