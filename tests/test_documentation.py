"""The pages of the project say what is the case."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import reference
from docs.state_diagrams import PAGE, make_diagrams, put_into

pytestmark = pytest.mark.main_python_only

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


@pytest.mark.parametrize("name", reference.PAGES)
def test_what_is_looked_up_is_written_from_the_code_of_today(name: str) -> None:
    page = (PROJECT / "docs" / name).read_text()
    assert reference.put_into(name, page) == page, "run `python docs/reference.py` and commit the pages"


def test_a_page_without_a_place_for_its_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="options"):
        reference.put_into("command.md", "# A page\n")


def test_the_first_page_is_short() -> None:
    assert len((PROJECT / "README.md").read_bytes()) <= 9000


def test_links_of_the_first_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#]+)[^)]*\)", (PROJECT / "README.md").read_text())
    assert links
    assert not [link for link in links if not (PROJECT / link).exists()]


@pytest.mark.parametrize("page", sorted((PROJECT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_is_in_the_table_of_contents(page: Path) -> None:
    assert page.stem == "index" or f"\n{page.stem}\n" in (PROJECT / "docs" / "index.md").read_text()
