"""PyTorch's own kernels for few queries on Apple GPUs, which our decode is measured against.

`sdpa_vector` and its form of two passes, of DecodeAttention.h in torch's wheel, unmodified. Which
one runs, its grid and its arguments are those of _scaled_dot_product_attention_math_mps in
ATen/native/mps/operations/Attention.mm.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .driver import Kernels, Launch
from .peer import INCLUDE

_HEADER = INCLUDE / "ATen" / "native" / "mps" / "kernels" / "DecodeAttention.h"
SOURCE = """
#include <c10/metal/utils.h>
#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;
#include <ATen/native/mps/kernels/DecodeAttention.h>
"""
HEAD_DIMS = (64, 96, 128, 256)
_MOST_QUERIES = 8
_BLOCKS = 32  # of keys, in two passes
_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


@dataclass(frozen=True)
class Step:
    """One launch: variant, grid in threadgroups, threads of a threadgroup, and its buffers. What a
    buffer holds is a tensor's name or numbers, 32 bits each."""

    name: str
    groups: tuple[int, int, int]
    threads: int
    tensors: dict[int, str]
    numbers: dict[int, Sequence[int]] = field(default_factory=dict)
    scale: int = -1  # index of its buffer


def has_two_passes(kv_len: int, is_grouped: bool) -> bool:
    return kv_len >= 1024 or (is_grouped and kv_len >= 4096)


def steps(q: Tensor, k: Tensor, v: Tensor) -> list[Step]:
    """The launches for operands (B, H, L, D) without a mask, of which every query sees all keys.

    Raises:
        ValueError: PyTorch has no such variant, or would not use it.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    if head_dim not in HEAD_DIMS or v.shape[3] != head_dim:
        raise ValueError(f"decode: head_dim must be one of {HEAD_DIMS}; got {tuple(q.shape)}")
    if q_len > min(_MOST_QUERIES, kv_len):
        raise ValueError(f"decode: q_len must be at most {_MOST_QUERIES}; got {q_len}")
    if any(x.stride(3) != 1 for x in (q, k, v)):
        raise ValueError("decode: operands must have dense rows")
    dtype = _TYPES[q.dtype]
    group = num_heads // num_kv_heads
    heads, rows = ([x.stride(d) for x in (q, k, v)] for d in (1, 2))
    batches = [*(x.stride(0) for x in (q, k, v)), num_heads]
    name = f"{dtype}_{head_dim}_{head_dim}_masknone"
    grid = (batch * num_heads, q_len)
    operands = {0: "q", 1: "k", 2: "v"}
    if not has_two_passes(kv_len, group > 1):
        numbers = {4: [group], 5: [kv_len], 6: heads, 7: rows, 11: batches}
        tensors = {**operands, 3: "out"}
        return [Step(f"sdpa_vector_{name}", (*grid, 1), 1024, tensors, numbers, scale=8)]
    first = Step(
        f"sdpa_vector_2pass_1_{name}",
        (*grid, _BLOCKS),
        256,
        {**operands, 3: "partial", 4: "sums", 5: "maxs"},
        {6: [group], 7: [kv_len], 8: heads, 9: rows, 13: batches},
        scale=10,
    )
    second = Step(
        f"sdpa_vector_2pass_2_{dtype}_{head_dim}",
        (*grid, 1),
        1024,
        {0: "partial", 1: "sums", 2: "maxs", 3: "out"},
    )
    return [first, second]


def prepare(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float
) -> list[Launch]:
    """The launches in order; they write out, which must be dense."""
    rows = (*q.shape[:3], _BLOCKS)
    empty = {"device": q.device, "dtype": torch.float32}
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "partial": torch.full((*rows, q.shape[3]), torch.nan, dtype=q.dtype, device=q.device),
        "sums": torch.full(rows, torch.nan, **empty),
        "maxs": torch.full(rows, torch.nan, **empty),
    }
    launches = []
    for step in steps(q, k, v):
        buffers = {index: tensors[name] for index, name in step.tensors.items()}
        for index, numbers in step.numbers.items():
            four = [*numbers, 0, 0, 0][:4]  # a vector of three has the room of four
            buffers[index] = torch.tensor(four, dtype=torch.int32, device=q.device)
        # The second pass has no argument by value: 30 is a buffer that it does not declare.
        of_scale = (step.scale if step.scale >= 0 else 30, ctypes.c_float(scale))
        launches.append(kernels.prepare(step.name, step.groups, (step.threads,), buffers, of_scale))
    return launches


def check_header() -> str:
    """The version of torch whose kernels these are, with the header's digest.

    Raises:
        RuntimeError: torch has no such header.
    """
    if not _HEADER.exists():
        raise RuntimeError(f"torch {torch.__version__} has no DecodeAttention.h; 2.13 has")
    return f"torch {torch.__version__}, {hashlib.sha256(_HEADER.read_bytes()).hexdigest()[:12]}"
