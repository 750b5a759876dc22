"""The shape of the project: what it depends on, and the one direction of its imports."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "ecdysis_async"

# A module imports only what stands below it.
TOP_TO_BOTTOM = (
    "__init__",
    "cli",
    "worker",
    "target",
    "servers",
    "start",
    "anchor",
    "account",
    "keeper",
    "renewal",
    "holdings",
    "plan",
    "succession",
    "reloading",
    "upgrade",
    "rollout",
    "supervisor",
    "duty",
    "status",
    "check",
    "takeover",
    "control",
    "health",
    "queues",
    "handover",
    "inheritance",
    "side",
    "generation",
    "lineage",
    "stderr_tail",
    "crew",
    "line",
    "listeners",
    "loops",
    "asyncio_datagrams",
    "asyncio_servers",
    "anyio_listeners",
    "trio_listeners",
    "accept",
    "transfer",
    "plane",
    "gate",
    "drain",
    "parcel",
    "descriptor_store",
    "stash",
    "systemd",
    "logging_setup",
    "options",
    "addresses",
    "control_path",
    "pid_file",
    "logs",
    "signals",
    "threads",
    "messages",
    "standard_descriptors",
    "tracebacks",
    "peer",
    "spawn",
    "registry",
    "channel",
    "protocol",
    "report",
    "settings",
    "collector",
    "errors",
)

# All others are written once, on anyio.
NATIVE = ("loops", "asyncio_datagrams", "asyncio_servers", "anyio_listeners", "trio_listeners", "servers")
LOOPS = {"asyncio", "trio", "uvloop"}

# What protocol.py would do I/O, tell the time or know a loop with.
IMPURE = {*LOOPS, "anyio", "datetime", "io", "logging", "mmap", "os", "pathlib", "random", "select", "selectors"}
IMPURE |= {"signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_file(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def name_layer(path: Path) -> str:
    """Name the module, or the subpackage, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def find_imports(source: str, package: tuple[str, ...], *, at_import_time: bool = False) -> Iterator[str]:
    """Name in full, with dots, what a module of a package imports: ever, or only while it is imported itself."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if at_import_time and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types_only(node)):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            origin = (*parents, node.module) if node.module else parents
            yield from (".".join((*origin, alias.name)) for alias in node.names)


def imported_names(path: Path, *, at_import_time: bool = False) -> list[str]:
    package = path.relative_to(PROJECT).parent.parts
    return list(find_imports(path.read_text(), package, at_import_time=at_import_time))


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imported_layers(path: Path) -> set[str]:
    """Name the modules of the package that a file imports; the package's own face is ``__init__``."""
    layers = set()
    for name in imported_names(path):
        package, _, rest = name.partition(".")
        if package == PACKAGE.name:
            layer = rest.partition(".")[0]
            layers.add(layer if layer in TOP_TO_BOTTOM else "__init__")
    return layers


def test_the_only_hard_dependency_is_anyio() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert [dependency.partition(">=")[0] for dependency in project["dependencies"]] == ["anyio"]


def test_extras_are_not_imported() -> None:
    program = f"import sys, {PACKAGE.name}; sys.exit(sorted({{'trio', 'uvloop', 'dotenv'}} & set(sys.modules)) or 0)"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_types_are_published() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("path", MODULES, ids=name_file)
def test_a_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", MODULES, ids=name_file)
def test_a_module_imports_only_from_below(path: Path) -> None:
    layer = name_layer(path)
    assert layer in TOP_TO_BOTTOM, "a new module: give it its place in TOP_TO_BOTTOM"
    below = TOP_TO_BOTTOM[TOP_TO_BOTTOM.index(layer) + 1 :]
    assert imported_layers(path) <= {*below, layer}


@pytest.mark.parametrize("path", [path for path in MODULES if name_layer(path) not in NATIVE], ids=name_file)
def test_the_control_plane_knows_no_loop(path: Path) -> None:
    imported = {name.partition(".")[0] for name in imported_names(path, at_import_time=True)}
    assert not imported & LOOPS


def test_the_protocol_is_pure() -> None:
    path = PACKAGE / "protocol.py"
    assert not {name.partition(".")[0] for name in imported_names(path)} & IMPURE


@pytest.mark.parametrize(
    ("source", "ever", "at_import_time"),
    [
        ("import trio.lowlevel", {"trio.lowlevel"}, {"trio.lowlevel"}),
        ("from .supervisor import Ecdysis", {"package.supervisor.Ecdysis"}, {"package.supervisor.Ecdysis"}),
        ("from . import plane, run", {"package.plane", "package.run"}, {"package.plane", "package.run"}),
        ("class A:\n import asyncio\n def f(self): import trio", {"asyncio", "trio"}, {"asyncio"}),
        ("if TYPE_CHECKING: import asyncio", {"asyncio"}, set()),
    ],
)
def test_imports_are_found(source: str, ever: set[str], at_import_time: set[str]) -> None:
    assert set(find_imports(source, ("package",))) == ever
    assert set(find_imports(source, ("package",), at_import_time=True)) == at_import_time


def test_relative_imports_climb() -> None:
    assert list(find_imports("from ..errors import NotReady", ("package", "servers"))) == ["package.errors.NotReady"]
