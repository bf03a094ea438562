"""The site of docs/, built by ``make docs``: Sphinx reads the Markdown pages through MyST."""

import os
import re
import sys
from os.path import relpath
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "src"))

from orchard_ops import __version__  # noqa: E402
from orchard_ops.__main__ import build_parser  # noqa: E402

project = "orchard_ops"
author = "The orchard_ops authors"
copyright = f"2026, {author}"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "groupwise"
default_role = "obj"  # docstrings write `name`
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"orchard_ops {release}"
html_show_sourcelink = False

_STAND_IN = {  # a page of the site for one that stands elsewhere in the repository
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "examples": ROOT / "examples" / "README.md",
}
_COLON = "\0"
_LINK = re.compile(r"(?<=\]\()(?!https?:|#|path:)([^)#\s]+)(#[^)\s]*)?(?=\))")


def _adapt(app, docname, source):
    """Pages are written for readers of the repository. In the site a link to a file that is no page
    of it offers the file itself."""
    folder, text = DOCS, source[0]
    if docname in _STAND_IN:
        folder, text = _STAND_IN[docname].parent, _STAND_IN[docname].read_text()

    if docname == "commands":
        text += _help()

    def for_the_site(link):
        target = (folder / link[1]).resolve()
        if DOCS in target.parents or not target.is_file():
            return relpath(target, DOCS) + (link[2] or "")
        return f"path:{relpath(target, DOCS)}"

    source[0] = _LINK.sub(for_the_site, text)


def _help():
    """What every command prints about itself, 80 columns wide."""
    os.environ["COLUMNS"] = "80"
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    return "".join(
        f"\n## {name}\n\n```text\n{parser.format_help()}```\n" for name, parser in commands.items()
    )


def _before_napoleon(app, what, name, obj, options, lines):
    """Docstrings write |i - j|, which reStructuredText takes for a substitution. A colon in that
    of an attribute is one, where napoleon sees a type before it."""
    lines[:] = [line.replace("|", r"\|") for line in lines]
    if what == "attribute":
        lines[:] = [line.replace(":", _COLON) for line in lines]


def _after_napoleon(app, what, name, obj, options, lines):
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def setup(app):
    app.connect("source-read", _adapt)
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
