"""What is compared in a preflight: sockets by what they are called, the environment by digests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._handoff.preflight import compare, describe_place, describe_release, digest_environment
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.registry import Registry


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry()
    yield registry
    registry.close(unlink=True)


def test_sockets(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    registry.obtain(Internet("127.0.0.1", 0))
    registry.obtain(Unix(str(path)))
    release = describe_release(["tcp:127.0.0.1:0", "tcp:127.0.0.1:1", "fd://api"], {})
    assert compare(release, registry.entries, {})["sockets"] == {
        # What the service manager passes has a name of its own there, and stays.
        "kept": ["tcp:127.0.0.1:0", "fd://api"],
        "added": ["tcp:127.0.0.1:1"],
        "removed": [f"unix:{path}"],
    }
    assert compare(describe_release(None, {}), registry.entries, {})["sockets"] is None


def test_the_environment() -> None:
    release = describe_release([], {"KEPT": "1", "CHANGED": "secret 2", "NEW": "secret 3", "PWD": "/new", "_": "x"})
    found = compare(release, (), {"KEPT": "1", "CHANGED": "secret 1", "OLD": "secret 4", "SHLVL": "1"})
    assert found["environment"] == {"added": ["NEW"], "removed": ["OLD"], "changed": ["CHANGED"]}
    assert "secret" not in repr(release) + repr(found)


def test_digests_have_a_salt_and_a_name() -> None:
    one, other = digest_environment({"A": "x", "B": "x"}, "salt").values()
    assert one != other
    assert digest_environment({"A": "x"}, "another")["A"] != one


def test_bytes_that_are_no_text() -> None:
    value = os.fsdecode(b"\xff")
    assert digest_environment({"A": value}, "") != digest_environment({"A": "y"}, "")


def test_links_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "current").symlink_to("release")
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("PWD", str(tmp_path / "current"))
    place = describe_place()
    assert (place["logical_directory"], place["directory"]) == (str(tmp_path / "current"), str(tmp_path / "release"))
    assert (place["interpreter"], place["real_interpreter"]) == (sys.executable, os.path.realpath(sys.executable))
    # A variable is only a variable.
    monkeypatch.setenv("PWD", "/nowhere")
    assert describe_place()["logical_directory"] == str(tmp_path / "release")
    monkeypatch.chdir(tmp_path / "release")
    (tmp_path / "release").rmdir()
    assert describe_place()["directory"] is None
    monkeypatch.chdir("/")
