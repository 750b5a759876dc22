"""How Sphinx builds the pages: ``nox -s docs``. Nothing is fetched from elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))

from ecdysis_async import __version__

project = "ecdysis_async"
author = "the authors of ecdysis_async"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["snippets"]
html_theme = "furo"
html_title = "ecdysis_async"
html_show_copyright = False

myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
# Programs that stand in a page are shown as they are: `--` is no dash.
smartquotes = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def lead_to_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Let links that are right where the files lie lead to the pages that are made of these files."""
    source[0] = source[0].replace("](../CONTRIBUTING.md", "](contributing.md")


def setup(app: Sphinx) -> None:
    """Tell Sphinx what it does not know: diagrams are shown as text, because what draws them would be fetched."""
    app.add_lexer("mermaid", TextLexer)
    app.connect("source-read", lead_to_pages)
