"""Whether trees of operations (flex_trees.py) and their Metal text agree, at all places."""

from __future__ import annotations

import torch
from flex_evaluation import check, evaluate, exact, mask_text, points, score_text, torch_seen
from flex_mods import SHAPE
from flex_trees import Tree

AT = points(*SHAPE, scale=2.0)


def agree_as_scores(trees: list[Tree]) -> None:
    mods = [score_text(tree) for tree in trees]
    given_text = [n for n, mod in enumerate(mods) if mod.text]
    found = dict(zip(given_text, evaluate([mods[n] for n in given_text], AT)))
    for n, tree in enumerate(trees):
        true = exact(tree, AT)
        check(repr(tree), found.get(n, (AT.score, torch.ones_like(AT.score))), true)


def agree_as_masks(trees: list[Tree]) -> None:
    functions = [lambda b, h, q, kv, t=t: t(None, b, h, q, kv) for t in trees]
    mods = [mask_text(f) for f in functions]
    given_text = [n for n, mod in enumerate(mods) if mod.text]
    found = dict(zip(given_text, evaluate([mods[n] for n in given_text], AT)))
    for n, tree in enumerate(trees):
        seen = torch_seen(functions[n], AT)
        assert bool(seen.all()) if n not in found else torch.equal(found[n][0].bool(), seen), tree


def agree_as_integers(trees: list[Tree]) -> None:
    """All bits, by 16."""
    for shift in (0, 16):
        functions = [lambda *at, t=t, shift=shift: (t(*at).long() >> shift) & 0xFFFF for t in trees]
        for tree, function, (value, _) in zip(
            trees, functions, evaluate([score_text(f) for f in functions], AT)
        ):
            with torch.no_grad():
                true = torch.vmap(function)(AT.score, *AT.indices)
            assert torch.equal(value, true.float()), tree
