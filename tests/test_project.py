"""The shape of the project: what it depends on, and the one direction of its imports."""

from __future__ import annotations

import ast
import graphlib
import importlib
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

# The shape is the same on each Python.
pytestmark = pytest.mark.main_python_only

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "ecdysis_async"

# The wings, top to bottom. A file imports its own wing and those below it; wings of one line do not know each other.
LAYERS = (
    {"__main__"},
    {"cli", "testing"},
    {"servers", "_proving", "_explaining", "__init__"},
    {"_anchor", "_service", "_config"},
    {"_management"},
    {"_handoff", "anyio_listeners", "trio_listeners"},
    {"_accepting", "transfer"},
    {"_ipc", "_connections"},
    {"_system", "_sockets"},
    {"report", "settings"},
    {"errors"},
)
FACES = {"transfer", "anyio_listeners", "trio_listeners", "testing"}

# All others are written once, on anyio.
NATIVE = ("_accepting", "_proving", "servers")
LOOPS = {"asyncio", "trio", "uvloop"}

# What protocol.py would do I/O, tell the time or know a loop with.
IMPURE = {*LOOPS, "anyio", "datetime", "io", "logging", "mmap", "os", "pathlib", "random", "select", "selectors"}
IMPURE |= {"signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time"}

# Foreign libraries whose private names are read, each where a comment on the line says which one it is.
FOREIGN = {
    *LOOPS,
    "aiohttp",
    "anyio",
    "CPython",
    "h11",
    "httptools",
    "hypercorn",
    "loguru",
    "typeshed",
    "uvicorn",
    "websockets",
}
# Documented, in spite of their underscores.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}

# Modules without a test file of their own name, and why.
TESTED_ELSEWHERE = {
    "servers/aiohttp.py": "tests/scenarios/servers runs each server as a whole, and nothing less would show anything",
    "servers/hypercorn.py": "as aiohttp.py",
    "servers/uvicorn.py": "as aiohttp.py",
    "servers/websockets.py": "as aiohttp.py",
    "servers/_hypercorn_asyncio.py": "as aiohttp.py",
    "servers/_hypercorn_trio.py": "as aiohttp.py",
    "cli/run.py": "tests/scenarios/run runs the command as a whole",
    "cli/control.py": "tests/cli/test_commands.py runs its commands as a user does",
    "cli/check.py": "tests/scenarios/run/test_check.py checks releases of running services",
    "cli/prove.py": "tests/scenarios/proving runs the command as a whole",
    "cli/explain.py": "tests/scenarios/explaining runs the command as a whole",
    "_proving/campaign.py": "as cli/prove.py",
    "_proving/records.py": "data only: test_rules.py is about what they mean",
    "_proving/settings.py": "names only",
}
# Those that shall have one.

# The only file outside of the package, and of its tests, that may look inside.
LOOKS_INSIDE = "benchmarks/stash.py"

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
            layers.add(layer if find_line(layer) is not None else "__init__")
    return layers


def find_line(layer: str) -> int | None:
    return next((line for line, layers in enumerate(LAYERS) if layer in layers), None)


def imported_files(path: Path) -> Iterator[Path]:
    """Name the files of the package that a file imports."""
    for name in imported_names(path):
        parts = name.split(".")
        for end in (len(parts), len(parts) - 1):
            file = PROJECT.joinpath(*parts[:end]).with_suffix(".py")
            if parts[0] == PACKAGE.name and file.is_file():
                yield file
                break


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


