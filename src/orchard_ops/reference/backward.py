"""The backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import empty_in_order_of, stride_order
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
    like_query = query
    query, dout = p.seeing(query), p.seeing(dout)
    if dlse is not None:
        moved = dlse.unsqueeze(-1)
        if scoring.sinks is None:  # else a row without a key sees its sink
            moved = p.seeing(moved)
    dq = dk = dv = None
    dmask, dsinks = query.new_empty(0), query.new_empty(0)
    if mask is not None and mask_grad:
        dmask = torch.zeros(mask.shape, dtype=p.dtype, device=p.device)
    if scoring.sinks is not None:
        dsinks = torch.zeros(scoring.sinks.shape, dtype=p.dtype, device=p.device)
    for block in p.blocks():
        q = p.rows_by_kv_head(query, block)
        x, tanh, top = p.scores(q, block)
        _, total, sink = p.exponentials(x, top)
        total.clamp_(min=1.0)  # 0 without a key
        do = p.rows(dout, block) / total
        delta = (do * block.rows(out)).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= (block.rows(moved) if sink is not None else p.rows(moved, block)) / total
        do = p.by_kv_head(do)
        if sink is not None:
            dsinks -= (sink * delta).sum((0, 2, 3))
        dx = product(do, block.cols(p.v).transpose(1, 2), into=p.kept("their gradient", block))
        dx = p.rows_by_head(dx, block)
        keep = p.keep(block)
        if keep is not None:
            dx.mul_(keep)
        dx.sub_(delta).mul_(x)
        if keep is not None:
            x.mul_(keep)
        dv = _with_part(dv, p.v, block, p.by_kv_head(x).transpose(1, 2), do, 1.0)
        if mask is not None and mask_grad:
            _add_mask_gradient(dmask, p.as_masked(dx), block)
        if tanh is not None:
            dx.mul_(tanh.square_().neg_().add_(1.0))
        dx = p.by_kv_head(dx)
        dq_rows = product(dx, block.cols(p.k), scoring.scale, like=q)
        dq_rows = p.rows_by_head(dq_rows, block)
        if block.row1 - block.row0 == p.q_len:
            dq = _in_order_of(like_query, dq_rows)
        else:
            dq = empty_in_order_of(like_query) if dq is None else dq
            block.rows(dq).copy_(dq_rows)
        dk = _with_part(dk, p.k, block, dx.transpose(1, 2), q, scoring.scale)
    if dq is None:  # nothing to compute
        dq = empty_in_order_of(like_query)
    grad_k, grad_v = _in_order_of(key, dk), _in_order_of(value, dv)
    if mask is not None and mask_grad:
        dmask = dmask.to(mask.dtype)
    if scoring.sinks is not None:
        dsinks = dsinks.to(scoring.sinks.dtype)
    return dq, grad_k, grad_v, dmask, dsinks


def _with_part(
    total: Tensor | None, like: Tensor, block: Block, a: Tensor, b: Tensor, factor: float
) -> Tensor:
    """A gradient of all keys, to which a block adds factor * a @ b; None is 0 so far."""
    if total is None and (block.col0, block.col1) == (0, like.shape[1]):
        return product(a, b, factor, like=like)
    if total is None:
        total = torch.zeros_like(like)
    add_product(block.cols(total), a, b, factor)
    return total


def _in_order_of(x: Tensor, gradient: Tensor | None) -> Tensor:
    """A gradient in x's dtype, shape and order in memory; None is 0."""
    if gradient is None:
        return empty_in_order_of(x).zero_()
    gradient = gradient.view(x.shape)
    if gradient.dtype == x.dtype and stride_order(x.stride()) == [0, 1, 2, 3]:
        return gradient
    return empty_in_order_of(x).copy_(gradient)
