"""Generation by transformers: eager's greedy tokens, and every one of them by the decode kernel."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers import modeling_flash_attention_utils as flash
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import initialization

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "clients")]

from families import FAMILIES, Family  # noqa: E402

import orchard_ops  # noqa: E402
from orchard_ops.integrations import transformers as door  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_stats")
PROMPT, NEW, SLOTS, WINDOW = 280, 5, 320, 260
REQUESTED = 6
"""New tokens of each request of a continuous batch."""


def _with_window(family: Family) -> Family:
    """The family with a window that holds enough keys to decode, and that the prompt fills."""

    def config() -> Any:
        made = family.config()
        if getattr(made, "sliding_window", None) is not None:
            made.sliding_window = WINDOW
        return made

    return dataclasses.replace(family, config=config)


@torch.no_grad()
def _tokens(family: Family, implementation: str, device: str, cache: str, length: int) -> Tensor:
    model = family.make(implementation).to(device).eval()
    mask = torch.ones((2, length), dtype=torch.int64)
    mask[0, :6] = 0
    caches = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=SLOTS),
    }
    return model.generate(
        input_ids=family.inputs(length=length)["input_ids"].to(device),
        attention_mask=mask.to(device),
        past_key_values=caches[cache](),
        max_new_tokens=NEW,
        do_sample=False,
    ).cpu()


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize(
    ("name", "way"),
    (
        ("llama", door.NAME),
        ("llama", "sdpa"),
        ("mistral", door.NAME),
        ("mistral", "sdpa"),
        ("gemma2", door.NAME),  # transformers has no "sdpa" for a Gemma 2
        ("gemma3", door.NAME),
        ("gemma3", "sdpa"),
        ("gpt_oss", door.NAME),  # nor for a gpt-oss
    ),
)
def test_greedy_tokens_are_eagers(name: str, way: str, cache: str):
    """Full and sliding layers, of caches that grow and of such that have slots to spare."""
    family = _with_window(FAMILIES[name])
    expected = _tokens(family, "eager", "cpu", cache, PROMPT)
    orchard_ops.reset_stats()
    with orchard_ops.sdpa():
        found = _tokens(family, way, "mps", cache, PROMPT)
    assert torch.equal(found, expected)
    stats = orchard_ops.stats()
    layers = family.config().num_hidden_layers
    assert stats.metal["flash_attn_decode"] == layers * (NEW - 1)  # the prompt gives the first one
    assert stats.fallbacks == 0 and not stats.left_to_pytorch


def test_a_static_cache_decodes_from_the_first_tokens_on():
    """Its slots count, not its tokens: those that nothing has filled are hidden by the mask."""
    family = FAMILIES["llama"]
    expected = _tokens(family, "eager", "cpu", "static", 20)
    found = _tokens(family, door.NAME, "mps", "static", 20)
    assert torch.equal(found, expected)
    assert orchard_ops.stats().metal["flash_attn_decode"] == 2 * (NEW - 1)


def test_continuous_batching_by_sdpa():
    """transformers' generate_batch keeps pages of its own and gathers them before each call."""
    expected = _batch_of_requests("paged|eager", "cpu")
    orchard_ops.reset_stats()
    with orchard_ops.sdpa():
        found = _batch_of_requests("sdpa", "mps")
    assert found == expected and len(found) == 3
    stats = orchard_ops.stats()
    assert stats.metal["flash_attn_fwd"] > 0
    assert stats.fallbacks == 0 and not stats.left_to_pytorch


def test_continuous_batching_in_pages(monkeypatch: pytest.MonkeyPatch):
    """What transformers keeps for CUDA and XPU, on mps: its kernel's functions are ours, and the
    condition that asks for those devices is gone. Nothing is gathered and no mask made."""
    expected = _batch_of_requests("paged|eager", "cpu")
    orchard_ops.reset_stats()
    ours = (
        orchard_ops.flash_attn_func,
        orchard_ops.flash_attn_varlen_func,
        orchard_ops.flash_attn_with_kvcache,
    )
    padding = flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (*ours, *padding))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(
        initialization, "ensure_decode_fast_path_is_available", lambda *_, **__: None
    )
    found = _batch_of_requests("flash_attention_2", "mps", max_blocks_per_request=4)
    assert found == expected
    stats = orchard_ops.stats()
    assert stats.metal["flash_attn_fwd"] == 2  # of the prompts, in each layer
    assert stats.metal["flash_attn_decode"] == 2 * (REQUESTED - 1)
    assert stats.fallbacks == 0


def test_continuous_batching_takes_no_other_name():
    """docs/decoding.md says so. Where transformers begins to take one, this test says it."""
    with pytest.raises(ValueError, match=f"{door.NAME} is not supported for continuous batching"):
        _batch_of_requests(door.NAME, "mps")


def _batch_of_requests(implementation: str, device: str, **options: Any) -> list[list[int]]:
    model = FAMILIES["llama"].make("eager").to(device).eval()
    model.config._attn_implementation = implementation  # unchecked: no package has to be there
    generator = torch.Generator().manual_seed(3)
    answers = model.generate_batch(
        inputs=[torch.randint(3, 63, (n,), generator=generator).tolist() for n in (30, 9, 17)],
        generation_config=GenerationConfig(
            max_new_tokens=REQUESTED, do_sample=False, eos_token_id=63, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=32, max_batch_tokens=64, auto_switch_to_flash=False, **options
        ),
        warmup=False,
    )
    return [answer.generated_tokens for answer in answers.values()]
