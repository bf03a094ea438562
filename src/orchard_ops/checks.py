"""Malformed calls: one place that says what is wrong: the op, what it wants and what it got.

The checks read shapes, dtypes and devices only, so they also run on fake tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIAGONAL = 1 << 40
"""Far beyond any length, and far from overflowing int64."""
IMPLS = ("auto", "metal", "reference")

_DIMENSIONS = "(batch, heads, length, head_dim)"


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def plainly_right(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True only for 4-D q, k, v with which `check_problem` finds no fault.

    The common call is recognised by one expression, since those take longer than everything else
    that Python does for a call. False means nothing: the checks decide, and word the error.
    """
    shape, kv_shape, dtype, device = query.shape, key.shape, query.dtype, query.device
    return (
        len(shape) == 4
        and kv_shape == value.shape
        and (kv_shape == shape or _may_group(shape, kv_shape))
        and shape[3] > 0
        and dtype in DTYPES
        and key.dtype == dtype == value.dtype
        and key.device == device == value.device
    )


def _may_group(shape: torch.Size, kv_shape: torch.Size) -> bool:
    """Whether q and k of these shapes, 4-D the first, differ in heads and length as they may."""
    return (
        len(kv_shape) == 4
        and kv_shape[0] == shape[0]
        and kv_shape[3] == shape[3]
        and (kv_shape[1] == shape[1] or (kv_shape[1] > 0 and shape[1] % kv_shape[1] == 0))
    )


def check_tensors(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """That q, k and v are tensors at all."""
    if isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor):
        return
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(x).__name__}")


def check_inputs(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Rank, dtype and device of q, k and v as the user passed them, with any batch dimensions."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 3:
            raise ValueError(
                f"{op}: {name} must have 3 or more dimensions, (..., heads, length, head_dim); "
                f"got shape {_shape(x)}"
            )
        if x.dim() != query.dim():
            raise ValueError(
                f"{op}: query, key and value must have the same number of dimensions; "
                f"got {query.dim()}, {key.dim()} and {value.dim()}"
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16, float32 or float64; got {x.dtype}"
            )
        if x.dtype != query.dtype:
            raise TypeError(
                f"{op}: query, key and value must have the same dtype; "
                f"got {query.dtype}, {key.dtype} and {value.dtype}"
            )
        if x.device != query.device:
            raise ValueError(
                f"{op}: query, key and value must be on the same device; "
                f"got {query.device}, {key.device} and {value.device}"
            )


def check_problem(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Sizes of 4-D q (B, Hq, L, D), k (B, Hkv, S, D) and v (B, Hkv, S, Dv)."""
    check_inputs(op, query, key, value)
    if query.dim() != 4:
        raise ValueError(f"{op}: query must be {_DIMENSIONS}; got shape {_shape(query)}")
    for name, x in (("key", key), ("value", value)):
        if x.shape[0] != query.shape[0]:
            raise ValueError(
                f"{op}: {name} must have query's batch size {query.shape[0]}; got {x.shape[0]}"
            )
    if key.shape[3] != query.shape[3]:
        raise ValueError(
            f"{op}: key must have query's head_dim {query.shape[3]}; got {key.shape[3]}"
        )
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"{op}: value must have key's {key.shape[1]} heads; got {value.shape[1]}")
    if value.shape[2] != key.shape[2]:
        raise ValueError(f"{op}: value must have key's length {key.shape[2]}; got {value.shape[2]}")
    if query.shape[3] == 0 or value.shape[3] == 0:
        raise ValueError(
            f"{op}: head_dim must be at least 1; got {query.shape[3]} for query and key "
            f"and {value.shape[3]} for value"
        )
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    divides = num_kv_heads > 0 and num_heads % num_kv_heads == 0
    if num_heads != num_kv_heads and not divides:
        raise ValueError(
            f"{op}: the number of query heads must be a multiple of the number of key/value "
            f"heads; got {num_heads} and {num_kv_heads}"
        )


def check_scoring(
    op: str,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    impl: str,
) -> None:
    """Everything but q, k and v of a 4-D problem that `check_problem` has accepted."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1); got {dropout_p}")
    if dropout_p > 0.0:
        if dropout_seed is None:
            raise ValueError(f"{op}: dropout_p is {dropout_p} but dropout_seed is None")
        if (
            dropout_seed.dim() != 0
            or dropout_seed.dtype != torch.int64
            or dropout_seed.device.type not in ("cpu", "meta")
        ):
            raise ValueError(
                f"{op}: dropout_seed must be a 0-dim int64 cpu tensor; got shape "
                f"{_shape(dropout_seed)}, {dropout_seed.dtype} on {dropout_seed.device}"
            )
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be 0 (none) or positive and finite; got {softcap}")
    if window_left < -1 or window_right < -1:
        name = "window_left" if window_left < -1 else "window_right"
        window = window_left if window_left < -1 else window_right
        raise ValueError(f"{op}: {name} must be -1 (open) or at least 0; got {window}")
    if abs(diagonal) > MAX_DIAGONAL:
        raise ValueError(f"{op}: diagonal must be within +-2^40; got {diagonal}")
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    if attn_mask is None and alibi_slopes is None and sinks is None:
        return
    batch, num_heads, q_len, _ = query.shape
    if attn_mask is not None:
        if attn_mask.device != query.device:
            raise ValueError(
                f"{op}: attn_mask must be on query's device {query.device}; got {attn_mask.device}"
            )
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise TypeError(
                f"{op}: attn_mask must be bool, float32 or query's {query.dtype}; "
                f"got {attn_mask.dtype}"
            )
        full = (batch, num_heads, q_len, key.shape[2])
        if attn_mask.dim() != 4 or any(m not in (1, f) for m, f in zip(attn_mask.shape, full)):
            raise ValueError(
                f"{op}: attn_mask must broadcast to {full}; got shape {_shape(attn_mask)}"
            )
    per_head = ((num_heads,), (batch, num_heads))
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in per_head:
        raise ValueError(
            f"{op}: alibi_slopes must have shape ({num_heads},) or ({batch}, {num_heads}); "
            f"got {_shape(alibi_slopes)}"
        )
    if sinks is not None and tuple(sinks.shape) != (num_heads,):
        raise ValueError(f"{op}: sinks must have shape ({num_heads},); got {_shape(sinks)}")
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None and x.device != query.device:
            raise ValueError(
                f"{op}: {name} must be on query's device {query.device}; got {x.device}"
            )
        if x is not None and not x.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be a floating point tensor; got {x.dtype}")
