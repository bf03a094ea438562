"""Every kind of score under torch.compile, vmap, autocast and checkpoint, on Metal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import orchard_ops
from orchard_ops import KeyRanges

Arguments = Callable[[int], dict[str, object]]


def positions(length: int) -> Tensor:
    return torch.arange(length, device="mps")


FEATURES: dict[str, Arguments] = {  # by length
    "key_ranges": lambda n: {"key_ranges": KeyRanges.from_document_ids(positions(n)[None] // 7)},
    "bool mask": lambda n: {"attn_mask": (positions(n)[:, None] - positions(n)).abs() < 6},
    "bias": lambda n: {"attn_mask": 0.1 * (positions(n)[:, None] - positions(n)).float()},
    "alibi": lambda n: {"alibi_slopes": torch.tensor((0.5, 0.25), device="mps")},
    "sinks": lambda n: {"sinks": torch.tensor((1.0, -1.0), device="mps")},
}
pytestmark = [
    pytest.mark.parametrize("name", FEATURES),
    pytest.mark.usefixtures("fresh_stats"),
]


def operands(length: int, *batch: int) -> list[Tensor]:
    return [torch.randn(*batch, 2, length, 16).to("mps").requires_grad_() for _ in range(3)]


def attention(q: Tensor, k: Tensor, v: Tensor, name: str, **options: object) -> Tensor:
    scores = FEATURES[name](q.shape[-2])
    return orchard_ops.flash_attn(q, k, v, is_causal=True, **scores, **options)


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [x.cpu() for x in torch.autograd.grad(out.float().square().sum(), leaves)]


def ran_on_metal() -> None:
    stats = orchard_ops.stats()
    assert stats.fallbacks == 0 and not stats.reference
    assert all(stats.metal.values())


def test_compiled_with_dynamic_shapes(name: str):
    torch._dynamo.reset()
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": True}
    compiled = torch.compile(attention, **options)
    for length in (20, 33):
        leaves = operands(length, 2)
        out, expected = compiled(*leaves, name), attention(*leaves, name)
        assert torch.equal(out.cpu(), expected.cpu())
        for x, y in zip(gradients(out, leaves), gradients(expected, leaves)):
            assert torch.equal(x, y)
    ran_on_metal()


def test_vmap(name: str):
    leaves = operands(20, 3, 2)
    out = torch.vmap(lambda q, k, v: attention(q, k, v, name))(*leaves)
    expected = torch.stack([attention(*(x[n] for x in leaves), name) for n in range(3)])
    torch.testing.assert_close(out.cpu(), expected.cpu())
    for x, y in zip(gradients(out, leaves), gradients(expected, leaves)):
        torch.testing.assert_close(x, y)
    ran_on_metal()


def test_autocast_and_checkpoint(name: str):
    leaves = operands(20, 2)
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        with torch.autocast("mps", dtype=torch.float16):
            arguments = (*leaves, name)
            if checkpoint:
                out = torch.utils.checkpoint.checkpoint(
                    attention, *arguments, use_reentrant=False, dropout_p=0.2
                )
            else:
                out = attention(*arguments, dropout_p=0.2)
        assert out.dtype == torch.float16
        found.append(gradients(out, leaves))
    for x, y in zip(*found):
        assert torch.equal(x, y)
    ran_on_metal()
