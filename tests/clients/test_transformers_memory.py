"""The memory of a training step through transformers is linear, and nearly all is not ours."""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import pytest
import simulator
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from orchard_ops.integrations import transformers as door

REMOVED = "attention_removed"
LENGTHS = (256, 512, 1024)


def _removed(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """The values in the place of attention's result. Queries and keys get no gradient then."""
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None


AttentionInterface.register(REMOVED, _removed)
AttentionMaskInterface.register(REMOVED, lambda **_: None)


def batch(kind: str, length: int) -> dict[str, Tensor]:
    """Inputs of two rows, padded or packed, or of neither kind."""
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if kind == "padded":
        inputs["attention_mask"] = torch.ones((2, length), dtype=torch.int64)
        inputs["attention_mask"][0, : length // 3] = 0
    if kind == "packed":
        inputs["position_ids"] = torch.arange(length).remainder(length // 4).expand(2, -1)
    return {name: x.to("mps") for name, x in inputs.items()}


@functools.cache
def peak(family: str, kind: str, length: int, implementation: str = door.NAME) -> int:
    """The bytes that a step takes beyond its model and inputs, by the device's allocator."""
    window = {"sliding_window": 128} if family == "Mistral" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=172,  # 2.7 times hidden_size, as Llama has it
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        **window,
    )
    kinds = getattr(transformers, f"{family}ForCausalLM")
    model = kinds._from_config(config, attn_implementation=implementation).to("mps").train()
    inputs = batch(kind, length)
    with simulator.recording(execute=False):  # of our kernels
        for _ in range(2):  # the first makes what a model keeps
            before = _settled()
            simulator.reset_peak()
            model(**inputs, use_cache=False).logits.float().sum().backward()
            found = simulator.memory().peak - before
            model.zero_grad()
    return found


def _settled() -> int:
    """Autograd's thread releases its last tensors a little later."""
    last = -1
    while last != (last := simulator.memory().allocated):
        time.sleep(0.02)
    return last


@pytest.mark.parametrize("kind", ("plain", "padded", "packed"))
@pytest.mark.parametrize("family", ("Llama", "Mistral"))
def test_a_step_grows_as_the_length(family: str, kind: str):
    found = [peak(family, kind, length) for length in LENGTHS]
    growth = [b / a for a, b in itertools.pairwise(found)]
    assert all(1.9 <= ratio <= 2.1 for ratio in growth), (found, growth)


@pytest.mark.parametrize("kind", ("plain", "padded", "packed"))
@pytest.mark.parametrize("family", ("Llama", "Mistral"))
def test_a_step_takes_little_more_than_one_without_attention(family: str, kind: str):
    ours, without = peak(family, kind, 1024), peak(family, kind, 1024, REMOVED)
    assert ours <= 1.15 * without, (ours, without, ours / without)


def test_eager_attention_would_fail_these():
    """The measure sees a quadratic step."""
    assert peak("Llama", "padded", 512, "eager") > 3.0 * peak("Llama", "padded", 256, "eager")
    assert peak("Llama", "padded", 512, "eager") > 1.15 * peak("Llama", "padded", 512, REMOVED)
