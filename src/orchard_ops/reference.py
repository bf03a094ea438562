"""Attention and its gradient in plain PyTorch: any device, any float dtype, memory O(block x S).

This is what runs where the Metal kernels cannot (CPU tensors, features the kernels refuse, a failed
compile). It walks over blocks of query rows, so no L x S matrix ever exists, looks only at the keys
a block may see, and never expands grouped keys and values. Half precision is computed in float32.

Mathematics: T. Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, sections 2 and 3; sinks
as in gpt-oss (one extra logit per head without a value).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import dropout
from .layout import empty_in_order_of

_BLOCK_ELEMENTS = 1 << 20
"""Scores of a block, over all batches and query heads: 4 MiB in float32."""
_ENOUGH_ROWS = 64
"""Fewer rows read and write all of dk and dv too often: a block has as many even if its scores are
more than _BLOCK_ELEMENTS ..."""
_MOST_ELEMENTS = 1 << 22
"""... but not more than these, 16 MiB in float32. Where a single group of rows (`dropout.GROUP`)
exceeds that, the block is this group: 64 bytes for every batch, query head and key."""


@dataclass(frozen=True)
class Scoring:
    """Everything but q, k and v that decides the scores, as in ``orchard::flash_attn_fwd``."""

    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_seed: Tensor | None
    dropout_p: float
    scale: float
    window_left: int
    window_right: int
    diagonal: int
    softcap: float


_OPEN = 1 << 42
"""A window this wide hides nothing (`checks.MAX_DIAGONAL`); wider ones would overflow int64."""


@dataclass(frozen=True)
class _Block:
    """Query rows [row0, row1) and the keys [col0, col1) that any of them may see."""

    row0: int
    row1: int
    col0: int
    col1: int

    @property
    def rows(self) -> slice:
        return slice(self.row0, self.row1)

    @property
    def cols(self) -> slice:
        return slice(self.col0, self.col1)


def _blocks(batch: int, num_heads: int, q_len: int, kv_len: int, s: Scoring) -> Iterator[_Block]:
    if batch * num_heads == 0:
        return
    row_elements = max(1, batch * num_heads * kv_len)
    step = max(_BLOCK_ELEMENTS // row_elements, min(_ENOUGH_ROWS, _MOST_ELEMENTS // row_elements))
    step = max(1, step // dropout.GROUP) * dropout.GROUP
    for row0 in range(0, q_len, step):
        row1 = min(q_len, row0 + step)
        col0, col1 = 0, kv_len
        if s.window_left >= 0:
            col0 = min(max(0, row0 + s.diagonal - s.window_left), kv_len)
        if s.window_right >= 0:
            col1 = max(min(kv_len, row1 + s.diagonal + s.window_right), col0)
        yield _Block(row0, row1, col0, col1)


def _outside_window(block: _Block, s: Scoring, device: torch.device) -> Tensor | None:
    """(rows, cols) bool, True where the window hides a key; None where it hides nothing."""
    if s.window_left < 0 and s.window_right < 0:
        return None
    first, last = block.row0 + s.diagonal, block.row1 - 1 + s.diagonal
    covers_left = s.window_left < 0 or block.col0 >= last - s.window_left
    covers_right = s.window_right < 0 or block.col1 - 1 <= first + s.window_right
    if covers_left and covers_right:
        return None
    i = torch.arange(first, last + 1, device=device).unsqueeze(1)
    j = torch.arange(block.col0, block.col1, device=device)
    hidden = torch.zeros((), dtype=torch.bool, device=device)
    if s.window_left >= 0:
        hidden = hidden | (j < i - s.window_left)
    if s.window_right >= 0:
        hidden = hidden | (j > i + s.window_right)
    return hidden


def _fuses(total: Tensor, factor: float) -> bool:
    """Whether baddbmm may compute total + factor * a @ b.

    On mps it may not: written in place into a part of a tensor it loses the result in some
    releases, and its graphs are remembered by shape, one for every block, and by a factor printed
    with six decimals, so that one serves factors that differ later. Nor with a factor that is not a
    normal number of the dtype: it refuses those beyond the range, and for one that rounds to 0 BLAS
    does not look at a and b, which may hold a NaN.
    """
    limits = torch.finfo(total.dtype)
    return total.device.type == "cpu" and limits.tiny <= abs(factor) <= limits.max


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a @ b of (B, H, m, k) and (B, H, k, n); if fused, without a pass for the factor."""
    if not _fuses(a, factor):
        return torch.matmul(a, b).mul_(factor)
    shape = (a.shape[0] * a.shape[1], a.shape[2], b.shape[3])
    nothing = a.new_zeros(1).expand(shape)
    result = torch.baddbmm(nothing, a.flatten(0, 1), b.flatten(0, 1), beta=0.0, alpha=factor)
    return result.view(*a.shape[:2], *shape[1:])


