"""Pages that are filled with what anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecdysis_async._system.pages import DATA, STYLES, TITLE, fill, read

TEMPLATE = f"<title>{TITLE}</title><style>{STYLES}</style><script>{DATA}</script>"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(TEMPLATE)
    return path


def test_the_common_styles_are_in_each_page(template: Path) -> None:
    assert STYLES not in read(template)
    assert "prefers-color-scheme: dark" in read(template)


def test_nothing_leaves_its_place(template: Path) -> None:
    data = ["</script><b>", "<!-- <script>", "\u2028\u2029", DATA, TITLE]
    page = fill(template, f"</title>{DATA}", data)
    title, _, rest = page.partition("</title>")
    assert title == f"<title>&lt;/title&gt;{DATA}"
    script = rest.partition("<script>")[2].removesuffix("</script>")
    assert "<" not in script
    assert json.loads(script) == data


def test_a_path_need_not_be_text(template: Path) -> None:
    assert "<title>\\udcff</title>" in fill(template, "\udcff", "\udcff").encode().decode()


def test_a_number_that_is_none_is_refused(template: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fill(template, "", float("nan"))
