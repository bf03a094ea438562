"""The backward takes the very weights of the forward, however large the scores are.

What is exact in one precision stays exact: with integer operands dot products have no rounding, a
dominant key has a weight of 1, and dv is dout.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import DTYPES, Case, run
from representative import pairs
from torch import Tensor

from orchard_ops import flash_attn
from orchard_ops.testing import assert_attention_close

pytestmark = pytest.mark.usefixtures("checked")

SCALES = [10.0**n for n in range(0, 31, 3)]
FAMILIES = {  # head_dim, and whether the backward may store dS
    "dkv, dq": (32, True),
    "dkv and dq without scratch": (64, False),
    "dkv, dq from dS": (64, True),
    "pairs, dq from dS": (128, True),
}


def dominant(q_len: int, kv_len: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and dout of small integers, where row i scores highest, by at least 1, with key i %
    kv_len."""
    generator = torch.Generator().manual_seed(5)
    key = torch.randint(-1, 2, (kv_len, head_dim), generator=generator).float()
    bits = torch.arange(kv_len)[:, None] >> torch.arange(8) & 1
    key[:, :8] = 2.0 * bits - 1  # no two keys alike
    key[:, 8:16] = -key[:, :8]
    key[:, 16:] = 0.0
    q = key[torch.arange(q_len) % kv_len]
    v = torch.randint(-8, 9, (1, 1, kv_len, head_dim), generator=generator).float()
    do = torch.randint(-8, 9, (1, 1, q_len, head_dim), generator=generator).float()
    return tuple(x.to(dtype) for x in (q[None, None], key[None, None], v, do))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (32, 64, 128))
def test_scores_of_normal_operands(dtype: torch.dtype, head_dim: int):
    """Each row's weight is all on itself: out is v and dv is dout, although no score is exact."""
    generator = torch.Generator().manual_seed(0)
    q = (torch.randn(1, 1, 16, head_dim, generator=generator) * 60).to(dtype).to("mps")
    v = torch.ones(1, 1, 16, head_dim, dtype=dtype, device="mps", requires_grad=True)
    (dv,) = torch.autograd.grad(flash_attn(q, q, v).sum(), v)
    assert torch.equal(dv.cpu(), torch.ones_like(dv, device="cpu"))


@pytest.mark.parametrize("family, scale, dtype", pairs(FAMILIES, SCALES, DTYPES), ids=str)
def test_a_dominant_key_has_all_the_weight(
    family: str, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    head_dim, scratch = FAMILIES[family]
    if not scratch:
        monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "0")
    case = Case(45, 45, head_dim, num_heads=1, dtype=dtype, scale=37.3 * scale)
    q, k, v, do = dominant(45, 45, head_dim, dtype)
    out, _, dq, dk, dv = run(case, *(x.to("mps") for x in (q, k, v, do)))
    assert torch.equal(out.cpu(), v)
    assert torch.equal(dv.cpu(), do)
    assert not dq.any() and not dk.any()  # delta is dP where the weight is 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", ({}, {"window_right": 3, "diagonal": 9, "dropout_p": 0.25}))
def test_metal_and_the_reference_keep_the_rule_at_every_scale(scale: float, options: dict):
    """Each key occurs twice, so that weights are 1/2 and sums are exact, whatever the size of the
    scores."""
    case = Case(45, 48, 32, num_heads=1, scale=scale, **options)
    q, k, v, do = dominant(45, 24, 32, torch.float32)
    k, v = k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)
    ref, eager = (case.math(t, q, k, v, do) for t in (torch.float64, torch.float32))
    assert_attention_close(run(case, *(x.to("mps") for x in (q, k, v, do))), ref, eager)
    assert_attention_close(run(case, q, k, v, do, impl="reference"), ref, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_by_the_rule(dtype: torch.dtype):
    case = Case(60, 80, 64, dtype=dtype, scale=40.0, window_right=20)
    operands = case.operands()
    ref, eager = (case.math(t, *operands) for t in (torch.float64, dtype))
    assert_attention_close(run(case, *(x.to("mps") for x in operands)), ref, eager)
