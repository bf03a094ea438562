"""Attention and its gradients, on the GPU, by blocks of rows: float64, and the same-dtype measure.

The formulas of orchard_ops.testing.math_attention, without an L x S matrix, so that long sequences
fit. float32 products are exact ones (no TF32).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orchard_ops import dropout
from orchard_ops.reference.ranges import Ranges
from orchard_ops.testing import MathResult
from orchard_ops.testing.mathematics import largest

from .plans import Scoring

_BLOCK_ELEMENTS = 1 << 26
_BLOCK_ELEMENTS_OF_FUNCTIONS = 1 << 24  # whose every operation has a result of its own


def _hidden(rows: Tensor, kv_len: int, s: Scoring, ranges: Ranges | None) -> Tensor | None:
    """(rows, S) or (1 or B, 1 or H, rows, S) bool, True where window or ranges hide a key."""
    if ranges is not None:
        return ranges.hidden(int(rows[0]), int(rows[-1]) + 1, 0, kv_len)
    if s.window_left < 0 and s.window_right < 0:
        return None
    distance = torch.arange(kv_len, device=rows.device) - rows.unsqueeze(1) - s.diagonal
    hidden = torch.zeros(1, 1, dtype=torch.bool, device=rows.device)
    if s.window_left >= 0:
        hidden = hidden | (distance < -s.window_left)
    if s.window_right >= 0:
        hidden = hidden | (distance > s.window_right)
    return hidden


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    s: Scoring,
    dtype: torch.dtype,
) -> MathResult:
    """Computes in float64 if that is the dtype, or else in float32, and rounds to the dtype."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    q, dout = q.to(compute), dout.to(compute)
    k_all, v_all = (x.to(compute).repeat_interleave(group, dim=1) for x in (k, v))
    b, h, q_len, _ = q.shape
    kv_len = k.shape[2]
    out, dq = torch.zeros_like(dout), torch.zeros_like(q)
    dk, dk_size = (torch.zeros_like(k_all) for _ in range(2))
    dv, dv_size, dv_squares = (torch.zeros_like(v_all) for _ in range(3))
    lse = torch.full((b, h, q_len), -math.inf, dtype=compute, device=q.device)
    dq_cancelled = score_size = lse_size = out_size = out_squares = 0.0
    sinks = None if s.sinks is None else s.sinks.to(compute).view(1, -1, 1, 1)
    dsinks, dsinks_size = (torch.zeros(h, dtype=compute, device=q.device) for _ in range(2))
    dmask = dmask_size = None
    if s.mask_grad and s.mask is not None:
        dmask, dmask_size = (
            torch.zeros(s.mask.shape, dtype=compute, device=q.device) for _ in range(2)
        )
    ranges = None
    if s.key_ranges is not None:
        ranges = Ranges(s.key_ranges, kv_len, s.window_left, s.window_right)
    has_dropout = dropout.threshold(s.dropout_p) > 0
    elements = _BLOCK_ELEMENTS if s.functions is None else _BLOCK_ELEMENTS_OF_FUNCTIONS
    step = max(16, elements // (b * h * kv_len) // 16 * 16)
    for row0 in range(0, q_len, step):
        row1 = min(q_len, row0 + step)
        rows = slice(row0, row1)
        scores = torch.matmul(q[:, :, rows], k_all.transpose(-1, -2)) * s.scale
        derivative = None
        if s.softcap:
            capped = torch.tanh(scores / s.softcap)
            scores, derivative = s.softcap * capped, 1.0 - capped * capped
        slope = 1.0
        if s.functions is not None:
            scores, derivative = s.functions(scores, row0, row1)
            # What a product's rounding, and dS, is multiplied by, which softcap never enlarges.
            slope = 1.0 if derivative is None else derivative.abs()
        if s.alibi_slopes is not None:
            places = torch.arange(row0, row1, device=q.device).unsqueeze(1) + s.diagonal
            distance = (places - torch.arange(kv_len, device=q.device)).abs()
            if ranges is not None:
                distance = ranges.distance(row0, row1, 0, kv_len)
            scores -= s.alibi_slopes.to(compute)[:, :, None, None] * distance
        if s.mask is not None:
            mask = s.mask if s.mask.shape[2] == 1 else s.mask[:, :, rows]
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, -math.inf)
            else:
                scores += mask.to(compute)
        hidden = _hidden(torch.arange(row0, row1, device=q.device), kv_len, s, ranges)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.expand(b, h, row1 - row0, 1)), dim=-1)
        row_lse = torch.logsumexp(scores, dim=-1)
        empty = (row_lse == -math.inf).unsqueeze(-1)
        # The softmax is taken anew. In exp(scores - lse), lse could not hold log(n) beside a large
        # score.
        weights = torch.softmax(scores.masked_fill_(empty, 0.0), dim=-1).masked_fill_(empty, 0.0)
        of_sinks = weights[..., kv_len:]
        weights = weights[..., :kv_len]
        del scores
        sizes = torch.matmul(q[:, :, rows].abs(), k_all.abs().transpose(-1, -2)) * abs(s.scale)
        sizes *= weights * slope
        lse_size = max(lse_size, largest(sizes.sum(-1)))
        score_size = max(score_size, largest((sizes * (1.0 - weights)).sum(-1)))
        del sizes
        kept = weights
        if has_dropout:
            keep = dropout.keep_block(
                s.dropout_seed, s.dropout_p, b, h, (row0, row1), (0, kv_len), q.device
            )
            factor = keep.to(compute) * dropout.rescale(s.dropout_p)
            kept = weights * factor
        row_out = torch.matmul(kept, v_all)
        lse[:, :, rows], out[:, :, rows] = row_lse, row_out
        dv += torch.matmul(kept.transpose(-1, -2), dout[:, :, rows])
        out_size = max(out_size, largest(torch.matmul(kept, v_all.abs())))
        dv_size += torch.matmul(kept.transpose(-1, -2), dout[:, :, rows].abs())
        squares = kept.square()
        out_squares += torch.matmul(squares, v_all.square()).sum().item()
        dv_squares += torch.matmul(squares.transpose(-1, -2), dout[:, :, rows].square())
        del squares
        # From here on this is what autograd computes: softmax's gradient from the unrounded
        # results.
        products = dout[:, :, rows] * row_out
        dscores = torch.matmul(dout[:, :, rows], v_all.transpose(-1, -2))
        if has_dropout:
            dscores *= factor
        delta = products.sum(-1, keepdim=True)
        if dlse is not None:
            row_dlse = dlse[:, :, rows].to(compute).unsqueeze(-1)
            delta -= row_dlse.masked_fill(empty, 0.0)
        dscores = weights * (dscores - delta)
        row_size = products.abs().sum(-1, keepdim=True)
        if dmask is not None and s.mask is not None:
            part = slice(None) if s.mask.shape[2] == 1 else rows
            like = dmask[:, :, part]
            like += dscores.sum_to_size(like.shape)
            dmask_size[:, :, part] += (weights * row_size).sum_to_size(like.shape)
        if sinks is not None:
            dsinks -= (of_sinks * delta).sum((0, 2, 3))
            dsinks_size += (of_sinks * row_size).sum((0, 2, 3))
        dscores = dscores * s.scale if derivative is None else dscores * derivative * s.scale
        dq[:, :, rows] = torch.matmul(dscores, k_all)
        dk += torch.matmul(dscores.transpose(-1, -2), q[:, :, rows])
        size = weights * slope * products.abs().sum(-1, keepdim=True) * abs(s.scale)
        dq_cancelled = max(dq_cancelled, largest(torch.matmul(size, k_all.abs())))
        dk_size += torch.matmul(size.transpose(-1, -2), q[:, :, rows].abs())
    dk, dv, dk_size, dv_size, dv_squares = (
        x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv, dk_size, dv_size, dv_squares)
    )
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = [x.to(dtype) for x in (dq, dk, dv)]
    if dmask is not None and s.mask is not None and dtype != torch.float64:
        dmask = dmask.to(s.mask.dtype)
    return MathResult(
        out.to(dtype),
        lse.to(lse_dtype),
        *rounded,
        dq_cancelled,
        largest(dk_size),
        dmask,
        None if sinks is None else dsinks.to(lse_dtype),
        0.0 if dmask_size is None else largest(dmask_size),
        largest(dsinks_size),
        score_size=score_size,
        lse_size=lse_size,
        out_size=out_size,
        dv_size=largest(dv_size),
        out_spread=math.sqrt(out_squares / max(1, out.numel())),
        dv_spread=math.sqrt(dv_squares.sum().item() / max(1, dv.numel())),
    )
