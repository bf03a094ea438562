"""Checks of the arguments of `flex_attention`: what is wrong, what came, and a remedy.

All of it reads shapes, dtypes and devices alone, and torch.compile traces through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.attention import flex_attention as pytorch
from torch.nn.attention.flex_attention import BlockMask

from ..arguments import autocast
from ..checks import DTYPES

OP = "orchard_ops.flex_attention"
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
    _check_operands(query, key, value)
    query, key, value = autocast(query, key, value)
    _check_sizes(query, key, value, enable_gqa)
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
    mask_mod = None
    if block_mask is not None:
        mask_mod = _check_mask(query, key, block_mask)
    if key.shape[0] != query.shape[0]:
        if key.shape[0] != 1 or block_mask is None:
            raise ValueError(
                f"{OP}: key and value must have query's batch size {query.shape[0]}, or 1 where "
                f"there is a block_mask for each sample of query; got {key.shape[0]}"
                + ("" if block_mask is not None else " and no block_mask")
            )
        key = key.expand(query.shape[0], -1, -1, -1)
        value = value.expand(query.shape[0], -1, -1, -1)
    if score_mod is pytorch._identity:
        score_mod = None
    has_blocks = block_mask is not None and block_mask.BLOCK_SIZE != (_NO_BLOCKS, _NO_BLOCKS)
    blocks = block_mask if has_blocks else None
    return FlexCall(query, key, value, score_mod, mask_mod, blocks, scale)


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor; got a {type(x).__name__}")
        if x.is_nested:
            raise TypeError(
                f"{OP}: {name} must be a dense tensor; got a nested one: pack the sequences into "
                "one and let mask_mod compare their document numbers"
            )
        if x.dim() != 4:
            raise ValueError(
                f"{OP}: {name} must be (batch, heads, length, head_dim); got shape {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{OP}: {name} must be float16, bfloat16, float32 or float64; got {x.dtype}"
            )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{OP}: query, key and value must have the same dtype; got {query.dtype}, {key.dtype} "
            f"and {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"{OP}: query, key and value must be on the same device; got {query.device}, "
            f"{key.device} and {value.device}"
        )


def _check_sizes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"{OP}: query and key must have the same head_dim; got {query.shape[3]} and "
            f"{key.shape[3]}"
        )
    if query.shape[3] == 0 or value.shape[3] == 0:
        raise ValueError(
            f"{OP}: head_dim must be at least 1; got {query.shape[3]} for query and key and "
            f"{value.shape[3]} for value"
        )
    for what, n in (("batch size", 0), ("number of heads", 1), ("length", 2)):
        if key.shape[n] != value.shape[n]:
            raise ValueError(
                f"{OP}: key and value must have the same {what}; got {key.shape[n]} and "
                f"{value.shape[n]}"
            )
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_heads != num_kv_heads:
        if not enable_gqa:
            raise ValueError(
                f"{OP}: query must have as many heads as key and value, or enable_gqa=True; got "
                f"{num_heads} and {num_kv_heads}"
            )
        if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
            raise ValueError(
                f"{OP}: the heads of query must be a multiple of those of key and value; got "
                f"{num_heads} and {num_kv_heads}"
            )


def _check_mask(query: Tensor, key: Tensor, block_mask: BlockMask) -> Callable[..., Any] | None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"{OP}: block_mask must be a torch.nn.attention.flex_attention.BlockMask or None; got "
            f"a {type(block_mask).__name__}: create_block_mask makes one of a mask_mod"
        )
    mask_mod = block_mask.mask_mod
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
        return mask_mod  # type: ignore[no-any-return]
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
    return mask_mod  # type: ignore[no-any-return]


def check_results(return_lse: bool, return_aux: Any) -> bool:
    """Whether lse is asked for, by either way."""
    if return_aux is None:
        return bool(return_lse)
    if return_lse:
        raise ValueError(
            f"{OP}: return_lse and return_aux were both given: pass "
            "return_aux=AuxRequest(lse=True) alone"
        )
    if return_aux.max_scores:
        raise NotImplementedError(
            f"{OP}: max_scores is not computed; got return_aux with max_scores=True: ask for lse, "
            "which is at least as large as the maximum and within log(kv_len) of it"
        )
    return bool(return_aux.lse)
