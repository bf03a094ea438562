"""Packed queries and keys in pages: `flash_attn_varlen_func` with a block_table.

Few queries a sequence are padded to a batch, for the decode kernel, which reads pages where they
lie. Others stay packed: the pages of as many sequences as fit into GATHERED_BYTES are copied behind
one another, and the sequences are key ranges of that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import calls, checks
from .attention import run_with_lse
from .cache import MOST_QUERIES, CacheCall, gathered
from .cache_attention import attend, sequences_at_a_time, slices
from .key_ranges import OPEN
from .varlen import check_numbers, packed_call, unpacked_with_lse

_PAGES = "(pages, page_size, heads, head_dim)"


class PagedBatch(NamedTuple):
    """The sequences of a call."""

    op: str
    of_query: Tensor
    """(sequences + 1): where the queries of each begin."""
    of_key: Tensor
    """(sequences + 1): the same of keys, of which the lengths alone count."""
    longest_query: int
    longest_key: int
    table: Tensor
    """(sequences, pages) int32"""
    used: Tensor | None
    """(sequences) int32: keys of each, in place of what `of_key` says."""
    padding: Tensor | None

    def lengths(self) -> Tensor:
        """(sequences) int32: the keys of each, padding included."""
        if self.used is not None:
            return self.used
        lengths = self.of_key.diff()
        return lengths if lengths.dtype == torch.int32 else lengths.clamp(-1, OPEN).int()

    def breaks_promises(self) -> Tensor:
        """(sequences) bool: those that are longer than max_seqlen_q or max_seqlen_k say."""
        # A number beyond int32 would wrap around in a comparison with int32 tensors.
        most_queries, most_keys = (
            max(min(n, OPEN), -1) for n in (self.longest_query, self.longest_key)
        )
        return (self.of_query.diff() > most_queries) | (self.lengths() > most_keys)

    def check(self, q: Tensor, k: Tensor) -> None:
        """Waits for the device, and raises for numbers that no right program passes."""
        op, lengths = self.op, self.lengths()
        check_numbers(op, (self.of_query, self.of_key), (q.shape[0], None), self.used, self.padding)
        name = "cu_seqlens_k's lengths" if self.used is None else "seqused_k"
        checks.check_range(op, name, lengths, 0, k.shape[1] * self.table.shape[1])
        checks.check_pages(op, self.table, k.shape[1], k.shape[0], lengths)
        for name, of, longest in (
            ("max_seqlen_q", self.of_query.diff(), self.longest_query),
            ("max_seqlen_k", lengths, self.longest_key),
        ):
            if of.numel() and int(of.max()) > longest:
                raise ValueError(
                    f"{op}: {name} must be at least the longest sequence's {int(of.max())} beside "
                    f"a block_table; got {longest} (checked because ORCHARD_DEBUG is set)"
                )


def check_pages(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises for malformed operands: q (total, H, D), k and v (pages, page_size, Hk, D or Dv)."""
    for name, x in (("k", k), ("v", v)):
        checks.check_tensor(op, name, x)
        if x.dim() != 4:
            raise ValueError(
                f"{op}: {name} must be {_PAGES} beside a block_table; got shape {tuple(x.shape)}"
            )
    if k.shape[0] != v.shape[0]:
        raise ValueError(
            f"{op}: k and v must have as many pages; got {k.shape[0]} and {v.shape[0]}"
        )
    if k.shape[2] == 0 or k.shape[0] == 0:
        raise ValueError(f"{op}: k must have a page and a head; got shape {tuple(k.shape)}")
    checks.check_tensor(op, "q", q)
    if q.dim() != 3:
        raise ValueError(f"{op}: q must be (total, heads, head_dim); got shape {tuple(q.shape)}")
    given = ("q", q), ("k", k), ("v", v)
    checks.check_length_first(op, _PAGES, given, (q.unsqueeze(0), k, v))
    for name, x in given:
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{op}: attention to keys in pages has no gradient; got a {name} that requires "
                "grad: call it under torch.no_grad(), or pass packed keys without block_table"
            )


