"""Every job of the project: ``python3 noxfile.py`` checks all, ``python3 noxfile.py -s demo`` shows what it is for.

Run as a script it needs nothing but Python: where nox is not installed, it gets a virtual environment of its own below
.nox. Arguments are nox's own; those after ``--`` go to pytest or to the demo.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

PROJECT = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14", "3.15")


def run_nox() -> NoReturn:
    """Replace this process by nox, which reads this file again."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this is where an older Python learns that it is too old
        sys.exit(f"Python 3.11 or newer is needed, and this is {sys.version.split()[0]}: try python3.11 noxfile.py")
    python = sys.executable if importlib.util.find_spec("nox") else install_nox()
    os.execv(python, [python, "-m", "nox", "--noxfile", __file__, *sys.argv[1:]])  # noqa: S606


def install_nox() -> str:
    """Make a virtual environment with nox in it, once; return its interpreter."""
    directory = PROJECT / ".nox" / f"nox-{sys.version_info.major}.{sys.version_info.minor}"
    python = str(directory / "bin" / "python")
    installed = directory / "installed"
    # The stamp comes last: an installation that was interrupted is made anew, and so is one whose Python has gone.
    if not (installed.exists() and os.path.exists(python)):
        # Not venv.create: only the command says which package a distribution that splits Python up has it in.
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "nox>=2026.10.20"], check=True)
        installed.touch()
    return python


if __name__ == "__main__":
    run_nox()

import nox  # noqa: E402 - only nox itself comes this far

nox.needs_version = ">=2026.10.20"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "docs", "tests"]
if any(f"tests-{version}" in argument for version in PYTHONS for argument in sys.argv):
    # A Python that was asked for by its number is not skipped. All of them together are those that there are.
    nox.options.error_on_missing_interpreters = True


def install(session: nox.Session, group: str) -> None:
    """Install the project, editable, and what a dependency group names."""
    session.install("--editable", ".", "--group", group)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, layout and types of all there is."""
    install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages of docs/ below .nox/docs; a link that leads nowhere, or any other warning, is an error."""
    install(session, "docs")
    session.run(
        "python", "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", *session.posargs, "docs", ".nox/docs"
    )


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests, in parallel. A missing Python is skipped; where it is named, or CI=true, it is an error."""
    install(session, "test")
    # More than there are processors: most tests wait, for the processes that they have started and for their drains.
    processes = 2 * (os.cpu_count() or 1) + 1
    session.run("python", "-m", "pytest", f"--numprocesses={processes}", "--dist=worksteal", *session.posargs)


@nox.session
def mutations(session: nox.Session) -> None:
    """Put one mistake after the other into a copy of the package, and name the test that catches it."""
    install(session, "test")
    session.run("python", "-m", "tests.mutations", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Make a service fail at every point in every way, and print what came of it; with ``model`` first, the model."""
    install(session, "test")
    is_model = session.posargs[:1] == ["model"]
    module = "tests.faults.model" if is_model else "tests.faults"
    session.run("python", "-m", module, *session.posargs[is_model:])


@nox.session
def models(session: nox.Session) -> None:
    """Prove the claims of the model in Promela for two slots, which takes spin, a compiler and some minutes."""
    session.install("--editable", ".")
    session.run("python", "-m", "tests.models.spin", *session.posargs)


@nox.session(python="3.13")
def fuzz(session: nox.Session) -> None:
    """Look for inputs that crash, hang or leak, guided by the code that they reach; it takes an hour."""
    install(session, "fuzz")
    session.run("python", "-m", "tests.fuzzing.campaign", *session.posargs)


@nox.session(python="3.13")
def grid(session: nox.Session) -> None:
    """Restart an application of each framework under its own client, and print what the clients have seen."""
    install(session, "grid")
    session.run("python", "-m", "tests.conformance.grid", *session.posargs)


@nox.session(python="3.13")
def conformance(session: nox.Session) -> None:
    """Let programs of others say whether restarts change anything: kosoku, h2load and varnishtest."""
    install(session, "conformance")
    session.run("python", "-m", "tests.conformance.conformance", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Restart a service a thousand times under load, of which nothing may remain; it takes an hour."""
    install(session, "soak")
    session.run("python", "-m", "tests.conformance.soak", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Restart a real service several times under real load, and print what it cost."""
    install(session, "demo")
    session.run("python", "-m", "benchmarks.demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what a restart, a transfer, a stash and tracking cost, and other servers; best on an idle machine.

    With --quick: restart a few servers under load, and fail where a request of ours has failed.
    """
    if "--quick" in session.posargs:
        install(session, "bench-quick")
        session.run("python", "-m", "benchmarks.peers", *session.posargs)
        return
    install(session, "bench")
    for benchmark in ("restart", "transfer", "stash", "tracking", "steady", "instructions", "scale", "peers"):
        session.run("python", "-m", f"benchmarks.{benchmark}", "--output", ".nox/benchmarks", *session.posargs)


@nox.session
def numbers(session: nox.Session) -> None:
    """Measure what the pages show, in a quarter of an hour on an idle machine, and write it into them."""
    install(session, "bench")
    for benchmark, *options in (["restart", "--only", "stalls"], ["scale"], ["peers"]):
        session.run("python", "-m", f"benchmarks.{benchmark}", "--output", "benchmarks/results", *options)
    session.run("python", "-m", "benchmarks.report")
