"""`flash_attn_varlen`: sequences of different lengths, packed one behind another, in one call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import calls, checks
from .arguments import Call, prepare
from .attention import run, run_with_lse
from .key_ranges import INTEGERS, OPEN, KeyRanges, check_cu_seqlens

_OP = "orchard_ops.flash_attn_varlen"
PACKED = "(total, heads, head_dim)"


def flash_attn_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of several sequences that are packed one behind another.

    One call of the op with key ranges (`KeyRanges.from_cu_seqlens`): no loop over the sequences, no
    copy, no padding, no wait for the device. A model of many layers makes the ranges once and
    passes them to `flash_attn`.

    Args:
        query: (total_q, Hq, D) float16, bfloat16, float32 (or float64, on the reference): the
            tokens of all sequences; any strides.
        key: (total_k, Hkv, D); query head h uses key head h // (Hq / Hkv).
        value: (total_k, Hkv, Dv).
        cu_seqlens_q: (sequences + 1) int32 or int64 on query's device: sequence n has the queries
            from cu_seqlens_q[n] to before cu_seqlens_q[n + 1]. Sequences may be empty. Queries
            outside of all are 0 and get no gradient.
        cu_seqlens_k: the same of the keys; by default those of the queries.
        max_seqlen_q, max_seqlen_k: the longest sequence. Not needed. Where cu_seqlens_k is not
            given, max_seqlen_k, or max_seqlen_q, says how much memory makes the backward faster
            (docs/packed-batches.md); a number too small costs time, not the result.
        dropout_p: as in `flash_attn`; the mask counts queries and keys of the packed tensors, and
            where alibi_slopes differ between sequences, the sequence's number too.
        is_causal: a query sees the keys of its sequence up to its own place, where the last query
            of a sequence is at its last key (aligned at the bottom right, also where the sequence
            has more keys than queries, or fewer).
        scale: factor on the scores; 1 / sqrt(D) by default.
        window_left, window_right: keys before and behind a query's place that it sees; -1 is open.
        softcap: c > 0 replaces a score s by c * tanh(s / c).
        alibi_slopes: (Hq) or (1, Hq); -slope * |place - j| is added to the scores. (sequences, Hq)
            for slopes that differ between sequences: memory and launches grow with the number of
            sequences then (docs/packed-batches.md). No gradient.
        sinks: (Hq); a logit per head that takes probability and has no value. May require grad.
        seqused_k: (sequences) int32 or int64: how many of a sequence's keys there are, from its
            first place on; the last query stands at the last of them. Places behind them may hold
            anything, and get no gradient. All by default.
        leftpad_k: (sequences): how many of these, from the first on, are padding.
        return_lse: also return the logarithm of the softmax's denominator.
        impl: as in `flash_attn`.

    Returns:
        out (total_q, Hq, Dv) in the query's dtype and stride order. With return_lse also lse
        (Hq, total_q) float32, natural logarithm; of a query that sees no key it is -inf, or the
        head's sink where there are sinks. Differentiable.

    Raises:
        ValueError, TypeError: a malformed call. The numbers in cu_seqlens, seqused_k and leftpad_k
            are looked at with ORCHARD_DEBUG=1 alone, which waits for the device.
        NotImplementedError: alibi_slopes that require grad.
        RuntimeError: as `flash_attn`.

    Reference: T. Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691.
    """
    named = (("query", query), ("key", key), ("value", value))
    operands = (query, key, value)
    checks.check_length_first(_OP, PACKED, named, operands, ("query", "key", "value"))
    try:
        call = packed_call(
            _OP,
            operands,
            (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k),
            max_seqlen_q if max_seqlen_k is None else max_seqlen_k,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            seqused_k=seqused_k,
            leftpad_k=leftpad_k,
            impl=impl,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("orchard::flash_attn:", f"{_OP}:", 1)) from None
    if not return_lse:
        return unpacked(run(call))
    return unpacked_with_lse(*run_with_lse(call))


def check_longest(op: str, max_seqlen: object) -> None:
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, INTEGERS):
        raise TypeError(
            f"{op}: the longest sequence must be an integer; got "
            f"{'a tensor: pass int(x)' if isinstance(max_seqlen, Tensor) else repr(max_seqlen)}"
        )


