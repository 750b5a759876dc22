"""What is left of a traceback: the application's lines, and everything that says what went wrong."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from ecdysis_async._system.tracebacks import describe_failure


def read_settings() -> None:
    json.loads("{")


async def start() -> None:
    try:
        await anyio.to_thread.run_sync(read_settings)
    except ValueError as error:
        raise OSError("no settings") from error


def first_lines(text: str) -> list[str]:
    """Return the line that follows the head of each traceback, also of those within a group."""
    lines = text.splitlines()
    return [after for line, after in itertools.pairwise(lines) if "Traceback (most recent call last):" in line]


async def test_it_begins_at_the_first_line_of_the_application(backend: str) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(start)
    described = describe_failure(caught.value.exceptions[0])
    # Of what went wrong, and of what that led to: what runs tasks stands above neither.
    assert [__file__ in line for line in first_lines(described)] == [True, True], described
    assert described.endswith("\nOSError: no settings")
    described = describe_failure(caught.value)
    assert [__file__ in line for line in first_lines(described)] == [True, True, True], described


def test_a_library_that_fails_by_itself_shows_all_of_its_lines() -> None:
    code = compile("1 / 0", anyio.__file__, "exec")
    with pytest.raises(ZeroDivisionError) as caught:
        exec(code)
    error = caught.value
    assert error.__traceback__ is not None
    error = error.with_traceback(error.__traceback__.tb_next)
    assert anyio.__file__ in describe_failure(error)


def test_a_syntax_error_needs_no_line_of_whoever_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_with_a_syntax_error.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SyntaxError) as caught:
        importlib.import_module("module_with_a_syntax_error")
    error = caught.value
    assert error.__traceback__ is not None
    described = describe_failure(error.with_traceback(error.__traceback__.tb_next))
    assert "importlib" not in described
    assert f'{tmp_path}/module_with_a_syntax_error.py", line 1' in described
