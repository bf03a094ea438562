"""torch.export and torch.compile with query and key lengths that vary independently."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config as functorch_config

import orchard_ops

WAYS = (orchard_ops.flash_attn, torch.ops.orchard.flash_attn)


class Attention(torch.nn.Module):
    def __init__(self, way) -> None:
        super().__init__()
        self.way = way

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.way(q, k, v)


def qkv(batch: int, q_len: int, kv_len: int) -> list[torch.Tensor]:
    return [torch.randn(batch, 2, n, 16) for n in (q_len, kv_len, kv_len)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("example", [(9, 11), (9, 9)], ids=str)
def test_export_with_two_lengths(way, example: tuple[int, int]):
    batch, q_len, kv_len = (torch.export.Dim(n, min=1, max=512) for n in ("B", "L", "S"))
    dims = [{0: batch, 2: q_len}, {0: batch, 2: kv_len}, {0: batch, 2: kv_len}]
    program = torch.export.export(
        Attention(way), tuple(qkv(2, *example)), dynamic_shapes=tuple(dims)
    )
    for lengths in ((20, 31), (20, 20), (1, 7), (1, 1)):
        inputs = qkv(3, *lengths)
        torch.testing.assert_close(program.module()(*inputs), way(*inputs))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(9, 11), (9, 9)], ids=str)
def test_mark_dynamic(way, lengths: tuple[int, int]):
    torch._dynamo.reset()
    inputs = qkv(2, *lengths)
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 2)
    compiled = torch.compile(Attention(way), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), way(*inputs))


@pytest.mark.parametrize("way", WAYS)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_lengths_that_depend_on_data(way):
    torch._dynamo.reset()

    def packed(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        rows = x[keep.nonzero().squeeze(1)][None, None]
        return way(rows, rows, rows)

    x, keep = torch.randn(20, 16), torch.arange(20) % 3 == 0
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, keep), packed(x, keep))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", (0.0, 0.1, 0.5, 0.9))
def test_the_backward_sees_the_forwards_dropout(way, budget: float):
    """Under a memory budget the partitioner repeats computations, but never the draw of the
    seed."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: way(q, k, v, dropout_p=0.4), backend="aot_eager")
    q, k, v = (x.requires_grad_() for x in qkv(2, 40, 50))
    with functorch_config.patch(activation_memory_budget=budget):
        out = compiled(q, k, v)
    weight = torch.randn_like(out)
    (dv,) = torch.autograd.grad((out * weight).sum(), v)
    torch.testing.assert_close((dv * v).sum(), (out * weight).sum())  # out is linear in v


def test_a_budget_of_0_saves_the_seed_beside_the_inputs():
    torch._dynamo.reset()

    def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return orchard_ops.flash_attn(q, k, v, dropout_p=0.4).tanh().exp()

    saved: list[tuple[int, ...]] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(x.shape))
        return x

    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    inputs = [x.requires_grad_() for x in qkv(2, 40, 50)]
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with functorch_config.patch(activation_memory_budget=0.0), hooks:
        compiled(*inputs)
    assert sorted(saved) == sorted([(), *(tuple(x.shape) for x in inputs)])


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"),
    reason="this torch has no budgets of regions",
)
def test_a_region_with_a_budget_of_0_is_refused():
    """A region's budget takes precedence over a node's, so nothing could save the seed."""
    torch._dynamo.reset()

    def region(q: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.region_activation_memory_budget(0.0):
            return orchard_ops.flash_attn(q, q, q, dropout_p=0.4)

    q = qkv(2, 40, 50)[0].requires_grad_()
    compiled = torch.compile(region, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"dropout needs its seed .* pass a budget above 0"):
        compiled(q)
