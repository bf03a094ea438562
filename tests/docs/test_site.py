"""The site builds without a warning, and links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from pages import PAGES, ROOT

import orchard_ops

_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#[^)\s]*)?\)")
READ_ON_GITHUB = (ROOT / "tests" / "README.md", ROOT / "simulator" / "README.md")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """`make docs` of a folder."""
    (recipe,) = re.findall(r"^\t\$\(PY\) (-m sphinx .*)$", (ROOT / "Makefile").read_text(), re.M)
    words = recipe.replace("$(ARGS)", "").replace("docs build/docs", f"{folder} {folder}/_out")
    return subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """docs/ with what its pages link to beside it, to be spoiled."""
    for path in ROOT.iterdir():
        if path.name not in ("docs", ".venv", ".git", "build", "dist"):
            (tmp_path / path.name).symlink_to(path)
    return Path(shutil.copytree(ROOT / "docs", tmp_path / "docs"))


def test_the_site_builds_and_documents_every_public_name(copied: Path):
    done = build(copied)
    assert done.returncode == 0, done.stderr
    html = (copied / "_out" / "reference.html").read_text()
    for name in set(orchard_ops.__all__) - {"__version__"}:
        found = re.search(rf'<dt [^>]*id="orchard_ops\.{name}"', html)
        assert found, f"{name} is not in the reference"
    for page in copied.glob("*.md"):
        assert (copied / "_out" / f"{page.stem}.html").exists()


def test_a_fault_fails_the_site(copied: Path):
    faults = {
        "[a dead link](nowhere.md)": "target not found: 'nowhere.md'",
        "[a dead anchor](numerics.md#nowhere)": "'nowhere'",
    }
    with (copied / "quickstart.md").open("a") as page:
        page.write("\n" + "\n".join(faults))
    (copied / "lonely.md").write_text("# In no list\n")
    done = build(copied)
    assert done.returncode != 0
    for warning in (*faults.values(), "lonely.md: WARNING: document isn't included in any toctree"):
        assert warning in done.stderr


@pytest.mark.parametrize("page", [*PAGES, *READ_ON_GITHUB], ids=pages.name)
def test_links_lead_to_files(page: Path):
    """As they stand, for readers of the repository."""
    for link in _LINK.findall(page.read_text()):
        assert not link or (page.parent / link).exists(), f"{pages.name(page)}: {link}"
