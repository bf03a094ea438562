"""Random functions of scores and indices: their Metal text against float64 autograd.

A few are drawn by default, always the same; `pytest -m slow` draws many more.
"""

from __future__ import annotations

import pytest
import torch
from flex_evaluation import check, evaluate, exact, mask_text, points, score_text, torch_seen
from flex_mods import SHAPE
from flex_trees import Tree, integers, masks, scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

AT = points(*SHAPE, scale=2.0)
_AT_ONCE = 12
OPTIONS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
}


def _agree_as_scores(trees: list[Tree]) -> None:
    mods = [score_text(tree) for tree in trees]
    given_text = [n for n, mod in enumerate(mods) if mod.text]
    found = dict(zip(given_text, evaluate([mods[n] for n in given_text], AT)))
    for n, tree in enumerate(trees):
        true = exact(tree, AT)
        check(repr(tree), found.get(n, (AT.score, torch.ones_like(AT.score))), true)


def _agree_as_masks(trees: list[Tree]) -> None:
    functions = [lambda b, h, q, kv, t=t: t(None, b, h, q, kv) for t in trees]
    mods = [mask_text(f) for f in functions]
    given_text = [n for n, mod in enumerate(mods) if mod.text]
    found = dict(zip(given_text, evaluate([mods[n] for n in given_text], AT)))
    for n, tree in enumerate(trees):
        seen = torch_seen(functions[n], AT)
        assert bool(seen.all()) if n not in found else torch.equal(found[n][0].bool(), seen), tree


def _agree_as_integers(trees: list[Tree]) -> None:
    """All bits, by 16."""
    for shift in (0, 16):
        functions = [lambda *at, t=t, shift=shift: (t(*at).long() >> shift) & 0xFFFF for t in trees]
        for tree, function, (value, _) in zip(
            trees, functions, evaluate([score_text(f) for f in functions], AT)
        ):
            with torch.no_grad():
                true = torch.vmap(function)(AT.score, *AT.indices)
            assert torch.equal(value, true.float()), tree


@given(st.lists(scores, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=3, **OPTIONS)
def test_scores_and_derivatives(trees: list[Tree]):
    _agree_as_scores(trees)


@given(st.lists(masks, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=2, **OPTIONS)
def test_conditions(trees: list[Tree]):
    _agree_as_masks(trees)


@given(st.lists(integers, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=2, **OPTIONS)
def test_integers(trees: list[Tree]):
    _agree_as_integers(trees)


@pytest.mark.slow
@given(st.lists(scores, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=60, **OPTIONS)
def test_many_scores_and_derivatives(trees: list[Tree]):
    _agree_as_scores(trees)


@pytest.mark.slow
@given(st.lists(masks, min_size=_AT_ONCE, max_size=_AT_ONCE))
@settings(max_examples=40, **OPTIONS)
def test_many_conditions(trees: list[Tree]):
    _agree_as_masks(trees)
