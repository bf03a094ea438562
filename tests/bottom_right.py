"""Attention in float64 after FlashAttention-2's documentation, apart from the package.

It loops over batches and heads, and autograd differentiates it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mathematics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None,
    longest_key: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) in the operands' dtype, differentiable.

    `keep` (B, Hq, Sq, Sk) is what dropout multiplies the weights with. A side of the window of at
    least `longest_key`, by default Sk, is open.
    """
    batch, q_len, heads, width = q.shape
    kv_len, group = k.shape[1], heads // k.shape[2]
    longest = kv_len if longest_key is None else longest_key
    scale = 1 / math.sqrt(width) if softmax_scale is None else softmax_scale
    outs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            scores = q[b, :, h] @ k[b, :, h // group].T * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            # How far key j is behind the place that query i has at the bottom right.
            behind = torch.tensor(
                [[i + kv_len - q_len - j for j in range(kv_len)] for i in range(q_len)]
            ).reshape(q_len, kv_len)
            if alibi_slopes is not None:
                slope = alibi_slopes[h] if alibi_slopes.dim() == 1 else alibi_slopes[b, h]
                scores = scores - slope.double() * behind.abs()
            left, right = (side if 0 <= side < longest else math.inf for side in window_size)
            right = 0 if causal else right
            hidden = (behind > left) | (-behind > right)
            exponentials = torch.exp(scores).masked_fill(hidden, 0.0)
            total = exponentials.sum(1, keepdim=True)
            empty = total == 0
            total = total.masked_fill(empty, 1.0)
            weights = exponentials / total
            lses.append(total.log().masked_fill(empty, -math.inf).squeeze(1))
            if keep is not None:
                weights = weights * keep[b, h]
            outs.append(weights @ v[b, :, h // group])
    out = torch.stack(outs).unflatten(0, (batch, heads)).transpose(1, 2)
    return out, torch.stack(lses).unflatten(0, (batch, heads))
