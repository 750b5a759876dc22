"""Imports are measured, and their tracebacks are what they were."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

HEAD = """
import sys
sys.path.insert(0, {directory!r})
from ecdysis_async._system.import_times import import_times
import_times.begin()
"""


def run(directory: Path, body: str) -> subprocess.CompletedProcess[str]:
    source = HEAD.format(directory=str(directory)) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)


def test_modules_are_told_with_what_they_import(tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text("import inner\nimport quick\n")
    (tmp_path / "inner.py").write_text("import time; time.sleep(0.02)\n")
    (tmp_path / "quick.py").write_text("")
    body = """
        import outer
        for each in import_times.take():
            print(each.name, each.depth, each.seconds >= 0.02)
        print(import_times.take(), "exec_module" in vars(sys.modules["outer"].__loader__))
    """
    ended = run(tmp_path, body)
    # An empty module may take as long on a busy machine.
    lines = [line for line in ended.stdout.splitlines() if not line.startswith("quick")]
    assert (lines, ended.stderr) == (["outer 0 True", "inner 1 True", "[] False"], "")


def test_a_traceback_names_the_application_s_lines_alone(tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text("import inner\n")
    (tmp_path / "inner.py").write_text("raise RuntimeError('broken')\n")
    ended = run(tmp_path, "import outer")
    files = [line.split('"')[1] for line in ended.stderr.splitlines() if line.lstrip().startswith("File")]
    assert files == ["<string>", str(tmp_path / "outer.py"), str(tmp_path / "inner.py")]


def test_after_its_end_nothing_is_measured(tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text("import time; time.sleep(0.02)\n")
    ended = run(tmp_path, "import_times.end(); import_times.end(); import outer; print(import_times.take())")
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_a_loader_that_somebody_else_watches_is_left_to_them(tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text("import time; time.sleep(0.02)\n")
    body = """
        import importlib.machinery

        class Watching:
            def find_spec(self, name, path, target=None):
                spec = importlib.machinery.PathFinder.find_spec(name, path, target)
                if spec is not None and name == "outer":
                    execute = spec.loader.exec_module
                    def exec_module(module):
                        print("watched")
                        execute(module)
                    spec.loader.exec_module = exec_module
                return spec

        sys.meta_path.insert(1, Watching())
        import outer
        print(import_times.take())
    """
    ended = run(tmp_path, body)
    assert (ended.stdout, ended.stderr) == ("watched\n[]\n", "")
