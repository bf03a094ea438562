"""Checks of the arguments of `flex_attention`: what is wrong, what came, and a remedy.

All of it reads shapes, dtypes and devices alone, and torch.compile traces through it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as pytorch
from torch.nn.attention.flex_attention import BlockMask

from ..arguments import autocast
from ..checks import LARGEST_FLOAT32, check_kinds, check_problem

OP = "orchard_ops.flex_attention"
_REAL = (float, int, torch.SymFloat, torch.SymInt, numbers.Real)
_NO_BLOCKS = pytorch._LARGE_SPARSE_BLOCK_SIZE
"""The block size of masks that have one block for everything."""


class FlexCall(NamedTuple):
    """A call that has been checked."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: Callable[..., Any] | None
    mask_mod: Callable[..., Any] | None
    block_mask: BlockMask | None
    """None also where the mask has one block for everything."""
    scale: float


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None,
    block_mask: BlockMask | None,
    scale: float | None,
    enable_gqa: bool,
) -> FlexCall:
    """The call in its parts; see `flex_attention` for what it raises."""
    check_kinds(OP, query, key, value)
    query, key, value = autocast(query, key, value)
    if all(x.dim() == 4 for x in (query, key, value)):
        key, value = _for_each_sample(query, key, value, block_mask)
    check_problem(OP, query, key, value)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"{OP}: query must have as many heads as key and value, or enable_gqa=True; got "
            f"{query.shape[1]} and {key.shape[1]}"
        )
    if score_mod is not None and not callable(score_mod):
        raise TypeError(
            f"{OP}: score_mod must be a function (score, b, h, q_idx, kv_idx) or None; got a "
            f"{type(score_mod).__name__}"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[3])
    elif isinstance(scale, Tensor):
        raise TypeError(
            f"{OP}: scale must be a number or None; got a tensor: multiply query by it and pass "
            "scale=1.0"
        )
    elif isinstance(scale, bool) or not isinstance(scale, _REAL):
        raise TypeError(
            f"{OP}: scale must be a number or None; got a {type(scale).__name__}, {scale!r}: None "
            "is 1 / sqrt(head_dim)"
        )
    elif not abs(scale) <= LARGEST_FLOAT32:
        raise ValueError(
            f"{OP}: scale must be finite in float32; got {scale}: None is 1 / sqrt(head_dim)"
        )
    mask_mod = None
    if block_mask is not None:
        mask_mod = _check_mask(query, key, block_mask)
    if score_mod is pytorch._identity:
        score_mod = None
    has_blocks = block_mask is not None and block_mask.BLOCK_SIZE != (_NO_BLOCKS, _NO_BLOCKS)
    blocks = block_mask if has_blocks else None
    return FlexCall(query, key, value, score_mod, mask_mod, blocks, scale)


def _for_each_sample(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Any
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sample serve every query, where there is a block_mask."""
    batch, kv_batch = query.shape[0], key.shape[0]
    if kv_batch != 1 or value.shape[0] != 1 or batch == 1:
        return key, value
    if block_mask is None:
        raise ValueError(
            f"{OP}: key and value must have query's batch size {batch}, or 1 where there is a "
            f"block_mask for each sample of query; got {kv_batch} and no block_mask"
        )
    return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)


def _check_mask(query: Tensor, key: Tensor, block_mask: BlockMask) -> Callable[..., Any] | None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"{OP}: block_mask must be a torch.nn.attention.flex_attention.BlockMask or None; got "
            f"a {type(block_mask).__name__}: create_block_mask makes one of a mask_mod"
        )
    mask_mod: Callable[..., Any] | None = block_mask.mask_mod
    if mask_mod is pytorch._sliced_mask_mod_error:
        raise ValueError(
            f"{OP}: block_mask was sliced, and its mask_mod does not know the new positions: set "
            "block_mask.mask_mod to one that adds the offset"
        )
    if mask_mod is pytorch.noop_mask:
        mask_mod = None
    numbers = block_mask.kv_num_blocks
    if numbers.device != query.device:
        raise ValueError(
            f"{OP}: block_mask must be on query's device {query.device}; got {numbers.device}: "
            f'move it with block_mask.to("{query.device}")'
        )
    if block_mask.BLOCK_SIZE == (_NO_BLOCKS, _NO_BLOCKS):
        return mask_mod
    q_len, kv_len = block_mask.seq_lengths
    if q_len != query.shape[2] or kv_len != key.shape[2]:
        raise ValueError(
            f"{OP}: block_mask was made for {q_len} queries and {kv_len} keys; got "
            f"{query.shape[2]} and {key.shape[2]}: make one for these lengths with "
            "create_block_mask, or crop a longer one with block_mask._adjust(q_len, kv_len)"
        )
    for what, n in (("batch size", 0), ("number of heads", 1)):
        if numbers.shape[n] != 1 and numbers.shape[n] != query.shape[n]:
            raise ValueError(
                f"{OP}: the {what} of block_mask must be 1 or query's {query.shape[n]}; got "
                f"{numbers.shape[n]}"
            )
    return mask_mod


def check_results(return_lse: bool, return_aux: Any) -> tuple[bool, bool]:
    """Whether lse is asked for, by either way, and max_scores."""
    if return_aux is None:
        return bool(return_lse), False
    if return_lse:
        raise ValueError(
            f"{OP}: return_lse and return_aux were both given: pass "
            "return_aux=AuxRequest(lse=True) alone"
        )
    return bool(return_aux.lse), bool(return_aux.max_scores)


def check_options(kernel_options: Any) -> None:
    if kernel_options is not None and not isinstance(kernel_options, Mapping):
        raise TypeError(
            f"{OP}: kernel_options must be a dict or None; got a {type(kernel_options).__name__}"
        )