def test_a_module_says_what_it_is_for() -> None:
    assert [name_file(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_a_module_imports_its_own_wing_and_those_below() -> None:
    for path in MODULES:
        layer = name_layer(path)
        line = find_line(layer)
        assert line is not None, f"{layer} is a new wing: give it its place in LAYERS"
        assert imported_layers(path) <= {layer}.union(*LAYERS[line + 1 :]), name_file(path)


@pytest.mark.parametrize("wing", sorted({path.parent for path in MODULES} - {PACKAGE}), ids=name_file)
def test_a_wing_has_no_circle(wing: Path) -> None:
    files = {path: set(imported_files(path)) for path in wing.glob("*.py") if path.name != "__init__.py"}
    graphlib.TopologicalSorter({path: others & files.keys() for path, others in files.items()}).prepare()


@pytest.mark.parametrize("wing", sorted({path.parent for path in MODULES} - {PACKAGE}), ids=name_file)
def test_a_wing_says_what_is_here_what_may_not_be_and_what_to_read_first(wing: Path) -> None:
    text = ast.get_docstring(ast.parse((wing / "__init__.py").read_text())) or ""
    if name_file(wing) == "servers":
        return  # public: its docstring is for users
    assert "Read first: " in text
    assert len([line for line in text.splitlines() if line]) == 3


@pytest.mark.parametrize("face", sorted(FACES))
def test_a_face_hands_names_of_one_wing_on_and_defines_nothing(face: str) -> None:
    path = PACKAGE / f"{face}.py"
    body = ast.parse(path.read_text()).body[1:]  # behind the docstring
    assert all(isinstance(node, ast.ImportFrom | ast.Assign) for node in body)
    assert [ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)] == ["__all__"]
    assert len(imported_layers(path)) == 1


def test_nothing_inside_imports_a_face() -> None:
    assert [name_file(path) for path in MODULES if imported_layers(path) & (FACES - {name_layer(path)})] == []


def test_the_control_plane_knows_no_loop() -> None:
    for path in MODULES:
        imported = {name.partition(".")[0] for name in imported_names(path, at_import_time=True)}
        assert name_layer(path) in NATIVE or not imported & LOOPS, name_file(path)


def test_nothing_private_crosses_a_file_unless_it_is_a_foreign_library_s() -> None:
    found = {name_file(path): find_private(path.read_text()) for path in MODULES}
    assert {name: lines for name, lines in found.items() if lines} == {}


def find_private(source: str) -> list[str]:
    """List what a module imports and reads of others' private names, each with its line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in {"self", "cls", "super()"}:
            names = [node.attr]
        for name in names:
            is_private = name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED
            line = getattr(node, "end_lineno", 0)
            if is_private and not FOREIGN & set(re.findall(r"\w+", comments.get(line, ""))):
                found.append(f"{line}: {name}")
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .plane import _gate, Gate", ["1: _gate"]),
        ("self._gate = cls._make_gate(super()._gates)", []),
        ("plane._gate\nself.plane._gate", ["1: _gate", "2: _gate"]),
        ("stream._protocol  # noqa: SLF001 - anyio", []),
        ("stream._protocol  # noqa: SLF001 - there is no other way", ["1: _protocol"]),
        ("os._exit(1)\nplane.__class__", []),
    ],
)
def test_private_names_are_found(source: str, found: list[str]) -> None:
    assert find_private(source) == found


def test_a_module_has_a_test_file_of_its_name() -> None:
    excused = {*TESTED_ELSEWHERE, *(f"{face}.py" for face in FACES)}
    for path in MODULES:
        if path.name.startswith("__"):
            continue
        *wings, name = (part.lstrip("_") for part in path.relative_to(PACKAGE).parts)
        exists = PROJECT.joinpath("tests", *wings, f"test_{name}").is_file()
        advice = "it has one: take it out of the list" if exists else "write one"
        assert exists != (name_file(path) in excused), f"{name_file(path)}: {advice}"


def test_excuses_are_for_what_exists() -> None:
    assert {*TESTED_ELSEWHERE} <= {name_file(path) for path in MODULES}


def python_outside() -> Iterator[tuple[str, str]]:
    """Yield name and text of each program that is not part of the package: examples, benchmarks, those of README.md."""
    for path in sorted([*PROJECT.glob("examples/**/*.py"), *PROJECT.glob("benchmarks/*.py")]):
        yield str(path.relative_to(PROJECT)), path.read_text()
    text = (PROJECT / "README.md").read_text() if (PROJECT / "README.md").exists() else ""
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)):
        yield f"README.md {number}", block


@pytest.mark.parametrize(("name", "text"), [pytest.param(*each, id=each[0]) for each in python_outside()])
def test_programs_for_users_import_public_names_only(name: str, text: str) -> None:
    imported = [each for each in find_imports(text, ("programs",)) if each.split(".")[0] == PACKAGE.name]
    private = [each for each in imported if not is_public(each)]
    assert bool(private) == (name == LOOKS_INSIDE), private


def is_public(name: str) -> bool:
    """Say whether a name, in full, is one of a module without an underscore, and of its ``__all__``."""
    if any(part.startswith("_") for part in name.split(".")):
        return False
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return last in importlib.import_module(module).__all__
    return True


def test_the_protocol_is_pure() -> None:
    path = PACKAGE / "_handoff" / "protocol.py"
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
