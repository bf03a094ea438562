"""Captured tensors that are trained, in what is added to the score: on Metal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import orchard_ops

pytestmark = pytest.mark.usefixtures("fresh_stats")


def _relative(captured: Tensor) -> Any:
    return lambda score, b, h, q_idx, kv_idx: score + captured[h, q_idx - kv_idx + 24]


def _by_position(captured: Tensor) -> Any:
    return lambda score, b, h, q_idx, kv_idx: captured[q_idx, kv_idx] + score


def _slope(captured: Tensor) -> Any:
    return lambda score, b, h, q_idx, kv_idx: score - captured[h] * (q_idx - kv_idx)


def _rows(captured: Tensor) -> Any:
    """As the rotary part of multi-head latent attention."""
    return lambda score, b, h, i, j: score + torch.dot(captured[h, i], captured[h // 2, j])


TRAINED = {
    "products of rows": (_rows, (4, 25, 6)),
    "relative positions": (_relative, (4, 49)),
    "a table of positions": (_by_position, (25, 25)),
    "slopes": (_slope, (4,)),
}


def _dense(name: str, q: Tensor, k: Tensor, x: Tensor, seen: Tensor | None) -> Tensor:
    i, j = torch.arange(25)[:, None], torch.arange(25)
    bias = {
        "relative positions": lambda: x[:, i - j + 24],
        "a table of positions": lambda: x,
        "slopes": lambda: -x[:, None, None] * (i - j),
        "products of rows": lambda: x @ x[[0, 0, 1, 1]].mT,
    }[name]()
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5 + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ k.repeat_interleave(2, 1)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("name", TRAINED)
def test_what_is_added_to_the_score_is_trained_on_metal(name: str, masked: bool):
    make, shape = TRAINED[name]
    q, k, captured = (torch.randn(s) for s in ((2, 4, 25, 8), (2, 2, 25, 8), shape))
    seen, mask = None, None
    if masked:
        documents = (torch.arange(25) // 11).to("mps")
        mask = create_block_mask(
            lambda b, h, i, j: (documents[i] == documents[j]) & (i >= j),
            None, None, 25, 25, device="mps", BLOCK_SIZE=8,
        )  # fmt: skip
        i, j = torch.arange(25)[:, None], torch.arange(25)
        seen = (i // 11 == j // 11) & (i >= j)
    right = [x.double().requires_grad_() for x in (q, k, captured)]
    _dense(name, *right, seen).sin().sum().backward()
    leaves = [x.to("mps").requires_grad_() for x in (q, k, captured)]
    out = orchard_ops.flex_attention(
        leaves[0], leaves[1], leaves[1], make(leaves[2]), mask, enable_gqa=True
    )
    out.sin().sum().backward()
    for x, y in zip(leaves, right):
        torch.testing.assert_close(x.grad.cpu().double(), y.grad, rtol=1e-4, atol=1e-4)
    metal = {name: n for name, n in orchard_ops.stats().metal.items() if n}
    assert metal == {"flash_attn_fwd": 1, "flash_attn_bwd": 1}
    assert orchard_ops.stats().reference == {}


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("trained_score", (False, True))
def test_a_mask_that_reads_what_is_trained_elsewhere(compiled: bool, trained_score: bool):
    """A mask has no derivative, as in PyTorch: a spread that is learned, say."""
    q, spread = torch.randn(1, 2, 20, 8).to("mps"), torch.tensor([3.0, 7.5]).to("mps")
    slope = torch.tensor([0.1, -0.2]).to("mps").requires_grad_(trained_score)

    def results(spread: Tensor) -> list[Tensor]:
        leaf = q.clone().requires_grad_()
        mask = create_block_mask(
            lambda b, h, i, j: i - j < spread[h], None, 2, 20, 20, device="mps", BLOCK_SIZE=16
        )

        def call(leaf: Tensor, mask: Any) -> Tensor:
            return orchard_ops.flex_attention(
                leaf, leaf, leaf, lambda score, b, h, i, j: score + slope[h] * j, mask
            )

        function = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
        out = function(leaf, mask)
        wanted = [leaf, slope] if trained_score else [leaf]
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), wanted)]

    torch._dynamo.reset()
    right = results(spread)
    found = results(torch.nn.Parameter(spread))
    assert all(torch.equal(x, y) for x, y in zip(found, right))
    assert orchard_ops.stats().reference == {}
