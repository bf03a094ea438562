"""Sums, products and extrema of vectors in a mod: loops of its Metal text."""

from __future__ import annotations

import flex_mods
import pytest
import pytorch_mods
import torch
from flex_evaluation import evaluate, points, score_text
from torch import Tensor

import orchard_ops

AT = points(*flex_mods.SHAPE)
_ROWS = torch.randint(-3, 4, (3, 2, 5), generator=torch.Generator().manual_seed(3))
_REDUCED = {
    "sum": lambda x: x.sum(),
    "sum of rows": lambda x: x.sum(-1)[1] + x.sum(0, keepdim=True)[0, 2] + x.sum((0, 1)),
    "prod": lambda x: x.prod() + x.prod(0)[3],
    "any, all": lambda x: x.any() + 2 * x.all(-1)[0] + 4 * (x != 2).all() + 8 * x[0].any(-1),
    "extrema": lambda x: (
        x.amax() * 1.0 - 1.0 * x.amin(-1)[1] + x.max() + x.amax(0, keepdim=True)[0, 1]
    ),
    "of one or none": lambda x: x[:1, :1].sum() + x[:, :0].sum() + x[:, :0].prod(),
}


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int32", "int64", "float32"])
def test_reductions_of_every_dtype(dtype: str):
    rows = _ROWS.to(getattr(torch, dtype))
    functions = {
        name: lambda s, b, h, q, kv, f=f: s * 0 + f(rows[h]) for name, f in _REDUCED.items()
    }
    found = evaluate([score_text(f) for f in functions.values()], AT)
    for (name, f), (value, _) in zip(_REDUCED.items(), found):
        true = torch.stack([f(rows[h]).float() for h in range(3)])[AT.h.long()]
        assert torch.equal(value, true), name


def test_reductions_keep_what_is_no_number():
    rows = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 3.0, -torch.inf], [-1.0, -2.0, -0.5]])
    functions = [
        lambda s, b, h, q, kv: rows[h].amax() + s * 0,
        lambda s, b, h, q, kv: rows[h].amin() + s * 0,
        lambda s, b, h, q, kv: rows[h].sum() + s * 0,
    ]
    for (value, _), f in zip(evaluate([score_text(f) for f in functions], AT), functions):
        true = torch.stack([f(torch.zeros(()), 0, h, 0, 0) for h in range(3)])[AT.h.long()]
        assert torch.equal(value.nan_to_num(77.0), true.nan_to_num(77.0))


def test_sums_of_float16_are_rounded_once():
    x, y = (torch.randn(3, 40, generator=torch.Generator().manual_seed(n)).half() for n in (1, 2))
    functions = [
        lambda s, b, h, q, kv: s * 0 + torch.dot(x[h], y[h]).float(),
        lambda s, b, h, q, kv: s * 0 + x[h].sum().float(),
        lambda s, b, h, q, kv: s * 0 + x[h].mean().float(),
    ]
    exactly = [(x.double() * y.double()).sum(1), x.double().sum(1), x.double().mean(1)]
    for (value, _), true in zip(evaluate([score_text(f) for f in functions], AT), exactly):
        error = (value.double() - true[AT.h.long()]).abs()
        assert torch.equal(value, value.half().float())
        assert (error <= 2**-11 * value.double().abs() + 1e-5).all()


def test_loops_in_loops_and_what_stays_outside():
    table = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))

    def mod(score, b, h, q_idx, kv_idx):
        gram = table @ table.T
        return score * 0 + (gram * gram).sum() * torch.exp(table[h]).sum()

    text = score_text(mod).text
    (value, _), *_ = evaluate([score_text(mod)], AT)
    gram = (table.double() @ table.double().T).square().sum()
    true = gram * table.double().exp().sum(1)[AT.h.long()]
    torch.testing.assert_close(value.double(), true, rtol=1e-6, atol=0)
    lines = [line for line in text.splitlines() if "for (" in line]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    assert indents == [4, 6, 4], text
    assert text == score_text(mod).text


@pytest.mark.parametrize("name", ["products_of_rows", "mixture", "distances_of_points"])
def test_the_kernels_run_them(name: str, fresh_stats: None):
    """Forward and backward, beside the reference on the CPU."""
    sizes = flex_mods.BATCH, flex_mods.HEADS
    given = [torch.randn(*sizes, n, 8) for n in (flex_mods.Q_LEN, flex_mods.KV_LEN)]
    mod = pytorch_mods.SCORES[name]

    def results(device: str) -> list[Tensor]:
        tables = {n: x.to(device) for n, x in vars(pytorch_mods).items() if isinstance(x, Tensor)}
        moved = type(mod)(mod.__code__, {**mod.__globals__, **tables})
        q, k = (x.to(device).requires_grad_() for x in given)
        out = orchard_ops.flex_attention(q, k, k, moved)
        return [x.cpu() for x in (out, *torch.autograd.grad(out.sin().sum(), (q, k)))]

    for x, y in zip(results("mps"), results("cpu")):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert orchard_ops.stats().metal["flex_attn_fwd"] == 1
    assert orchard_ops.stats().metal["flex_attn_bwd"] == 1
