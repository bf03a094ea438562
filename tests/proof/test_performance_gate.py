"""No kernel does more than the committed table says; benchmarks/apple_model/gate.py.

The counts are exact and know no clock, so 2 % is not a matter of luck. A change that is worth its
cost refreshes the table: python -m benchmarks.apple_model.gate --write.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.apple_model import counts, features, gate, value_width

COMMITTED = json.loads(gate.TABLE.read_text())["kernels"]


def test_no_kernel_became_slower():
    worse, better = gate.compare(COMMITTED, gate.measure())
    assert not worse, "\n".join(worse)
    if better:
        warnings.warn("refresh the table with `make model`: " + "; ".join(better), stacklevel=1)


def test_table_holds_the_kernels():
    assert {gate._case(x) for x in COMMITTED} == set(gate.cases())
    for x in COMMITTED:
        assert (x["totals"]["products"] > 0) == (
            x["family"] not in (counts.DELTA, counts.DMASK_FROM_DS)
        )
        assert x["totals"]["issue cycles (model A)"] > 0


@pytest.mark.parametrize("name", [*gate.CLASSES, "issue cycles (model A)", "registers (estimate)"])
def test_gate_sees(name):
    """2.1 % more of a class fails with both numbers, 1.9 % does not; less is only told."""
    x = copy.deepcopy(next(x for x in COMMITTED if x["totals"][name]))
    before = x["totals"][name]
    for factor, worse, better in ((1.021, 1, 0), (1.019, 0, 0), (0.981, 0, 0), (0.979, 0, 1)):
        x["totals"][name] = before * factor
        found = gate.compare(COMMITTED, [x])
        assert (len(found[0]), len(found[1])) == (worse, better)
    x["totals"][name] = before * 2
    (message,), _ = gate.compare(COMMITTED, [x])
    assert f"{name} {before:g} -> {2 * before:g}" in message


def test_gate_sees_a_class_that_was_not_there():
    x = copy.deepcopy(next(x for x in COMMITTED if not x["totals"]["products of float operands"]))
    x["totals"]["products of float operands"] = 64
    assert gate.compare(COMMITTED, [x])[0]


def test_gate_sees_an_unknown_kernel():
    x = {**COMMITTED[0], "head_dim": 8}
    assert "is not in" in gate.compare(COMMITTED, [x])[0][0]


def test_docs_quote_what_features_cost():
    """The table word for word, and the cycles of the mask's gradient."""
    text = (counts.ROOT / "docs" / "performance-tables.md").read_text()
    header, rows = features.costs(COMMITTED)
    assert len(rows) == len(counts.SCORES) + 1
    for row in (header, *rows):
        assert f"| {' | '.join(row)} |" in text
    narrow, wide = features.gradient_cycles(COMMITTED)
    said = f"{narrow} cycles each at D 64, {wide} at D 128"
    assert said in " ".join(text.split())


@pytest.mark.slow
def test_docs_quote_what_values_of_their_own_width_save():
    text = (counts.ROOT / "docs" / "performance-tables.md").read_text()
    for row in value_width.table():
        assert f"| {' | '.join(row)} |" in text
