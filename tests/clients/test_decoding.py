"""Generation with a static cache: eager's greedy tokens, by the decode kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "clients")]

from families import FAMILIES  # noqa: E402

import orchard_ops  # noqa: E402
from orchard_ops.integrations import transformers as door  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_stats")
SLOTS, NEW = 300, 5


@torch.no_grad()
def _tokens(family: str, implementation: str, device: str) -> torch.Tensor:
    model = FAMILIES[family].make(implementation).to(device).eval()
    inputs = FAMILIES[family].inputs(length=20)
    mask = torch.ones((2, 20), dtype=torch.int64)
    mask[0, :6] = 0
    return model.generate(
        input_ids=inputs["input_ids"].to(device),
        attention_mask=mask.to(device),
        past_key_values=StaticCache(config=model.config, max_cache_len=SLOTS),
        max_new_tokens=NEW,
        do_sample=False,
    ).cpu()


@pytest.mark.parametrize(
    ("family", "way"), (("llama", door.NAME), ("llama", "sdpa"), ("gemma2", door.NAME))
)  # transformers has no "sdpa" for a Gemma 2
def test_greedy_tokens_are_eagers(family: str, way: str):
    expected = _tokens(family, "eager", "cpu")
    with orchard_ops.sdpa():
        found = _tokens(family, way, "mps")
    assert torch.equal(found, expected)
    stats = orchard_ops.stats()
    assert stats.metal["flash_attn_decode"] > 0 and stats.fallbacks == 0
