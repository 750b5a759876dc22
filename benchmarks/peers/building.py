"""What peers are made of: programs of this directory, built below .nox, and what the machine has installed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(__file__).resolve().parent / "programs"
BUILT = PROJECT / ".nox" / "peers"

# A first build fetches and compiles some fifty crates.
BUILD_SECONDS = 300.0


class MissingError(Exception):
    """A peer that cannot be had here: the row says why, and the run goes on."""


def require(program: str) -> str:
    """Return where a program is.

    Raises:
        MissingError: nowhere.
    """
    path = shutil.which(program)
    if path is None:
        raise MissingError(f"{program} is not here")
    return path


def version_of(program: str, *options: str) -> str:
    """Return the version that a program tells.

    Raises:
        MissingError: it is not here, or does not tell.
    """
    done = subprocess.run([require(program), *options], capture_output=True, text=True, check=False)
    version = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    if version is None:
        raise MissingError(f"{program} does not start")
    return version[0]


def version_of_package(name: str) -> str:
    """Return the version of a package of this Python.

    Raises:
        MissingError: it is not installed.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(f"the package {name} is not installed") from None


def beside_python(name: str) -> str:
    """Return the path of a command that was installed into the environment of this Python."""
    return str(Path(sys.executable).with_name(name))


def build_in_go(name: str) -> str:
    """Build a program, where it is not yet, and return the version of the library it is for.

    Raises:
        MissingError: the compiler is not here, or its modules are not to be had.
    """
    build([require("go"), "build", "-o", str(BUILT / name), "."], PROGRAMS / name)
    return locked(PROGRAMS / name / "go.mod", rf"/{name} v(\S+)")


def build_in_rust(name: str) -> str:
    """Build a program, where it is not yet, and return the version of the library it is for.

    Raises:
        MissingError: the compiler is not here, or its crates are not to be had.
    """
    command = [require("cargo"), "build", "--release", "--locked", "--quiet", "--target-dir", str(BUILT / "cargo")]
    build(command, PROGRAMS / name)
    (BUILT / name).unlink(missing_ok=True)
    (BUILT / name).hardlink_to(BUILT / "cargo" / "release" / f"peer-{name}")
    return locked(PROGRAMS / name / "Cargo.lock", rf'name = "{name}"\nversion = "(\S+)"')


def build(command: list[str], directory: Path) -> None:
    """Run a compiler.

    Raises:
        MissingError: it has failed.
    """
    BUILT.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "GOFLAGS": "-mod=mod" if directory.joinpath("go.mod").exists() else ""},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MissingError("not built in time") from None
    if done.returncode:
        raise MissingError(f"not built: {done.stderr.strip().splitlines()[-1]}")


def locked(path: Path, pattern: str) -> str:
    """Return the version that a lock file names."""
    version = re.search(pattern, path.read_text())
    assert version is not None
    return version[1]
