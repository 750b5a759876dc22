"""Which release runs: the directory of its code without links, and its environment where that is elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ecdysis_async._system import release


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        ("/srv/2", None, "/srv/2"),
        ("/srv/2", "/srv/2/.venv", "/srv/2"),
        ("/srv/2", "/srv/envs/2", "/srv/2 with /srv/envs/2"),
        ("/srv/envs/2/lib/site-packages", "/srv/envs/2", "/srv/envs/2"),
        (None, "/srv/envs/2", "/srv/envs/2"),
        (None, None, "unknown"),
    ],
)
def test_code_and_environment(
    monkeypatch: pytest.MonkeyPatch, code: str | None, environment: str | None, expected: str
) -> None:
    monkeypatch.setattr(release, "_code", code)
    monkeypatch.setattr(release, "_environment", environment)
    assert release.describe_release() == expected


@pytest.mark.parametrize("module", ["app", "app.main"])
def test_the_release_is_where_the_link_led_when_the_code_was_loaded(tmp_path: Path, module: str) -> None:
    (tmp_path / "1" / "app").mkdir(parents=True)
    (tmp_path / "1" / "app" / "__init__.py").touch()
    (tmp_path / "1" / "app" / "main.py").touch()
    (tmp_path / "current").symlink_to("1")
    program = (
        f"import importlib, sys; sys.path.insert(0, {str(tmp_path / 'current')!r}); "
        f"importlib.import_module({module!r}); "
        "from ecdysis_async._system import release; release._environment = None; "
        f"release.note_application({module!r}); print(release.describe_release())"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(tmp_path / "1")
