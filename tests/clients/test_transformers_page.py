"""The snippets of docs/transformers.md run as they stand, and its lists are true."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES

import orchard_ops

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"
DEVICE = "mps"
TABLES = {  # what the page calls them, and where transformers keeps their classes
    "Falcon": "falcon.modeling_falcon.FALCON_ATTENTION_CLASSES",
    "SAM": "sam.modeling_sam.SAM_VISION_ATTENTION_CLASSES",
    "SAM-HQ": "sam_hq.modeling_sam_hq.SAM_HQ_VISION_ATTENTION_CLASSES",
    "GPT-Neo": "gpt_neo.modeling_gpt_neo.GPT_NEO_ATTENTION_CLASSES",
    "Bark": "bark.modeling_bark.BARK_ATTENTION_CLASSES",
    "GIT": "git.modeling_git.GIT_SELF_ATTENTION_CLASSES",
    "Data2Vec": "data2vec.modeling_data2vec_vision.DATA2VEC_VISION_SELF_ATTENTION_CLASSES",
    "SuperGlue": "superglue.modeling_superglue.SUPERGLUE_SELF_ATTENTION_CLASSES",
}


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.usefixtures("fresh_stats")
def test_the_snippets_run_in_their_order_on_metal(tmp_path: Path):
    FAMILIES["llama"].make("eager").save_pretrained(tmp_path)
    ids = torch.randint(3, 64, (2, 24), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    documents = [{"input_ids": list(range(3, 3 + n))} for n in (5, 9, 14)]
    names: dict[str, Any] = {
        "name": str(tmp_path),
        "device": DEVICE,
        "ids": ids,
        "mask": mask,
        "documents": documents,
    }
    found = snippets()
    assert len(found) == 5
    for text in found:
        exec(compile(text, str(PAGE), "exec"), names)
    assert names["model"].config._attn_implementation == "orchard"
    assert names["tokens"].shape == (2, 40)
    stats = orchard_ops.stats()
    assert stats.fallbacks == 0 and stats.metal["flash_attn_bwd"] == 2 * 3


@pytest.mark.parametrize("family", TABLES)
def test_families_with_a_table_of_classes_are_listed(family: str):
    module, _, table = TABLES[family].rpartition(".")
    classes = getattr(importlib.import_module(f"transformers.models.{module}"), table)
    assert "eager" in classes
    assert re.search(rf"\b{family}\b", PAGE.read_text())


def test_such_a_family_is_given_a_class_of_ours():
    orchard_ops.register_transformers()
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.FalconForCausalLM._from_config(config, attn_implementation="orchard")
    assert type(model.transformer.h[0].self_attention).__name__ == "OrchardFalconAttention"
