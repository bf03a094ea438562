"""Operands beyond 2^31 elements and 4 GiB: what 32-bit index arithmetic would get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .attention import Attention, lse_of
from .plans import Scoring

# run(attention) gives the operands q, k, v, dout, the scoring and the results out, lse, dq, dk, dv,
# all cut to what is to be checked.
Checked = tuple[tuple[Tensor, ...], Scoring, tuple[Tensor, ...]]
FarCase = tuple[str, Callable[[Attention], Checked]]


def _run(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, s: Scoring):
    out, row_stats = attention.forward(q, k, v, s)
    grads = attention.backward(dout, None, q, k, v, out, row_stats, s)
    # In parts, since what lse_of needs besides would not fit where there are 2^31 rows.
    lse = torch.cat([lse_of(part) for part in row_stats.split(4096)])
    return (out, lse, *grads)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def large_batch(dtype: torch.dtype, batch: int, head_dim: int) -> FarCase:
    """Every operand and result has more than 2^31 elements; some batches are checked."""
    heads, length = 32, 128
    shape = (batch, heads, length, head_dim)
    elements = batch * heads * length * head_dim
    assert elements > 2**31

    def run(attention: Attention) -> Checked:
        generator = torch.Generator("cuda").manual_seed(2)
        q, k, v, dout = (
            torch.randn(shape, generator=generator, dtype=dtype, device="cuda") for _ in range(4)
        )
        s = Scoring(head_dim**-0.5, window_right=0)
        results = _run(attention, q, k, v, dout, s)
        checked = torch.tensor([0, 1, batch // 2, batch - 2, batch - 1], device="cuda")
        cut = tuple(x[checked] for x in (q, k, v, dout)), s, tuple(x[checked] for x in results)
        return cut

    text = f"{_name(dtype)} B{batch} H{heads} L{length} D{head_dim} causal: "
    return text + f"{elements:.3g} elements, {elements * dtype.itemsize / 2**30:.1f} GiB each", run


def far_strides(
    dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], what: str
) -> FarCase:
    """Views whose elements lie up to 2^32 apart, in a buffer full of NaN."""
    reach = sum((n - 1) * stride for n, stride in zip(sizes, strides))
    assert reach > 2**31

    def run(attention: Attention) -> Checked:
        shift = 4096  # q, k, v and dout lie beside each other
        buffer = torch.full((reach + 4 * shift + 8,), torch.nan, dtype=dtype, device="cuda")
        generator = torch.Generator("cuda").manual_seed(3)
        operands = []
        for i in range(4):
            view = buffer.as_strided(sizes, strides, i * shift + 8)
            values = torch.randn(sizes, generator=generator, dtype=dtype, device="cuda")
            operands.append(view.copy_(values))
        s = Scoring(sizes[3] ** -0.5, window_right=0)
        return tuple(operands), s, _run(attention, *operands, s)

    size = f"B{sizes[0]} H{sizes[1]} L{sizes[2]} D{sizes[3]}"
    return f"{_name(dtype)} {size} causal: {what}, {reach:.3g} elements from first to last", run


def many_rows(batch: int) -> FarCase:
    """More than 2^31 query rows: row_stats and delta are indexed beyond 2^31. q and dout
    repeat; heads are narrow, so that a GPU of 80 GB holds the results.
    """
    heads, q_len, kv_len, head_dim = 16, 1024, 16, 2
    assert batch * heads * q_len > 2**31

    def run(attention: Attention) -> Checked:
        generator = torch.Generator("cuda").manual_seed(4)

        def draw(length: int) -> Tensor:
            shape = (1, heads, length, head_dim)
            x = torch.randn(shape, generator=generator, dtype=torch.float16, device="cuda")
            return x.expand(batch, -1, -1, -1)

        q, k, v, dout = draw(q_len), draw(kv_len), draw(kv_len), draw(q_len)
        s = Scoring(head_dim**-0.5)
        results = _run(attention, q, k, v, dout, s)
        for x in results:  # all batches are alike
            for first in range(0, batch, 4096):
                block = x[first : first + 4096]
                assert torch.equal(block, x[:1].expand_as(block))
        checked = slice(batch - 1, batch)
        return (tuple(x[checked] for x in (q, k, v, dout)), s, tuple(x[checked] for x in results))

    text = f"float16 B{batch} H{heads} L{q_len} S{kv_len} D{head_dim}: "
    return text + f"{batch * heads * q_len:.3g} rows of statistics", run


def cases() -> Iterator[FarCase]:
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    yield large_batch(half, 8200, 64)
    yield large_batch(bfloat, 4100, 128)
    row = 1 << 20
    yield far_strides(half, (1, 4, 4096, 64), (0, 64, row, 1), "rows far apart")
    yield far_strides(bfloat, (1, 4, 4096, 61), (0, 128, row, 2), "rows far apart, every second")
    yield far_strides(single, (1, 2, 4096, 128), (0, 128, row, 1), "rows far apart")
    heads = (1 << 31) + 8
    yield far_strides(half, (2, 2, 999, 80), (1 << 30, heads, 16384, 1), "heads far apart")
    yield far_strides(single, (2, 2, 999, 77), (heads, 1 << 30, 16384, 1), "batches far apart")
    yield far_strides(half, (1, 1, 500, 32), (0, 0, 32768, 1 << 27), "columns far apart")
    yield many_rows((1 << 17) + 3)
