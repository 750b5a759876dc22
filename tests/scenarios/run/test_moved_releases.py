"""Releases with an environment each, behind a `current` that moves: code, environment and env file change together."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import PROJECT, QUICK, Run, by_tcp, get, run_command

# The loop makes no difference to what is run.
pytestmark = [pytest.mark.newest_python_only, pytest.mark.backends("asyncio")]

APP = """
import os
import own_package

async def app(scope, receive, send):
    body = f"{CODE} {own_package.RELEASE} {os.environ.get('OF')} {os.environ.get('ONLY_ONE')}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""

SCRIPT = "import sys\nfrom ecdysis_async.cli import main\nsys.exit(main())\n"


def make_release(root: Path, number: int, *, is_trampoline: bool = False) -> None:
    """Make a release: its code, its env file, and a virtual environment with a package and a script of its own."""
    release = root / "releases" / str(number)
    binaries = release / "venv" / "bin"
    packages = release / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    binaries.mkdir(parents=True)
    packages.mkdir(parents=True)
    interpreter: str = sys._base_executable  # type: ignore[attr-defined] # what venv(3) takes
    (binaries / "python").symlink_to(interpreter)
    (release / "venv" / "pyvenv.cfg").write_text(f"home = {Path(interpreter).resolve().parent}\n")
    paths = [str(PROJECT), *site.getsitepackages()]
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (packages / "shared.pth").write_text("\n".join([*paths, *lines]))
    (packages / "own_package.py").write_text(f"RELEASE = {number}\n")
    own = binaries / "python"
    first = f"#!/bin/sh\n'''exec' {own} \"$0\" \"$@\"\n' '''\n" if is_trampoline else f"#!{own}\n"
    (binaries / "ecdysis").write_text(first + SCRIPT)
    (binaries / "ecdysis").chmod(0o755)
    (release / "main.py").write_text(f"CODE = {number}\n{APP}")
    (release / ".env").write_text(f"OF={number}\n" + ("ONLY_ONE=yes\n" if number == 1 else ""))


def move(root: Path, number: int) -> None:
    """Let `current` lead to a release."""
    (root / "next").symlink_to(f"releases/{number}")
    (root / "next").replace(root / "current")


class Service:
    """A service whose releases stand behind a link."""

    def __init__(
        self, root: Path, process: subprocess.Popen[bytes], log: asyncio.StreamReader, reading: asyncio.BaseTransport
    ) -> None:
        self._reading = reading
        self.run = Run(process, str(root / "control"))
        self._listening = asyncio.create_task(self.run.listen(log))

    async def find_answer(self) -> str:
        """Return of which release code, environment and env file are, and what only the first env file has."""
        return await get(by_tcp(await self.run.find_port()))

    async def stop(self) -> None:
        """Stop it, and wait for the end of its last process."""
        self.run.process.terminate()
        await self._listening
        self._reading.close()
        await asyncio.to_thread(self.run.process.wait)


