"""Releases behind a link that moves, and the commands that start a service by way of the link."""

from __future__ import annotations

import os
import shutil
import site
import sys
from pathlib import Path

__all__ = ["APART", "LAUNCHERS", "LINKS", "UV", "make_parts", "make_release", "move"]

PROJECT = Path(__file__).resolve().parents[2]

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


# What executes itself anew out of a cache, as PEX does: variables of its own name the file, the command line the cache.
SELF_EXECUTING = """#!{python}
import os, sys
DONE, ITSELF = "_PEX_SHOULD_EXIT_BOOTSTRAP_REEXEC", "__PEX_EXE__"
if DONE not in os.environ:
    cache = os.path.join({cache!r}, "{number}")
    os.makedirs(cache, exist_ok=True)
    with open(os.path.join(cache, "__main__.py"), "w") as file:
        file.write("import os, sys\\nsys.argv[0] = os.environ.pop('__PEX_EXE__')\\n"
            "os.environ.pop('_PEX_SHOULD_EXIT_BOOTSTRAP_REEXEC')\\n"
            "from ecdysis_async.cli import main\\nsys.exit(main())\\n")
    found = {{"PEX": os.path.realpath(__file__), ITSELF: os.path.abspath(__file__), DONE: "1"}}
    os.execve(sys.executable, [sys.executable, cache, *sys.argv[1:]], {{**os.environ, **found}})
sys.exit("it takes itself for one that was executed anew")
"""


def make_release(root: Path, number: int, *, is_trampoline: bool = False) -> None:
    """Make a release: its code, its env file, and a virtual environment with a package and a script of its own."""
    release = root / "releases" / str(number)
    make_environment(release / "venv", number, is_trampoline=is_trampoline)
    # What `uv run` looks for.
    (release / ".venv").symlink_to("venv")
    (release / "pyproject.toml").write_text("[project]\nname = 'shop'\nversion = '1'\nrequires-python = '>=3.11'\n")
    own = release / "venv" / "bin" / "python"
    (release / "app.pex").write_text(SELF_EXECUTING.format(python=own, cache=str(root / "cache"), number=number))
    (release / "app.pex").chmod(0o755)
    (release / "main.py").write_text(f"CODE = {number}\n{APP}")
    (release / ".env").write_text(f"OF={number}\n" + ("ONLY_ONE=yes\n" if number == 1 else ""))


def make_environment(directory: Path, number: int, *, is_trampoline: bool = False) -> None:
    """Make a virtual environment with a package and a script of its own."""
    binaries = directory / "bin"
    packages = directory / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    binaries.mkdir(parents=True)
    packages.mkdir(parents=True)
    interpreter: str = sys._base_executable  # type: ignore[attr-defined] # what venv(3) takes
    (binaries / "python").symlink_to(interpreter)
    (directory / "pyvenv.cfg").write_text(f"home = {Path(interpreter).resolve().parent}\n")
    paths = [str(PROJECT), *site.getsitepackages()]
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (packages / "shared.pth").write_text("\n".join([*paths, *lines]))
    (packages / "own_package.py").write_text(f"RELEASE = {number}\n")
    own = binaries / "python"
    first = f"#!/bin/sh\n'''exec' {own} \"$0\" \"$@\"\n' '''\n" if is_trampoline else f"#!{own}\n"
    (binaries / "ecdysis").write_text(first + SCRIPT)
    (binaries / "ecdysis").chmod(0o755)


def make_parts(root: Path, number: int) -> None:
    """Make a release whose code, environment and env file lie apart, so that each of them may move alone."""
    for name in "code", "env":
        (root / name / str(number)).mkdir(parents=True)
    make_environment(root / "venv" / str(number), number)
    (root / "code" / str(number) / "main.py").write_text(f"CODE = {number}\n{APP}")
    (root / "env" / str(number) / "env").write_text(f"OF={number}\n" + ("ONLY_ONE=yes\n" if number == 1 else ""))


def move(root: Path, number: int, link: str = "current", target: str = "releases") -> None:
    """Let a link lead to a release."""
    (root / "next").symlink_to(f"{target}/{number}")
    (root / "next").replace(root / link)


UV = shutil.which("uv", path=os.path.dirname(sys.executable)) or shutil.which("uv") or ""

LAUNCHERS = {
    "script by the link": ("{root}/current/venv/bin/ecdysis",),
    "relative script": ("venv/bin/ecdysis",),
    "module by the link": ("{root}/current/venv/bin/python", "-m", "ecdysis_async.cli"),
    "relative module": ("venv/bin/python", "-m", "ecdysis_async.cli"),
    "activated script": ("{root}/releases/1/venv/bin/ecdysis",),
    "activated module": ("{root}/releases/1/venv/bin/python", "-m", "ecdysis_async.cli"),
    "trampoline": ("{root}/current/venv/bin/ecdysis",),
    "self-executing by the link": ("{root}/current/app.pex",),
    "relative self-executing": ("./app.pex",),
    "uv run": (UV, "run", "--offline", "--no-sync", "ecdysis"),
    "uv run in a directory": (UV, "run", "--offline", "--no-sync", "--directory", "{root}/current", "ecdysis"),
}

APART = {
    "script": ("{root}/py/bin/ecdysis",),
    "relative script": ("../../py/bin/ecdysis",),
    "module": ("{root}/py/bin/python", "-m", "ecdysis_async.cli"),
    "relative module": ("../../py/bin/python", "-m", "ecdysis_async.cli"),
}
LINKS = {"app": "code", "py": "venv", "settings": "env"}
