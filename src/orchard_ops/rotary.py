"""Rotary position embedding of queries and keys, as FlashAttention-2's cache function applies it.

Mathematics: J. Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x with its first columns rotated, in float32 and rounded once. Nothing is waited for.

    Args:
        x: (B, S, H, D).
        cos, sin: (positions, rotated columns / 2).
        positions: (B, S) or (B, 1), of the tokens; those beyond the ends have the first or the
            last.
        interleaved: whether columns 2 i and 2 i + 1 turn together, or i and i + half of them.
    """
    half = cos.shape[1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    at = positions.clamp(0, cos.shape[0] - 1)
    c, s = (table[at].unsqueeze(2).to(compute) for table in (cos, sin))  # (B, S or 1, 1, half)
    turned = x[..., : 2 * half].to(compute)
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    first, second = pairs.unbind(-1 if interleaved else -2)
    rotated = (first * c - second * s, first * s + second * c)
    columns = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    if 2 * half == x.shape[-1]:
        return columns.to(x.dtype)
    return torch.cat((columns.to(x.dtype), x[..., 2 * half :]), -1)
