"""docs/transformers-matrix.md has the families and situations of today, as its script writes."""

from __future__ import annotations

import sys
from pathlib import Path

import cells
import pytest
from families import FAMILIES
from situations import SITUATIONS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

pytestmark = pytest.mark.simulated


def test_the_page_has_every_cell_of_today():
    """A new family or situation asks for `make clients`."""
    import transformers_matrix as tool

    text = tool.PAGE.read_text()
    outcomes = {sign: outcome for outcome, sign in tool.SIGNS.items()}
    found = []
    for line in text.splitlines():
        family, *signs = (x.strip() for x in line.strip("|").split("|"))
        if family in FAMILIES and len(signs) == len(SITUATIONS):
            found += [
                cells.Cell(family, situation, outcomes[sign])
                for situation, sign in zip(SITUATIONS, signs, strict=True)
                if sign
            ]
    assert {(x.family, x.situation) for x in found} == set(cells.all_cells())
    assert text.startswith(tool.page(found))
    assert not tool.failures(found)
