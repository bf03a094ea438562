"""Problems and calls that the kernel tests share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orchard_ops.testing import MathResult, assert_attention_close, math_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEED = 0x0123_4567_89AB_CDEF


@dataclass(frozen=True)
class Case:
    """One attention problem. Windows and diagonal as in orchard::flash_attn_fwd."""

    q_len: int
    kv_len: int
    head_dim: int = 64
    batch: int = 1
    num_heads: int = 2
    num_kv_heads: int = 1
    dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0
    window_left: int = -1
    window_right: int = -1
    diagonal: int = 0
    scale: float | None = None

    def __str__(self) -> str:
        parts = [
            str(self.dtype).removeprefix("torch."),
            f"B{self.batch}H{self.num_heads}/{self.num_kv_heads}",
            f"L{self.q_len}S{self.kv_len}D{self.head_dim}",
        ]
        if (self.window_left, self.window_right, self.diagonal) != (-1, -1, 0):
            parts.append(f"window{self.window_left},{self.window_right}at{self.diagonal}")
        if self.dropout_p:
            parts.append(f"drop{self.dropout_p}")
        if self.scale is not None:
            parts.append(f"scale{self.scale}")
        return "-".join(parts)

    def but(self, **changes: object) -> Case:
        return replace(self, **changes)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout on the CPU."""
        generator = torch.Generator().manual_seed(1)

        def draw(heads: int, length: int) -> Tensor:
            shape = (self.batch, heads, length, self.head_dim)
            return torch.randn(shape, generator=generator).to(self.dtype)

        q, do = draw(self.num_heads, self.q_len), draw(self.num_heads, self.q_len)
        k, v = (draw(self.num_kv_heads, self.kv_len) for _ in range(2))
        return q, k, v, do

    def math(self, dtype: torch.dtype, *operands: Tensor, dlse: Tensor | None = None) -> MathResult:
        return math_attention(
            *operands, dlse, dtype=dtype, scale=self.scale,
            dropout_p=self.dropout_p, dropout_seed=SEED, window_left=self.window_left,
            window_right=self.window_right, diagonal=self.diagonal,
        )  # fmt: skip

    def scoring(self) -> tuple:
        """The arguments of flash_attn_fwd behind q, k and v, but for impl."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return (
            None, None, None, torch.tensor(SEED), self.dropout_p, scale,
            self.window_left, self.window_right, self.diagonal, 0.0,
        )  # fmt: skip


def run(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dlse: Tensor | None = None,
    impl: str = "metal",
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv by the functional ops."""
    ops = torch.ops.orchard
    out, lse = ops.flash_attn_fwd(q, k, v, *case.scoring(), impl)
    grads = ops.flash_attn_bwd(do, dlse, q, k, v, out, lse, *case.scoring(), False, impl)
    return (out, lse, *grads[:3])


def check_case(case: Case, device: str = "mps", impl: str = "metal") -> tuple[Tensor, ...]:
    """Runs the case with plain contiguous operands and applies the tolerance rule."""
    operands = case.operands()
    ref, eager = case.math(torch.float64, *operands), case.math(case.dtype, *operands)
    results = run(case, *(x.to(device) for x in operands), impl=impl)
    assert_attention_close(results, ref, eager)
    return results


def uneven_scores(dtype: torch.dtype, head_dim: int) -> tuple[Case, tuple[Tensor, ...]]:
    """A case and its operands (q, k, v, dout) for which the origins of the exponentials move.

    In powers of two, rows score by blocks of 32 keys: evenly, slowly rising, soon falling far,
    up at once, to the edge of what moves an origin and just beyond it, far below the rest until
    late, up and down. Four neighbouring rows do the same.
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
    """As uneven_scores, once: from key 32 on the score is 2^27 + 32, before 2^27 + 16 (powers of
    two), which are neighbours in float32. All the weight is behind.
    """
    case = Case(8, 64, 16, num_heads=1, dtype=torch.float16, scale=16 * math.log(2))
    q, k = torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 64, 16)
    q[..., 0], q[..., 1] = 2.0**12, 1.0
    k[..., 0], k[..., 1] = 2.0**11, 1.0
    k[..., 32:, 1] = 2.0
    _, _, v, do = case.operands()
    return case, (q.half(), k.half(), v, do)
