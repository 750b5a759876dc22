"""The pages of the project say what is the case."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.state_diagrams import PAGE, make_diagrams, put_into

PROJECT = Path(__file__).resolve().parent.parent


def test_the_state_diagrams_are_drawn_from_the_tables_of_today() -> None:
    assert put_into(PAGE.read_text()) == PAGE.read_text(), "run `python docs/state_diagrams.py` and commit the page"


def test_a_page_without_a_place_for_the_diagrams_is_refused() -> None:
    with pytest.raises(ValueError, match="predecessor"):
        put_into("# A page\n")


def test_a_diagram_shows_how_each_side_begins_and_ends() -> None:
    diagrams = make_diagrams()
    assert "[*] --> SPAWNING" in diagrams["predecessor"]
    assert "PROBATION --> SETTLED: settle, timed out, stop" in diagrams["predecessor"]
    assert "ROLLED_BACK --> [*]" in diagrams["predecessor"]
    assert "WAITING --> OPENING: commit" in diagrams["successor"]


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|toml))`", (PROJECT / page).read_text())
    missing = [
        name for name in named if not any((root / name).exists() for root in (PROJECT, PROJECT / "ecdysis_async"))
    ]
    assert named
    assert not missing
