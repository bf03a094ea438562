"""How attention to a cache runs: where the keys lie, or from rooms that their pages are copied to.

The decode kernel reads pages in place, if a block of its keys has one page. The forward kernel
knows one tensor of keys for each sequence. So pages are copied behind one another for it, for as
many sequences at a time as GATHERED_BYTES holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cache import MOST_QUERIES, PAGE_MULTIPLE, CacheCall
from .ops.schema import DECODE, FORWARD, public_lse
from .scoring import NO_BACKWARD

GATHERED_BYTES = 256 << 20
"""The memory of rooms at a time. Those of one sequence may take more."""


def attend(call: CacheCall) -> tuple[Tensor, Tensor]:
    """out and lse; as ``orchard::flash_attn_decode``, for any number of queries and any pages."""
    few = call.query.shape[2] <= MOST_QUERIES
    if few and reads_in_place(call.key, call.block_table):
        return DECODE(*call)
    run = DECODE if few else _forward
    if call.block_table is None and call.cache_batch_idx is None:
        return run(*call)
    call = call.without_unused_pages()
    batch = call.query.shape[0]
    step = sequences_at_a_time(call.capacity, call.key, call.value)
    if batch <= step:
        return run(*call.in_rooms())
    parts = [run(*call.of(first, end).in_rooms()) for first, end in slices(batch, step)]
    outs, lses = zip(*parts)
    return torch.cat(outs), torch.cat(lses)


def reads_in_place(key: Tensor, block_table: Tensor | None) -> bool:
    """Whether the decode kernel can read keys (entries, heads, keys of an entry, D) in place."""
    return block_table is None or key.shape[2] % PAGE_MULTIPLE == 0


def sequences_at_a_time(capacity: int, key: Tensor, value: Tensor) -> int:
    """How many rooms of `capacity` keys are made at a time; heads and widths lie in 1 and 3."""
    widths = key.shape[3] + value.shape[3]
    room = capacity * key.shape[1] * widths * key.element_size()
    return max(GATHERED_BYTES // max(room, 1), 1)


def slices(batch: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, batch, step):
        yield first, min(first + step, batch)


def _forward(*arguments: object) -> tuple[Tensor, Tensor]:
    query, key, value, scoring = CacheCall(*arguments).as_forward()  # type: ignore[arg-type]
    scoring = scoring._replace(key_span=NO_BACKWARD)
    out, row_stats = FORWARD(query, key, value, *scoring, arguments[-1])
    return out, public_lse(row_stats, scoring.unit)
