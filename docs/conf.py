"""The documentation's build: `uv run --group docs sphinx-build -W docs docs/_build/html`.

The reference of config and command line is written here from the code, so that it cannot differ.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

project = "prune-search"
version = release = metadata.version("prune-search")
author = "the prune-search authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "prune-search"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# Links to files that are no pages (examples, tables) stay text; tests/test_docs.py checks them.
suppress_warnings = ["myst.xref_missing"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}


def setup(app: Any) -> None:
    """Writes the generated pages before Sphinx looks for them."""
    from reference_pages import write_pages

    app.connect("builder-inited", lambda _: write_pages(DOCS / "reference"))
