"""Property tests: the op against F.scaled_dot_product_attention, and attention's identities."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import orchard_ops
from orchard_ops.testing import (
    GRAD_FACTOR,
    OUT_FACTOR,
    Memory,
    assert_no_worse_than_math,
    math_attention,
)

DEVICES = ("cpu", "mps")

settings.register_profile(
    "suite",
    max_examples=int(os.environ.get("ORCHARD_EXAMPLES", "40")),
    deadline=None,  # the first call of a variant compiles it
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
settings.load_profile("suite")


MEMORIES = st.builds(
    Memory,
    st.permutations(range(4)).map(tuple),
    offset=st.sampled_from((0, 1, 8)),
    gap=st.sampled_from((0, 3)),
)


@st.composite
def problems(draw: st.DrawFn) -> dict:
    group = draw(st.sampled_from((1, 2, 3)))
    num_kv_heads = draw(st.integers(1, 2))
    length = st.one_of(st.integers(1, 70), st.sampled_from((64, 128, 130)))
    return {
        "batch": draw(st.integers(1, 2)),
        "num_heads": group * num_kv_heads,
        "num_kv_heads": num_kv_heads,
        "q_len": draw(length),
        "kv_len": draw(length),
        "head_dim": draw(st.sampled_from((8, 16, 24, 33, 64))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "is_causal": draw(st.booleans()),
        "memory": [draw(MEMORIES) for _ in range(4)],
        "seed": draw(st.integers(0, 2**31)),
    }


def operands(problem: dict) -> list[Tensor]:
    """q, k, v, dout on the CPU."""
    generator = torch.Generator().manual_seed(problem["seed"])
    shapes = [
        (problem["batch"], problem[heads], problem[length], problem["head_dim"])
        for heads, length in (
            ("num_heads", "q_len"),
            ("num_kv_heads", "kv_len"),
            ("num_kv_heads", "kv_len"),
            ("num_heads", "q_len"),
        )
    ]
    return [torch.randn(s, generator=generator).to(problem["dtype"]) for s in shapes]


def sdpa(q: Tensor, k: Tensor, v: Tensor, do: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), do))


@pytest.mark.parametrize("device", DEVICES)
@given(problem=problems())
def test_agrees_with_sdpa(device: str, problem: dict):
    """out and gradients for every shape, memory order, head grouping, causality and dtype."""
    tensors, is_causal = operands(problem), problem["is_causal"]
    ref = sdpa(*(x.double() for x in tensors), is_causal)
    eager = sdpa(*tensors, is_causal)
    q, k, v, do = (m.place(x, device) for x, m in zip(tensors, problem["memory"]))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = torch.ops.orchard.flash_attn(q, k, v, is_causal=is_causal, enable_gqa=True)
    grads = torch.autograd.grad(out, (q, k, v), do)
    rounding = math_attention(*tensors, dtype=torch.float64, window_right=0 if is_causal else -1)
    for i, (name, x) in enumerate(zip(("out", "dq", "dk", "dv"), (out, *grads))):
        factor = OUT_FACTOR if name == "out" else GRAD_FACTOR
        floor = rounding.rounding(name, problem["dtype"])
        least = rounding.rounded_weights(name, problem["dtype"])
        assert_no_worse_than_math(name, x, ref[i], eager[i], factor, floor, least)


@pytest.mark.parametrize("device", DEVICES)
@given(problem=problems(), split=st.floats(0.0, 1.0))
def test_attention_over_two_halves_merges_by_lse(device: str, problem: dict, split: float):
    """softmax over all keys = the halves weighted with exp(lse)."""
    q, k, v, _ = (x.float().to(device) for x in operands(problem))
    cut = round(split * problem["kv_len"])
    whole, lse = orchard_ops.flash_attn(q, k, v, return_lse=True, enable_gqa=True)
    parts = [
        orchard_ops.flash_attn(q, k[:, :, rows], v[:, :, rows], return_lse=True, enable_gqa=True)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    merged_lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * torch.exp(part - merged_lse).unsqueeze(-1) for o, part in parts)
    torch.testing.assert_close(merged_lse.cpu(), lse.cpu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.cpu(), whole.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@given(problem=problems())
def test_keys_may_come_in_any_order(device: str, problem: dict):
    q, k, v, _ = (x.float().to(device) for x in operands(problem))
    order = torch.randperm(problem["kv_len"]).to(device)
    shuffled = orchard_ops.flash_attn(q, k[:, :, order], v[:, :, order], enable_gqa=True)
    torch.testing.assert_close(
        shuffled.cpu(), orchard_ops.flash_attn(q, k, v, enable_gqa=True).cpu(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
@given(problem=problems(), extra=st.integers(1, 40))
def test_causal_output_does_not_depend_on_the_future(device: str, problem: dict, extra: int):
    """Bitwise: appending keys and values changes no earlier row."""
    q, k, v, _ = (x.to(device) for x in operands(problem))
    n = min(problem["q_len"], problem["kv_len"])
    q, k, v = q[:, :, :n], k[:, :, :n], v[:, :, :n]
    before = orchard_ops.flash_attn(q, k, v, is_causal=True, enable_gqa=True)
    tail = torch.full_like(k[:, :, :1], 7.0).expand(-1, -1, extra, -1)
    longer = [torch.cat((x, tail), dim=2) for x in (k, v)]
    assert torch.equal(
        orchard_ops.flash_attn(q, *longer, is_causal=True, enable_gqa=True).cpu(), before.cpu()
    )


@given(
    problem=problems(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    exponent=st.integers(0, 100),
    equal=st.booleans(),
)
def test_falling_back_gives_the_same_result_to_rounding(
    problem: dict, dtype: torch.dtype, exponent: int, equal: bool
):
    """Metal against the reference for scores of 1 to 1e30.

    The dot products are whole numbers, so that both have the same; the scale is a power of two.
    What is left are the roundings of sums, at the size of their terms, whatever the scores' size.
    With `equal` keys come in pairs that share their weight.
    """
    q, k, v, do = (x.to(dtype) for x in operands(problem))
    q, k = (x.mul(2).round().clamp(-8, 8) for x in (q, k))
    if equal:
        k[:, :, 1::2] = k[:, :, : 2 * (k.shape[2] // 2) : 2]
    scale, right = 2.0**exponent, 0 if problem["is_causal"] else -1
    found = []
    for impl in ("metal", "reference"):
        leaves = [x.to("mps").requires_grad_() for x in (q, k, v)]
        out = orchard_ops.flash_attn(
            *leaves, scale=scale, window_right=right, impl=impl, enable_gqa=True
        )
        grads = torch.autograd.grad(out, leaves, do.to("mps"))
        found.append([x.detach().cpu() for x in (out, *grads)])
    math = math_attention(q, k, v, do, dtype=torch.float64, scale=scale, window_right=right)
    sizes = (math.out_size, math.dq_cancelled, math.dk_cancelled, math.dv_size)
    for name, x, y, size in zip(("out", "dq", "dk", "dv"), *found, sizes):
        largest = y.double().abs().max().item()
        tolerance = 4 * torch.finfo(dtype).eps * (size + largest)
        error = (x.double() - y.double()).abs().max().item()
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.2e}"
