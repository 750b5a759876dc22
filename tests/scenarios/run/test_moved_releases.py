"""Releases with an environment each, behind a `current` that moves: code, environment and env file change together."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import trustme

from tests.scenarios.moving import APART, LAUNCHERS, LINKS, UV, make_parts, make_release, move

from .harness import QUICK, Run, by_tcp, get, run_command

# The loop makes no difference to what is run.
pytestmark = [pytest.mark.main_python_only, pytest.mark.backends("asyncio")]


class Service:
    """A service whose releases stand behind a link."""

    def __init__(
        self,
        root: Path,
        process: subprocess.Popen[bytes],
        log: asyncio.StreamReader,
        reading: asyncio.BaseTransport,
        control: str = "control",
    ) -> None:
        self._reading = reading
        self.run = Run(process, str(root / control))
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


async def start(
    root: Path,
    command: list[str],
    directory: Path,
    *more: str,
    env_file: str = ".env",
    found_control: str = "control",
    **environment: str | None,
) -> Service:
    """Start a service, and wait until it serves."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PWD")}
    variables |= {name: value for name, value in environment.items() if value is not None}
    control = str(root / "control")
    options = ("run", "main:app", "--bind", "127.0.0.1:0", *QUICK, "--env-file", env_file, "--control", control, *more)
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:
        process = subprocess.Popen([*command, *options], cwd=directory, env=variables, stdout=pipe, stderr=pipe)
    log = asyncio.StreamReader()
    reading, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(log), os.fdopen(reader, "rb")
    )
    service = Service(root, process, log, reading, found_control)
    await service.run.find_port()
    return service


# How it can be known, without PWD, that a service was started by way of the link: its command line says so.
KNOWN_WITHOUT_PWD = (
    "script by the link",
    "module by the link",
    "trampoline",
    "self-executing by the link",
    "uv run in a directory",
)


@pytest.mark.parametrize("launcher", LAUNCHERS)
async def test_code_environment_and_env_file_follow_the_link(tmp_path: Path, launcher: str) -> None:
    if launcher.startswith("uv") and not UV:
        pytest.skip("uv is not installed")
    for number in 1, 2, 3:
        make_release(tmp_path, number, is_trampoline=launcher == "trampoline")
    move(tmp_path, 1)
    current = tmp_path / "current"
    command = [each.format(root=tmp_path) for each in LAUNCHERS[launcher]]
    service = await start(tmp_path, command, current, PWD=None if launcher in KNOWN_WITHOUT_PWD else str(current))
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


async def test_relative_files_follow_the_link_but_for_those_that_stay(tmp_path: Path) -> None:
    """Certificates and the settings of logging are the new release's; the service is commanded where it was."""
    authority = trustme.CA()
    for number in 1, 2:
        make_release(tmp_path, number)
        release = tmp_path / "releases" / str(number)
        certificate = authority.issue_cert("localhost", organization_name=f"release {number}")
        certificate.private_key_and_cert_chain_pem.write_to_path(release / "cert.pem")
        handler = {"class": "logging.StreamHandler", "formatter": "it"}
        settings = {
            "version": 1,
            "formatters": {"it": {"format": f"settings {number}: %(message)s"}},
            "handlers": {"it": handler},
            "root": {"level": "INFO", "handlers": ["it"]},
        }
        (release / "log.json").write_text(json.dumps(settings))
        (release / "run").mkdir(mode=0o700)
    move(tmp_path, 1)
    context = ssl.create_default_context()
    authority.configure_trust(context)

    async def find_organization() -> str:
        streams = await by_tcp(await service.run.find_port(), context)()
        certificate = streams[1].get_extra_info("peercert")
        streams[1].close()
        return str(dict(each[0] for each in certificate["subject"])["organizationName"])

    current = tmp_path / "current"
    files = ("--log-config", "log.json", "--certfile", "cert.pem")
    staying = ("--control", "run/control", "--pid-file", "run/pid")
    service = await start(
        tmp_path,
        [f"{current}/venv/bin/ecdysis"],
        current,
        *files,
        *staying,
        PWD=str(current),
        found_control="releases/1/run/control",
    )
    try:
        await service.run.wait_for(f"--control run/control, --pid-file run/pid: relative, .* {current} leads")
        assert await find_organization() == "release 1"
        move(tmp_path, 2)
        code, answer = await service.run.restart()
        assert code == 0, answer
        assert await find_organization() == "release 2"
        # The access log is the new worker's.
        await get(by_tcp(await service.run.find_port(), context))
        await service.run.wait_for('settings 2: .*"GET /')
        assert int((tmp_path / "releases/1/run/pid").read_text()) == service.run.process.pid
    finally:
        await service.stop()


@dataclasses.dataclass
class Step:
    """What is deployed, and how it is brought into effect.

    Attributes:
        moved: the links that move on.
        is_pruned: whether the release is deleted to which they have led.
        is_upgraded: whether the anchor is upgraded before.
    """

    moved: tuple[str, ...]
    is_pruned: bool
    is_upgraded: bool


async def walk(root: Path, launcher: str, steps: Sequence[Step], *, has_pwd: bool) -> None:
    """Take steps, one after the other, with one service; see after each that what was deployed runs."""
    for number in range(1, len(steps) + 2):
        make_parts(root, number)
    leads_to = dict.fromkeys(LINKS, 1)
    for link, target in LINKS.items():
        move(root, 1, link, target)
    command = [each.format(root=root) for each in APART[launcher]]
    service = await start(
        root, command, root / "app", env_file="../../settings/env", PWD=str(root / "app") if has_pwd else None
    )
    try:
        for number, step in enumerate(steps, 2):
            for link in step.moved:
                former, leads_to[link] = leads_to[link], number
                move(root, number, link, LINKS[link])
                if step.is_pruned:
                    shutil.rmtree(root / LINKS[link] / str(former))
            for arguments in (("--anchor",), ()) if step.is_upgraded else ((),):
                code, answer = await service.run.restart(*arguments)
                assert code == 0, (step, answer)
            expected = "{app} {py} {settings}".format_map(leads_to)
            assert (await service.find_answer()).startswith(f"{expected} "), step
    finally:
        await service.stop()


@pytest.mark.parametrize(("launcher", "has_pwd"), [("relative script", True), ("module", False)])
async def test_code_environment_and_env_file_move_apart(tmp_path: Path, launcher: str, has_pwd: bool) -> None:
    # Without PWD nothing says by which link the code was reached: that is told, see below.
    code = ("app",) if has_pwd else ()
    steps = [
        Step(("py",), is_pruned=True, is_upgraded=False),
        Step((*code, "py"), is_pruned=True, is_upgraded=True),
        Step((*code, "settings"), is_pruned=False, is_upgraded=False),
    ]
    await walk(tmp_path, launcher, steps, has_pwd=has_pwd)


async def test_a_link_that_cannot_be_followed_is_named(tmp_path: Path) -> None:
    for number in 1, 2:
        make_release(tmp_path, number)
    move(tmp_path, 1)
    # Neither PWD nor a path in the command line goes through the link.
    service = await start(tmp_path, ["venv/bin/ecdysis"], tmp_path / "current")
    try:
        await service.run.wait_for(f"the link {tmp_path}/current leads to")
        status = (await asyncio.to_thread(run_command, "status", "--control", str(tmp_path / "control")))[1]
        checked = (await service.run.restart("--check"))[1]
        for told in status, checked:
            assert f"{tmp_path}/current is not followed when it moves" in told, told
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
