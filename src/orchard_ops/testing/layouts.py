"""Ways in which a (B, H, L, D) operand may lie in memory, with NaN or loud numbers around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _strided(storage: Tensor, like: Tensor, device: torch.device | str) -> Tensor:
    """`like`, a view of `storage`, on the device: the whole storage travels, then the view."""
    return storage.to(device).as_strided(like.shape, like.stride(), like.storage_offset())


@dataclass(frozen=True)
class Memory:
    """A dense order of the dimensions, begun somewhere, with gaps between its rows."""

    order: tuple[int, ...]
    """Dimensions from the slowest to the fastest."""
    offset: int = 0
    """Elements before the first."""
    gap: int = 0
    """Elements between the fastest dimension's rows."""

    def place(self, x: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """x's values in this memory, NaN around them."""
        sizes = [x.shape[d] for d in self.order]
        sizes[-1] += self.gap
        storage = torch.full((self.offset + math.prod(sizes),), math.nan, dtype=x.dtype)
        view = storage[self.offset :].view(sizes).narrow(-1, 0, x.shape[self.order[-1]])
        view = view.permute([self.order.index(d) for d in range(4)])
        view.copy_(x)
        return _strided(storage, view, device)


def _as_blhd(x: Tensor) -> Tensor:
    """(B, L, H, D) memory, as models that split heads by view make it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """A slice of a wider row, as from a fused qkv projection."""
    wide = torch.full((*x.shape[:3], 3 * x.shape[3]), math.nan, dtype=x.dtype)
    wide[..., x.shape[3] : 2 * x.shape[3]] = x
    return wide[..., x.shape[3] : 2 * x.shape[3]]


def _sliced_cache(x: Tensor) -> Tensor:
    """The middle of a longer sequence whose other rows are loud."""
    cache = torch.full((x.shape[0], x.shape[1], x.shape[2] + 24, x.shape[3]), 1e4, dtype=x.dtype)
    cache[:, :, 8 : 8 + x.shape[2]] = x
    return cache[:, :, 8 : 8 + x.shape[2]]


def _odd_offset(x: Tensor) -> Tensor:
    """Starts one element into its storage: no 16-byte alignment."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


def _transposed_columns(x: Tensor) -> Tensor:
    """stride(-1) != 1."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _every_other_column(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "blhd": _as_blhd,
    "packed": _packed,
    "sliced_cache": _sliced_cache,
    "odd_offset": _odd_offset,
    "transposed_columns": _transposed_columns,
    "every_other_column": _every_other_column,
}
"""Of CPU tensors, by name."""


def with_strides(x: Tensor, layout: str, device: torch.device | str = "cpu") -> Tensor:
    """x's values in one of the LAYOUTS, on the device with the same strides and offset."""
    laid = LAYOUTS[layout](x)
    storage = torch.empty(0, dtype=x.dtype).set_(laid.untyped_storage())
    return _strided(storage, laid, device)
