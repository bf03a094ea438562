"""A cell of the matrix: a family in a situation, ours on the device against eager on the CPU."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from families import FAMILIES, Family
from situations import SITUATIONS, Results, Situation
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import orchard_ops
from orchard_ops.dropout import rescale
from orchard_ops.integrations import transformers as door
from orchard_ops.ops import seed

WITH_OUR_DROPOUT = "eager_with_the_dropout_of_orchard"

OUT, GRADIENT, NOISE = 2e-5, 5e-5, 2e-6
"""Bounds in float32, relative to the largest number of a result. NOISE is relative to the largest
gradient of the model, since the gradient of a key's bias, say, is 0 but for rounding."""


@dataclass
class Cell:
    """What came out."""

    family: str
    situation: str
    outcome: str
    """"metal", "own" (the model's own attention ran), "reference", "refused", "wrong", "crash"."""
    detail: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    """Calls of the op on Metal."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Calls on the reference, by reason."""


def applies(family: Family, situation: Situation) -> bool:
    """Whether the cell exists."""
    return family.kind in situation.kinds and situation.name not in family.without


def all_cells() -> list[tuple[str, str]]:
    """(family, situation) of every cell."""
    return [
        (f.name, s.name) for f in FAMILIES.values() for s in SITUATIONS.values() if applies(f, s)
    ]


def run(family_name: str, situation_name: str, device: str = "mps") -> Cell:
    """Runs a cell. Nothing is raised: what went wrong is the outcome."""
    family, situation = FAMILIES[family_name], SITUATIONS[situation_name]
    cell = Cell(family_name, situation_name, "crash")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, allowed = _expected(family, situation)
        orchard_ops.reset_stats()
        try:
            found = _run(family, situation, "orchard", device)
        except (NotImplementedError, TypeError, ValueError) as error:
            if door._OP not in str(error):
                return _crashed(cell, error)
            cell.outcome, cell.detail = "refused", str(error)
            return cell
        except Exception as error:
            return _crashed(cell, error)
    stats = orchard_ops.stats()
    cell.calls = {op: n for op, n in stats.metal.items() if n}
    cell.reasons = {reason: sum(ops.values()) for reason, ops in stats.reference.items()}
    wrong = _wrong(expected, found, allowed, situation)
    if wrong:
        cell.outcome, cell.detail = "wrong", wrong
    elif cell.reasons:
        cell.outcome = "reference"
    else:
        cell.outcome = "metal" if cell.calls else "own"
    return cell


def _crashed(cell: Cell, error: Exception) -> Cell:
    cell.detail = f"{type(error).__name__}: {error}"
    return cell


def _run(family: Family, situation: Situation, implementation: str, device: str) -> Results:
    model: nn.Module = family.make(implementation, situation.dropout).to(device)
    torch.manual_seed(3)  # of the dropout masks
    results = situation.run(family, model, device)
    return {name: x.detach().to("cpu") for name, x in results.items()}


def _expected(family: Family, situation: Situation) -> tuple[Results, dict[str, float]]:
    """What eager attention gives on the CPU, and how far ours may be from it, by result."""
    eager = WITH_OUR_DROPOUT if situation.dropout else "eager"
    if not situation.bfloat16:
        return _run(family, situation, eager, "cpu"), {}
    exact = _run(family, SITUATIONS["nopad"], eager, "cpu")
    rounded = _run(family, situation, eager, "cpu")
    return exact, {name: 3.0 * _distance(x, exact[name]) for name, x in rounded.items()}


def _distance(x: Tensor, y: Tensor) -> float:
    return (x.double() - y.double()).abs().max().item()


def _wrong(
    expected: Results, found: Results, allowed: dict[str, float], situation: Situation
) -> str:
    """What differs, or nothing."""
    more = {name for name in found.keys() - expected.keys() if found[name].any()}
    if expected.keys() - found.keys() or more:
        return f"other results: {sorted(expected.keys() ^ found.keys())[:4]}"
    if situation.exact:
        same = all(torch.equal(x, found[name]) for name, x in expected.items())
        return "" if same else f"tokens differ: {expected} and {found}"
    grads = [x.abs().max().item() for name, x in expected.items() if name != "out"]
    largest = max(grads, default=0.0)
    for name, x in expected.items():
        bound = (OUT if name == "out" else GRADIENT) * x.abs().max().item()
        bound += 0.0 if name == "out" else NOISE * largest
        if name in allowed:
            bound = allowed[name] + (0.01 if name != "out" else 0.0) * largest
        distance = _distance(x, found[name])
        if not distance <= bound:
            return f"{name} is off by {distance:.2e}, allowed {bound:.2e}"
    return ""


# ---- eager attention with our dropout mask ------------------------------------------------------


def _eager_with_our_dropout(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    indices: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T) v written out, for the situations whose dropout mask must be known."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if position_bias is not None:
        scores = scores + position_bias
    if indices is not None:
        chosen = torch.zeros_like(scores[:, :1], dtype=torch.bool)
        chosen = chosen.scatter(-1, indices.long()[:, None], True)
        scores = scores.masked_fill(~chosen, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    if dropout > 0.0 and module.training:
        kept = orchard_ops.dropout_mask(seed.draw(query), dropout, tuple(weights.shape))
        weights = weights * kept * rescale(dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(WITH_OUR_DROPOUT, _eager_with_our_dropout)
AttentionMaskInterface.register(WITH_OUR_DROPOUT, eager_mask)