async def start(root: Path, command: list[str], directory: Path, **environment: str | None) -> Service:
    """Start a service, and wait until it serves."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PWD")}
    variables |= {name: value for name, value in environment.items() if value is not None}
    control = str(root / "control")
    options = ("run", "main:app", "--bind", "127.0.0.1:0", *QUICK, "--env-file", ".env", "--control", control)
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:
        process = subprocess.Popen([*command, *options], cwd=directory, env=variables, stdout=pipe, stderr=pipe)
    log = asyncio.StreamReader()
    reading, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(log), os.fdopen(reader, "rb")
    )
    service = Service(root, process, log, reading)
    await service.run.find_port()
    return service


LAUNCHERS = {
    "script by the link": ("{root}/current/venv/bin/ecdysis",),
    "relative script": ("venv/bin/ecdysis",),
    "module by the link": ("{root}/current/venv/bin/python", "-m", "ecdysis_async.cli"),
    "relative module": ("venv/bin/python", "-m", "ecdysis_async.cli"),
    "activated script": ("{root}/releases/1/venv/bin/ecdysis",),
    "activated module": ("{root}/releases/1/venv/bin/python", "-m", "ecdysis_async.cli"),
    "trampoline": ("{root}/current/venv/bin/ecdysis",),
}


@pytest.mark.parametrize(
    ("launcher", "has_pwd"),
    [
        *((name, True) for name in LAUNCHERS),
        ("script by the link", False),
        ("module by the link", False),
        ("trampoline", False),
    ],
)
async def test_code_environment_and_env_file_follow_the_link(tmp_path: Path, launcher: str, has_pwd: bool) -> None:
    for number in 1, 2, 3:
        make_release(tmp_path, number, is_trampoline=launcher == "trampoline")
    move(tmp_path, 1)
    current = tmp_path / "current"
    command = [each.format(root=tmp_path) for each in LAUNCHERS[launcher]]
    service = await start(tmp_path, command, current, PWD=str(current) if has_pwd else None)
    try:
        assert await service.find_answer() == "1 1 1 yes"
        move(tmp_path, 2)
        status = (await asyncio.to_thread(run_command, "status", "--control", str(tmp_path / "control")))[1]
        assert re.search(
            rf"a restart +would run {tmp_path}/releases/2/venv/bin/\S+\n +in {tmp_path}/releases/2$",
            status,
            re.MULTILINE,
        )
        code, answer = await service.run.restart()
        assert code == 0, answer
        assert await service.find_answer() == "2 2 2 None"
        shutil.rmtree(tmp_path / "releases" / "1")
        move(tmp_path, 3)
        for arguments in ("--anchor",), ():
            code, answer = await service.run.restart(*arguments)
            assert code == 0, answer
        assert await service.find_answer() == "3 3 3 None"
        status = (await asyncio.to_thread(run_command, "status", "--control", str(tmp_path / "control")))[1]
        assert str(tmp_path / "releases" / "3") in status
    finally:
        await service.stop()


async def test_a_link_that_cannot_be_followed_is_named(tmp_path: Path) -> None:
    for number in 1, 2:
        make_release(tmp_path, number)
    move(tmp_path, 1)
    # Neither PWD nor a path in the command line goes through the link.
    service = await start(tmp_path, ["venv/bin/ecdysis"], tmp_path / "current")
    try:
        await service.run.wait_for(f"the link {tmp_path}/current leads to")
        status = (await asyncio.to_thread(run_command, "status", "--control", str(tmp_path / "control")))[1]
        assert f"{tmp_path}/current is not followed when it moves" in status
    finally:
        await service.stop()


@pytest.mark.parametrize("gone", ["venv/bin/python", "venv/bin/ecdysis", ".env", ""])
async def test_what_is_gone_is_named_before_anything_changes(tmp_path: Path, gone: str) -> None:
    for number in 1, 2:
        make_release(tmp_path, number)
    move(tmp_path, 1)
    current = tmp_path / "current"
    service = await start(tmp_path, [f"{current}/venv/bin/ecdysis"], current, PWD=str(current))
    try:
        (tmp_path / "current").unlink()
        if gone:
            (tmp_path / "releases" / "2" / gone).unlink()
            (tmp_path / "current").symlink_to("releases/2")
        code, answer = await service.run.restart()
        assert code == 1
        assert (gone or str(current)) in answer
        assert "--command" in answer or "put it back" in answer
        assert await service.find_answer() == "1 1 1 yes"
    finally:
        await service.stop()


async def test_a_command_of_its_own_runs_the_workers(tmp_path: Path) -> None:
    for number in 1, 2:
        make_release(tmp_path, number)
    move(tmp_path, 1)
    current = tmp_path / "current"
    options = f"--bind 127.0.0.1:0 --app-dir {current} --env-file {current}/.env --control {tmp_path}/control"
    worker = f"{current}/venv/bin/ecdysis run main:app {options}"
    pinned = [f"{tmp_path}/releases/1/venv/bin/ecdysis"]
    service = await start(tmp_path, pinned, tmp_path / "releases" / "1", ECDYSIS_COMMAND=worker, ECDYSIS_PROBATION="0")
    try:
        assert await service.find_answer() == "1 1 1 yes"
        move(tmp_path, 2)
        (tmp_path / "releases" / "1" / ".env").write_text("")
        code, answer = await service.run.restart()
        assert code == 0, answer
        assert await service.find_answer() == "2 2 2 None"
    finally:
        await service.stop()
