"""Products of matrices with a factor, in one pass where that is safe."""

from __future__ import annotations

import torch
from torch import Tensor


def is_normal(factor: float, dtype: torch.dtype) -> bool:
    """Whether the dtype has the number, and without a loss of digits."""
    limits = torch.finfo(dtype)
    return limits.tiny <= abs(factor) <= limits.max


def fuses(total: Tensor, factor: float) -> bool:
    """Whether baddbmm may compute total + factor * a @ b.

    On mps it may not: written in place into a part of a tensor it loses the result in some
    releases, and its graphs are remembered by shape, one for every block, and by a factor printed
    with six decimals, so that one serves factors that differ later. Nor with a factor that is not a
    normal number of the dtype: it refuses those beyond the range, and for one that rounds to 0 BLAS
    does not look at a and b, which may hold a NaN.
    """
    return total.device.type == "cpu" and is_normal(factor, total.dtype)


_FEW = 512  # products of numbers in one of matrices


def _are_few(a: Tensor, b: Tensor) -> bool:
    """Whether BLAS would sum a @ b one product after another.

    For so few it does not go by blocks, and its error is three times as large (MKL: 3.3 against 0.8
    roundings at the size of the terms, for 256 of them). Fewer than 32 terms have no blocks.
    """
    (_, m, k), n = a.shape, b.shape[2]
    return a.device.type == "cpu" and k >= 32 and m * k * n < _FEW


def product(
    a: Tensor,
    b: Tensor,
    factor: float = 1.0,
    *,
    into: Tensor | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """factor * a @ b of (N, m, k) and (N, k, n); if fused, without a pass for the factor.

    Where fused products are safe, the result is `into` if that is given. `like` is any tensor of
    the result's shape and dtype. Nothing in them is read.
    """
    if not _are_few(a, b) and fuses(a, factor):
        if into is not None:
            return into.baddbmm_(a, b, beta=0.0, alpha=factor)
        if factor != 1.0:
            like = a.new_empty(1) if like is None else like
            return torch.baddbmm(like, a, b, beta=0.0, alpha=factor)
    if _are_few(a, b):
        found = (a.unsqueeze(2) * b.transpose(1, 2).unsqueeze(1)).sum(-1)
    else:
        found = torch.bmm(a, b)
    return scaled(found, factor)


def scale_and_add(x: Tensor, factor: float, addend: Tensor) -> None:
    """x = factor * x + addend, which broadcasts to x: in one pass where that is safe."""
    if fuses(x, factor):
        torch.add(addend, x, alpha=factor, out=x)
    else:
        scaled(x, factor).add_(addend)


def scaled(x: Tensor, factor: float) -> Tensor:
    """factor * x, in place."""
    return x if factor == 1.0 else x.mul_(factor)


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total += factor * a @ b; total (N, m, n) has dense rows."""
    if fuses(total, factor) and not _are_few(a, b):
        total.baddbmm_(a, b, alpha=factor)
    else:
        total += product(a, b, factor)
