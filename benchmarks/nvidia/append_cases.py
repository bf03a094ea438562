"""What is written into caches by the Metal kernels, and what they must hold then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cache_cases import entries_of, room
from .caches import Append, Places
from .cases import DTYPES

_LONGEST = 1 << 17


@dataclass(frozen=True)
class AppendCase:
    """New keys behind those that sequences have; every other slot of the cache is NaN."""

    dtype: torch.dtype
    width: int = 64
    num_kv_heads: int = 2
    new: int = 5
    lengths: tuple[int, ...] = (0, 123, 1024, 1020, 7)
    capacity: int = 1024
    layout: str = "tokens"
    page_size: int = 0
    entries: tuple[int, ...] = ()
    offset: int = 0
    nowhere: bool = False  # whether one sequence's table has pages that do not exist

    device = "cuda"

    def __str__(self) -> str:
        parts = [
            str(self.dtype).removeprefix("torch."),
            f"{self.new} keys behind {', '.join(map(str, self.lengths))} of {self.capacity}",
            f"H{self.num_kv_heads} D{self.width} {self.layout}",
        ]
        parts += [f"pages of {self.page_size}"] * bool(self.page_size)
        parts += [f"cache_batch_idx {', '.join(map(str, self.entries))}"] * bool(self.entries)
        parts += [f"offset {self.offset}"] * bool(self.offset)
        parts += ["pages that do not exist"] * self.nowhere
        return " ".join(parts)

    def but(self, **changes: object) -> AppendCase:
        return replace(self, **changes)

    def shaped(self) -> Append:
        """The call without operands, for the plan."""
        return _OnMeta(**vars(self)).call()

    def call(self) -> Append:
        batch = len(self.lengths)
        generator = None
        if self.device != "meta":
            generator = torch.Generator(self.device).manual_seed(3)
        shape = (batch, self.new, self.num_kv_heads, self.width)
        on = {"dtype": self.dtype, "device": self.device}
        added = torch.randn(shape, generator=generator, **on).transpose(1, 2)
        entries, keys = batch + 1, self.capacity
        table = None
        if self.page_size:
            pages, keys = self.capacity // self.page_size, self.page_size
            entries = batch * pages + 3
            order = torch.randperm(entries, generator=torch.Generator().manual_seed(2))
            table = order[: batch * pages].view(batch, pages).int()
            if self.nowhere:
                table[1] = entries
                table[-1] = -1
            table = table.to(self.device)
        elif not self.entries:
            entries = batch
        cache = room((entries, self.num_kv_heads, keys, self.width), self.layout, **on)
        integers = {"dtype": torch.int32, "device": self.device}
        places = Places(
            torch.tensor(self.lengths, **integers),
            entries=torch.tensor(self.entries, **integers) if self.entries else None,
            table=table,
        )
        return Append(added, cache, places, self.offset)

    def check(self, call: Append) -> None:
        """The new keys lie where they belong, and all else is as it was.

        Raises:
            AssertionError: to the bit.
        """
        entries, keys = call.cache.shape[0], call.cache.shape[2]
        shape = (entries, self.num_kv_heads, keys, self.width)
        right = room(shape, self.layout, self.dtype, self.device)
        for b, length in enumerate(self.lengths):
            first = min(max(length, 0), self.capacity) + self.offset
            count = min(max(self.capacity - first, 0), self.new)
            slots = torch.arange(first, first + count, device=self.device)
            found = entries_of(slots, b, call.places, keys)
            exists = (found[0] >= 0) & (found[0] < entries)
            rows = call.added[b, :, :count].transpose(0, 1)
            right[found[0][exists], :, found[1][exists]] = rows[exists]
        got, expected = (_whole(x).view(torch.uint8) for x in (call.cache, right))
        if not torch.equal(got, expected):
            wrong = int((got != expected).sum())
            raise AssertionError(f"{wrong} bytes of the cache are not what they should be")


class _OnMeta(AppendCase):
    device = "meta"


def _whole(x: Tensor) -> Tensor:
    """All of the memory that a view is of."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def appends() -> Iterator[AppendCase]:
    for dtype in DTYPES:
        base = AppendCase(dtype)
        yield base
        yield base.but(layout="heads", width=128, new=1)
        yield base.but(page_size=16, new=300, num_kv_heads=8)
        yield base.but(page_size=48, capacity=1008, offset=2, nowhere=True)
        yield base.but(entries=(3, 0, 5, 2, 6), new=40)  # the cache has no entry 6
        yield base.but(layout="every second column", width=61)
        yield base.but(layout="odd rows", page_size=64, width=96)
        yield base.but(lengths=(1 << 30, -4, 1023, 0, 512), new=3)
    yield AppendCase(torch.float16, 128, 8, lengths=(_LONGEST - 9,), capacity=_LONGEST, new=9)
