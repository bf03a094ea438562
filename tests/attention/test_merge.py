"""`merge_attentions`: parts of the keys, merged, are attention over all of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import orchard_ops
from orchard_ops import KeyRanges, merge_attentions

REFUSED = {
    "no_parts": (lambda out, lse: ([], []), "at least one; got 0 outs and 0 lses"),
    "counts": (lambda out, lse: ([out, out], [lse]), "got 2 outs and 1 lses"),
    "out_shape": (lambda out, lse: ([out, out[:1]], [lse, lse[:1]]), r"outs\[1\] must have"),
    "lse_shape": (
        lambda out, lse: ([out], [lse.mT]),
        r"lses\[0\] must have the shape of outs\[0\]",
    ),
    "scalar": (lambda out, lse: ([out[0, 0, 0, 0]], [lse[0, 0, 0]]), r"lses\[0\] must have"),
    "dtype": (lambda out, lse: ([out], [lse.long()]), r"lses\[0\] must be floating point"),
    "kind": (lambda out, lse: ([out], [1.0]), r"lses\[0\] must be a tensor"),
    "device": (lambda out, lse: ([out], [lse.to("meta")]), r"lses\[0\] must be on the device"),
}


@st.composite
def splits(draw: st.DrawFn) -> dict:
    kv_len = draw(st.integers(0, 40))
    cuts = sorted(draw(st.lists(st.integers(0, kv_len), max_size=4)))
    return {
        "lengths": (draw(st.integers(1, 20)), kv_len),
        "cuts": [0, *cuts, kv_len],
        "window": draw(st.sampled_from(((-1, -1), (-1, 0), (5, 2), (0, 0)))),
        "sink_part": draw(st.one_of(st.none(), st.integers(0, len(cuts)))),
        "mask": draw(st.sampled_from(("", "bool", "float"))),
        "far": draw(st.sampled_from((0.0, 30.0, 1e4))),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=splits())
def test_parts_of_the_keys_make_the_whole(problem: dict):
    """out, lse and the gradients of q, k, v, mask and sinks, through out and lse, in float64."""
    torch.manual_seed(problem["seed"])
    (q_len, kv_len), (left, right) = problem["lengths"], problem["window"]
    q, k, v = (
        torch.randn(2, heads, n, 8, dtype=torch.float64, requires_grad=True)
        for heads, n in ((4, q_len), (2, kv_len), (2, kv_len))
    )
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    distance = torch.arange(kv_len) - torch.arange(q_len).unsqueeze(1)
    seen = torch.ones(2, 1, q_len, kv_len, dtype=torch.bool)
    seen &= (distance >= -left) if left >= 0 else True
    seen &= (distance <= right) if right >= 0 else True
    if problem["mask"] == "bool":
        seen = seen & (torch.rand(seen.shape) > 0.4)
    mask = torch.zeros(seen.shape, dtype=torch.float64)
    if problem["mask"] == "float":
        mask = torch.randn(seen.shape, dtype=torch.float64)
    mask[..., kv_len // 2 :] += problem["far"]  # the parts' lse lie far apart
    mask.masked_fill_(~seen, -math.inf).requires_grad_()

    def attention(keys: slice, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return orchard_ops.flash_attn(
            q, k[:, :, keys], v[:, :, keys], mask[..., keys],
            sinks=sinks, enable_gqa=True, return_lse=True,
        )  # fmt: skip

    has_sinks = problem["sink_part"] is not None
    whole = attention(slice(None), sinks if has_sinks else None)
    cuts = problem["cuts"]
    parts = [
        attention(slice(begin, end), sinks if n == problem["sink_part"] else None)
        for n, (begin, end) in enumerate(itertools.pairwise(cuts))
    ]
    merged = merge_attentions(*zip(*parts))
    grads = [torch.randn_like(x) for x in whole]
    leaves = (q, k, v, mask, *((sinks,) if has_sinks else ()))
    expected = torch.autograd.grad(whole, leaves, grads)
    found = torch.autograd.grad(merged, leaves, grads)
    for x, y in zip((*merged, *found), (*whole, *expected)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_parts_of_a_window_by_positions():
    """A part's positions count from its own first key: windows, causality and ALiBi go on."""
    q, k, v = (torch.randn(1, 2, 30, 8, dtype=torch.float64) for _ in range(3))
    options = {"window_left": 9, "is_causal": True, "alibi_slopes": torch.tensor([0.3, 0.7])}
    options["return_lse"] = True
    whole = orchard_ops.flash_attn(q, k, v, **options)
    parts = []
    for begin, end in ((0, 7), (7, 20), (20, 30)):
        ranges = KeyRanges.sliding_window(-1, -1, 30, diagonal=-begin)
        keys = slice(begin, end)
        parts.append(
            orchard_ops.flash_attn(q, k[:, :, keys], v[:, :, keys], key_ranges=ranges, **options)
        )
    for x, y in zip(merge_attentions(*zip(*parts)), whole):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_dtypes(device: str, dtype: torch.dtype):
    """Three parts on the device, rounded once: a unit in the last place of the whole's size."""
    q, k, v = (torch.randn(1, 2, n, 16).to(device, dtype) for n in (20, 48, 48))
    parts = [
        orchard_ops.flash_attn(q, k[:, :, keys], v[:, :, keys], return_lse=True)
        for keys in (slice(0, 16), slice(16, 17), slice(17, 48))
    ]
    out, lse = merge_attentions(*zip(*parts))
    expected, expected_lse = orchard_ops.flash_attn(
        *(x.cpu().double() for x in (q, k, v)), return_lse=True
    )
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    ulp = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2 * ulp)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_dtypes_promote():
    outs = torch.randn(2, 1, 1, 3, 4)
    lses = torch.randn(2, 1, 1, 3)
    out, lse = merge_attentions((outs[0].half(), outs[1].bfloat16()), lses)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    out, lse = merge_attentions(outs.half(), lses.double())
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float64)


