"""The benchmarks run, and end in the tables that they promise; what the numbers are is for a machine that is idle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.main_python_only, pytest.mark.timeout(600)]

PROJECT = Path(__file__).resolve().parent.parent

# How long a benchmark may take here, seconds: far more than it needs, on a machine that is busy with other tests.
TIMEOUT = 500

# What each one has a row for.
SUBJECTS = {
    "restart": {"asyncio", "trio"},
    "stash": {
        *("copy in one process", "copy to new memory"),
        *("stash, read in place", "stash, copied there", "pipe", "Unix socket"),
    },
    "scale": {"1"},
    "tracking": {"streams on asyncio", "protocol on uvloop", "trio on trio"},
    "steady": {"uvicorn (httptools) on uvloop, as installed", "aiohttp on uvloop, like for like"},
    "instructions": {"uvicorn (httptools) on uvloop, like for like"},
    "transfer": {"asyncio, with transfer", "asyncio, without", "uvloop, with transfer", "uvloop, without"},
}
TITLES = {
    "restart": ["The accept gap", "From restart() to SERVING", "The old process during a restart"],
    "stash": ["What a stash passes"],
    "scale": ["A restart with many sockets", "A restart with many workers"],
    "tracking": ["What tracking costs in steady state"],
    "steady": ["What `ecdysis run` costs while nothing happens"],
    "instructions": ["Instructions of a request while nothing happens"],
    "transfer": [
        "What restarts cost clients that keep their connections",
        "How long the loop stands still, ms",
    ],
}
# Of tables with other rows than one for each subject.
ROWS = {
    "A restart with many sockets": {"1", "10"},
    "A restart with many workers": {"1", "2"},
    "How long the loop stands still, ms": {
        *(f"{subject}: {side}" for subject in SUBJECTS["transfer"] for side in ("serving", "old", "new")),
        *("arithmetic, 1 at a time", "arithmetic, 3 at a time"),
    },
}


def run_quickly(name: str, *options: str) -> str:
    """Run a benchmark, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"benchmarks.{name}", "--quick", *options],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def read_tables(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of each table by its title, the heads of its columns first."""
    tables: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("### "):
            title = line.removeprefix("### ")
            tables[title] = []
        elif line.startswith("| "):
            tables[title].append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(shutil.which("valgrind") is None, reason="Valgrind is not here"))
        if name == "instructions"
        else name
        for name in SUBJECTS
    ],
)
def test_a_benchmark_ends_in_its_tables(name: str) -> None:
    text = run_quickly(name)
    tables = read_tables(text)
    assert list(tables) == TITLES[name]
    for title, (head, *rows) in tables.items():
        assert {row[0] for row in rows} == ROWS.get(title, SUBJECTS[name])
        for row in rows:
            assert len(row) == len(head)
            assert all(row)
            # Behind its name each row has numbers, but for a side of which a quick run has seen nothing.
            is_empty = row[1] == "-" and title in ROWS
            assert is_empty or all(any(character.isdigit() for character in cell) for cell in row[-4:])
        assert any(row[1] != "-" for row in rows)
    assert "Machine: " in text


def test_a_benchmark_writes_its_table_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it is in the dependency group of the benchmarks only")
    text = run_quickly("stash", "--only", "pipe", "--output", str(tmp_path / "output"))
    assert {row[0] for row in read_tables(text)["What a stash passes"]} == {"way", "pipe"}
    assert (tmp_path / "output" / "stash.md").read_text() in text
    assert (tmp_path / "output" / "stash.png").read_bytes().startswith(b"\x89PNG")
