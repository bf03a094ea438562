"""The formulas of attention's memory in a training step, against the allocator's bytes.

test_memory.py holds one step of ours to a formula written out once more; here are several layers,
and PyTorch's math path.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from representative import product
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from orchard_ops.training_memory import (
    AttentionLayer,
    TrainingStep,
    score_matrix_bytes,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.memory import scratch_budget

if sys.platform != "linux":
    pytest.skip("the simulated device's allocator", allow_module_level=True)

import simulator

LAYERS = {
    "float32": AttentionLayer(4, 4, 32, "float32", 2),
    "float32, grouped": AttentionLayer(6, 3, 40, "float32"),
    "float16, causal": AttentionLayer(4, 4, 64, "float16", 2),
    "float16, grouped": AttentionLayer(8, 2, 32, "float16", 2),
    "bfloat16, one key head": AttentionLayer(8, 1, 64, "bfloat16"),
    "not causal": AttentionLayer(4, 4, 32, "float16", is_causal=False),
    "not causal, grouped, float32": AttentionLayer(4, 2, 32, "float32", is_causal=False),
}
STEPS = ((128, 1), (203, 3))

Attention = Callable[[Tensor, Tensor, Tensor, AttentionLayer], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
    return torch.ops.orchard.flash_attn(q, k, v, is_causal=layer.is_causal, enable_gqa=True)


def stock(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
    grouped = layer.num_heads != layer.num_kv_heads
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=layer.is_causal, enable_gqa=grouped
        )


def settled() -> int:
    """Bytes in use, when autograd's thread has let go of the last step."""
    gc.collect()
    before = -1
    while before != (now := simulator.memory().allocated):
        before = now
        time.sleep(0.05)
    return now


def measured(step: TrainingStep, length: int, attention: Attention) -> tuple[int, int]:
    """(bytes kept after all forwards, bytes at the peak of the step), with q, k and v."""
    layer = step.layer
    shapes = [
        (layer.batch, heads, length, layer.head_dim)
        for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    ]
    dtype = getattr(torch, layer.dtype)
    dout = torch.ones(shapes[0], dtype=dtype, device="mps")
    before = settled()
    simulator.reset_peak()
    inputs = [
        [torch.ones(shape, dtype=dtype, device="mps", requires_grad=True) for shape in shapes]
        for _ in range(step.num_layers)
    ]
    with simulator.recording(execute=False):
        outs = [attention(q, k, v, layer) for q, k, v in inputs]
        kept = simulator.memory().allocated - before
        torch.autograd.grad(outs[-1], inputs[-1], dout)
        peak = simulator.memory().peak - before
    del inputs, outs, dout
    return kept, peak


def inputs_of(step: TrainingStep, length: int) -> int:
    return step.num_layers * sum(step.layer.inputs(length).values())


@pytest.mark.parametrize("name, length_and_layers", product(tuple(LAYERS), STEPS), ids=str)
class TestBytes:
    def test_stock(self, name: str, length_and_layers: tuple[int, int]):
        length, num_layers = length_and_layers
        step = TrainingStep(LAYERS[name], num_layers)
        kept, peak = measured(step, length, stock)
        formula = num_layers * sum(step.layer.stock_kept(length).values())
        assert kept == inputs_of(step, length) + formula
        assert peak == step.stock(length)

    def test_ours_without_scratch(self, name: str, length_and_layers: tuple[int, int]):
        length, num_layers = length_and_layers
        step = TrainingStep(LAYERS[name], num_layers)
        with scratch_budget(0):
            kept, peak = measured(step, length, ours)
        assert kept == inputs_of(step, length) + num_layers * sum(step.layer.kept(length).values())
        assert peak == step.ours(length, scratch_mb=0)

    def test_ours_takes_no_more_scratch_than_the_bound(
        self, name: str, length_and_layers: tuple[int, int]
    ):
        length, num_layers = length_and_layers
        step = TrainingStep(LAYERS[name], num_layers)
        for budget_mb in (1, 256):
            with scratch_budget(budget_mb):
                _, peak = measured(step, length, ours)
                assert peak <= step.ours(length) == step.ours(length, scratch_mb=budget_mb)
                if budget_mb > 1 and not step.layer.num_heads > step.layer.num_kv_heads:
                    assert peak == step.ours(length)  # all of dS fits


@pytest.mark.parametrize("gpu_cores", (8, 80))
@pytest.mark.parametrize(
    ("heads", "head_dim", "length"), ((1, 256, 512), (1, 256, 1100), (2, 32, 1024), (1, 64, 700))
)
def test_a_forward_that_divides_its_keys(
    heads: int, head_dim: int, length: int, gpu_cores: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ORCHARD_GPU_CORES", str(gpu_cores))
    layer = AttentionLayer(heads, heads, head_dim, "float16")
    step = TrainingStep(layer, 2)
    with scratch_budget(0):
        _, peak = measured(step, length, ours)
    assert peak == step.ours(length, 0, gpu_cores)
    assert gpu_cores < 80 or layer.forward_parts(length, gpu_cores) > 0


def test_one_tensor_more_is_noticed():
    step = TrainingStep(LAYERS["float32"], 1)

    def keeping(q, k, v, layer):
        out = ours(q, k, v, layer)
        out.further = torch.empty(1, device="mps")
        return out

    with scratch_budget(0):
        _, peak = measured(step, 128, keeping)
    assert peak == step.ours(128, scratch_mb=0) + 4


def test_checkpointing_keeps_the_inputs_of_layers():
    """All layers but the one at work keep what goes into them, of the size of q."""
    layer = LAYERS["float16, grouped"]
    one, many = (TrainingStep(layer, n, checkpoint=True) for n in (1, 5))
    hidden = layer.inputs(256)["q"]
    assert many.ours(256) - one.ours(256) == many.stock(256) - one.stock(256) == 4 * hidden
    assert one.ours(256) - hidden == TrainingStep(layer, 1).ours(256)


@pytest.mark.parametrize("name", LAYERS)
def test_ours_is_linear_and_stock_is_not(name: str):
    step = TrainingStep(LAYERS[name], 4)
    assert step.ours(8192, 0) == 2 * step.ours(4096, 0)
    assert step.stock(8192) > 3.5 * step.stock(4096)


def test_the_softmax_is_the_same_number_in_the_report_and_in_the_plan():
    layer = LAYERS["float16, causal"]
    of_layer = layer.stock_kept(128)["softmax"]
    assert of_layer == score_matrix_bytes(2, 4, 128, 128) == 2 * 4 * 128 * 128 * 4
