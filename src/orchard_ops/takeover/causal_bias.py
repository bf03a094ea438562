"""`torch.nn.attention.bias.causal_lower_right` as a window, while F.sdpa is taken over.

A CausalBias answers calls of F.scaled_dot_product_attention itself, by PyTorch's protocol for
tensor subclasses, and would make a bool mask of all queries and keys before the operator is called.
While the takeover lasts its answer is ours where `flash_attn` takes the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.nn.functional import scaled_dot_product_attention

from .. import attention as op
from ..arguments import prepare
from . import double_backward, kernels

_PROTOCOL = "__torch_function__"
_stock: Any = vars(CausalBias)[_PROTOCOL]


def begin() -> None:
    """Answers for CausalBias from now on."""
    setattr(CausalBias, _PROTOCOL, _ours)


def end() -> None:
    """Leaves CausalBias as it was, unless somebody else answers for it by now."""
    if vars(CausalBias)[_PROTOCOL] is _ours:
        setattr(CausalBias, _PROTOCOL, _stock)


def _answer(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    if func is scaled_dot_product_attention and not torch.compiler.is_compiling():
        out = _attention(*args, **(kwargs or {}))
        if out is not None:
            return out
    return _stock.__func__(cls, func, types, args, kwargs)


_ours: Any = classmethod(_answer)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """out, or None for a call that PyTorch goes on with. It meets `kernels.attention` later then,
    which says why it is not ours."""
    if not isinstance(attn_mask, CausalBias) or attn_mask.variant != CausalVariant.LOWER_RIGHT:
        return None
    if query.device.type != "mps" or torch._C._are_functorch_transforms_active():
        return None
    if kernels.why_left_to_pytorch(query, key, value, None, is_causal) is not None:
        return None
    if kernels.why_not_metal(query, value) is not None:
        return None
    more: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    try:
        call = prepare(query, key, value, attn_mask, dropout_p, is_causal, **more)
    except (TypeError, ValueError, NotImplementedError):
        return None
    return op.run(call, record=double_backward.record)
