"""PyTorch's own attention kernel for Apple GPUs, which our forward is measured against.

`prefill_attention` of PrefillAttention.h in torch's wheel, unmodified. Tile, name, grid and
parameters are those of sdpa_prefill_mps in ATen/native/mps/operations/Attention.mm.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

INCLUDE = Path(torch.__file__).parent / "include"
_HEADER = INCLUDE / "ATen" / "native" / "mps" / "kernels" / "PrefillAttention.h"
SOURCE = """
#include <c10/metal/utils.h>
#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;
#include <ATen/native/mps/kernels/PrefillAttention.h>
"""
HEAD_DIMS = (32, 64, 72, 80, 96, 128, 256)
BUFFERS = {"q": 0, "k": 1, "v": 2, "out": 3, "params": 4}
_int32 = ctypes.c_int32


class Params(ctypes.Structure):
    """PrefillAttnParams, as torch 2.13 has it: strides of (B, H, L) in elements"""

    _fields_ = [
        *[(name, _int32) for name in ("batch", "num_heads", "head_dim", "q_len", "kv_len")],
        ("group", _int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *[(name, _int32 * 3) for name in ("q", "k", "v", "out")],
    ]


_STRUCT = (
    "intB;intH;intD;intqL;intkL;intgqa_factor;floatscale;floatsoftcapping;"
    "intQ_strides[3];intK_strides[3];intV_strides[3];intO_strides[3];"
)


@dataclass(frozen=True)
class Prefill:
    """One launch: variant, grid in threadgroups, threads of a threadgroup, parameters."""

    name: str
    groups: tuple[int, int, int]
    threads: tuple[int, int]
    params: Params


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tile(head_dim: int) -> tuple[int, int, int]:
    """BQ, BK and simdgroups"""
    return {256: (16, 8, 2), 128: (32, 16, 4)}.get(head_dim, (32, 32, 4))


def prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float, causal: bool
) -> Prefill:
    """The launch for operands (B, H, L, D), whose last dimension must be dense.

    A causal row sees the keys up to its own number, as in scaled_dot_product_attention.

    Raises:
        ValueError: PyTorch has no such variant, or would not use it.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"prefill: head_dim must be one of {HEAD_DIMS}; got {head_dim}")
    if q_len <= 8:
        raise ValueError(f"prefill: q_len must be above 8; got {q_len}")
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if x.stride(3) != 1:
            raise ValueError(f"prefill: {name} must have dense rows; got strides {x.stride()}")
    bq, bk, simdgroups = _tile(head_dim)
    dtype = _dtype_name(q.dtype)
    params = Params(
        batch,
        num_heads,
        head_dim,
        q_len,
        kv_len,
        num_heads // num_kv_heads,
        scale,
        1.0,
        *((_int32 * 3)(*x.stride()[:3]) for x in (q, k, v, out)),
    )
    return Prefill(
        f"prefill_attention_{dtype}_bq{bq}_bk{bk}_bd{head_dim}_wm{simdgroups}_wn1"
        f"_hm0_dc{int(causal)}_mask{dtype}",
        (-(-q_len // bq), num_heads, batch),
        (32, simdgroups),
        params,
    )


def rounded_query(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The q and scale whose exact attention the kernel approximates.

    It multiplies q by scale * log2(e), rounds to q's dtype, and takes powers of two.
    """
    factor = torch.tensor(scale * math.log2(math.e), dtype=q.dtype, device=q.device)
    return q * factor, math.log(2.0)


def check_header() -> str:
    """The version of torch whose kernel this is, with the header's digest.

    Raises:
        RuntimeError: torch has no such header, or its parameters are not `Params`.
    """
    if not _HEADER.exists():
        raise RuntimeError(f"torch {torch.__version__} has no PrefillAttention.h; 2.13 has")
    text = _HEADER.read_text()
    body = re.search(r"struct PrefillAttnParams \{(.*?)\};", text, re.S)
    fields = re.sub(r"//.*|\s", "", body[1]) if body else ""
    if fields != _STRUCT:
        raise RuntimeError(f"torch {torch.__version__}: PrefillAttnParams is now {fields}")
    return f"torch {torch.__version__}, {hashlib.sha256(text.encode()).hexdigest()[:12]}"
