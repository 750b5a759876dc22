"""Releases behind a `current` that moves, in units: a reload, and a restart of the unit, run what was deployed."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import pytest

from tests.ports import find_free_port
from tests.scenarios.moving import APART, LAUNCHERS, LINKS, UV, make_parts, make_release, move
from tests.scenarios.run.commands import get
from tests.scenarios.systemd.harness import NAME, Unit

pytestmark = pytest.mark.main_python_only

# All rows are tried where this is set, which takes ten minutes; a handful otherwise.
IS_WHOLE = "ECDYSIS_TEST_MATRIX" in os.environ

# What systemd executes names its file by an absolute path; a shell may then go where it likes.
STARTED = {
    name: LAUNCHERS[name]
    for name in (
        "script by the link",
        "module by the link",
        "activated script",
        "trampoline",
        "self-executing by the link",
        "uv run",
        "uv run in a directory",
    )
} | {"shell": ("/bin/sh", "-c", 'cd {root}/current && exec venv/bin/ecdysis "$@"', "sh"), "ecdysis unit": ()}
# Nothing in these command lines goes by the link: the unit has to say it.
NEEDS_PWD = ("activated script", "uv run")

OPTIONS = ("--probation", "0.05", "--drain-timeout", "2")


@dataclasses.dataclass(frozen=True)
class Row:
    """How a service is started, and how the next release comes.

    Attributes:
        launcher: one of STARTED.
        is_pruned: whether the former release is deleted before the reload.
        is_upgraded: whether the anchor is upgraded before.
    """

    launcher: str
    is_pruned: bool
    is_upgraded: bool

    def __str__(self) -> str:
        words = [self.launcher.replace(" ", "-"), "pruned" if self.is_pruned else "kept"]
        return "-".join([*words, *(["anchor"] if self.is_upgraded else [])])


HANDFUL = [
    Row("script by the link", is_pruned=True, is_upgraded=True),
    Row("activated script", is_pruned=True, is_upgraded=False),
]
ROWS = [Row(*each) for each in itertools.product(STARTED, (False, True), (False, True))] if IS_WHOLE else HANDFUL


class Deployed:
    """A unit that starts what stands behind the link."""

    def __init__(self, unit: Unit, root: Path, command: str) -> None:
        self.unit = unit
        self.root = root
        self.port = find_free_port()
        self.control = str(root / "control")
        self._command = command

    def install(self, start: tuple[str, ...], directory: str, env_file: str, *lines: str) -> None:
        """Write the unit by hand."""
        quoted = " ".join(f"'{word}'" for word in self._fill(start))
        options = (f"--bind=127.0.0.1:{self.port}", f"--env-file={env_file}", f"--control={self.control}", *OPTIONS)
        self.unit.machine.install(
            NAME,
            "[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\nKillMode=mixed\n"
            f"ExecStart={quoted} run main:app {' '.join(options)}\n"
            f"ExecReload={self._command} restart --control {self.control}\n"
            f"WorkingDirectory={self.root}/{directory}\n" + "".join(f"{line}\n" for line in self._fill(lines)),
        )
        self.unit.keep_log()

    def _fill(self, words: tuple[str, ...]) -> list[str]:
        return [word.replace("{root}", str(self.root)) for word in words]

    def print_unit(self) -> None:
        """Let `ecdysis unit` write it, where a deployer would call it."""
        place = ("env", "-C", f"{self.root}/current", f"PWD={self.root}/current")
        options = (f"--bind=127.0.0.1:{self.port}", "--env-file=.env", f"--control={self.control}", *OPTIONS)
        machine = self.unit.machine
        machine.run(*place, self._command, "unit", "main:app", "--name=app", *options, f"--output={machine.units}")
        self.unit.keep_log(f"ReadWritePaths={self.root}")

    def find_answer(self) -> str:
        """Return of which release code, environment and env file are, and what only the first env file has."""
        status, text = get(self.port)
        assert status == 200
        return text

    def upgrade(self) -> None:
        """Upgrade the anchor."""
        self.unit.machine.run(self._command, "restart", "--anchor", "--control", self.control)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_unit_runs_the_release_that_was_deployed(unit: Unit, tmp_path: Path, row: Row) -> None:
    if row.launcher.startswith("uv") and not UV:
        pytest.skip("uv is not installed")
    for number in 1, 2, 3:
        make_release(tmp_path, number, is_trampoline=row.launcher == "trampoline")
    move(tmp_path, 1)
    service = Deployed(unit, tmp_path, f"{tmp_path}/current/venv/bin/ecdysis")
    if row.launcher == "ecdysis unit":
        service.print_unit()
    else:
        lines = ["Environment=PWD={root}/current"] if row.launcher in NEEDS_PWD else []
        # uv waits for what it runs, and systemd hears its main process, unless it is told to hear all.
        lines += ["NotifyAccess=all", "Environment=HOME=/root"] if row.launcher.startswith("uv") else []
        service.install(STARTED[row.launcher], "current", ".env", *lines)
    unit.systemctl("start")
    assert service.find_answer() == "1 1 1 yes"
    move(tmp_path, 2)
    if row.is_pruned:
        shutil.rmtree(tmp_path / "releases" / "1")
    if row.is_upgraded:
        service.upgrade()
    unit.reload()
    assert service.find_answer() == "2 2 2 None"
    # What is gone is refused, and named where systemd shows it.
    (tmp_path / "releases" / "3" / ".env").rename(tmp_path / "away")
    move(tmp_path, 3)
    assert unit.machine.fails("systemctl", "reload", NAME)
    assert f"{tmp_path}/current/.env" in unit.show("StatusText")
    assert service.find_answer() == "2 2 2 None"
    (tmp_path / "away").rename(tmp_path / "releases" / "3" / ".env")
    if row.launcher == "activated script":
        # The next start of the unit wants the script of that release.
        unit.reload()
    else:
        unit.systemctl("restart")
    assert service.find_answer() == "3 3 3 None"
    unit.systemctl("stop")
    assert unit.show("Result") == "success"


@pytest.mark.skipif(not IS_WHOLE, reason="the releases of a service without a unit move apart in the suite")
@pytest.mark.parametrize("launcher", ["script", "module"])
@pytest.mark.parametrize("is_pruned", [True, False])
def test_in_a_unit_code_environment_and_env_file_move_apart(
    unit: Unit, tmp_path: Path, launcher: str, is_pruned: bool
) -> None:
    moves = [each for size in (1, 2, 3) for each in itertools.combinations(LINKS, size)]
    for number in range(1, len(moves) + 2):
        make_parts(tmp_path, number)
    leads_to = dict.fromkeys(LINKS, 1)
    for link, target in LINKS.items():
        move(tmp_path, 1, link, target)
    service = Deployed(unit, tmp_path, f"{tmp_path}/py/bin/ecdysis")
    service.install(APART[launcher], "app", "../../settings/env", "Environment=PWD={root}/app")
    unit.systemctl("start")
    for number, moved in enumerate(moves, 2):
        for link in moved:
            former, leads_to[link] = leads_to[link], number
            move(tmp_path, number, link, LINKS[link])
            if is_pruned:
                shutil.rmtree(tmp_path / LINKS[link] / str(former))
        if number % 2:
            service.upgrade()
        unit.reload()
        assert service.find_answer().startswith("{app} {py} {settings} ".format_map(leads_to)), moved
    unit.systemctl("stop")
