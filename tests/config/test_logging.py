"""Where the log goes: in a process of its own, because it is the process' logging that is set up."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ecdysis_async._config.logging import PlainFormatter

PROGRAM = """
import logging, sys
from ecdysis_async._config.logging import configure_logging
from ecdysis_async._config.options import Options
configure_logging(Options("a:b", log_level=sys.argv[1] or None, log_config=sys.argv[2] or None))
for name in "ecdysis_async", "app":
    logging.getLogger(name).debug("detail")
    logging.getLogger(name).info("fact")
"""

FILES = {
    "log.json": '{"version": 1, "handlers": {"h": {"class": "logging.StreamHandler"}}, '
    '"root": {"level": "INFO", "handlers": ["h"]}}',
    "log.yaml": "version: 1\nhandlers: {h: {class: logging.StreamHandler}}\nroot: {level: INFO, handlers: [h]}\n",
    "log.ini": "[loggers]\nkeys=root\n[handlers]\nkeys=h\n[formatters]\nkeys=\n"
    "[logger_root]\nlevel=INFO\nhandlers=h\n[handler_h]\nclass=StreamHandler\nargs=()\n",
}


def run(level: str, config: str) -> str:
    command = [sys.executable, "-c", PROGRAM, level, config]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize(("level", "lines"), [("", 2), ("debug", 4), ("warning", 0)])
def test_without_a_file_there_is_one_handler_on_stderr(level: str, lines: int) -> None:
    said = run(level, "").splitlines()
    assert len(said) == lines
    assert all("ecdysis_async: " in each or "app: " in each for each in said)


@pytest.mark.parametrize("name", FILES)
def test_a_file_sets_it_up_and_a_level_is_that_of_this_package(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    assert run("", str(tmp_path / name)) == "fact\nfact\n"
    assert run("debug", str(tmp_path / name)) == "detail\nfact\nfact\n"


@pytest.mark.parametrize(("name", "text"), [("log.json", "{"), ("log.ini", "nothing"), ("log.yaml", "[")])
def test_a_file_that_says_nothing_is_named(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert f"log_config: {tmp_path / name} sets no logging up" in run("", str(tmp_path / name))


def test_control_characters_of_others_are_written_out() -> None:
    def format_line(name: str) -> str:
        record = logging.LogRecord(name, logging.INFO, "path", 1, "a\x1b[2J\tb\nc\x9b", None, None)
        return PlainFormatter("%(message)s").format(record)

    assert format_line("ecdysis_async") == "a\\x1b[2J\tb\nc\\x9b"
    assert format_line("app") == "a\x1b[2J\tb\nc\x9b"
