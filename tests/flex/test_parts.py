"""Vectors that a mod pads, splits or takes the diagonal of."""

from __future__ import annotations

import flex_mods
import pytest
import torch
import torch.nn.functional as F
from flex_evaluation import evaluate, points, score_text, torch_scores

import orchard_ops

AT = points(*flex_mods.SHAPE)
_GENERATOR = torch.Generator().manual_seed(4)
TABLE, SQUARE = (torch.randn(3, *n, generator=_GENERATOR) for n in ((6,), (4, 4)))
COUNTS = torch.randint(-9, 9, (3, 5), generator=_GENERATOR)
HALVES = TABLE.half()


def _turned(x):
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left])


def _changed_diagonal(x):
    x = x.clone()
    x.diagonal(-1).fill_(3.0)
    x.diagonal().mul_(2.0)
    return x.sum()


def _changed_part(x):
    x = x.clone()
    x.split([2, 4])[1].mul_(2.0)
    return x.sum()


PARTS = {
    "padded": lambda s, b, h, q, kv: s + F.pad(TABLE[h], (1, 2), value=9.0)[q % 9],
    "padded score": lambda s, b, h, q, kv: (
        F.pad(torch.sin(s * SQUARE[h]), (1, -1, 0, 3), value=2.5).square().sum()
    ),
    "cut": lambda s, b, h, q, kv: (
        s + F.pad(SQUARE[h], (-1, 2, 1, -2), value=-torch.inf)[kv % 3].amax()
    ),
    "padded integers": lambda s, b, h, q, kv: (
        s + F.pad(COUNTS[h], (2, 1), value=7).sum() + F.pad(COUNTS[h] > 0, (1, 0), value=True).all()
    ),
    "padded none": lambda s, b, h, q, kv: s + F.pad(TABLE[h, :0], (2, 1), value=4.0).sum(),
    "padded float16": lambda s, b, h, q, kv: s + F.pad(HALVES[h], (1, 1), value=0.1)[0].float(),
    "chunks": lambda s, b, h, q, kv: s + torch.dot(_turned(TABLE[h]), TABLE[b]),
    "chunks of a score": lambda s, b, h, q, kv: (s * TABLE[h]).chunk(2)[1].square().sum(),
    "uneven": lambda s, b, h, q, kv: (
        s + sum((n + 1) * x.sum() for n, x in enumerate(TABLE[h].split(4)))
    ),
    "columns": lambda s, b, h, q, kv: s + SQUARE[h].split([1, 3], -1)[1][:, 2].sum(),
    "diagonals": lambda s, b, h, q, kv: (
        s + SQUARE.diagonal(1, -1, 0)[h].sum() + SQUARE[h].diagonal(-2).amax() + SQUARE[h].trace()
    ),
    "diagonal of a score": lambda s, b, h, q, kv: torch.einsum("ii->", torch.sin(s * SQUARE[h])),
    "a diagonal changed": lambda s, b, h, q, kv: s + _changed_diagonal(SQUARE[h]),
    "a part changed": lambda s, b, h, q, kv: s + _changed_part(TABLE[h]),
}


def test_parts_of_vectors_have_a_text():
    found = evaluate([score_text(f) for f in PARTS.values()], AT)
    for (name, f), results in zip(PARTS.items(), found):
        for what, x, true in zip(("score", "derivative"), results, torch_scores(f, AT)):
            is_close = torch.allclose(x.double(), true.double(), rtol=1e-5, atol=1e-5)
            assert is_close, f"{name}: {what}"


@pytest.mark.parametrize("name", ["padded score", "diagonal of a score"])
def test_the_kernels_run_them(name: str, fresh_stats: None):
    given = [torch.randn(2, 3, n, 8) for n in (7, 9)]
    tables = {n: x for n, x in globals().items() if isinstance(x, torch.Tensor)}

    def results(device: str) -> list[torch.Tensor]:
        moved = {**globals(), **{n: x.to(device) for n, x in tables.items()}}
        mod = type(PARTS[name])(PARTS[name].__code__, moved)
        q, k = (x.detach().to(device).requires_grad_() for x in given)
        out = orchard_ops.flex_attention(q, k, k, mod)
        return [x.cpu() for x in (out, *torch.autograd.grad(out.sin().sum(), (q, k)))]

    for x, y in zip(results("mps"), results("cpu")):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert orchard_ops.stats().metal["flex_attn_fwd"] == 1
