"""Raises for malformed operands; each message says the op, what it wants and what it got.

The checks read shapes, dtypes and devices only, so they also run on fake tensors. `Scoring.check`
does the same for the scoring arguments, `arguments.py` for those of `flash_attn` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLS = ("auto", "metal", "reference")
SMALLEST_FLOAT32 = torch.finfo(torch.float32).tiny
LARGEST_FLOAT32 = torch.finfo(torch.float32).max

_DIMENSIONS = "(batch, heads, length, head_dim)"


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def plainly_right(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """True only for 4-D q, k and v in which `check_problem` would find no fault.

    The checks take longer than everything else that Python does for a call, so a common call is
    recognised by this one expression. False does not mean that the operands are wrong: the checks
    decide that, and word the error.
    """
    shape, kv_shape, dtype, device = query.shape, key.shape, query.dtype, query.device
    return (
        len(shape) == 4
        and len(kv_shape) == 4
        and kv_shape == value.shape
        # The lengths are not compared: torch.export would make a condition of that.
        and kv_shape[0] == shape[0]
        and kv_shape[3] == shape[3]
        and (
            kv_shape[1] == shape[1]
            or kv_shape[1] == 1
            or (enable_gqa and kv_shape[1] > 0 and shape[1] % kv_shape[1] == 0)
        )
        and shape[3] > 0
        and dtype in DTYPES
        and key.dtype == dtype == value.dtype
        and key.device == device == value.device
    )


def check_tensors(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks that q, k and v are dense tensors."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, x)


def check_tensor(op: str, name: str, x: Tensor) -> None:
    """That x is a dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(x).__name__}")
    check_dense(op, name, x)


def check_kinds(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks that q, k and v are dense tensors of one dtype on one device, of any shape."""
    check_tensors(op, query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16, float32 or float64; got {x.dtype}"
            )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{op}: query, key and value must have the same dtype; "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"{op}: query, key and value must be on the same device; "
            f"got {query.device}, {key.device} and {value.device}"
        )


def check_dense(op: str, name: str, x: Tensor) -> None:
    if x.is_nested:
        raise TypeError(
            f"{op}: {name} must be a dense tensor; got a nested one: pad it with "
            "torch.nested.to_padded_tensor and hide the padding by a mask"
        )
    if x.layout != torch.strided:
        raise TypeError(
            f"{op}: {name} must be a dense tensor; got layout {x.layout}: call .to_dense()"
        )


def check_problem(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks the sizes of 4-D q (B, Hq, L, D), k (B, Hkv, S, D) and v (B, Hkv, S, Dv)."""
    check_kinds(op, query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be {_DIMENSIONS}; got shape {_shape(x)}")
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


def check_length_first(
    op: str,
    dimensions: str,
    given: Sequence[tuple[str, Tensor]],
    operands: tuple[Tensor, Tensor, Tensor],
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> None:
    """Operands whose length precedes their heads: q (..., L, Hq, D), k and v (..., S, Hk, D or Dv).

    `given` are the tensors that the caller named, which q, k and v are or are views of.
    """
    for name, x in given:
        check_tensor(op, name, x)
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16, float32 or float64; got {x.dtype}"
            )
    if any(x.dtype != given[0][1].dtype for _, x in given):
        got = ", ".join(str(x.dtype) for _, x in given)
        raise TypeError(f"{op}: {_listed(given)} must have the same dtype; got {got}")
    if any(x.device != given[0][1].device for _, x in given):
        got = ", ".join(str(x.device) for _, x in given)
        raise ValueError(f"{op}: {_listed(given)} must be on the same device; got {got}")
    query, key, value = operands
    q, k, v = names
    for name, x in zip(names, operands):
        if x.dim() != dimensions.count(",") + 1:
            raise ValueError(f"{op}: {name} must be {dimensions}; got shape {_shape(x)}")
    for name, x in ((q, query), (v, value)):
        if x.shape[-1] == 0:
            raise ValueError(
                f"{op}: the head_dim of {name} must be at least 1; got shape {_shape(x)}"
            )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{op}: {q} and {k} must have the same head_dim; got {query.shape[-1]} and "
            f"{key.shape[-1]}"
        )
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(
            f"{op}: {k} and {v} must have the same length and heads; got shapes {_shape(key)} and "
            f"{_shape(value)}"
        )
    num_heads, num_kv_heads = query.shape[-2], key.shape[-2]
    if num_heads != num_kv_heads and (num_kv_heads == 0 or num_heads % num_kv_heads):
        raise ValueError(
            f"{op}: the heads of {q} must be a multiple of those of {k} and {v}; got {num_heads} "
            f"and {num_kv_heads} (operands are {dimensions})"
        )


def _listed(given: Sequence[tuple[str, Tensor]]) -> str:
    return " and ".join(", ".join(name for name, _ in given).rsplit(", ", 1))


def check_impl(op: str, impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}; got {impl!r}")


def sequence_integers(
    op: str, name: str, x: Tensor | None, batch: int, q: Tensor, columns: str = ""
) -> Tensor | None:
    """The numbers of `batch` sequences as the ops take them: checked, and int32."""
    if x is None:
        return None
    if isinstance(x, list | tuple):
        raise TypeError(
            f"{op}: {name} must be a tensor; got the {type(x).__name__} {x!r}: pass "
            "torch.tensor(..., dtype=torch.int32) on q's device"
        )
    check_tensor(op, name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64; got {x.dtype}")
    if x.dim() != 1 + bool(columns) or x.shape[0] != batch:
        raise ValueError(f"{op}: {name} must have shape ({batch},{columns}); got {_shape(x)}")
    if x.device != q.device:
        raise ValueError(f"{op}: {name} must be on the device of q, {q.device}; got {x.device}")
    if x.dtype == torch.int64:
        limits = torch.iinfo(torch.int32)
        x = x.clamp(limits.min, limits.max).int()
    return x


def check_range(op: str, name: str, x: Tensor | None, least: int, most: int) -> None:
    """Waits for the device, and raises where a number of x is out of bounds."""
    if x is None or not x.numel():
        return
    wrong = x[(x < least) | (x > most)]
    if wrong.numel():
        raise ValueError(
            f"{op}: {name} must be from {least} to {most}; got {wrong[0].item()} among "
            f"{x.numel()} (checked because ORCHARD_DEBUG is set)"
        )


def check_leftpad(op: str, name: str, starts: Tensor | None, ends: Tensor | int) -> None:
    """The same where padding is longer than the keys of its sequence."""
    if starts is None or not starts.numel():
        return
    ends = torch.zeros_like(starts) + ends
    wrong = starts > ends
    if bool(wrong.any()):
        raise ValueError(
            f"{op}: {name} must be at most the keys of its sequence, new ones included; got "
            f"{starts[wrong][0].item()} beside {ends[wrong][0].item()} (checked because "
            "ORCHARD_DEBUG is set)"
        )


def check_pages(op: str, table: Tensor | None, page_size: int, num_pages: int, ends: Any) -> None:
    """The same where a page that holds keys, of which each sequence has `ends`, does not exist."""
    if table is None:
        return
    first_keys = torch.arange(table.shape[1], device=table.device) * page_size
    used = first_keys < (ends.unsqueeze(1) if isinstance(ends, Tensor) else ends)
    wrong = table[used & ((table < 0) | (table >= num_pages))]
    if wrong.numel():
        raise ValueError(
            f"{op}: block_table must be from 0 to {num_pages - 1} for the pages that hold keys; "
            f"got {wrong[0].item()} (checked because ORCHARD_DEBUG is set)"
        )
