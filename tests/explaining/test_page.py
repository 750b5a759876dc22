"""The page of a story, in a real browser."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from ecdysis_async._explaining import page
from ecdysis_async._explaining.now import Wait
from ecdysis_async._explaining.story import tell_stories
from tests.scenarios.servers.programs import browse

from .histories import begin, fail, records, roll_out, settle


@pytest.mark.main_python_only
def test_the_page_shows_lanes_arrows_and_the_reason(tmp_path: Path) -> None:
    stories = tell_stories(records(tmp_path, [*roll_out(), *begin_again("r2", begin() + fail())]))
    waits = [Wait(7, "pid 6 waits for pid 7", stack="File </script><b>app.py")]
    file = tmp_path / "page.html"
    file.write_text(page.write(stories, waits, "</title>app.sock"))
    document = browse(file, tmp_path, "--dump-dom")
    assert len(re.findall(r'<details class="restart"', document)) == 2
    assert len(re.findall(r'<g class="lane"', document)) == 5 + 2
    assert len(re.findall(r'<line class="arrow"', document)) == 2 * 5 + 2
    assert "no such table: users" in document
    assert html.escape("File </script><b>app.py", quote=False) in document


def begin_again(id: str, lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the same for another restart, later."""
    found = []
    for each in lines:
        later = {**each, "at": float(str(each["at"])) + 500, "clock": float(str(each["clock"])) + 500}
        found.append({**later, "restart": id} if "restart" in each else later)
    return found


def test_the_page_asks_for_nothing() -> None:
    text = page.TEMPLATE.read_text()
    assert re.findall(r"""(?:src|href)\s*=|@import|url\(|fetch\(|https?://(?!www\.w3\.org)""", text) == []


def test_it_is_json_without_infinities(tmp_path: Path) -> None:
    stories = tell_stories(records(tmp_path, begin()))
    found = json.loads(json.dumps(page.describe(stories, [], "app.sock"), allow_nan=False))
    assert found["restarts"][0]["ended"] is None
    settled = tell_stories(records(tmp_path, begin() + settle()))
    assert page.describe(settled, [], "app.sock")["restarts"][0]["drained"] == 108.0
