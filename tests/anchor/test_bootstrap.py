"""What is run in place of an anchor's program is, in all that the program can see, the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecdysis_async._anchor import bootstrap
from ecdysis_async._system.launch import Launch

pytestmark = pytest.mark.main_python_only

SCRIPT = """{first}
import sys
from ecdysis_async._system.launch import describe_launch
print(__name__, sys.argv, sys.orig_argv, sys.path, describe_launch(None, {{}}, None), file=sys.stdout)
"""
TRAMPOLINE = """#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''"""
MODULES = bootstrap.describe_modules()


def see(launch: Launch, *descriptors: int) -> str:
    done = subprocess.run(
        launch.arguments,
        executable=launch.arguments[0],
        cwd=launch.directory,
        env=launch.environment,
        pass_fds=descriptors,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("kind", ["script", "long script", "interpreter", "relative", "module"])
def test_the_program_sees_no_difference(kind: str, tmp_path: Path) -> None:
    # A console script stands next to its interpreter.
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    script = tmp_path / "ecdysis"
    first = TRAMPOLINE.format(python=python) if kind == "long script" else f"#!{sys.executable}"
    script.write_text(SCRIPT.format(first=first), encoding="utf-8")
    script.chmod(0o755)
    program = {
        "script": (str(script),),
        "long script": (str(script),),
        "interpreter": (sys.executable, "-W", "error", "-u", str(script)),
        "relative": (sys.executable, "ecdysis"),
        "module": (sys.executable, "-X", "dev", "-m", "ecdysis_async.cli"),
    }[kind]
    arguments = ("--help",) if kind == "module" else ("run", "main:app", "--bind", "é")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    launch = Launch((*program, *arguments), str(tmp_path), environment)
    prepared = bootstrap.prepare(launch, MODULES, ())
    assert prepared is not None
    bootstrapped, memory = prepared
    try:
        assert see(bootstrapped, memory) == see(launch)
    finally:
        os.close(memory)


@pytest.mark.parametrize(
    "program",
    [
        ("{python}", "-m", "debugpy", "-m", "ecdysis_async"),
        ("{python}", "-c", "import ecdysis_async"),
        ("{path}/other",),
        ("{python}", "{path}/archive"),
        ("{path}/env",),
        ("/no/such/program",),
        ("{python}",),
    ],
)
def test_other_programs_are_executed_as_they_are(program: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "other").write_text(f"#!{sys.executable}\nprint()\n", encoding="utf-8")
    (tmp_path / "archive").write_bytes(b"PK\xff\xfeecdysis_async")
    (tmp_path / "env").write_text("#!/usr/bin/env python3\nimport ecdysis_async\n", encoding="utf-8")
    words = tuple(word.format(python=sys.executable, path=tmp_path) for word in program)
    assert bootstrap.prepare(Launch(words, None, {}), MODULES, ()) is None


def test_a_check_of_another_release_names_no_modules() -> None:
    assert "ecdysis_async._anchor.bootstrap" in MODULES
    assert bootstrap.prepare(Launch((sys.executable, "-m", "ecdysis_async"), None, {}), (), ()) is None
