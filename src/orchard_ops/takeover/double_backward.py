"""Second derivatives of a call that was taken over: by PyTorch's mathematics, as without us.

`flash_attn` refuses them. A backward that is to be differentiated (``create_graph=True``) computes
its gradients from the mathematics then, in memory quadratic in the length as PyTorch does; other
backwards are Metal's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dropout import dropout_mask, rescale
from ..ops import autograd
from ..ops.schema import ForwardArgs
from ..scoring import Scoring


def mathematics(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """out of a call without sinks, ALiBi, softcap, key ranges and windows other than causality."""
    mask, keep = scoring.attn_mask, None
    if scoring.dropout_p > 0.0:
        shape = (*query.shape[:3], key.shape[2])
        assert scoring.dropout_seed is not None
        keep = dropout_mask(scoring.dropout_seed, scoring.dropout_p, shape, query.device)
    batch = scoring.mask_batch(query.shape[0])
    if len(batch) > 1:
        query, key, value = (x.unflatten(0, batch) for x in (query, key, value))
        keep = None if keep is None else keep.unflatten(0, batch)
    dropout_p = 0.0 if keep is None else 1.0 - 1.0 / rescale(scoring.dropout_p)
    out, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        _additive(mask, query.dtype),
        dropout_p,
        scoring.window_right == 0,
        keep,
        scale=scoring.scale,
        enable_gqa=True,
    )
    return out.flatten(0, 1) if len(batch) > 1 else out


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


class _TwiceDifferentiable(autograd._FlashAttention):
    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, drow_stats: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dout is None or not torch.is_grad_enabled():
            return autograd._FlashAttention.backward(ctx, dout, drow_stats)
        *tensors, _, _ = ctx.saved_tensors
        call = ForwardArgs.read(autograd._join((*tensors, ctx.rest)))
        # Aliases: one tensor may be the query and the key, and has a gradient as each of them.
        query, key, value = (x.view_as(x) for x in (call.query, call.key, call.value))
        scoring, mask = call.scoring, call.scoring.attn_mask
        if mask is not None:
            scoring = scoring._replace(attn_mask=mask.view_as(mask))
        out = mathematics(query, key, value, scoring)
        leaves = (query, key, value, scoring.attn_mask)
        wanted = [n for n in range(len(leaves)) if ctx.needs_input_grad[n]]
        inputs: list[Any] = [leaves[n] for n in wanted]
        grads = torch.autograd.grad(out, inputs, dout, create_graph=True)
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for n, grad in zip(wanted, grads):
            result[n] = grad
        return tuple(result)


record = _TwiceDifferentiable.apply
