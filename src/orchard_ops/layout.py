"""Gives outputs the input's stride order, so that models in (B, L, H, D) layout need no copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stride_order(strides: Sequence[int]) -> list[int]:
    """Dimensions of a (B, H, L, D) tensor from the slowest to the fastest; D is always last.

    ``native/plan/params.cpp`` follows the same rule: a stable sort of B, H, L by descending stride.
    Strides that torch.export cannot compare, because a length is unknown, are taken to be in order.
    """
    if not any(isinstance(stride, torch.SymInt) for stride in strides):
        return [*sorted(range(3), key=lambda d: -strides[d]), 3]
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes half a second

    order: list[int] = []
    for d in range(3):
        place = len(order)
        while place > 0 and guard_or_false(strides[order[place - 1]] < strides[d]):
            place -= 1
        order.insert(place, d)
    return [*order, 3]


def empty_in_order_of(like: Tensor, last: int | None = None) -> Tensor:
    """A dense uninitialised tensor in `like`'s dtype, device, stride order and sizes but the
    last."""
    sizes = [*like.shape[:3], like.shape[3] if last is None else last]
    return torch.empty_permuted(
        sizes, stride_order(like.stride()), dtype=like.dtype, device=like.device
    )
