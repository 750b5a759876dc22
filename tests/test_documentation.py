"""The pages of the project say what is the case."""

from __future__ import annotations

import pytest

from docs.state_diagrams import PAGE, make_diagrams, put_into


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
