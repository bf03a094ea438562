"""Whether the lists of a BlockMask are those of its mask_mod: then the mask_mod alone says what is
seen, and the fixed kernels, which read no lists, may take the call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..key_ranges import KeyRanges
from .apart import apart
from .block_mask import ASK, HIDDEN, SEEN, Blocks
from .known import RangeRule
from .memory import ByMemory

_NUMBERS_AT_ONCE = 1 << 22
"""The judgement holds so many numbers of (row, block of keys) at a time."""


class Said(NamedTuple):
    """What a known mask_mod sees."""

    window_left: int
    window_right: int
    ranges: Tensor | None
    """Of `KeyRanges`."""
    source: Tensor | None
    """What the ranges were made of, with `number`; both tell them from others."""
    kind: str
    number: int

    @classmethod
    def of(
        cls, window_left: int, window_right: int, ranges: KeyRanges | None, rule: RangeRule | None
    ) -> Said:
        if ranges is None or rule is None:
            return cls(window_left, window_right, None, None, "", 0)
        return cls(window_left, window_right, ranges.tensor, rule.source, rule.kind, rule.number)


_judged: ByMemory[bool] = ByMemory()


def lists_follow(blocks: Blocks, said: Said, sizes: tuple[int, int, int, int]) -> bool:
    """Whether lists let every query of the call see what the mask_mod says.

    `sizes` are those of the scores, (B, Hq, L, S). That is found once for the present numbers of
    the lists and of what the mask_mod captured, by waiting for the device. False also where nothing
    tells of changes.
    """
    lists, *block_size = blocks
    given = [x for x in (*lists, said.source) if x is not None]
    numbers = (*block_size, *sizes, *said[:2], *said[4:], *(x is None for x in lists))

    def make() -> bool:
        with apart(), torch.no_grad():
            return _judge(blocks, said, sizes)

    return bool(_judged.find(given, numbers, make))


def _judge(blocks: Blocks, said: Said, sizes: tuple[int, ...]) -> bool:
    q_len, kv_len = sizes[2:]
    if 0 in sizes:
        return False
    lists, q_block, kv_block = blocks
    device = lists[0].device
    states = blocks.states(q_len, kv_len)
    first_keys = torch.arange(0, kv_len, kv_block, device=device)
    end_keys = (first_keys + kv_block).clamp(max=kv_len)
    leading = 1 if said.ranges is None else said.ranges[..., 0, 0].numel()
    step = max(1, _NUMBERS_AT_ONCE // (leading * len(first_keys) * q_block))
    same = torch.ones((), dtype=torch.bool, device=device)
    for first in range(0, states.shape[2], step):
        own = states[:, :, first : first + step]
        rows = torch.arange(own.shape[2] * q_block, device=device) + first * q_block
        # The last row stands for those behind it.
        seen = _seen_keys(said, rows.clamp(max=q_len - 1), first_keys, end_keys, kv_len)
        seen = seen.unflatten(2, (-1, q_block))
        hides_all = (seen == 0).all(3)
        sees_all = (seen == end_keys - first_keys).all(3)
        # Where the mask_mod is asked, it says what is seen whatever it is.
        agrees = (own == ASK) | ((own == HIDDEN) & hides_all) | ((own == SEEN) & sees_all)
        same &= agrees.all()
    return bool(same)


def _seen_keys(
    said: Said, rows: Tensor, first_keys: Tensor, end_keys: Tensor, kv_len: int
) -> Tensor:
    """(batches, heads, rows, blocks of keys): how many keys of a block a row sees."""
    if said.ranges is None:
        position = rows[None, None]
        begin, prefix = torch.zeros_like(position), torch.zeros_like(position)
        end = torch.full_like(position, kv_len)
    else:
        begin, end, position, prefix = said.ranges[:, :, rows].long().unbind(-1)
    if said.window_left >= 0:
        begin = torch.maximum(begin, position - said.window_left)
    if said.window_right >= 0:
        last = position + said.window_right + 1
        end, prefix = torch.minimum(end, last), torch.minimum(prefix, last)
    end = torch.maximum(begin, end)
    # The keys of the interval [begin, end), and those of the prefix that are before it or behind.
    return (
        _within(begin, end, first_keys, end_keys)
        + _within(torch.zeros_like(prefix), torch.minimum(prefix, begin), first_keys, end_keys)
        + _within(end, prefix, first_keys, end_keys)
    )


def _within(begin: Tensor, end: Tensor, first_keys: Tensor, end_keys: Tensor) -> Any:
    """How many numbers from `begin` to before `end` are keys of each block."""
    low = torch.maximum(begin.unsqueeze(-1), first_keys)
    high = torch.minimum(end.unsqueeze(-1), end_keys)
    return (high - low).clamp(min=0)
