"""What `torch.utils.flop_counter.FlopCounterMode` counts: as for F.scaled_dot_product_attention.

Every pair of a query and a key counts, hidden or not, and every query head, shared keys or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..namespace import OPS
from .schema import BackwardArgs, ForwardArgs


def _pairs(query: torch.Size, key: torch.Size) -> int:
    batch, num_heads, q_len, _ = query
    return batch * num_heads * q_len * key[2]


@register_flop_formula(OPS.flash_attn_fwd)
def forward_flops(*args: Any, out_val: Any = None, **_: Any) -> int:
    """Counts q @ k^T and p @ v from the shapes of the operands."""
    call = ForwardArgs.read(args)
    return 2 * _pairs(call.query, call.key) * (call.query[3] + call.value[3])


@register_flop_formula(OPS.flash_attn_bwd)
def backward_flops(*args: Any, out_val: Any = None, **_: Any) -> int:
    """Counts the scores, which are computed again, dq, dk, dp and dv from the shapes of the
    operands."""
    call = BackwardArgs.read(args)
    return 2 * _pairs(call.query, call.key) * (3 * call.query[3] + 2 * call.value[3])
