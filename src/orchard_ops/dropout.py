"""Which attention weights dropout keeps: a pure function of the seed and the position.

The Metal kernels (``shaders/dropout.h``) and the reference call the same function, so a mask is
never stored, a recomputed forward (activation checkpointing) sees the same one, and falling back
from Metal to the reference does not change it.

One Philox4x32-10 block gives four words of 32 bits. They decide a 2 x 2 arrangement of pairs of
weights that lie eight rows and eight columns apart; a pair is two neighbouring columns, one for
each 16-bit half of a word. A lane of an Apple GPU's simdgroup holds just these elements of four
neighbouring 8 x 8 matrix fragments, so it draws only what it needs, whether a kernel walks along
the keys or along the queries.

Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

RESOLUTION = 1 << 16
"""A dropout probability is rounded to a multiple of 1 / RESOLUTION, before weights are rescaled."""

GROUP = 16
"""Rows and columns are drawn in groups of this many; see the module's docstring."""


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four int64 tensors holding uint32 values (broadcast together).

    Returns four int64 tensors holding uint32 values.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        # int64 products wrap; their 64 bits are still those of the unsigned product.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK32) ^ c1 ^ k0,
            second & _MASK32,
            ((first >> 32) & _MASK32) ^ c3 ^ k1,
            first & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """The number of the RESOLUTION 16-bit draws that drop a weight; all of them only for p = 1."""
    return RESOLUTION if dropout_p == 1.0 else min(round(dropout_p * RESOLUTION), RESOLUTION - 1)


def rescale(dropout_p: float) -> float:
    """What a kept weight is multiplied with: 1 / (1 - p), p as rounded by `threshold`.

    It is 0 for p = 1, where none is kept.
    """
    kept = RESOLUTION - threshold(dropout_p)
    return RESOLUTION / kept if kept else 0.0


def keep_block(
    seed: int,
    dropout_p: float,
    batch: int,
    num_heads: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Weights that dropout keeps among rows [first, last) and columns [first, last).

    Returns a bool tensor (batch, num_heads, rows, cols); True is kept.
    """
    row0, col0 = rows[0] // GROUP, cols[0] // GROUP
    row_groups, col_groups = -(-rows[1] // GROUP) - row0, -(-cols[1] // GROUP) - col0

    def axis(first: int, count: int, dim: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = count
        return torch.arange(first, first + count, device=device).view(shape)

    words = philox_4x32(
        (
            axis(col0 * 4, col_groups * 4, 3),
            axis(row0 * 8, row_groups * 8, 2),
            axis(0, num_heads, 1),
            axis(0, batch, 0),
        ),
        seed,
    )
    # (B, H, row group, 8, column group, 4, row block, column block, half)
    # int32 holds the 32 bits in half of int64's memory.
    draws = torch.stack([word.to(torch.int32) for word in words], dim=-1)
    draws = draws.view(batch, num_heads, row_groups, 8, col_groups, 4, 2, 2, 1)
    shifts = torch.tensor([0, 16], dtype=torch.int32, device=device)
    draws = (draws >> shifts) & (RESOLUTION - 1)
    keep = draws >= threshold(dropout_p)
    keep = keep.permute(0, 1, 2, 6, 3, 4, 7, 5, 8).reshape(
        batch, num_heads, row_groups * GROUP, col_groups * GROUP
    )
    row_skip, col_skip = rows[0] - row0 * GROUP, cols[0] - col0 * GROUP
    return keep[
        :, :, row_skip : row_skip + rows[1] - rows[0], col_skip : col_skip + cols[1] - cols[0]
    ]


def dropout_mask(
    seed: int | Tensor,
    dropout_p: float,
    shape: tuple[int, int, int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """The whole dropout mask of an attention call, for tests and for other implementations.

    Args:
        seed: the ``dropout_seed`` given to ``orchard::flash_attn_fwd``.
        dropout_p: probability of dropping a weight, in [0, 1].
        shape: (batch, query heads, query length, key length).

    Returns:
        bool tensor of that shape, True where a weight is kept. Kept weights are multiplied with
        `rescale(dropout_p)`.
    """
    batch, num_heads, q_len, kv_len = shape
    return keep_block(int(seed), dropout_p, batch, num_heads, (0, q_len), (0, kv_len), device)