def attend_pages(
    batch: PagedBatch, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """out (total, Hq, Dv) and lse (Hq, total); options as `prepare` has them."""
    if batch.of_query.device != q.device:
        raise ValueError(
            f"{batch.op}: cu_seqlens must be on the device of the operands, {q.device}; got "
            f"{batch.of_query.device}"
        )
    if calls.looks_at_numbers(batch.of_query, batch.of_key, batch.table, batch.used, batch.padding):
        batch.check(q, k)
    if batch.table.shape[0] == 0 or q.shape[0] == 0:
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=lse_dtype)
        return q.new_zeros(*q.shape[:2], v.shape[3]), lse
    few = batch.longest_query <= MOST_QUERIES
    out, lse = (_as_batch if few else _packed)(batch, q, k, v, options)
    n, own = _sequences_of(batch, q.shape[0])
    out = out.masked_fill(~own[:, None, None], 0.0)
    lse = lse.masked_fill(~own, -math.inf)
    # A promise that does not hold must not pass for a result.
    broken = own & batch.breaks_promises()[n]
    return out.masked_fill(broken[:, None, None], math.nan), lse.masked_fill(broken, math.nan)


def _sequences_of(batch: PagedBatch, total: int) -> tuple[Tensor, Tensor]:
    """(total) twice: the sequence that each query is of, or of another, and whether it is of it."""
    i = torch.arange(total, device=batch.of_query.device)
    n = torch.searchsorted(batch.of_query.long().contiguous(), i, right=True) - 1
    last = batch.table.shape[0] - 1
    return n.clamp(0, last), (n >= 0) & (n <= last)


def _as_batch(
    batch: PagedBatch, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Each sequence's queries as the last of `rows`; what stands before them is not used."""
    rows, total = max(batch.longest_query, 1), q.shape[0]
    r = torch.arange(rows, device=q.device)
    tokens = batch.of_query[1:].long().unsqueeze(1) - rows + r
    scale = options["scale"]
    out, lse = attend(
        CacheCall(
            q[tokens.clamp(0, total - 1)].transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            cache_seqlens=batch.lengths(),
            cache_leftpad=batch.padding,
            block_table=batch.table,
            alibi_slopes=options["alibi_slopes"],
            scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
            window_left=options["window_left"],
            window_right=0 if options["is_causal"] else options["window_right"],
            softcap=options["softcap"],
        )
    )
    n, _ = _sequences_of(batch, total)
    row = torch.arange(total, device=q.device) - batch.of_query[n + 1].long() + rows
    row = row.clamp(0, rows - 1)
    return out.transpose(1, 2)[n, row], lse.transpose(1, 2)[n, row].T


def _packed(
    batch: PagedBatch, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The sum over slices of the sequences: a query is 0 in all but its own."""
    page_size, count = max(k.shape[1], 1), batch.table.shape[0]
    table = batch.table[:, : (max(batch.longest_key, 0) + page_size - 1) // page_size]
    capacity = page_size * table.shape[1]
    step = sequences_at_a_time(capacity, k.transpose(1, 2), v.transpose(1, 2))
    lengths, slopes = batch.lengths(), options["alibi_slopes"]
    results: tuple[Tensor, Tensor] | None = None
    for first, end in slices(count, step):
        rooms = torch.arange(end - first + 1, device=q.device) * capacity
        if slopes is not None and slopes.dim() == 2:
            options = options | {"alibi_slopes": slopes[first:end]}
        call = packed_call(
            batch.op,
            (q, *(gathered(x, table[first:end]).flatten(0, 1) for x in (k, v))),
            (batch.of_query[first : end + 1], rooms),
            None,
            lengths[first:end],
            None if batch.padding is None else batch.padding[first:end],
            **options,
        )
        out, lse = unpacked_with_lse(*run_with_lse(call))
        if results is None:
            results = out, lse
        else:
            results = results[0] + out, torch.maximum(results[1], lse)
    assert results is not None  # there are sequences
    return results
