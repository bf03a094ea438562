"""Problems and calls that the kernel tests share."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from orchard_ops import plan
from orchard_ops.ops.schema import public_lse
from orchard_ops.scoring import Scoring
from orchard_ops.testing import DTYPES, SEED, Case, assert_attention_close

__all__ = [
    "DTYPES",
    "SEED",
    "Case",
    "check_case",
    "far_scores",
    "kernel_head_dims",
    "lse_of",
    "run",
    "uneven_scores",
]


def kernel_head_dims() -> tuple[int, ...]:
    """The widths that kernels are made in.

    Where the native library is missing, the plan's source says them, so that the list of tests does
    not depend on a build.
    """
    source = Path(__file__).resolve().parents[1] / "native" / "plan" / "tiles.cpp"
    listed = re.search(r"kHeadDims\[\] = \{(.*?)\}", source.read_text())
    assert listed is not None
    return plan.head_dims() or tuple(map(int, listed[1].split(",")))


def lse_of(row_stats: Tensor, scoring: Scoring) -> Tensor:
    """The natural logarithm of a row's sum of exponentials, as flash_attn returns it."""
    return public_lse(row_stats, scoring.unit)


def run(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dlse: Tensor | None = None,
    impl: str = "metal",
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv by the functional ops; with a mask or sinks also dmask, dsinks."""
    ops, scoring = torch.ops.orchard, case.scoring(q.device)
    out, row_stats = ops.flash_attn_fwd(q, k, v, *scoring, impl)
    mask_grad = case.mask not in ("", "bool")
    grads = ops.flash_attn_bwd(do, dlse, q, k, v, out, row_stats, *scoring, mask_grad, impl)
    dmask, dsinks = (x if x is not None and x.numel() else None for x in grads[3:])
    results = (out, lse_of(row_stats, scoring), *grads[:3])
    return (*results, dmask, dsinks) if case.mask or case.sinks else results


def check_case(case: Case, device: str = "mps", impl: str = "metal") -> tuple[Tensor, ...]:
    """Runs the case with plain contiguous operands and applies the tolerance rule."""
    operands = case.operands()
    ref, eager = case.math(torch.float64, *operands), case.math(case.dtype, *operands)
    results = run(case, *(x.to(device) for x in operands), impl=impl)
    assert_attention_close(results, ref, eager)
    return results


def uneven_scores(dtype: torch.dtype, head_dim: int) -> tuple[Case, tuple[Tensor, ...]]:
    """A case and its operands (q, k, v, dout) in which rows move the origins of their exponentials.

    Scores, as powers of two, change between blocks of 32 keys. Rows score evenly, rise slowly, fall
    far soon, rise at once, rise to the edge of what moves an origin and just beyond it, stay far
    below the rest until late, or go up and down. Four neighbouring rows do the same.
    """
    case = Case(75, 300, head_dim, dtype=dtype, scale=math.log(2))
    block = torch.arange(case.kv_len) // 32
    courses = (
        torch.zeros(case.kv_len),
        3.0 * block,
        -300.0 * (block > 1),
        40.0 * (block > 3),
        8.0 * (block > 2) + 0.5 * (block > 5),
        3000.0 * (block > 4) - 3000.0,
        20.0 * (block % 2) - 10.0 * (block > 1),
    )
    _, k, v, do = case.operands()
    for column, course in enumerate(courses):
        k[..., column] = course.to(dtype)
    q = torch.zeros_like(do)
    for head in range(case.num_heads):
        for row in range(case.q_len):
            q[:, head, row, (row // 4 + head) % len(courses)] = 1.0
    return case, (q, k, v, do)


def far_scores() -> tuple[Case, tuple[Tensor, ...]]:
    """As uneven_scores, with one step: the score, as a power of two, is 2^27 + 16 before key 32 and
    2^27 + 32 from there on. These are neighbours in float32. The later keys have all the weight.
    """
    case = Case(8, 64, 16, num_heads=1, dtype=torch.float16, scale=16 * math.log(2))
    q, k = torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 64, 16)
    q[..., 0], q[..., 1] = 2.0**12, 1.0
    k[..., 0], k[..., 1] = 2.0**11, 1.0
    k[..., 32:, 1] = 2.0
    _, _, v, do = case.operands()
    return case, (q.half(), k.half(), v, do)
