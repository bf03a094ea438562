"""Products of matrices with a factor, in one pass where that is safe."""

from __future__ import annotations

import torch
from torch import Tensor


def fuses(total: Tensor, factor: float) -> bool:
    """Whether baddbmm may compute total + factor * a @ b.

    On mps it may not: written in place into a part of a tensor it loses the result in some
    releases, and its graphs are remembered by shape, one for every block, and by a factor printed
    with six decimals, so that one serves factors that differ later. Nor with a factor that is not a
    normal number of the dtype: it refuses those beyond the range, and for one that rounds to 0 BLAS
    does not look at a and b, which may hold a NaN.
    """
    limits = torch.finfo(total.dtype)
    return total.device.type == "cpu" and limits.tiny <= abs(factor) <= limits.max


def product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a @ b of (N, m, k) and (N, k, n); if fused, without a pass for the factor."""
    if not fuses(a, factor):
        return torch.bmm(a, b).mul_(factor)
    nothing = a.new_empty(1)  # is not read, since beta is 0
    return torch.baddbmm(nothing, a, b, beta=0.0, alpha=factor)


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total += factor * a @ b; total (N, m, n) has dense rows."""
    if fuses(total, factor):
        total.baddbmm_(a, b, alpha=factor)
        return
    added = torch.bmm(a, b)
    total += added if factor == 1.0 else added.mul_(factor)
