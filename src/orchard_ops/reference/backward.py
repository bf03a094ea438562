"""The backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import empty_in_order_of
from ..scoring import Scoring
from .products import add_product, product
from .scores import Block, Problem


def _add_mask_gradient(dmask: Tensor, dx: Tensor, block: Block) -> None:
    """Adds the block's score gradient to dmask, summed over the dimensions the mask broadcasts."""
    summed = [d for d in range(dmask.dim()) if dmask.shape[d] == 1 and dx.shape[d] != 1]
    part = dx.sum(dim=summed, keepdim=True) if summed else dx
    target = block.of_mask(dmask)
    target += part


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    row_stats: Tensor,
    *,
    scoring: Scoring,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dmask, dsinks); dmask and dsinks are empty where nobody asked.

    `row_stats` is not read: a block has whole rows, and takes their softmax anew. So a weight is
    right even if another kernel, which rounds scores its own way, was the forward.

    The weights stay unnormalised, exponentials E with P = E / total; dout, delta and thereby dP
    are divided by total instead, which is a number a row.
    """
    p = Problem(query, key, value, scoring)
    mask = scoring.attn_mask
    dq = empty_in_order_of(query)
    query, dout = p.seeing(query), p.seeing(dout)
    if dlse is not None:
        moved = dlse.unsqueeze(-1)
        if scoring.sinks is None:  # else a row without a key sees its sink
            moved = p.seeing(moved)
    dk, dv = (torch.zeros(x.shape, dtype=p.dtype, device=p.device) for x in (p.k, p.v))
    dmask, dsinks = query.new_empty(0), query.new_empty(0)
    if mask is not None and mask_grad:
        dmask = torch.zeros(mask.shape, dtype=p.dtype, device=p.device)
    if scoring.sinks is not None:
        dsinks = torch.zeros(scoring.sinks.shape, dtype=p.dtype, device=p.device)
    for block in p.blocks():
        q = p.rows_by_kv_head(query, block)
        x, tanh = p.scores(q, block)
        _, total, sink = p.exponentials(x)
        total.clamp_(min=1.0)  # 0 without a key
        do = p.rows(dout, block)
        delta = (do * block.rows(out)).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= block.rows(moved) if sink is not None else p.rows(moved, block)
        do, delta = p.by_kv_head(do / total), delta.div_(total)
        if sink is not None:
            dsinks -= (sink * delta).sum((0, 2, 3))
        dx = product(do, block.cols(p.v).transpose(1, 2))
        dx = p.rows_by_head(dx, block)
        keep = p.keep(block)
        if keep is not None:
            dx.mul_(keep)
        dx.sub_(delta).mul_(x)
        if keep is not None:
            x.mul_(keep)
        add_product(block.cols(dv), p.by_kv_head(x).transpose(1, 2), do)
        if mask is not None and mask_grad:
            _add_mask_gradient(dmask, p.as_masked(dx), block)
        if tanh is not None:
            dx.mul_(tanh.square_().neg_().add_(1.0))
        dx = p.by_kv_head(dx)
        dq_rows = product(dx, block.cols(p.k), scoring.scale)
        block.rows(dq).copy_(p.rows_by_head(dq_rows, block))
        add_product(block.cols(dk), dx.transpose(1, 2), q, scoring.scale)
    grad_k, grad_v = empty_in_order_of(key), empty_in_order_of(value)
    grad_k.copy_(dk.view(key.shape))
    grad_v.copy_(dv.view(value.shape))
    if mask is not None and mask_grad:
        dmask = dmask.to(mask.dtype)
    if scoring.sinks is not None:
        dsinks = dsinks.to(scoring.sinks.dtype)
    return dq, grad_k, grad_v, dmask, dsinks
