"""Forwards of few queries and many keys, on the decode kernel as where no backward follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from . import cases
from .cache_cases import check_sequence
from .caches import Forward
from .cases import DTYPES, Case

_KEYS = (True, False, False, True)
"""What of (B, H, L, S) a mask of keys has: it is the same for all heads and queries."""


def forwards() -> Iterator[Case]:
    for dtype in DTYPES:
        base = Case(1, 4001, 64, dtype, batch=3, num_heads=8, num_kv_heads=2)
        several = base.but(q_len=4, window_right=0, diagonal=3997, head_dim=128, num_kv_heads=1)
        yield several
        yield several.but(layout="heads inside", num_kv_heads=4, window_left=900, alibi=True)
        yield base.but(q_len=2, diagonal=5, window_right=0, sinks=True, softcap=2.0)
        yield base.but(mask="bool", mask_full=_KEYS, head_dim=128)
        yield base.but(mask="bool", mask_full=_KEYS, hides="padding", q_len=2, num_kv_heads=1)
        yield base.but(mask="same", mask_full=_KEYS, layout="every second column")
        yield base.but(mask="float32", mask_full=(False, False, False, True), alibi=True)
        yield base.but(ranges="any", ranges_full=(True, False), window_left=2000)
        yield base.but(ranges="padding", mask="bool", mask_full=_KEYS, sinks=True, head_dim=61)
    yield Case(1, 1 << 17, 128, torch.float16, num_heads=8, mask="bool", mask_full=_KEYS)


def shaped(case: Case) -> Forward:
    """The call without operands, for the plan."""
    planned = cases._OnMeta(**vars(case))
    q, k, v, _ = planned.shaped()
    return Forward(q, k, v, planned.scoring)


def placed(case: Case, dense: tuple[Tensor | None, ...]) -> Forward:
    """The call, with NaN in keys that a mask, a window or ranges hide, and in queries without a
    key."""
    q, k, v = (cases.place(x, case.layout) for x in dense[:3] if x is not None)
    scoring = case.scoring
    cases.hide_unseen(case, (q, k, v, None, None))
    if scoring.mask is not None:
        mask = scoring.mask[:, 0, 0].expand(case.batch, -1)
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        for x in (k, v):
            x.masked_fill_(hidden[:, None, :, None], torch.nan)
    return Forward(q, k, v, scoring)


def check(
    case: Case, dense: tuple[Tensor | None, ...], out: Tensor, lse: Tensor
) -> dict[str, tuple[float, float]]:
    """result -> largest error against float64, and that of same-dtype mathematics

    Raises:
        AssertionError: by the rule of orchard_ops.testing.
    """
    q, k, v = dense[:3]
    assert q is not None and k is not None and v is not None
    scoring = dataclasses.replace(case.scoring, mask_grad=False)
    return check_sequence((q, k, v), scoring, {"out": out, "lse": lse})
