"""Whether the lists of a BlockMask are those of its mask_mod: then the mask_mod alone says what is
seen, and the fixed kernels, which read no lists, may take the call.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .block_mask import ASK, lists_of, states_of, versions_of
from .conditions import arguments_of, is_read
from .traces import Kept, Use, apart

MOST_PAIRS = 1 << 28
"""Masks of more pairs, over their batches and heads, are not judged: the mask_mod is asked for each
pair once, as by `create_block_mask`, which the maker of a longer mask may have avoided."""
_PAIRS_AT_ONCE = 1 << 24


class _Judged(NamedTuple):
    """What was found for a BlockMask, and for which mask_mod and tensors."""

    kept: Kept | None
    tensors: tuple[weakref.ref[Tensor], ...]
    numbers: tuple[Any, ...]
    verdict: bool

    def is_of(self, kept: Kept | None, tensors: Sequence[Tensor], numbers: tuple[Any, ...]) -> bool:
        if self.kept is not kept or self.numbers != numbers or len(self.tensors) != len(tensors):
            return False
        return all(known() is x for known, x in zip(self.tensors, tensors))


_judged: weakref.WeakKeyDictionary[BlockMask, _Judged] = weakref.WeakKeyDictionary()


def lists_follow(block_mask: BlockMask, mask: Use | None, query: Tensor) -> bool:
    """Whether a BlockMask sees what its mask_mod says, for each of the query's batches and heads.

    The mask_mod is asked for every pair of a query and a key, once for each object, the present
    numbers of its lists and of what the mask_mod captured. That waits for the device. A BlockMask
    of other lists than `create_block_mask` makes means what they say.

    False also where that may not be asked: a compiler or a transform is at work, nothing tells
    whether a tensor or the mask_mod has changed, or the mask has more than MOST_PAIRS.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    kept, captures = (None, ()) if mask is None else (mask.kept, mask.captures)
    if kept is not None:
        if not kept.lasts:
            return False
        indices = arguments_of(kept.traced)[:2]
        for node, lists, present in zip(indices, block_mask.kv_num_blocks.shape, query.shape):
            if is_read(node) and lists != present:
                return False
    tensors = (*(x for x in lists_of(block_mask) if x is not None), *captures)
    versions = versions_of(tensors)
    if versions is None:
        return False
    q_block, kv_block = block_mask.BLOCK_SIZE
    numbers = (*versions, *block_mask.seq_lengths, q_block, kv_block)
    judged = _judged.get(block_mask)
    if judged is None or not judged.is_of(kept, tensors, numbers):
        with apart(), torch.no_grad():
            verdict = _judge(block_mask)
        judged = _Judged(kept, tuple(map(weakref.ref, tensors)), numbers, verdict)
        _judged[block_mask] = judged
    return judged.verdict


def _judge(block_mask: BlockMask) -> bool:
    q_len, kv_len = block_mask.seq_lengths
    q_block, _ = block_mask.BLOCK_SIZE
    states = states_of(block_mask, q_len, kv_len)
    batches, heads, q_blocks, _ = states.shape
    if 0 in (q_len, kv_len) or math.prod((batches, heads, q_len, kv_len)) > MOST_PAIRS:
        return False
    same = torch.ones((), dtype=torch.bool, device=states.device)
    step = max(1, _PAIRS_AT_ONCE // (batches * heads * kv_len * q_block))
    for first in range(0, q_blocks, step):
        own = states[:, :, first : first + step]
        true = _states_of_mod(block_mask, first * q_block, (first + step) * q_block)
        # Where the mask_mod is asked, it says what is seen whatever it is.
        same &= ((own == true) | (own == ASK)).all()
    return bool(same)


def _states_of_mod(block_mask: BlockMask, begin: int, end: int) -> Tensor:
    """The states that `create_block_mask` gives the blocks of queries from begin to end."""
    batches, heads = block_mask.kv_num_blocks.shape[:2]
    q_len, kv_len = block_mask.seq_lengths
    mask_mod, rows = block_mask.mask_mod, min(end, q_len) - begin

    def shifted(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx + begin, kv_idx)

    anew = create_block_mask(
        shifted,
        *(batches, heads, rows, kv_len),
        device=str(block_mask.kv_num_blocks.device),
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
    )
    return states_of(anew, rows, kv_len)
