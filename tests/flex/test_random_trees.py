"""Random functions of scores and indices: their Metal text against float64 autograd.

A few are drawn by default, always the same; `pytest -m slow` and `make fuzz ARGS="--of trees"`
draw many more.
"""

from __future__ import annotations

import pytest
import torch
from flex_trees import Tree, integers, masks, read, scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tree_agreement import agree_as_integers, agree_as_masks, agree_as_scores

_AT_ONCE = 12
OPTIONS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
}


@given(st.lists(scores, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=3, **OPTIONS)
def test_scores_and_derivatives(trees: list[Tree]):
    agree_as_scores(trees)


@given(st.lists(masks, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=2, **OPTIONS)
def test_conditions(trees: list[Tree]):
    agree_as_masks(trees)


@given(st.lists(integers, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=2, **OPTIONS)
def test_integers(trees: list[Tree]):
    agree_as_integers(trees)


@pytest.mark.slow
@given(st.lists(scores, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=60, **OPTIONS)
def test_many_scores_and_derivatives(trees: list[Tree]):
    agree_as_scores(trees)


@pytest.mark.slow
@given(st.lists(masks, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=40, **OPTIONS)
def test_many_conditions(trees: list[Tree]):
    agree_as_masks(trees)


@given(st.lists(scores | integers, min_size=3, max_size=3))
@settings(max_examples=3, **OPTIONS)
def test_what_is_written_is_the_tree(trees: list[Tree]):
    """A tree that has failed is kept as it is written."""
    agree_as_scores([read(tree.written) for tree in trees])
    for tree in trees:
        again = read(tree.written)
        for at in ((0.75, 0, 1, 3, 5), (-2.5, 1, 2, 12, 0)):
            score, *places = (torch.tensor(x) for x in at)
            places = [x.int() for x in places]
            assert torch.equal(again(score, *places), tree(score, *places)), tree
