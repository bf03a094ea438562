"""Key ranges: which keys of a block its rows see, which rows see none, which keys nobody sees."""

from __future__ import annotations

import torch
from torch import Tensor

_OPEN = 1 << 42
"""A window this wide hides nothing; wider ones would overflow int64."""


class Ranges:
    """A call's key ranges, with its windows in them: a row sees [0, prefix) and [begin, end).

    All are int64 (1 or B, 1 or Hq, L), within the keys, and cost memory linear in L.
    """

    def __init__(self, key_ranges: Tensor, kv_len: int, window_left: int, window_right: int):
        begin, end, self.position, prefix = key_ranges.long().unbind(-1)
        if window_left >= 0:
            begin = torch.maximum(begin, self.position - min(window_left, _OPEN))
        if window_right >= 0:
            behind = self.position + (min(window_right, _OPEN) + 1)
            end, prefix = torch.minimum(end, behind), torch.minimum(prefix, behind)
        self.kv_len = kv_len
        self.begin, self.end, self.prefix = (x.clamp(0, kv_len) for x in (begin, end, prefix))

    def blind_rows(self) -> Tensor:
        """True for the rows that see no key: (1 or B, 1 or Hq, L)."""
        return (self.begin >= self.end) & (self.prefix <= 0)

    def unseen_keys(self) -> Tensor:
        """True for the keys that no row sees: (1 or B, 1 or Hq, S).

        Each interval adds 1 where it begins and takes 1 where it ends.
        """
        steps = self.begin.new_zeros((*self.begin.shape[:2], self.kv_len + 1))
        one = torch.ones_like(self.begin)
        for begin, end in (
            (self.begin, torch.maximum(self.begin, self.end)),
            (torch.zeros_like(self.prefix), self.prefix),
        ):
            steps.scatter_add_(-1, begin, one).scatter_add_(-1, end, -one)
        return steps.cumsum(-1)[..., : self.kv_len] == 0

    def hull(self, row0: int, row1: int) -> tuple[int, int]:
        """The keys, from the first to before the last, that any of the rows sees.

        All of them where the numbers lie on another device than the CPU: to look would wait.
        """
        if self.begin.device.type != "cpu":
            return 0, self.kv_len
        begin, end, prefix = (x[..., row0:row1] for x in (self.begin, self.end, self.prefix))
        sees = begin < end
        first = begin.masked_fill(~sees, self.kv_len).masked_fill(prefix > 0, 0).min()
        last = torch.maximum(end.masked_fill(~sees, 0), prefix).max()
        return min(int(first), int(last)), int(last)

    def hidden(self, row0: int, row1: int, col0: int, col1: int) -> Tensor:
        """True where a row does not see a key: (1 or B, 1 or Hq, rows, cols)."""
        rows = (x[..., row0:row1].unsqueeze(-1) for x in (self.begin, self.end, self.prefix))
        begin, end, prefix = rows
        j = torch.arange(col0, col1, device=self.begin.device)
        return (j >= prefix) & ((j < begin) | (j >= end))

    def distance(self, row0: int, row1: int, col0: int, col1: int) -> Tensor:
        """|position - j|: (1 or B, 1 or Hq, rows, cols)."""
        j = torch.arange(col0, col1, device=self.begin.device)
        return (self.position[..., row0:row1].unsqueeze(-1) - j).abs()
