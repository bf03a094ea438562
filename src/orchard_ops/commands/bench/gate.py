"""Holds the call that is timed to float64 by the package's rule: wrong results get no figure.

`orchard_ops.testing.math_attention` stores L x S matrices; here it sees a block of rows of one
key/value head at a time, so that a length of thousands fits. out, lse and dq are the rows' own,
and dk and dv are sums over the blocks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...testing import MathResult, assert_attention_close, math_attention
from .cases import DTYPES, Case, Problem, operands

_BLOCK_ELEMENTS = 1 << 23
"""The number of scores in a block, of which math_attention holds about a dozen matrices."""

_SIZES = ("dq_cancelled", "dk_cancelled", "score_size", "out_size", "dv_size")


def _math_by_blocks(problem: Problem, compute: torch.dtype, dtype: torch.dtype) -> MathResult:
    """Computes and sums in `compute` and rounds to `dtype`.

    Each size that the rounding floor depends on is the largest of any block, which is at most that
    of the whole problem.
    """
    q, k, v, dout = operands(problem)
    group = problem.num_heads // problem.num_kv_heads
    rows = max(1, _BLOCK_ELEMENTS // (group * problem.length))
    out, dq = (torch.zeros(q.shape, dtype=compute) for _ in range(2))
    dk, dv = (torch.zeros(k.shape, dtype=compute) for _ in range(2))
    lse = torch.zeros(q.shape[:3], dtype=compute)
    sizes = dict.fromkeys(_SIZES, 0.0)
    for b in range(problem.batch):
        for kv_head in range(problem.num_kv_heads):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            for row0 in range(0, problem.length, rows):
                row1 = min(problem.length, row0 + rows)
                seen = row1 if problem.is_causal else problem.length
                at_rows = (slice(b, b + 1), heads, slice(row0, row1))
                at_keys = (slice(b, b + 1), slice(kv_head, kv_head + 1), slice(0, seen))
                part = math_attention(
                    q[at_rows],
                    k[at_keys],
                    v[at_keys],
                    dout[at_rows],
                    dtype=compute,
                    window_right=0 if problem.is_causal else -1,
                    diagonal=row0,
                )
                out[at_rows], lse[at_rows], dq[at_rows] = part.out, part.lse, part.dq
                dk[at_keys] += part.dk
                dv[at_keys] += part.dv
                sizes = {name: max(size, getattr(part, name)) for name, size in sizes.items()}
    return MathResult(
        out.to(dtype),
        lse,
        dq.to(dtype),
        dk.to(dtype),
        dv.to(dtype),
        dq_cancelled=sizes["dq_cancelled"],
        dk_cancelled=sizes["dk_cancelled"],
        score_size=sizes["score_size"],
        out_size=sizes["out_size"],
        dv_size=sizes["dv_size"],
    )


@functools.lru_cache(maxsize=1)
def _expected(problem: Problem) -> tuple[MathResult, MathResult]:
    """The results of float64 mathematics, and of mathematics in the problem's dtype (for half
    precision: in float32)."""
    return (
        _math_by_blocks(problem, torch.float64, torch.float64),
        _math_by_blocks(problem, torch.float32, DTYPES[problem.dtype]),
    )


def check(results: tuple[Tensor, ...], case: Case) -> None:
    """Applies the rule to what `Contender.call` returned.

    Raises:
        AssertionError: a result is wrong; with both errors and the tolerance.
    """
    ref, eager = _expected(case.problem)
    out, *grads = results
    assert_attention_close([out, None, *grads], ref, eager)