def _add_product(total: Tensor, cols: slice, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total[:, :, cols] += factor * a @ b; total (B, H, m, n) is contiguous."""
    if _fuses(total, factor):
        part = total.flatten(0, 1)[:, cols]
        part.baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=factor)
        return
    part, product = total[:, :, cols], torch.matmul(a, b)
    part += product if factor == 1.0 else product.mul_(factor)


class _Problem:
    """One call's operands in compute precision, heads grouped as (B, Hkv, G, L, D)."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring):
        self.batch, self.num_heads, self.q_len, self.head_dim = query.shape
        self.num_kv_heads, self.kv_len = key.shape[1], key.shape[2]
        self.group = self.num_heads // max(1, self.num_kv_heads)
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.device = query.device
        self.query = query
        self.scoring = replace(
            scoring,
            window_left=min(scoring.window_left, _OPEN),
            window_right=min(scoring.window_right, _OPEN),
        )
        self.key, self.value = key.to(self.dtype), value.to(self.dtype)
        self.seed = 0 if scoring.dropout_seed is None else int(scoring.dropout_seed)
        self.has_dropout = dropout.threshold(scoring.dropout_p) > 0

    def blocks(self) -> Iterator[_Block]:
        return _blocks(self.batch, self.num_heads, self.q_len, self.kv_len, self.scoring)

    def rows_by_kv_head(self, x: Tensor, block: _Block) -> Tensor:
        """(B, Hq, L, E) -> the block's rows as (B, Hkv, G * rows, E) in compute precision."""
        rows = x[:, :, block.rows].to(self.dtype)
        return rows.reshape(self.batch, self.num_kv_heads, -1, x.shape[3])

    def rows_by_head(self, x: Tensor, block: _Block) -> Tensor:
        """(B, Hkv, G * rows, E) -> (B, Hq, rows, E)."""
        return x.view(self.batch, self.num_heads, block.row1 - block.row0, x.shape[3])

    def per_head(self, x: Tensor) -> Tensor:
        """(Hq) or (B, Hq) -> (1 or B, Hq, 1, 1) in compute precision."""
        return x.to(self.dtype).view(-1, self.num_heads, 1, 1)

    def scores(self, block: _Block) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows of q as (B, Hkv, G * rows, D); scores (B, Hq, rows, cols); softcap's derivative."""
        s = self.scoring
        q = self.rows_by_kv_head(self.query, block)
        raw = _product(q, self.key[:, :, block.cols].transpose(-1, -2), s.scale)
        x = self.rows_by_head(raw, block)
        slope = None
        if s.softcap > 0.0:
            t = torch.tanh(x.div_(s.softcap))
            x, slope = t * s.softcap, t.square().neg_().add_(1.0)
        if s.alibi_slopes is not None:
            i = torch.arange(block.row0, block.row1, device=self.device) + s.diagonal
            j = torch.arange(block.col0, block.col1, device=self.device)
            distance = (i.unsqueeze(1) - j).abs().to(self.dtype)
            x = x - self.per_head(s.alibi_slopes) * distance
        if s.attn_mask is not None:
            mask = s.attn_mask
            mask = mask[:, :, block.rows] if mask.shape[2] != 1 else mask
            mask = mask[..., block.cols] if mask.shape[3] != 1 else mask
            x = x.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else x + mask
        hidden = _outside_window(block, s, self.device)
        if hidden is not None:
            x = x.masked_fill_(hidden, -math.inf)
        return q, x, slope

    def keep(self, block: _Block) -> Tensor | None:
        """Dropout's multiplier on the block's weights: 0 or 1 / (1 - p)."""
        s = self.scoring
        if not self.has_dropout:
            return None
        kept = dropout.keep_block(
            self.seed, s.dropout_p, self.batch, self.num_heads,
            (block.row0, block.row1), (block.col0, block.col1), self.device,
        )  # fmt: skip
        return kept.to(self.dtype).mul_(dropout.rescale(s.dropout_p))


def forward(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """out (B, Hq, L, Dv) in the query's dtype and stride order, lse (B, Hq, L) float32.

    lse is in natural logarithms; -inf marks a row without a key, whose output is 0. float64 inputs
    keep a float64 lse.
    """
    p = _Problem(query, key, value, scoring)
    out = empty_in_order_of(query, value.shape[-1])
    lse = torch.empty(query.shape[:3], dtype=p.dtype, device=p.device)
    for block in p.blocks():
        if block.col0 == block.col1:  # no key in sight
            out[:, :, block.rows] = 0.0
            empty = lse[:, :, block.rows]
            empty.fill_(-math.inf)
            if scoring.sinks is not None:
                empty.copy_(scoring.sinks.to(p.dtype).view(1, -1, 1).expand_as(empty))
            continue
        _, x, _ = p.scores(block)
        top = x.amax(dim=-1, keepdim=True)
        if scoring.sinks is not None:
            top = torch.maximum(top, p.per_head(scoring.sinks))
        top = top.masked_fill_(top == -math.inf, 0.0)
        weights = x.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        if scoring.sinks is not None:
            total = total + torch.exp(p.per_head(scoring.sinks) - top)
        lse[:, :, block.rows] = (total.log() + top).squeeze(-1)
        keep = p.keep(block)
        if keep is not None:
            weights = weights.mul_(keep)
        weights = weights.view(p.batch, p.num_kv_heads, -1, weights.shape[-1])
        rows = p.rows_by_head(torch.matmul(weights, p.value[:, :, block.cols]), block)
        out[:, :, block.rows] = rows.div_(total.masked_fill(total == 0.0, 1.0))
    return out, lse


def _mask_gradient(dx: Tensor, mask: Tensor, dmask: Tensor, block: _Block) -> None:
    """Adds the block's score gradient to dmask, summed over the dimensions the mask broadcasts."""
    summed = [d for d in range(4) if mask.shape[d] == 1 and dx.shape[d] != 1]
    part = dx.sum(dim=summed, keepdim=True) if summed else dx
    target = dmask[:, :, block.rows] if mask.shape[2] != 1 else dmask
    target = target[..., block.cols] if mask.shape[3] != 1 else target
    target += part


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scoring: Scoring,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dmask, dsinks); dmask and dsinks are empty where nobody asked."""
    p = _Problem(query, key, value, scoring)
    mask, sinks = scoring.attn_mask, scoring.sinks
    dq = empty_in_order_of(query)
    dk, dv = (torch.zeros(x.shape, dtype=p.dtype, device=p.device) for x in (p.key, p.value))
    dmask = query.new_empty(0)
    if mask_grad and mask is not None:
        dmask = torch.zeros(mask.shape, dtype=p.dtype, device=p.device)
    dsinks = query.new_empty(0)
    if sinks is not None:
        dsinks = torch.zeros(sinks.shape, dtype=p.dtype, device=p.device)
    for block in p.blocks():
        delta = (dout[:, :, block.rows].to(p.dtype) * out[:, :, block.rows]).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= dlse[:, :, block.rows].unsqueeze(-1)
        row_lse = lse[:, :, block.rows].unsqueeze(-1)
        row_lse = row_lse.masked_fill(row_lse == -math.inf, 0.0)  # no key: every weight stays 0
        if sinks is not None:
            dsinks -= (torch.exp(p.per_head(sinks) - row_lse) * delta).sum((0, 2, 3))
        if block.col0 == block.col1:
            dq[:, :, block.rows] = 0.0
            continue
        q, x, slope = p.scores(block)
        weights = x.sub_(row_lse).exp_()  # P (B, Hq, rows, cols)
        kv_shape = (p.batch, p.num_kv_heads, -1, weights.shape[-1])
        do = p.rows_by_kv_head(dout, block)
        keep = p.keep(block)
        dropped = weights if keep is None else weights * keep
        _add_product(dv, block.cols, dropped.view(kv_shape).transpose(-1, -2), do)
        dp = torch.matmul(do, p.value[:, :, block.cols].transpose(-1, -2))
        dp = p.rows_by_head(dp, block)
        if keep is not None:
            dp = dp.mul_(keep)
        dx = dp.sub_(delta).mul_(weights)
        if mask_grad and mask is not None:
            _mask_gradient(dx, mask, dmask, block)
        if slope is not None:
            dx = dx.mul_(slope)
        dx = dx.view(kv_shape)
        dq_rows = _product(dx, p.key[:, :, block.cols], scoring.scale)
        dq[:, :, block.rows] = p.rows_by_head(dq_rows, block)
        _add_product(dk, block.cols, dx.transpose(-1, -2), q, scoring.scale)
    grad_k, grad_v = empty_in_order_of(key), empty_in_order_of(value)
    grad_k.copy_(dk)
    grad_v.copy_(dv)
    if mask is not None and mask_grad:
        dmask = dmask.to(mask.dtype)
    if sinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    return dq, grad_k, grad_v, dmask, dsinks
