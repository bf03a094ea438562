"""The stride order of outputs: as the input's, so that (B, L, H, D) models stay copy-free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stride_order(strides: Sequence[int]) -> list[int]:
    """Dimensions of a (B, H, L, D) tensor from the slowest to the fastest; D is always last.

    ``native/plan/params.cpp`` follows the same rule: a stable sort of B, H, L by descending stride.
    """
    return [*sorted(range(3), key=lambda d: -strides[d]), 3]


def empty_in_order_of(like: Tensor, last: int | None = None) -> Tensor:
    """Uninitialised and dense, with `like`'s dtype, device, stride order and sizes but the last."""
    sizes = [*like.shape[:3], like.shape[3] if last is None else last]
    return torch.empty_permuted(
        sizes, stride_order(like.stride()), dtype=like.dtype, device=like.device
    )
