"""Second derivatives of a call that was taken over: by PyTorch's mathematics, as without us.

`flash_attn` refuses them. A backward that is to be differentiated (``create_graph=True``) computes
its gradients from the mathematics then, in memory quadratic in the length as PyTorch does; other
backwards are Metal's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import calls
from ..dropout import dropout_mask, rescale
from ..ops import autograd
from ..scoring import Scoring


def mathematics(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """out of a call without sinks, ALiBi, softcap, key ranges and windows other than causality."""
    batch = scoring.mask_batch(query.shape[0])
    if len(batch) > 1:
        query, key, value = (x.unflatten(0, batch) for x in (query, key, value))
    mask, is_causal = scoring.attn_mask, scoring.window_right == 0
    if is_causal and scoring.diagonal != 0:  # of a CausalBias, which comes without a mask
        ones = query.new_ones((query.shape[-2], key.shape[-2]), dtype=torch.bool)
        mask, is_causal = ones.tril(scoring.diagonal), False
    out, weights = torch.ops.aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        _additive(mask, query.dtype),
        is_causal=is_causal,
        scale=scoring.scale,
        enable_gqa=True,
    )
    if scoring.dropout_p > 0.0:
        assert scoring.dropout_seed is not None
        flat = weights.flatten(0, 1) if len(batch) > 1 else weights
        keep = dropout_mask(scoring.dropout_seed, scoring.dropout_p, flat.shape, query.device)
        weights = weights * (keep * rescale(scoring.dropout_p)).view_as(weights).to(weights.dtype)
        group = query.shape[-3] // value.shape[-3]
        out = weights @ value.repeat_interleave(group, dim=-3)
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
        call = autograd.saved_call(ctx.saved_tensors, ctx.rest)
        # Aliases: one tensor may be the query and the key, and has a gradient as each of them.
        query, key, value = (x.view_as(x) for x in (call.query, call.key, call.value))
        scoring, mask = call.scoring, call.scoring.attn_mask
        if mask is not None:
            scoring = scoring._replace(attn_mask=mask.view_as(mask))
        calls.record_left_to_pytorch(
            "a backward with create_graph=True",
            (query, key, value, mask, scoring.dropout_p, False, scoring.scale, True),
        )
        # autograd has the gradients in these dtypes: an autocast of the caller would change them.
        with torch.autocast(query.device.type, enabled=False):
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
