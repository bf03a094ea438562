"""`flash_attn`: the public function and the op ``torch.ops.orchard.flash_attn``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import Call, prepare
from .checks import plainly_right
from .key_ranges import KeyRanges
from .ops import autograd, eager, schema, seed
from .scoring import Scoring

_LARGE = 1e30
"""No scale in use is as large, and float32 can hold it."""
_USUAL = Scoring()
_BEHIND_WINDOWS = (*_USUAL[_USUAL._fields.index("window_right") + 1 :], "auto")
"""The arguments of FORWARD that no usual call sets."""
assert _USUAL._fields.index("window_right") == 7  # attend_usual names those before it


def is_usual(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether `prepare` would surely accept the operands and leave them as they are."""
    return (
        type(query) in eager.TENSORS
        and type(key) in eager.TENSORS
        and type(value) in eager.TENSORS
        and query.is_mps
        and plainly_right(query, key, value, enable_gqa)
        and (not torch.is_autocast_enabled("mps") or query.dtype == torch.get_autocast_dtype("mps"))
    )


def usual_numbers(dropout_p: float, scale: float | None) -> bool:
    """Whether `prepare` would surely take these as they are."""
    return (type(dropout_p) is float and 0.0 <= dropout_p < 1.0) and (
        scale is None or (type(scale) is float and abs(scale) < _LARGE)
    )


def attend_usual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window_left: int = -1,
    window_right: int = -1,
    record: Callable[..., Any] = autograd.record,
) -> tuple[Tensor, Tensor]:
    """out and row_stats of the call that `prepare` would make of arguments that are usual, in less
    time."""
    args = (  # a Scoring takes longer to make
        query,
        key,
        value,
        None,  # attn_mask
        None,  # alibi_slopes
        None,  # sinks
        seed.draw(query) if dropout_p > 0.0 else None,
        dropout_p,
        1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        window_left,
        0 if is_causal else window_right,
        *_BEHIND_WINDOWS,
    )
    return autograd.attend_operands(args, record)


def flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_ranges: Tensor | KeyRanges | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact scaled dot product attention in memory linear in the lengths, forward and backward.

    softmax(scale * query @ key^T + attn_mask) @ value, with the leading arguments and the meaning
    of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (..., Hq, L, D) float16, bfloat16, float32 (or float64, on the reference). 3-D inputs
            are one batch, 2-D inputs one head; batch dimensions broadcast; any strides.
        key: (..., Hkv, S, D).
        value: (..., Hkv, S, Dv).
        attn_mask: broadcastable to (..., Hq, L, S). bool: True takes part. float: added to the
            scores, may require grad. A `torch.nn.attention.bias.CausalBias` is a causal mask.
        dropout_p: probability of dropping an attention weight, in [0, 1]; rounded to a multiple of
            2^-16. The mask follows torch's cpu generator (`torch.manual_seed`).
        is_causal: query i sees keys 0..i (top-left aligned, as in PyTorch). Combines with
            attn_mask.
        scale: factor on the scores; 1 / sqrt(D) by default. A number: multiply query by a scale
            that is trained.
        enable_gqa: query heads share key and value heads: Hq must be a multiple of Hkv (which may
            differ between key and value), and query head h uses key head h // (Hq / Hkv). Without
            it head counts must be equal or 1.
        window_left, window_right: query i sees keys i - window_left ... i + window_right; -1 is
            open.
        softcap: c > 0 replaces a score s by c * tanh(s / c).
        alibi_slopes: (Hq) or (B, Hq); -slope * |i - j| is added to the scores. No gradient.
        sinks: (Hq); a logit per head that takes probability and has no value. May require grad.
        key_ranges: which keys each query may see, as `KeyRanges` or their int32 tensor (1 or B, 1
            or Hq, L, 4), in linear memory: padding, packed documents, prefixes, chunks. Windows,
            is_causal and alibi_slopes count from its positions instead of i; attn_mask may hide
            more. Keys that no query sees may hold anything, NaN too. No gradient.
        return_lse: also return the logarithm of the softmax's denominator.
        impl: None chooses per call; "metal" raises with the reason where Metal cannot run it;
            "reference" never uses Metal.

    Returns:
        out (..., Hq, L, Dv) in the query's dtype and stride order. Rows without a key are 0. With
        return_lse also lse (..., Hq, L) float32, natural logarithm; of a row without a key it is
        -inf, or the head's sink where there are sinks. Differentiable.

    Raises:
        ValueError, TypeError: a malformed call; the message says what was wrong and what came.
        NotImplementedError: alibi_slopes that require grad.
        RuntimeError: impl="metal" or ORCHARD_STRICT=1 and Metal cannot run the call.

    Reference: T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
    Partitioning", https://arxiv.org/abs/2307.08691.
    """
    if (
        (attn_mask is None and alibi_slopes is None and sinks is None)
        and (key_ranges is None and impl is None)
        and usual_numbers(dropout_p, scale)
        and softcap == 0.0
        and (type(window_left) is int and type(window_right) is int)
        and (window_left >= -1 and window_right >= -1)
        and (type(is_causal) is bool and type(enable_gqa) is bool and type(softcap) is float)
        and is_usual(query, key, value, enable_gqa)
    ):
        out, row_stats = attend_usual(
            query, key, value, dropout_p, is_causal, scale, window_left, window_right
        )
        return (out, schema.public_lse(row_stats, _USUAL.unit)) if return_lse else out
    call = prepare(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_ranges=key_ranges,
        impl=impl,
    )
    return run_with_lse(call) if return_lse else run(call)


def run(call: Call, record: Callable[..., Any] = autograd.record) -> Tensor:
    """out of a call that `prepare` has made."""
    return _run(call, record)[0]


def run_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """out and lse of a call that `prepare` has made."""
    out, row_stats = _run(call, autograd.record)
    return out, call.restore(schema.public_lse(row_stats, call.scoring.unit))


def _run(call: Call, record: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    out, row_stats = autograd.attend(call.flat(), record)
    return call.restore(out * 0.0 if call.drops_all else out), row_stats


# With the second key, vmap too decomposes the op into the functional ops, which have rules for vmap
# (ops/vmap.py). With the third, nested tensors reach the function, which refuses them by name.
for _key in (
    "CompositeImplicitAutograd",
    "FuncTorchBatchedDecomposition",
    "CompositeImplicitAutogradNestedTensor",
):
    schema.library.impl("flash_attn", flash_attn, _key)
