"""What a unit is called, and by which links its paths lead."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ecdysis_async.cli.places import find_interpreter, find_links, name_project

pytestmark = pytest.mark.main_python_only


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("shop", "shop"),
        ("my shop", "my-shop"),
        ("shop/src", "shop"),
        ("shop/releases/2026-10-01", "shop"),
        ("shop/releases/0a1b2c3d/app", "shop"),
    ],
)
def test_a_project_is_called_after_its_directory(tmp_path: Path, directory: str, name: str) -> None:
    place = tmp_path / directory
    place.mkdir(parents=True)
    assert name_project(str(place), "main:app") == name


def test_a_link_is_called_after_its_purpose(tmp_path: Path) -> None:
    (tmp_path / "shop" / "releases").mkdir(parents=True)
    link = tmp_path / "shop" / "deployed"
    link.symlink_to("releases")
    assert name_project(str(link), "main:app") == "shop"


def test_the_root_has_no_name() -> None:
    assert name_project("/", "shop.main:app") == "shop-main"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('[project]\nname = "web_shop"', "web_shop"),
        ('[tool.poetry]\nname = "web-shop"', "web-shop"),
        ("[project]\nname = 1", "shop"),
        ("project = 1", "shop"),
        ("no TOML", "shop"),
    ],
)
def test_pyproject_goes_first(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "pyproject.toml").write_text(content)
    assert name_project(str(tmp_path / "shop"), "main:app") == name


def test_links_to_a_release_are_found(tmp_path: Path) -> None:
    release = tmp_path / "releases" / "1"
    release.mkdir(parents=True)
    link = tmp_path / "current"
    link.symlink_to(release)
    (tmp_path / "other").symlink_to(tmp_path)
    assert find_links(str(release)) == [str(link)]
    assert find_links(str(link)) == []


def test_the_interpreter_is_named_as_the_script_beside_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = tmp_path / "releases" / "1" / "bin"
    release.mkdir(parents=True)
    for name in ("python", "ecdysis"):
        (release / name).touch()
    link = tmp_path / "current"
    link.symlink_to("releases/1")
    monkeypatch.setattr(sys, "executable", str(release / "python"))
    monkeypatch.setattr(sys, "argv", [str(link / "bin" / "ecdysis")])
    assert find_interpreter() == str(link / "bin" / "python")
    # systemd takes no `..`.
    monkeypatch.setattr(sys, "argv", ["-c"])
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/releases/../current/bin/python")
    assert find_interpreter() == str(link / "bin" / "python")
    monkeypatch.setattr(sys, "executable", f"{link}/../1/bin/python")
    assert find_interpreter() == str(release / "python")
