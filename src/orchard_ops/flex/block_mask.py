"""From the lists of PyTorch's BlockMask to what the kernels read: a state for each block.

The lists are what counts: a block that is in neither is hidden, one of the full list is seen
whatever mask_mod says, and mask_mod is asked in the others alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .apart import apart
from .memory import ByMemory

HIDDEN, ASK, SEEN = 0, 1, 2
"""The states: no pair of the block is seen, mask_mod says which are, all are."""


def _marked(states: Tensor, num_blocks: Tensor, indices: Tensor, state: int) -> Tensor:
    """`states` with those of the listed blocks. Its last column takes what is no block."""
    nowhere = states.shape[-1] - 1
    rows = states.shape[-2]
    num_blocks, indices = num_blocks[..., :rows], indices[..., :rows, :]
    places = torch.arange(indices.shape[-1], device=indices.device)
    listed = (places < num_blocks[..., None]) & (indices >= 0) & (indices < nowhere)
    return states.scatter(-1, torch.where(listed, indices, nowhere).long(), state)


def block_states(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor | None,
    full_kv_indices: Tensor | None,
    q_blocks: int,
    kv_blocks: int,
) -> Tensor:
    """(batches, heads, q_blocks, kv_blocks) uint8, on the lists' device.

    The lists, (batches, heads, q_blocks[, columns]), are BlockMask's. Rows and columns beyond the
    blocks that are asked for are left out. Nothing waits for the device, and no shape depends on
    what the lists hold.
    """
    if kv_num_blocks.shape[-1] < q_blocks:
        raise ValueError(
            f"block_states: the lists have {kv_num_blocks.shape[-1]} blocks of queries; "
            f"got {q_blocks}: create the block mask for this length"
        )
    states = kv_indices.new_zeros(
        (*kv_num_blocks.shape[:-1], q_blocks, kv_blocks + 1), dtype=torch.int32
    )
    states = _marked(states, kv_num_blocks, kv_indices, ASK)
    if full_kv_num_blocks is not None and full_kv_indices is not None:
        states = _marked(states, full_kv_num_blocks, full_kv_indices, SEEN)
    return states[..., :kv_blocks].to(torch.uint8)


Lists = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
_known: ByMemory[Tensor] = ByMemory()


class Blocks(NamedTuple):
    """The lists of a BlockMask, and the sizes of a block."""

    lists: Lists
    """The partial blocks of each row of blocks, their number and which, and the full ones."""
    q_block: int
    kv_block: int

    @classmethod
    def of(cls, block_mask: BlockMask) -> Blocks:
        lists = (
            block_mask.kv_num_blocks,
            block_mask.kv_indices,
            block_mask.full_kv_num_blocks,
            block_mask.full_kv_indices,
        )
        return cls(lists, *block_mask.BLOCK_SIZE)

    def states(self, q_len: int, kv_len: int) -> Tensor:
        """`block_states` for these lengths, made once for the memory of the lists, and anew when
        that is written to."""
        q_blocks = (q_len + self.q_block - 1) // self.q_block
        kv_blocks = (kv_len + self.kv_block - 1) // self.kv_block

        def make() -> Tensor:
            with torch.inference_mode(False), apart():  # a later call may be trained
                return block_states(*self.lists, q_blocks, kv_blocks)

        if torch.compiler.is_compiling():
            return block_states(*self.lists, q_blocks, kv_blocks)
        given = [x for x in self.lists if x is not None]
        found = _known.find(given, (q_blocks, kv_blocks, len(given)), make)
        return block_states(*self.lists, q_blocks, kv_blocks) if found is None else found