def packed_call(
    op: str,
    operands: Sequence[Tensor],
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlen: int | Tensor | None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    **options: object,
) -> Call:
    """The call of the op for packed operands (total, H, D), as one batch of views."""
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in operands)
    if isinstance(max_seqlen, Tensor):
        max_seqlen = None  # it would have to be waited for, and is no more than a hint
    if max_seqlen is not None:
        check_longest(op, max_seqlen)
    of_query, of_key = cu_seqlens
    check_cu_seqlens(op, of_query, of_key)
    if of_query.device != query.device:
        raise ValueError(
            f"{op}: cu_seqlens must be on the device of the operands, {query.device}; got "
            f"{of_query.device}"
        )
    count = of_query.shape[0] - 1
    used = checks.sequence_integers(op, "seqused_k", seqused_k, count, query)
    padding = checks.sequence_integers(op, "leftpad_k", leftpad_k, count, query)
    if calls.looks_at_numbers(of_query, of_key, used, padding):
        check_numbers(op, cu_seqlens, (query.shape[2], key.shape[2]), used, padding)
    ranges = KeyRanges.from_cu_seqlens(
        of_query,
        None if of_key is of_query else of_key,
        q_len=query.shape[2],
        max_length=max_seqlen,
        seqused_k=used,
        leftpad_k=padding,
    )
    if count == 0:
        options["alibi_slopes"] = None  # of no sequence
    if _differ_by_sequence(options["alibi_slopes"]):
        query, key, value = (x.expand(count, -1, -1, -1) for x in (query, key, value))
        ranges = replace(ranges, tensor=_of_one_sequence_each(ranges.tensor, of_query))
    return prepare(query, key, value, enable_gqa=True, key_ranges=ranges, **options)  # type: ignore[arg-type]


def check_numbers(
    op: str,
    cu_seqlens: tuple[Tensor, Tensor],
    totals: tuple[int, int | None],
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
) -> None:
    """Waits for the device, and raises for numbers that no right program passes.

    `totals` are the queries and keys of the packed tensors; None where the keys are in pages.
    """
    for name, x, total in zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, totals):
        numbers = x.tolist()
        if any(end < begin for begin, end in itertools.pairwise((0, *numbers))):
            raise ValueError(
                f"{op}: {name} must be at least 0 and not fall; got {numbers} (checked because "
                "ORCHARD_DEBUG is set)"
            )
        if total is not None and numbers[-1] > total:
            raise ValueError(
                f"{op}: {name} must end within the {total} tokens of its tensor; got "
                f"{numbers[-1]} (checked because ORCHARD_DEBUG is set)"
            )
    lengths = cu_seqlens[1].diff()
    if seqused_k is not None:
        if totals[1] is not None and seqused_k.numel():
            wrong = (seqused_k < 0) | (seqused_k > lengths)
            if bool(wrong.any()):
                raise ValueError(
                    f"{op}: seqused_k must be from 0 to the length that cu_seqlens_k gives its "
                    f"sequence; got {seqused_k[wrong][0].item()} beside {lengths[wrong][0].item()} "
                    "(checked because ORCHARD_DEBUG is set)"
                )
        lengths = seqused_k
    checks.check_range(op, "leftpad_k", leftpad_k, 0, OPEN)
    checks.check_leftpad(op, "leftpad_k", leftpad_k, lengths)


def _differ_by_sequence(alibi_slopes: object) -> bool:
    return isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 2 and len(alibi_slopes) > 1


def _of_one_sequence_each(ranges: Tensor, of_query: Tensor) -> Tensor:
    """(1, 1, L, 4) -> (N, 1, L, 4): entry n of the batch has the queries of sequence n; the others
    see nothing there, so that all entries added up are the result."""
    i = torch.arange(ranges.shape[2], device=ranges.device)
    n = torch.arange(of_query.shape[0] - 1, device=ranges.device)[:, None]
    own = (of_query[n] <= i) & (i < of_query[n + 1])
    return ranges * own[:, None, :, None]


def unpacked(out: Tensor) -> Tensor:
    """(1, H, total, Dv) -> (total, H, Dv); of entries of one sequence each, the sum."""
    return (out[0] if out.shape[0] == 1 else out.sum(0)).transpose(0, 1)


def unpacked_with_lse(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `unpacked`, and lse (1, H, total) -> (H, total)."""
    return unpacked(out), lse[0] if lse.shape[0] == 1 else lse.amax(0)
