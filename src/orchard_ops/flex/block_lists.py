"""Whether the lists of a BlockMask are those of its mask_mod."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conditions import arguments_of
from .trace import Traced


class _Followed(NamedTuple):
    """What was found for a BlockMask, and for which tensors."""

    tensors: tuple[weakref.ref[Tensor], ...]
    numbers: tuple[Any, ...]
    verdict: bool

    def has(self, tensors: Sequence[Tensor]) -> bool:
        same = [known() is x for known, x in zip(self.tensors, tensors)]
        return len(self.tensors) == len(tensors) and all(same)


_followed: weakref.WeakKeyDictionary[Any, _Followed] = weakref.WeakKeyDictionary()


def lists_follow(block_mask: Any, mask: Traced, captures: Sequence[Tensor], query: Tensor) -> bool:
    """Whether a BlockMask sees what its mask_mod says, for each of the query's batches and heads.

    Its lists are made anew and compared, once for each object, the present numbers of the lists and
    of what the mask_mod captured: that waits for the device. A BlockMask of other lists than
    `create_block_mask` makes means what they say.
    """
    b, h = arguments_of(mask)[:2]
    for node, lists, present in zip((b, h), block_mask.kv_num_blocks.shape, query.shape):
        if node.users and lists != present:
            return False
    tensors = (*_lists(block_mask), *captures)
    numbers = (
        tuple(x._version for x in tensors),
        tuple(block_mask.seq_lengths),
        tuple(block_mask.BLOCK_SIZE),
    )
    known = _followed.get(block_mask)
    if known is None or known.numbers != numbers or not known.has(tensors):
        verdict = _follow(block_mask)
        known = _Followed(tuple(map(weakref.ref, tensors)), numbers, verdict)
        _followed[block_mask] = known
    return known.verdict


def _lists(block_mask: Any) -> Iterator[Tensor]:
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        found = getattr(block_mask, name)
        if found is not None:
            yield found


def _follow(block_mask: Any) -> bool:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads = block_mask.kv_num_blocks.shape[:2]
    q_len, kv_len = block_mask.seq_lengths
    anew = create_block_mask(
        block_mask.mask_mod,
        *(batch, heads, q_len, kv_len),
        device=block_mask.kv_num_blocks.device,
        BLOCK_SIZE=tuple(block_mask.BLOCK_SIZE),
    )
    for own, other in zip(_listed(block_mask), _listed(anew)):
        if own.shape != other.shape or not torch.equal(own, other):
            return False
    return True


def _listed(block_mask: Any) -> tuple[Tensor, Tensor]:
    """Which blocks are listed, and which as full: (B, H, blocks of queries, blocks of keys)."""
    partial = _dense(block_mask.kv_num_blocks, block_mask.kv_indices)
    if block_mask.full_kv_num_blocks is None:
        return partial, torch.zeros_like(partial)
    full = _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return partial | full, full


def _dense(counts: Tensor, indices: Tensor) -> Tensor:
    blocks = indices.shape[-1]
    is_listed = torch.arange(blocks, device=indices.device) < counts.unsqueeze(-1)
    places = torch.where(is_listed, indices.long(), blocks)
    dense = torch.zeros((*indices.shape[:-1], blocks + 1), dtype=torch.bool, device=indices.device)
    return dense.scatter_(-1, places, True)[..., :blocks]
