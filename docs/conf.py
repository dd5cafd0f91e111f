"""How Sphinx builds the documentation: ``tox -e docs``."""

from __future__ import annotations

from typing import Any

from pygments.lexers.special import TextLexer

import tinkex

project = "tinkex"
author = "the authors of tinkex"
version = release = tinkex.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
# Links to headings of other pages, as GitHub makes them: testing.md#faults.
myst_heading_anchors = 3

# Docstrings mark a name with single backticks.
default_role = "py:obj"
# A word may be an attribute of several classes.
suppress_warnings = ["ref.python"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "tinkex"
html_static_path = ["_static"]
html_css_files = ["tinkex.css"]
# At the root of the site; its links go to the pages' sources, which are copied with it.
html_extra_path = ["llms.txt"]
html_theme_options = {"navigation_with_keys": True}


def setup(app: Any) -> None:
    """Show the golden byte vectors of protocol.md, which its test finds by their language."""
    app.add_lexer("hex", TextLexer)