def test_rows_without_keys_reach_nothing():
    """Seen by no part: 0 and -inf; by one of two: that one, whatever the other's out holds."""
    outs = torch.randn(2, 1, 1, 3, 4)
    lses = torch.randn(2, 1, 1, 3)
    lses[:, ..., 0] = -math.inf
    lses[0, ..., 1] = -math.inf
    outs[:, ..., 0, :] = math.nan
    outs[0, ..., 1, :] = math.nan
    outs, lses = outs.requires_grad_(), lses.requires_grad_()
    out, lse = merge_attentions(outs, lses)
    assert not out[..., 0, :].any()
    assert lse[..., 0].isneginf().all()
    torch.testing.assert_close(out[..., 1, :], outs[1, ..., 1, :])
    torch.testing.assert_close(lse[..., 1], lses[1, ..., 1])
    douts, dlses = torch.autograd.grad(
        (out, lse), (outs, lses), (torch.randn_like(out), torch.randn_like(lse))
    )
    assert douts.isfinite().all()
    assert dlses.isfinite().all()
    assert not douts[:, ..., 0, :].any()
    assert not dlses[:, ..., 0].any()
    assert not dlses[0, ..., 1].any()


@pytest.mark.parametrize("far", (1e3, 1e8, 1e30))
def test_far_lse(far: float):
    """Parts that differ by much, and equal ones at any size: the weights stay right."""
    outs = torch.randn(3, 1, 1, 1, 4)
    lses = torch.tensor([far, far, -far]).view(3, 1, 1, 1).requires_grad_()
    out, lse = merge_attentions(outs, lses)
    torch.testing.assert_close(out, (outs[0] + outs[1]) / 2)
    torch.testing.assert_close(lse.item(), far + math.log(2.0))
    (dlses,) = torch.autograd.grad(lse, lses, torch.ones_like(lse))
    torch.testing.assert_close(dlses.flatten(), torch.tensor([0.5, 0.5, 0.0]))


def test_one_part_is_itself():
    out, lse = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3)
    for x, y in zip(merge_attentions([out], [lse]), (out, lse)):
        assert torch.equal(x, y)


def test_gradcheck():
    outs = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_attentions, (outs, lses))
    assert torch.autograd.gradgradcheck(merge_attentions, (outs, lses))


def test_compile_vmap_and_func():
    outs, lses = torch.randn(2, 4, 1, 3, 4), torch.randn(2, 4, 1, 3)
    expected = merge_attentions(outs, lses)
    compiled = torch.compile(merge_attentions, backend="aot_eager", fullgraph=True)
    mapped = torch.vmap(merge_attentions, in_dims=1)
    for found in (compiled(list(outs), list(lses)), mapped(outs, lses)):
        for x, y in zip(found, expected):
            torch.testing.assert_close(x, y)

    def loss(outs: Tensor, lses: Tensor) -> Tensor:
        return sum(x.sum() for x in merge_attentions(outs, lses))

    leaves = outs.clone().requires_grad_(), lses.clone().requires_grad_()
    for x, y in zip(
        torch.func.grad(loss, argnums=(0, 1))(outs, lses),
        torch.autograd.grad(loss(*leaves), leaves),
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    arguments, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        merge_attentions(*arguments(torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3)))
    assert str(error.value).startswith("orchard_ops.merge_attentions: ")
