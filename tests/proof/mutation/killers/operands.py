"""Operands whose results are known to the bit."""

from __future__ import annotations

import math

import torch
from attention_cases import Case
from torch import Tensor

from .attention import F16, F32


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


def long_sums(head_dim: int, heads: int, q_len: int) -> tuple[Case, dict[str, Tensor]]:
    """All weights are 1/8. Each element of dk and dv is a sum of integers / 8, which float32 holds
    up to 1024 of them and not many more."""
    case = Case(q_len, 8, head_dim, num_heads=heads, num_kv_heads=1, dtype=F32, scale=1.0)
    generator = torch.Generator().manual_seed(6)
    rows, keys = (1, heads, q_len, head_dim), (1, 1, 8, head_dim)
    value = torch.zeros(keys)
    value[0, 0, range(8), range(8)] = 1.0  # dP of key j is column j of dout
    dout = torch.randint(16256, 16384, rows, generator=generator).float()
    return case, {
        "query": torch.ones(rows), "key": torch.zeros(keys), "value": value, "dout": dout,
        "row_stats": torch.tensor((0.0, 3.0)).expand(*rows[:3], 2),
        "delta": torch.zeros(rows[:3]),
    }  # fmt: skip


def sums_of_half() -> tuple[Case, dict[str, Tensor]]:
    """All weights are 2^-10. dv is a sum of 2048 half numbers, exact in float32. The first of two
    heads ends where a part of a float32 sum would."""
    case = Case(1024, 8, 16, num_heads=2, num_kv_heads=1, dtype=F16)
    zeros = torch.zeros(1, 1, 8, 16, dtype=F16)
    generator = torch.Generator().manual_seed(7)
    dout = torch.randint(1024, 2048, (1, 2, 1024, 16), generator=generator).to(F16)
    return case, {
        "query": torch.zeros_like(dout), "key": zeros, "value": zeros, "dout": dout,
        "row_stats": torch.tensor((0.0, 10.0)).expand(1, 2, 1024, 2),
        "delta": torch.zeros(1, 2, 1024),
    }  # fmt: skip
