"""From the lists of BlockMask to states of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from orchard_ops.flex import block_mask
from orchard_ops.flex.block_mask import ASK, HIDDEN, SEEN, Blocks, block_states


def states_of(mask: BlockMask, q_len: int, kv_len: int) -> Tensor:
    return Blocks.of(mask).states(q_len, kv_len)


def states_by_hand(mask: BlockMask, rows: int, cols: int) -> Tensor:
    states = torch.full((*mask.kv_num_blocks.shape[:2], rows, cols), HIDDEN, dtype=torch.uint8)
    lists = ((ASK, mask.kv_num_blocks, mask.kv_indices),
             (SEEN, mask.full_kv_num_blocks, mask.full_kv_indices))  # fmt: skip
    for state, numbers, indices in lists:
        if numbers is None:
            continue
        for b, h, row in torch.cartesian_prod(*map(torch.arange, states.shape[:3])).tolist():
            for n in range(int(numbers[b, h, row])):
                states[b, h, row, int(indices[b, h, row, n])] = state
    return states


MODS = {
    "causal": lambda b, h, q, kv: q >= kv,
    "window": lambda b, h, q, kv: (q - kv).abs() < 100,
    "by batch": lambda b, h, q, kv: q >= kv + 200 * b,
    "by head": lambda b, h, q, kv: (q // 64 + kv // 64) % (h + 2) == 0,
    "everything": lambda b, h, q, kv: q >= 0,
}


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("block", (128, (64, 96)))
@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_states_are_what_the_lists_say(name: str, block: int | tuple[int, int], device: str):
    mask = create_block_mask(MODS[name], 2, 3, 400, 500, device="cpu", BLOCK_SIZE=block)
    block_q, block_kv = mask.BLOCK_SIZE
    rows, cols = -(-400 // block_q), -(-500 // block_kv)
    expected = states_by_hand(mask, rows, cols)
    states = states_of(mask.to(device), 400, 500)
    assert states.dtype == torch.uint8 and states.device.type == device
    assert torch.equal(states.cpu(), expected)


def test_full_blocks_without_partial_ones_and_the_other_way_round():
    mask = create_block_mask(MODS["causal"], 1, 1, 256, 256, device="cpu")
    lists = (mask.full_kv_num_blocks, mask.full_kv_indices)
    assert block_states(*lists, None, None, 2, 2).tolist() == [[[[0, 0], [1, 0]]]]
    of_both = block_states(*lists, *lists, 2, 2)
    assert of_both.tolist() == [[[[0, 0], [2, 0]]]]


def test_what_lies_beyond_the_lengths_is_left_out():
    mask = create_block_mask(MODS["causal"], 1, 1, 512, 512, device="cpu")
    assert states_of(mask, 300, 200).shape == (1, 1, 3, 2)
    assert torch.equal(states_of(mask, 300, 200), states_of(mask, 512, 512)[:, :, :3, :2])


def test_lists_that_are_too_short():
    mask = create_block_mask(MODS["causal"], 1, 1, 256, 256, device="cpu")
    with pytest.raises(ValueError, match="the lists have 2 blocks of queries; got 3"):
        states_of(mask, 300, 256)


def test_entries_behind_a_list_count_for_nothing():
    """Their indices may be anything, also no block at all."""
    numbers = torch.tensor([[[1, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0, -7], [99, 2, 0]]]], dtype=torch.int32)
    assert block_states(numbers, indices, None, None, 2, 3).tolist() == [[[[0, 1, 0], [0, 0, 0]]]]


def test_states_are_kept_while_the_lists_are_the_same():
    mask = create_block_mask(MODS["causal"], 1, 1, 256, 256, device="cpu")
    states = states_of(mask, 256, 256)
    assert states_of(mask, 256, 256) is states
    assert states_of(mask, 250, 100) is not states
    states = states_of(mask, 256, 256)
    mask.kv_num_blocks[0, 0, 0] = 0  # in place
    changed = states_of(mask, 256, 256)
    assert changed[0, 0, 0, 0] == HIDDEN and states[0, 0, 0, 0] == ASK
    mask.kv_num_blocks = mask.kv_num_blocks.clone()
    assert states_of(mask, 256, 256) is not changed
    other = len(block_mask._known)
    del mask
    assert len(block_mask._known) == other - 1


def test_nothing_waits_for_the_device():
    import simulator

    mask = create_block_mask(MODS["window"], 1, 1, 512, 512, device="cpu").to("mps")
    before = simulator.waits().total
    states_of(mask, 512, 512)
    assert simulator.waits().total == before
