"""The tolerance rule: what it must refuse, and what it must grant."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attention_cases import check_case
from torch import Tensor

from orchard_ops.testing import (
    GRAD_FACTOR,
    OUT_FACTOR,
    SEED,
    Case,
    MathResult,
    assert_attention_close,
    math_attention,
)


def results(x: MathResult, dtype: torch.dtype, **changes: Tensor) -> list[Tensor | None]:
    x = dataclasses.replace(x, **changes)
    parts = (x.out, x.lse.float(), x.dq, x.dk, x.dv)
    return [None if part is None else part.to(dtype) for part in parts]


@pytest.mark.parametrize("constant", (-1e5, -1e7, -1e9))
def test_refuses_weights_from_a_rounded_lse(constant: float):
    """Weights from exp(score - lse) with lse in float32 are refused beside a constant so large that
    lse cannot hold log(n).

    The scores are the constant, since a sum with others would be rounded in any mathematics.
    """
    case = Case(40, 56, 32, num_heads=1)
    q, k, v, do = case.operands()
    operands = q.zero_(), k, v, do
    mask = torch.full((1, 1, 40, 56), constant)
    arguments = case.scoring()._asdict() | {"attn_mask": mask, "dropout_seed": SEED}
    ref, eager = (
        math_attention(*operands, dtype=dtype, **arguments)
        for dtype in (torch.float64, torch.float32)
    )
    assert_attention_close(results(eager, case.dtype), ref, eager)
    scores = q @ k.mT + mask
    weights = torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))
    with pytest.raises(AssertionError, match="dv: max error"):
        assert_attention_close(results(eager, case.dtype, dv=weights.mT @ do), ref, eager)


@pytest.mark.parametrize(("size", "error"), [(1e3, 6e-5), (1e4, 5e-4), (1e5, 8e-3), (1e9, 0.5)])
def test_refuses_two_roundings_of_one_score(size: float, error: float):
    """One key has all the weight of its row: its weight is 1, however large the score."""
    case = Case(16, 16, 16, num_heads=1, scale=size)
    _, _, v, do = case.operands()
    q = torch.eye(16).view(1, 1, 16, 16)
    ref, eager = (case.math(dtype, q, q, v, do) for dtype in (torch.float64, torch.float32))
    assert_attention_close(results(eager, case.dtype), ref, eager)
    with pytest.raises(AssertionError, match="dv: max error"):
        assert_attention_close(results(eager, case.dtype, dv=eager.dv * (1 + error)), ref, eager)


@pytest.mark.parametrize("name", ("out", "dq", "dk", "dv"))
def test_refuses_an_error_of_a_thousandth(name: str):
    case = Case(70, 90, 64, window_right=0, diagonal=20)
    operands = case.operands()
    ref, eager = (case.math(dtype, *operands) for dtype in (torch.float64, torch.float32))
    worse = {name: getattr(eager, name) * 1.001}
    with pytest.raises(AssertionError, match=f"{name}: max error"):
        assert_attention_close(results(eager, case.dtype, **worse), ref, eager)


@pytest.mark.parametrize("head_dim", (1, 16, 64, 200))
@pytest.mark.parametrize("seed", range(8))
def test_grants_single_keys(head_dim: int, seed: int):
    """dq of a row with one key is 0, as a difference of sums that are rounded in float32."""
    check_case(Case(33, 1, head_dim, batch=2, seed=seed), device="cpu", impl="auto")


def test_mathematics_of_a_float_mask_with_an_empty_row():
    """Such a row gives 0 and no NaN, as in F.scaled_dot_product_attention, and nothing else
    changes."""
    case = Case(6, 7, 8, mask="float32")
    operands = [x.double() for x in case.operands()]
    scoring = case.scoring()
    mask = scoring.attn_mask.clone()
    mask[:, :, 2] = -math.inf
    arguments = scoring._asdict() | {"attn_mask": mask, "dropout_seed": SEED}
    x = math_attention(*operands, torch.ones(1, 2, 6), dtype=torch.float64, **arguments)
    rows = [0, 1, 3, 4, 5]
    q, k, v, do = operands
    arguments["attn_mask"] = mask[:, :, rows]
    y = math_attention(
        q[:, :, rows], k, v, do[:, :, rows], torch.ones(1, 2, 5), dtype=torch.float64, **arguments
    )
    for name in ("out", "dq", "dmask"):
        assert torch.equal(getattr(x, name)[:, :, 2], torch.zeros_like(getattr(x, name)[:, :, 2]))
        torch.testing.assert_close(getattr(x, name)[:, :, rows], getattr(y, name))
    for name in ("dk", "dv"):
        torch.testing.assert_close(getattr(x, name), getattr(y, name))


# ---- few elements, of float16 -------------------------------------------------------------------


def single_element(seed: int) -> tuple[MathResult, MathResult, Tensor, Tensor]:
    """One query, 31 keys, width 1: ref and eager, the weights and v in float64."""
    case = Case(1, 31, 1, num_heads=1, dtype=torch.float16, seed=seed)
    operands = case.operands()
    ref, eager = (case.math(dtype, *operands) for dtype in (torch.float64, case.dtype))
    q, k, v, _ = (x.double() for x in operands)
    return ref, eager, torch.softmax(q @ k.mT, -1), v


def from_rounded_weights(weights: Tensor, v: Tensor) -> Tensor:
    """As the matrix unit has it: exponentials in float16, their sum not rounded."""
    of_largest = weights / weights.amax()
    return of_largest.half().double() @ v / of_largest.sum()


def test_grants_rounded_weights_of_a_single_element():
    """Its terms cancel in some draws, and twice the error of a small output is no measure then."""
    refused_without = 0
    for seed in range(300):
        ref, eager, weights, v = single_element(seed)
        out = from_rounded_weights(weights, v)
        assert_attention_close([out.half()], ref, eager)
        try:
            assert_attention_close([out.half()], dataclasses.replace(ref, out_spread=0.0), eager)
        except AssertionError:
            refused_without += 1
    assert refused_without > 10


@pytest.mark.parametrize("fault", ("a key too few", "the scale a tenth off", "another value"))
def test_refuses_faults_of_a_single_element(fault: str):
    """Those of a kernel, in nine of ten draws at least: some change next to nothing by luck."""
    noticed = 0
    for seed in range(100):
        ref, eager, weights, v = single_element(seed)
        if fault == "a key too few":
            weights = weights[..., :-1] / weights[..., :-1].sum()
            v = v[:, :, :-1]
        elif fault == "the scale a tenth off":
            weights = weights**1.1
            weights /= weights.sum()
        else:
            v = v.roll(1, 2)
        try:
            assert_attention_close([from_rounded_weights(weights, v).half()], ref, eager)
        except AssertionError:
            noticed += 1
    assert noticed >= 90


@pytest.mark.parametrize("q_len, kv_len, head_dim", [(5, 40, 64), (70, 90, 16), (300, 400, 64)])
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
def test_grants_many_elements_no_more(
    q_len: int, kv_len: int, head_dim: int, causal: bool, dropout_p: float
):
    case = Case(
        q_len, kv_len, head_dim, dtype=torch.float16, dropout_p=dropout_p,
        window_right=0 if causal else -1, diagonal=kv_len - q_len,
    )  # fmt: skip
    operands = case.operands()
    ref, eager = (case.math(dtype, *operands) for dtype in (torch.float64, case.dtype))
    for name in ("out", "dq", "dk", "dv"):
        factor = OUT_FACTOR if name == "out" else GRAD_FACTOR
        exact = getattr(ref, name)
        error = (getattr(eager, name).double() - exact).abs().max().item()
        usual = factor * error + torch.finfo(case.dtype).eps / 2 * exact.abs().max().item()
        assert 0.0 < ref.rounded_weights(name, case.dtype) < usual
        assert ref.rounded_weights(name, torch.bfloat16) == 0.0
