"""Rows whose scores all carry a large constant, as additive masks and left padding make them.

Softmax does not see a constant: the weights depend on the differences of scores. A weight computed
as exp(score - lse) is wrong, because float32 rounds log(n) away from lse = constant + log(n).
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES
from representative import pairs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import orchard_ops
from orchard_ops.ops.schema import public_lse
from orchard_ops.scoring import Scoring
from orchard_ops.testing import SEED, Case, assert_attention_close, math_attention

pytestmark = pytest.mark.usefixtures("checked")

LOWEST = torch.finfo(torch.float32).min
CONSTANTS = (1e4, -1e7, -1e9, 1e30, LOWEST)
KINDS = {
    "dense": Case(40, 56, 32, num_heads=4, num_kv_heads=2),
    "dropout": Case(40, 56, 32, dropout_p=0.3),
    "window": Case(40, 56, 32, window_left=9, window_right=3, diagonal=5),
    "sinks": Case(40, 56, 32, num_heads=4, num_kv_heads=4, sinks=True),
}


@pytest.fixture(params=("cpu", "mps"), autouse=True)
def device(request: pytest.FixtureRequest, quiet_fallback: None) -> str:
    return request.param


def differentiated(
    device: str, operands: tuple[Tensor, ...], scoring: Scoring, with_lse: bool = False
) -> list[Tensor | None]:
    """out, lse, dq, dk, dv, dmask, dsinks of the functional ops by autograd."""
    *qkv, dout = (x.to(device) for x in operands)
    leaves = [x.detach().requires_grad_() for x in qkv]
    moved = {
        name: None if (x := getattr(scoring, name)) is None else x.to(device)
        for name in ("attn_mask", "alibi_slopes", "sinks")
    }
    for name in ("attn_mask", "sinks"):
        if moved[name] is not None and moved[name].dtype.is_floating_point:
            moved[name] = moved[name].detach().requires_grad_()
    scoring = scoring._replace(**moved)
    out, row_stats = torch.ops.orchard.flash_attn_fwd(*leaves, *scoring)
    lse = public_lse(row_stats, scoring.unit)
    optional = [scoring.attn_mask, scoring.sinks]
    inputs = [*leaves, *(x for x in optional if x is not None and x.requires_grad)]
    outputs, grads = [out], [dout]
    if with_lse:
        outputs, grads = [out, lse], [dout, torch.ones_like(lse)]
    found = iter(torch.autograd.grad(outputs, inputs, grads))
    return [
        out.detach(),
        lse.detach(),
        *(next(found) for _ in range(3)),
        *(next(found) if x is not None and x.requires_grad else None for x in optional),
    ]


def check(device: str, case: Case, operands: tuple[Tensor, ...], scoring: Scoring) -> None:
    for with_lse in (False, True):
        dlse = torch.ones(operands[0].shape[:3]) if with_lse else None
        arguments = scoring._asdict() | {"dropout_seed": SEED}
        ref, eager = (
            math_attention(*operands, dlse, dtype=dtype, **arguments)
            for dtype in (torch.float64, case.dtype)
        )
        results = differentiated(device, operands, scoring, with_lse)
        assert_attention_close(results, ref, eager)


@pytest.mark.parametrize("kind, constant, dtype", pairs(KINDS, CONSTANTS, DTYPES), ids=str)
def test_constant_float_mask(device: str, kind: str, constant: float, dtype: torch.dtype):
    case = KINDS[kind].but(dtype=dtype)
    mask = torch.full((1, 1, case.q_len, case.kv_len), constant)
    check(device, case, case.operands(), case.scoring()._replace(attn_mask=mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("constant", (2.0**13, -(2.0**17), -(2.0**23)))
def test_constant_in_the_dot_products(device: str, constant: float, dtype: torch.dtype):
    """Without a mask: one column of q and k adds the constant, exactly in every dtype."""
    case = KINDS["dense"].but(dtype=dtype, scale=1.0)
    q, k, v, do = case.operands()
    q[..., 0], k[..., 0] = 2.0**10, constant / 2.0**10
    q[..., 1:] = q[..., 1:].sign()
    k[..., 1:] = k[..., 1:].sign()
    check(device, case, (q, k, v, do), case.scoring())


@pytest.mark.parametrize("constant", (-1e4, -1e7, -1e9, LOWEST))
def test_equal_keys_share_a_row_exactly(device: str, constant: float):
    """dv is the sum of the weights: 4 rows with 1/4 for each of 4 keys."""
    z = torch.zeros(1, 1, 4, 8, device=device)
    v = torch.randn(1, 1, 4, 8).to(device).requires_grad_()
    mask = torch.full((4, 4), constant, device=device)
    orchard_ops.flash_attn(z, z, v, attn_mask=mask).sum().backward()
    assert torch.equal(v.grad.cpu(), torch.ones(1, 1, 4, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("additive", "bool"))
def test_left_padding_as_transformers_builds_it(device: str, kind: str, dtype: torch.dtype):
    """Causal, with the first keys of one sample hidden: its first rows see only scores of
    finfo.min."""
    case = Case(24, 24, 32, batch=2, num_heads=4, num_kv_heads=4, dtype=dtype)
    q, k, v, do = case.operands()
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1).expand(2, 1, 24, 24).clone()
    hidden[1, :, :, :7] = True
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(2, 1, 24, 24, dtype=dtype).masked_fill(hidden, lowest)
    mask = ~hidden if kind == "bool" else mask
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        wide = mask if kind == "bool" else mask.double()
        expected = F.scaled_dot_product_attention(*leaves, attn_mask=wide)
    expected = [expected, *torch.autograd.grad(expected, leaves, do.double())]
    scoring = case.scoring()._replace(attn_mask=mask)
    out, _, dq, dk, dv, *_ = differentiated(device, (q, k, v, do), scoring)
    # float16's finfo.min is -65504: float32 adds it to a score with a rounding of 4e-3.
    tolerance = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for x, y in zip((out, dq, dk, dv), expected):
        torch.testing.assert_close(x.cpu().double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ("bool", "float32", "same"))
@pytest.mark.parametrize("sinks", (False, True))
def test_rows_that_see_nothing(device: str, kind: str, sinks: bool):
    """A row whose mask is all False or all -inf gives 0 and gradients of 0, in the oracle and in
    the op."""
    case = Case(9, 11, 16, mask=kind, sinks=sinks, dtype=torch.float16)
    scoring = case.scoring()
    mask = scoring.attn_mask.clone()
    mask[:, :, 3] = False if kind == "bool" else -math.inf
    scoring = scoring._replace(attn_mask=mask)
    operands = case.operands()
    arguments = scoring._asdict() | {"dropout_seed": SEED}
    ref = math_attention(*operands, dtype=torch.float64, **arguments)
    for x in (ref.out, ref.dq, ref.dk, ref.dv, ref.dmask, ref.dsinks):
        assert x is None or x.isfinite().all()
    assert not ref.out[:, :, 3].any() and not ref.dq[:, :, 3].any()
    assert not sinks or ref.dsinks.any()
    check(device, case, operands, scoring)
