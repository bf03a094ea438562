"""What F.scaled_dot_product_attention accepts, flash_attn accepts, with the same result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import (
    CausalBias,
    CausalVariant,
    causal_lower_right,
    causal_upper_left,
)
from torch.utils.flop_counter import FlopCounterMode

import orchard_ops
from orchard_ops import arguments
from orchard_ops.scoring import Scoring

SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 8)),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 8)),
    "keys of one batch": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "keys without a batch": ((2, 4, 5, 8), (4, 7, 8), (4, 7, 8)),
    "keys without heads": ((2, 4, 5, 8), (7, 8), (7, 8)),
    "queries of one batch": ((1, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)),
    "values of more batches": ((1, 4, 5, 8), (1, 4, 7, 8), (3, 4, 7, 8)),
    "one query head": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "one key head": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "5-D": ((2, 1, 4, 5, 8), (1, 3, 4, 7, 8), (3, 4, 7, 8)),
}


def check(shapes: tuple, device: str, mask: torch.Tensor | None = None, **kwargs: object) -> None:
    cpu = [torch.randn(s, requires_grad=True) for s in shapes]
    there = [x.detach().to(device).requires_grad_() for x in cpu]
    expected = F.scaled_dot_product_attention(*cpu, mask, **kwargs)
    on_device = mask.to(device) if type(mask) is torch.Tensor else mask
    out = orchard_ops.flash_attn(*there, on_device, **kwargs)
    assert out.shape == expected.shape
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(expected)
    for x, y in zip(
        torch.autograd.grad(out, there, dout.to(device)), torch.autograd.grad(expected, cpu, dout)
    ):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_broadcast(name: str, device: str):
    check(SHAPES[name], device)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 2, 1), (4, 2, 4), (12, 4, 6)], ids=str)
def test_head_counts_under_gqa(heads: tuple[int, int, int], device: str):
    shapes = tuple((2, h, n, 8) for h, n in zip(heads, (5, 7, 7)))
    check(shapes, device, enable_gqa=True)


BATCH = (3, 2, 4)
MASKS = {  # the mask, and how many elements the functional op gets of its batch dimensions
    "none": ((1, 1, 1), 1),
    "last": ((1, 1, 4), 4),
    "last two": ((1, 2, 4), 8),
    "first": ((3, 1, 1), 3),
    "first two": ((3, 2, 1), 6),
    "all": ((3, 2, 4), 24),
    "middle": ((1, 2, 1), 6),
    "ends": ((3, 1, 4), 24),
}


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("kind", ("bool", "float"))
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_broadcast_within_the_batch(name: str, kind: str, device: str):
    """A mask of a Swin layer's windows is (1, windows, 1, L, L) for (images, windows, heads, L,
    D)."""
    batch, most = MASKS[name]
    bias = torch.randn(*batch, 1, 5, 7)
    mask = bias > -1.0 if kind == "bool" else bias
    mask[..., 0] = True if kind == "bool" else 0.0
    shapes = tuple((*BATCH, 2, n, 8) for n in (5, 7, 7))
    check(shapes, device, mask)
    operands = [torch.randn(s) for s in shapes]
    passed = arguments.prepare(*operands, mask).scoring.attn_mask
    assert passed.shape[: passed.dim() - 3].numel() == most
    if name not in ("middle", "ends"):
        assert passed.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
    if kind == "float":
        grads = []
        for attention in (orchard_ops.flash_attn, F.scaled_dot_product_attention):
            leaf = bias.clone().requires_grad_()
            attention(*operands, leaf).square().sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_vmap_over_masks_that_broadcast_within_the_batch():
    q, k, v = (torch.randn(3, 2, 4, 2, n, 8) for n in (5, 7, 7))
    for shape in ((3, 1, 4, 1, 5, 7), (3, 2, 1, 1, 5, 7), (1, 4, 1, 5, 7), (2, 1, 1, 5, 7)):
        mask = torch.randn(shape)
        dims = (0, 0, 0, 0 if len(shape) == 6 else None)
        out = torch.vmap(orchard_ops.flash_attn, dims)(q, k, v, mask)
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 1, 5, 7), (1, 5, 1, 5, 7), (0, 1, 1, 5, 7)], ids=str)
def test_a_mask_of_two_batch_dimensions_that_does_not_fit(shape: tuple[int, ...]):
    q, k = torch.randn(4, 2, 5, 8), torch.randn(4, 2, 7, 8)
    with pytest.raises(ValueError, match="attn_mask must broadcast"):
        torch.ops.orchard.flash_attn_fwd(q, k, k, *Scoring(attn_mask=torch.zeros(shape)))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64), ids=str)
def test_a_mask_of_another_float_type(dtype: torch.dtype):
    q, mask = torch.randn(1, 2, 5, 8), torch.randn(5, 5, dtype=dtype, requires_grad=True)
    out = orchard_ops.flash_attn(q, q, q, mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q, mask.float()))
    (gradient,) = torch.autograd.grad(out.sum(), mask)
    assert gradient.dtype == dtype


def test_a_mask_for_2d_operands():
    check(((5, 8), (7, 8), (7, 8)), "cpu", torch.randn(5, 7))


def test_swapped_heads_and_lengths_do_not_run_as_gqa():
    """(B, L, H, D) operands of unequal lengths: the lengths look like head counts."""
    q, k = torch.randn(2, 8, 4, 16), torch.randn(2, 4, 4, 16)
    with pytest.raises(ValueError, match="same number of heads, or enable_gqa=True"):
        orchard_ops.flash_attn(q, k, k)


def test_a_class_made_from_causal_bias_is_one():
    class Named(CausalBias):
        pass

    q, k, v = (torch.randn(1, 2, n, 16) for n in (5, 8, 8))
    bias = Named(CausalVariant.LOWER_RIGHT, 5, 8)
    whole = orchard_ops.flash_attn(q, k, v, causal_lower_right(5, 8))
    assert torch.equal(orchard_ops.flash_attn(q, k, v, bias), whole)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("make", (causal_upper_left, causal_lower_right))
@pytest.mark.parametrize("lengths", [(3, 3), (3, 7)], ids=str)
def test_causal_bias(make, lengths: tuple[int, int], device: str, fresh_stats: None):
    """A CausalBias becomes a window, so it needs no reference on mps."""
    q_len, kv_len = lengths
    bias = make(q_len, kv_len)
    q, k = torch.randn(1, 2, q_len, 16), torch.randn(1, 2, kv_len, 16)
    diagonal = kv_len - q_len if make is causal_lower_right else 0
    seen = torch.ones(q_len, kv_len, dtype=torch.bool).tril(diagonal)
    expected = F.scaled_dot_product_attention(q, k, k, seen)
    out = orchard_ops.flash_attn(*(x.to(device) for x in (q, k, k)), bias)
    torch.testing.assert_close(out.cpu(), expected)
    assert orchard_ops.stats().fallbacks == 0


def test_causal_bias_that_does_not_fit():
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match="for 5 queries and 5 keys; got one for 3 and 4"):
        orchard_ops.flash_attn(q, q, q, causal_lower_right(3, 4))
    with pytest.raises(ValueError, match="is a CausalBias already"):
        orchard_ops.flash_attn(q, q, q, causal_lower_right(5, 5), is_causal=True)


class Relative(torch.Tensor):
    """A tensor whose meaning is not in its memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_masks_with_a_meaning_of_their_own_are_refused():
    q = torch.randn(1, 2, 5, 16)
    mask = torch.empty(5, 5).as_subclass(Relative)
    with pytest.raises(TypeError, match=r"attn_mask must be a plain tensor .* got a Relative"):
        orchard_ops.flash_attn(q, q, q, mask)


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_dropout_of_everything(device: str):
    q = torch.randn(1, 2, 5, 16, device=device, requires_grad=True)
    out = orchard_ops.flash_attn(q, q, q, dropout_p=1.0)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == q.shape and not out.any() and not dq.any()


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_numbers_may_be_0d_tensors(device: str):
    q = torch.randn(1, 2, 5, 16, device=device)
    out = orchard_ops.flash_attn(q, q, q, scale=torch.tensor(0.3), window_left=torch.tensor(2))
    assert torch.equal(
        out, orchard_ops.flash_attn(q, q, q, scale=torch.tensor(0.3).item(), window_left=2)
    )


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_flops_are_counted_as_for_sdpa(device: str):
    def count(attention, on: str) -> int:
        q, k, v = (torch.randn(2, 4, n, 16, device=on, requires_grad=True) for n in (5, 7, 7))
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v).sum().backward()
        return counter.get_total_flops()

    pairs = 2 * 4 * 5 * 7
    assert count(orchard_ops.flash_attn, device) == 2 * pairs * 16 * (2 + 5)


def test_vmap_over_no_samples():
    q = torch.randn(0, 1, 2, 5, 16)
    out = torch.vmap(lambda x: orchard_ops.flash_attn(x, x, x))(q)
    assert out.shape == q.shape
