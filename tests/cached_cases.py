"""Caches of keys and values, and a mathematics of attention to them that the tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orchard_ops.cache import CacheCall
from orchard_ops.testing import assert_no_worse_than_math, math_attention

NAN = float("nan")


@dataclass(frozen=True)
class Cached:
    """One problem: sequences with the keys [starts, lengths) of their rooms, the rest is NaN."""

    lengths: Sequence[int] = (130, 77)
    starts: Sequence[int] | None = None
    heads: tuple[int, int] = (4, 2)
    q_len: int = 1
    widths: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.float32
    capacity: int = 208
    page_size: int = 0
    """0: each sequence has a room of its own."""
    table: Sequence[Sequence[int]] = ()
    """The pages of each sequence, where it is not a random one."""
    added: int = 0
    """Of the lengths, what is not in cache_seqlens."""
    entries: Sequence[int] = ()
    """Those that the sequences have, of two more than there are sequences."""
    alibi: str = ""
    sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, Hq, L, D), k and v (B, Hkv, capacity, D or Dv), all of them numbers."""
        generator = torch.Generator().manual_seed(1)
        (heads, kv_heads), (width, value_width) = self.heads, self.widths
        batch = len(self.lengths)

        def draw(length: int, heads: int, width: int) -> Tensor:
            x = torch.randn(batch, length, heads, width, generator=generator)
            return x.to(self.dtype).transpose(1, 2)

        return (
            draw(self.q_len, heads, width),
            draw(self.capacity, kv_heads, width),
            draw(self.capacity, kv_heads, value_width),
        )

    def call(self, garbage: float = NAN, impl: str = "auto") -> CacheCall:
        """The op's arguments, with `garbage` in every slot that no sequence uses."""
        q, k, v = self.rows()
        batch = len(self.lengths)
        starts = self.starts or [0] * batch
        slots = torch.arange(self.capacity).view(1, 1, -1, 1)
        lengths, begins = (torch.tensor(x, dtype=torch.int32) for x in (self.lengths, starts))
        unused = (slots < begins.view(-1, 1, 1, 1)) | (slots >= lengths.view(-1, 1, 1, 1))
        k, v = (x.masked_fill(unused, garbage) for x in (k, v))
        table = entries = None
        generator = torch.Generator().manual_seed(2)
        if self.page_size:
            pages = self.capacity // self.page_size
            order = torch.randperm(batch * pages + 3, generator=generator)
            table = order[: batch * pages].view(batch, pages).int()
            if self.table:
                table = torch.tensor(self.table, dtype=torch.int32)
            k, v = (_in_pages(x, table, self.page_size, garbage) for x in (k, v))
        elif self.entries:
            entries = torch.tensor(self.entries, dtype=torch.int32)
            k, v = (_in_entries(x, entries, garbage) for x in (k, v))
        slopes = sinks = None
        if self.alibi:
            shape = (batch, self.heads[0]) if self.alibi == "batch" else self.heads[:1]
            slopes = torch.rand(shape, generator=generator)
        if self.sinks:
            sinks = torch.randn(self.heads[0], generator=generator)
        return CacheCall(
            q,
            k,
            v,
            cache_seqlens=lengths - self.added,
            cache_batch_idx=entries,
            cache_leftpad=None if self.starts is None else begins,
            block_table=table,
            added=self.added,
            alibi_slopes=slopes,
            sinks=sinks,
            impl=impl,
            **{"scale": self.widths[0] ** -0.5, **self.options},
        )

    def math(self, dtype: torch.dtype) -> list[Any]:
        """For each sequence alone, from its keys alone."""
        q, k, v = self.rows()
        call = self.call()
        results = []
        for b, length in enumerate(self.lengths):
            start = 0 if self.starts is None else self.starts[b]
            slopes = call.alibi_slopes
            results.append(
                math_attention(
                    q[b : b + 1],
                    k[b : b + 1, :, start:length],
                    v[b : b + 1, :, start:length],
                    torch.zeros(1, self.heads[0], self.q_len, self.widths[1]),
                    dtype=dtype,
                    scale=call.scale,
                    window_left=call.window_left,
                    window_right=call.window_right,
                    diagonal=length - start - self.q_len,
                    softcap=call.softcap,
                    alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
                    sinks=call.sinks,
                )
            )
        return results

    def check(self, out: Tensor, lse: Tensor) -> None:
        """Applies the rule of the other kernels, sequence by sequence."""
        exact, eager = self.math(torch.float64), self.math(self.dtype)
        for b, (right, unfused) in enumerate(zip(exact, eager)):
            for name, x in (("out", out), ("lse", lse)):
                assert_no_worse_than_math(
                    f"sequence {b}: {name}",
                    x[b : b + 1],
                    getattr(right, name),
                    getattr(unfused, name),
                    2.0,
                    right.rounding(name, self.dtype),
                    right.rounded_weights(name, self.dtype),
                )


def _in_pages(x: Tensor, table: Tensor, page_size: int, garbage: float) -> Tensor:
    """(pages, Hkv, page_size, D), as a view of a cache with the heads behind the keys."""
    batch, heads, _, width = x.shape
    cache = x.new_full((int(table.numel()) + 3, page_size, heads, width), garbage)
    by_page = x.transpose(1, 2).unflatten(1, (-1, page_size))
    for b in range(batch):
        cache[table[b].long()] = by_page[b]
    return cache.transpose(1, 2)


def _in_entries(x: Tensor, entries: Tensor, garbage: float) -> Tensor:
    batch, heads, length, width = x.shape
    cache = x.new_full((batch + 2, length, heads, width), garbage)
    cache[entries.long()] = x.transpose(1, 2)
    return cache.transpose(1, 2)


def on(device: str, call: CacheCall) -> CacheCall:
    return CacheCall._make(x.to(device) if isinstance(x, Tensor) else x for x in call)


def decode(call: CacheCall) -> tuple[Tensor, Tensor]:
    """out and lse, on the CPU."""
    out, lse = torch.ops.orchard.flash_attn_decode(*call)
    return out.cpu(), lse.cpu()


def on_metal(problem: Cached, garbage: float = NAN) -> tuple[Tensor, Tensor]:
    return decode(on("mps", problem.call(garbage, "metal")))
