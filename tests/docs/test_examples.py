"""The examples learn, and their attention runs where they say: on Metal, and not beside it."""

from __future__ import annotations

import runpy

import pytest
from pages import ROOT

import orchard_ops

EXAMPLES = {
    "train_gpt": ("--steps 6 --length 32", 2),
    "patch_sdpa": ("--steps 6 --length 32", 2),
    "packed_documents": ("--steps 6 --length 48", 2),
    "finetune_transformers": ("--steps 6 --length 32", 2),
    "diffusers_unet": ("--steps 6 --size 8", 8),
}
"""Arguments, and the attention calls of a step. Models have two layers; the UNet has four
transformer blocks (one down, one in the middle, two up) of self- and cross-attention."""


def test_every_example_is_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_learns_on_metal(name: str, fresh_stats):
    arguments, calls = EXAMPLES[name]
    main = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]
    losses = main(arguments.split())
    assert len(losses) == 6
    assert sum(losses[-2:]) < sum(losses[:2])
    if orchard_ops.stats().metal:  # an mps device, a Mac's or the simulated one
        assert orchard_ops.stats().metal == dict.fromkeys(
            ("flash_attn_fwd", "flash_attn_bwd"), 6 * calls
        )
    assert orchard_ops.stats().fallbacks == 0
