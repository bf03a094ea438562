"""Operands whose results are known to the bit."""

from __future__ import annotations

import math

import torch
from attention_cases import Case
from torch import Tensor

from .attention import F32


def dominant_keys() -> tuple[Case, dict[str, Tensor]]:
    """Row i sees only key i from near: its score is 10^5 to 10^7 above the others, and no float32.

    dq and dk are the scale times key and query, dv is dout.
    """
    case = Case(32, 32, 16, num_heads=1, dtype=F32, scale=3.7)
    size = 401.0 + 97 * torch.arange(32)
    rows = torch.arange(32)
    q, k = torch.zeros(1, 1, 32, 16), torch.zeros(1, 1, 32, 16)
    q[0, 0, rows, rows // 2] = size
    k[0, 0, rows, rows // 2] = size
    q[0, 0, rows, rows // 2] *= (-1.0) ** rows
    k[0, 0, rows, rows // 2] *= (-1.0) ** rows
    score = torch.tensor(case.scale / math.log(2), dtype=F32) * size**2
    stats = torch.stack((score, torch.zeros(32)), -1)[None, None]
    one = torch.zeros(1, 1, 32, 16)
    one[..., 3] = 1.0
    return case, {"query": q, "key": k, "value": one, "dout": one, "out": one, "row_stats": stats,
                  "delta": torch.zeros(1, 1, 32)}  # fmt: skip


def infinite_rows() -> tuple[Case, dict[str, Tensor]]:
    """Every other query scores -inf with every key, without a mask."""
    case = Case(16, 32, 16, num_heads=1, dtype=F32, scale=1.0)
    q = torch.zeros(1, 1, 16, 16)
    q[:, :, ::2, 0] = math.inf
    k = torch.zeros(1, 1, 32, 16)
    k[..., 0] = -1.0
    stats = torch.tensor((0.0, 5.0)).expand(1, 1, 16, 2).clone()
    stats[:, :, ::2] = torch.tensor((torch.finfo(F32).min, -math.inf))
    ones = torch.ones(1, 1, 16, 16)
    return case, {"query": q, "key": k, "value": torch.ones(1, 1, 32, 16), "dout": ones,
                  "row_stats": stats, "out": ones * (stats[..., 1:] > 0)}  # fmt: skip
