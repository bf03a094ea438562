"""Models of transformers with attn_implementation="orchard": a sample of the matrix."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "clients")]

import cells  # noqa: E402
import transformers_matrix as matrix  # noqa: E402
from families import FAMILIES  # noqa: E402
from situations import SITUATIONS  # noqa: E402

from orchard_ops.integrations import transformers as door  # noqa: E402

DEVICE = "mps"
ALL = cells.all_cells()
ALWAYS = {
    ("llama", name) for name in SITUATIONS if cells.applies(FAMILIES["llama"], SITUATIONS[name])
} | {
    ("mistral", "compile"),
    ("gemma3", "static"),
    ("gemma4", "last"),
    ("gemma4", "static"),
    ("gpt_oss", "flat"),
    ("llama4", "left"),
    ("deepseek_v32", "right"),
    ("t5", "holes"),
    ("swin", "nopad"),
    ("bloom", "left"),
    ("whisper", "generate"),
}
"""Cells that were wrong once in some front door."""
SAMPLE = ALWAYS | {cell for n, cell in enumerate(x for x in ALL if x[1] != "compile") if n % 8 == 0}


def _marks(cell: tuple[str, str]) -> list[pytest.MarkDecorator]:
    return [] if cell in SAMPLE else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("family", "situation"),
    [pytest.param(*cell, marks=_marks(cell), id="-".join(cell)) for cell in ALL],
)
def test_a_cell_is_what_the_page_says(family: str, situation: str):
    cell = cells.run(family, situation, DEVICE)
    assert matrix.failures([cell]) == []
    assert _said(family, situation) == matrix.SIGNS[cell.outcome]


def _said(family: str, situation: str) -> str:
    """The sign of a cell in the page."""
    lines = matrix.PAGE.read_text().splitlines()
    heads = next(x for x in lines if x.startswith("| family | "))
    column = [x.strip() for x in heads.split("|")].index(situation)
    return next(x for x in lines if x.startswith(f"| {family} |")).split("|")[column].strip()


def test_the_page_has_every_cell_and_none_that_failed():
    signs = [_said(family, situation) for family, situation in ALL]
    assert set(signs) <= {"M", "o", "f"}
    assert matrix.page([]).splitlines()[:10] == matrix.PAGE.read_text().splitlines()[:10]
    assert len(FAMILIES) >= 24


WRONG_DOORS: dict[str, Any] = {
    "no mask": lambda **_: None,
    "a mask without padding": lambda attention_mask=None, **rest: door.attention_mask(**rest),
    "a mask without its function": lambda mask_function=None, **rest: door.attention_mask(**rest),
}


@pytest.mark.parametrize(
    ("wrong", "family", "situation"),
    (
        ("no mask", "llama", "left"),
        ("no mask", "mistral", "left"),
        ("no mask", "bloom", "nopad"),
        ("no mask", "llama", "packed"),
        ("a mask without padding", "qwen2", "left"),
        ("a mask without padding", "bert", "right"),
        ("a mask without padding", "llama", "generate"),
        ("a mask without padding", "t5", "holes"),
        ("a mask without its function", "mistral", "dropout"),
        ("a mask without its function", "llama4", "nopad"),
        ("a mask without its function", "llama", "packed"),
        ("a mask without its function", "gemma3", "autocast"),
    ),
)
def test_a_wrong_door_does_not_pass(wrong: str, family: str, situation: str):
    masks = door.AttentionMaskInterface
    masks.register(door.NAME, WRONG_DOORS[wrong])
    try:
        cell = cells.run(family, situation, DEVICE)
    finally:
        door.register()
    assert cell.outcome in matrix.BAD or "refused" in cell.outcome


def test_no_dropout_out_of_training():
    model = FAMILIES["llama"].make("orchard", dropout=0.5).to(DEVICE).eval()
    inputs = {k: v.to(DEVICE) for k, v in FAMILIES["llama"].inputs().items()}
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        first, second = (model(**inputs).logits for _ in range(2))
        assert torch.equal(first, second)
        x = torch.randn((1, 4, 8, 16), device=DEVICE)
        kept, _ = door.attention_forward(attention, x, x, x, None, dropout=0.5)
        attention.train()
        dropped, _ = door.attention_forward(attention, x, x, x, None, dropout=0.5)
    assert not torch.equal(kept, dropped)
