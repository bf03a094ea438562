"""Writes docs/support.md: what runs where, asked of the plan, the reference and the compiler.

`python tools/support_matrix.py` writes the page; tests/attention/test_support.py compares it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import orchard_ops
from orchard_ops import KeyRanges
from orchard_ops.arguments import prepare
from orchard_ops.plan import Plan, plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"
B, H, L, D = 2, 2, 6, 16


class Feature(NamedTuple):
    """A feature, a call that has it, and the test files (of tests/attention) that prove it."""

    name: str
    tests: tuple[str, ...]
    options: Callable[[], dict[str, Any]] = dict
    operands: Callable[[], list[torch.Tensor]] = lambda: qkv()


def qkv(dtype: torch.dtype = torch.float32, **sizes: int) -> list[torch.Tensor]:
    size = {"heads": H, "kv_heads": H, "width": D, "value_width": D, **sizes}
    shapes = (
        (B, size["heads"], L, size["width"]),
        (B, size["kv_heads"], L, size["width"]),
        (B, size["kv_heads"], L, size["value_width"]),
    )
    return [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def bias(*shape: int) -> dict[str, Any]:
    return {"attn_mask": torch.zeros(shape, requires_grad=True)}


def ranges(make: Callable[[], KeyRanges]) -> Callable[[], dict[str, Any]]:
    return lambda: {"key_ranges": make()}


COVERING = "covering"
FEATURES = (
    Feature("float32", ("kernels",)),
    Feature("float16", ("kernels",), operands=lambda: qkv(torch.float16)),
    Feature("bfloat16", ("kernels",), operands=lambda: qkv(torch.bfloat16)),
    Feature("float64", ("reference",), operands=lambda: qkv(torch.float64)),
    Feature("head_dim 256", ("kernels",), operands=lambda: qkv(width=256, value_width=256)),
    Feature("head_dim above 256", ("fallback",), operands=lambda: qkv(width=257, value_width=257)),
    Feature("value head_dim of its own", (COVERING,), operands=lambda: qkv(value_width=24)),
    Feature(
        "grouped heads", ("kernels", COVERING), lambda: {"enable_gqa": True},
        lambda: qkv(heads=4),
    ),
    Feature("causal", ("kernels", COVERING), lambda: {"is_causal": True}),
    Feature("windows", ("kernels", COVERING), lambda: {"window_left": 2, "window_right": 1}),
    Feature("dropout", ("dropout", COVERING), lambda: {"dropout_p": 0.5}),
    Feature("softcap", ("reference", COVERING), lambda: {"softcap": 2.0}),
    Feature("ALiBi", ("reference", COVERING), lambda: {"alibi_slopes": torch.ones(H)}),
    Feature(
        "sinks, with their gradient", ("reference", COVERING),
        lambda: {"sinks": torch.ones(H, requires_grad=True)},
    ),
    Feature(
        "bool mask", ("mask_work", COVERING),
        lambda: {"attn_mask": torch.ones(L, L, dtype=torch.bool)},
    ),
    Feature("additive mask, with its gradient", ("mask_gradient", COVERING), lambda: bias(L, L)),
    Feature("bias of keys, with its gradient", ("mask_gradient",), lambda: bias(B, 1, 1, L)),
    Feature(
        "padding, left or right (`KeyRanges`)", ("ranged_attention", "unseen_keys", COVERING),
        ranges(lambda: KeyRanges.from_lengths(torch.tensor([L, 2]), L)),
    ),
    Feature(
        "packed documents (`KeyRanges`, `flash_attn_varlen`)", ("varlen", "range_work", COVERING),
        ranges(lambda: KeyRanges.from_document_ids(torch.tensor([[0, 0, 1, 1, 1, 2]]))),
    ),
    Feature(
        "prefix besides a window (`KeyRanges`)", ("ranged_attention", "range_work", COVERING),
        ranges(lambda: KeyRanges.sliding_window(2, 0, L, prefix=2)),
    ),
)  # fmt: skip


def far(batch: int, length: int) -> list[torch.Tensor]:
    """Sizes alone: no memory lies behind them."""
    return [torch.zeros(1, 1, 1, D).expand(batch, 1, length, D) for _ in range(3)]


LIMITS: tuple[Callable[[], tuple[list[torch.Tensor], dict[str, Any]]], ...] = (
    lambda: (qkv(torch.float64), {}),
    lambda: (qkv(width=257), {}),
    lambda: (far(1, 2**28 + 1), {}),
    lambda: (far(2**24, 1), {}),
)


def plan_of(operands: list[torch.Tensor], options: dict[str, Any]) -> Plan:
    return plan(*prepare(*operands, **options).flat())


def on_metal(feature: Feature) -> tuple[str, str]:
    """Whether the plan has kernels for the forward, and for the backward."""
    families = [kernel.family for kernel in plan_of(feature.operands(), feature.options()).kernels]
    backward = ("attention_backward_delta", "attention_backward_dkv", "attention_backward_dq")
    has_backward = all(any(x.startswith(name) for x in families) for name in backward)
    return yes("attention_forward" in families), yes(has_backward)


def on_reference(feature: Feature) -> str:
    """Runs it, forward and backward."""
    operands, options = feature.operands(), feature.options()
    leaves = [x for x in (*operands, *options.values()) if isinstance(x, torch.Tensor)]
    leaves = [x for x in leaves if x.requires_grad]
    out = orchard_ops.flash_attn(*operands, impl="reference", **options)
    grads = torch.autograd.grad(out.sum(), leaves)
    return yes(all(math.isfinite(x.sum().item()) for x in (out, *grads)))


def compiles(feature: Feature) -> str:
    """Traces it as one graph; what is not traceable raises."""
    torch._dynamo.reset()
    operands, options = feature.operands(), feature.options()
    compiled = torch.compile(orchard_ops.flash_attn, backend="eager", fullgraph=True)
    return yes(
        compiled(*operands, **options).shape == (*operands[0].shape[:3], operands[2].shape[3])
    )


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def links(names: tuple[str, ...]) -> str:
    return ", ".join(f"[{name}](../tests/attention/test_{name}.py)" for name in names)


def page() -> str:
    lines = [
        "# What runs where",
        "",
        "`python tools/support_matrix.py` writes this page from what the plan, the reference and",
        "the compiler answer; a test compares them. Features combine freely: the covering tests",
        "take every two of them together.",
        "",
        "| | Metal forward | Metal backward | reference | `torch.compile` | tested by |",
        "|---|---|---|---|---|---|",
    ]
    for x in FEATURES:
        cells = (x.name, *on_metal(x), on_reference(x), compiles(x), links(x.tests))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## What Metal does not take",
        "",
        "Such a call runs on the reference, with one warning; `explain` says the same.",
        "",
        "| reason | advice |",
        "|---|---|",
    ]
    for call in LIMITS:
        answer = plan_of(*call())
        lines.append(f"| {answer.refusal} | {answer.advice} |")
    lines += [
        "",
        "`orchard_ops.flex_attention` takes Python functions for scores and masks: what of it runs",
        "where is in [its own table](flex-attention.md#what-runs-where), tested by",
        "[flex](../tests/flex/test_api.py).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
