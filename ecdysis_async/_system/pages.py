"""Pages for people that are one file each, and ask for nothing from elsewhere: their common styles, and their data.

A page draws itself from the JSON that stands in it. What that says may have been written by anybody.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

__all__ = ["fill", "read"]

# What stands in a template for the common styles, for the title, and for the data.
STYLES = "/* common styles */"
TITLE = "<!-- title -->"
DATA = "/* what was seen */"


def read(template: Path) -> str:
    """Return a page with the common styles in it. It blocks on files."""
    styles = Path(__file__).with_name("pages.css").read_text(encoding="utf-8")
    return template.read_text(encoding="utf-8").replace(STYLES, styles, 1)


def fill(template: Path, title: str, data: object) -> str:
    """Return a page with its title and its data.

    Args:
        template: the path of the page.
        title: as text.
        data: what JSON can hold.

    Raises:
        ValueError: a number in it is not finite.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # Nothing in it may end the script that it stands in.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    before, _, behind = read(template).partition(DATA)
    # A path in it may hold bytes that are no text.
    shown = html.escape(title).encode("utf-8", "backslashreplace").decode()
    return before.replace(TITLE, shown, 1) + text + behind
