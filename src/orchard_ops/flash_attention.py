"""The functions of FlashAttention-2 by their names, with their arguments and meaning.

(B, S, H, D) layout, causal masks and windows aligned at the bottom right, grouped heads by their
counts. What differs from the CUDA package on purpose is a table in docs/flash-attention.md.

Reference: T. Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, and the arguments of
https://github.com/Dao-AILab/flash-attention, version 2.7.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .arguments import prepare
from .attention import run, run_with_lse
from .key_ranges import check_cu_seqlens
from .paged_varlen import PagedBatch, attend_pages, check_pages
from .varlen import PACKED, check_longest, packed_call, unpacked, unpacked_with_lse

Results = Tensor | tuple[Tensor, Tensor, Tensor]
_INTEGERS = (int, torch.SymInt, numbers.Integral)
_REAL = (float, torch.SymFloat, numbers.Real, torch.SymInt)
_DENSE = "(batch, seqlen, heads, head_dim)"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """Attention of (B, S, H, D) operands, as ``flash_attn.flash_attn_func``. Nothing is copied.

    Args:
        q: (B, Sq, Hq, D) float16, bfloat16, float32 (or float64, on the reference); any strides.
        k: (B, Sk, Hk, D); query head h uses key head h // (Hq / Hk), Hq being a multiple of Hk.
        v: (B, Sk, Hk, Dv).
        dropout_p: probability of dropping a weight, in [0, 1], rounded to a multiple of 2^-16; the
            mask follows torch's cpu generator. 0 for evaluation.
        softmax_scale: factor on the scores; 1 / sqrt(D) by default.
        causal: query i sees keys up to i + Sk - Sq: aligned at the bottom right.
        window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq +
            right. A negative side is open, and so is one of at least Sk. Causal: right is 0.
        softcap: c > 0 replaces a score s by c * tanh(s / c); anything else is none.
        alibi_slopes: (Hq) or (B, Hq) float32; -slope * |i + Sk - Sq - j| is added to the scores. No
            gradient.
        deterministic: either; the gradients always have the same bits.
        return_attn_probs: also return lse and S_dmask.

    Returns:
        out (B, Sq, Hq, Dv); a row that sees no key is 0. With return_attn_probs (out, lse,
        S_dmask): lse (B, Hq, Sq) float32, natural logarithm, -inf for a row that sees no key,
        differentiable; S_dmask is empty, shape (0,), since no matrix of weights exists.

    Raises:
        ValueError, TypeError: a malformed call; the message says what was wrong and what came.
        NotImplementedError: alibi_slopes that require grad.
    """
    operands = _Operands("flash_attn_func", q, k, v, (("q", q), ("k", k), ("v", v)))
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _dense(operands, options, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_func` of q, k and v in one tensor, which is read in place.

    Args:
        qkv: (B, S, 3, H, D), q, k and v in this order. The others: as `flash_attn_func`.

    Returns:
        As `flash_attn_func`: out (B, S, H, D).

    Raises:
        As `flash_attn_func`.
    """
    op = "flash_attn_qkvpacked_func"
    q, k, v = _unpack(op, "qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    operands = _Operands(op, q, k, v, (("qkv", qkv),))
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _dense(operands, options, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_func` of k and v in one tensor, which is read in place.

    Args:
        q: (B, Sq, Hq, D).
        kv: (B, Sk, 2, Hk, D), k and v in this order. The others: as `flash_attn_func`.

    Returns:
        As `flash_attn_func`: out (B, Sq, Hq, D).

    Raises:
        As `flash_attn_func`.
    """
    op = "flash_attn_kvpacked_func"
    k, v = _unpack(op, "kv", kv, 2, "(batch, seqlen, 2, heads, head_dim)")
    operands = _Operands(op, q, k, v, (("q", q), ("kv", kv)))
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _dense(operands, options, return_attn_probs)


# ---- packed sequences ---------------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Results:
    """Attention within sequences packed one behind another, as ``flash_attn_varlen_func``.

    Args:
        q: (total_q, Hq, D), the tokens of all sequences; dtypes as in `flash_attn_func`.
        k: (total_k, Hk, D).
        v: (total_k, Hk, Dv).
        cu_seqlens_q: (sequences + 1) int32 or int64: where each sequence's queries begin and the
            last ends. Queries outside of all sequences are 0.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: the longest sequence's queries; not used.
        max_seqlen_k: the longest sequence's keys: a side of the window of at least that is open.
            Where cu_seqlens_q and cu_seqlens_k are one tensor, it also says how much memory makes
            the backward faster (docs/packed-batches.md).
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic: as in
            `flash_attn_func`, within each sequence; Sq and Sk are its own lengths.
        alibi_slopes: (Hq) or (sequences, Hq) float32. Slopes that differ between sequences
            make memory grow with their number (docs/packed-batches.md), and the dropout mask
            depends on the sequence's number then.
        return_attn_probs: also return lse and S_dmask.
        block_table: (sequences, pages) int32 or int64: k and v are pages (num_pages, page_size, Hk,
            D or Dv) of any page_size, and a sequence has those of its row, one after another.
            cu_seqlens_k gives its length alone. max_seqlen_q and max_seqlen_k are promises then:
            rows of a sequence that has more are NaN. No dropout and no gradient
            (docs/decoding.md).
        seqused_k: (sequences) int32 or int64: how many of a sequence's keys there are, in place of
            what cu_seqlens_k says; in the packed tensors no more than that.
        leftpad_k: (sequences) int32 or int64: how many of these, from the first on, are padding.

    Returns:
        out (total_q, Hq, Dv), or (out, lse, S_dmask) with lse (Hq, total_q), as `flash_attn_func`.

    Raises:
        As `flash_attn_func`. NotImplementedError for a block_table beside dropout, or beside
        operands that require grad. The numbers of the sequences are looked at with ORCHARD_DEBUG=1
        alone, which waits for the device.
    """
    operands = _Operands("flash_attn_varlen_func", q, k, v, (("q", q), ("k", k), ("v", v)))
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    sequences = _Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_k, seqused_k, leftpad_k)
    if block_table is not None:
        pages = (max_seqlen_q, block_table)
        return _paged(operands, sequences, pages, options, return_attn_probs)
    return _packed(operands, sequences, options, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_varlen_func` of q, k and v in one tensor, which is read in place.

    Args:
        qkv: (total, 3, H, D), q, k and v in this order.
        cu_seqlens: (sequences + 1), of queries and keys.
        max_seqlen: the longest sequence. The others: as `flash_attn_varlen_func`.

    Returns:
        As `flash_attn_varlen_func`: out (total, H, D).

    Raises:
        As `flash_attn_varlen_func`.
    """
    op = "flash_attn_varlen_qkvpacked_func"
    q, k, v = _unpack(op, "qkv", qkv, 3, "(total, 3, heads, head_dim)")
    operands = _Operands(op, q, k, v, (("qkv", qkv),))
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    sequences = _Sequences(cu_seqlens, cu_seqlens, max_seqlen)
    return _packed(operands, sequences, options, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_varlen_func` of k and v in one tensor, which is read in place.

    Args:
        q: (total_q, Hq, D).
        kv: (total_k, 2, Hk, D), k and v in this order. The others: as `flash_attn_varlen_func`.

    Returns:
        As `flash_attn_varlen_func`: out (total_q, Hq, D).

    Raises:
        As `flash_attn_varlen_func`.
    """
    op = "flash_attn_varlen_kvpacked_func"
    k, v = _unpack(op, "kv", kv, 2, "(total, 2, heads, head_dim)")
    operands = _Operands(op, q, k, v, (("q", q), ("kv", kv)))
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    sequences = _Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_k)
    return _packed(operands, sequences, options, return_attn_probs)


# ---- a call, its checks, and how it runs --------------------------------------------------------


class _Operands(NamedTuple):
    """q, k and v of a call, and as the caller named what they came in."""

    function: str
    q: Tensor
    k: Tensor
    v: Tensor
    given: tuple[tuple[str, Tensor], ...]

    @property
    def op(self) -> str:
        return f"orchard_ops.{self.function}"


class Options(NamedTuple):
    """The further arguments that all functions have in common."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None


class _Sequences(NamedTuple):
    """Where packed sequences lie."""

    of_query: Tensor
    of_key: Tensor
    longest_key: int
    used: Tensor | None = None
    padding: Tensor | None = None


def _unpack(
    function: str, name: str, packed: Tensor, count: int, dimensions: str
) -> tuple[Tensor, ...]:
    """The parts of a packed tensor as views; their gradients are stacked once, not added up."""
    op = f"orchard_ops.{function}"
    checks.check_tensor(op, name, packed)
    axis = packed.dim() - 3
    if packed.dim() != dimensions.count(",") + 1 or packed.shape[axis] != count:
        raise ValueError(f"{op}: {name} must be {dimensions}; got shape {tuple(packed.shape)}")
    return packed.unbind(axis)


def _dense(operands: _Operands, options: Options, return_attn_probs: bool) -> Results:
    op, q, k, v, given = (operands.op, *operands[1:])
    checks.check_length_first(op, _DENSE, given, (q, k, v))
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"{op}: q, k and v must have the same batch size; got {q.shape[0]}, {k.shape[0]} and "
            f"{v.shape[0]}"
        )
    check_options(op, options, return_attn_probs, q, q.shape[0])
    q_len, kv_len = q.shape[1], k.shape[1]
    named = by_our_names(options, kv_len)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    call = prepare(*heads_first, enable_gqa=True, **named)  # type: ignore[arg-type]
    s = call.scoring
    if s.window_left >= 0 or s.window_right >= 0 or s.alibi_slopes is not None:
        call = call._replace(scoring=s._replace(diagonal=kv_len - q_len))
    if not return_attn_probs:
        return run(call).transpose(1, 2)
    out, lse = run_with_lse(call)
    return out.transpose(1, 2), lse, q.new_empty(0)


def _packed(
    operands: _Operands, sequences: _Sequences, options: Options, return_attn_probs: bool
) -> Results:
    op, q, k, v, given = (operands.op, *operands[1:])
    checks.check_length_first(op, PACKED, given, (q, k, v))
    cu_seqlens = (sequences.of_query, sequences.of_key)
    check_cu_seqlens(op, *cu_seqlens)
    check_options(op, options, return_attn_probs, q, sequences.of_query.shape[0] - 1)
    longest = sequences.longest_key
    check_longest(op, longest)
    named = by_our_names(options, longest)
    call = packed_call(
        op, (q, k, v), cu_seqlens, longest, sequences.used, sequences.padding, **named
    )
    if not return_attn_probs:
        return unpacked(run(call))
    return *unpacked_with_lse(*run_with_lse(call)), q.new_empty(0)


def _paged(
    operands: _Operands,
    sequences: _Sequences,
    pages: tuple[int, Tensor],
    options: Options,
    return_attn_probs: bool,
) -> Results:
    op, q, k, v = (operands.op, *operands[1:4])
    check_pages(op, q, k, v)
    cu_seqlens = (sequences.of_query, sequences.of_key)
    check_cu_seqlens(op, *cu_seqlens)
    count = sequences.of_query.shape[0] - 1
    check_options(op, options, return_attn_probs, q, count)
    if options.dropout_p > 0.0:
        raise NotImplementedError(
            f"{op}: keys in pages know no dropout; got dropout_p {options.dropout_p} beside a "
            "block_table: pass 0.0"
        )
    longest_query, table = pages
    for longest in (longest_query, sequences.longest_key):
        check_longest(op, longest)
    batch = PagedBatch(
        op,
        *cu_seqlens,
        longest_query,
        sequences.longest_key,
        checks.sequence_integers(op, "block_table", table, count, q, " pages"),  # type: ignore[arg-type]
        checks.sequence_integers(op, "seqused_k", sequences.used, count, q),
        checks.sequence_integers(op, "leftpad_k", sequences.padding, count, q),
    )
    named = by_our_names(options, sequences.longest_key)
    out, lse = attend_pages(batch, q, k, v, named)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def by_our_names(options: Options, kv_len: int) -> dict[str, Any]:
    """As `prepare` takes them; sides of at least `kv_len` are open."""
    left, right = options.window_size
    return {
        "dropout_p": options.dropout_p,
        "is_causal": options.causal,
        "scale": options.softmax_scale,
        "window_left": -1 if left < 0 or left >= kv_len else left,
        "window_right": -1 if right < 0 or right >= kv_len else right,
        "softcap": max(options.softcap, 0.0),
        "alibi_slopes": options.alibi_slopes,
    }


def check_options(
    op: str,
    options: Options,
    returns_lse: bool,
    q: Tensor,
    batch: int,
    flag_name: str = "return_attn_probs",
) -> None:
    dropout_p, scale, causal, window, softcap, slopes = options
    for name, number in (
        ("dropout_p", dropout_p),
        ("softmax_scale", 0.0 if scale is None else scale),
        ("softcap", softcap),
    ):
        if isinstance(number, bool) or not isinstance(number, _REAL):
            raise TypeError(
                f"{op}: {name} must be a number; got a {type(number).__name__}, {number!r}"
            )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1]; got {dropout_p}")
    if scale is not None and not abs(scale) <= checks.LARGEST_FLOAT32:
        raise ValueError(f"{op}: softmax_scale must be finite in float32; got {scale}")
    if not (softcap <= 0.0 or checks.SMALLEST_FLOAT32 <= softcap <= checks.LARGEST_FLOAT32):
        raise ValueError(
            f"{op}: softcap must be positive and finite in float32, or at most 0 for none; "
            f"got {softcap}"
        )
    for name, flag in (("causal", causal), (flag_name, returns_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} must be True or False; got {flag!r}")
    pair = isinstance(window, tuple | list) and len(window) == 2
    if not pair or not all(
        isinstance(side, _INTEGERS) and not isinstance(side, bool) for side in window
    ):
        raise TypeError(
            f"{op}: window_size must be two integers, (left, right), -1 for an open side; "
            f"got {window!r}"
        )
    if slopes is not None:
        _check_slopes(op, slopes, q, batch)


def _check_slopes(op: str, slopes: Tensor, q: Tensor, batch: int) -> None:
    checks.check_tensor(op, "alibi_slopes", slopes)
    heads = q.shape[-2]
    # Not `in`: dynamo compares sizes that may vary by identity there.
    if not (tuple(slopes.shape) == (heads,) or tuple(slopes.shape) == (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes must have shape ({heads},) or ({batch}, {heads}); "
            f"got {tuple(slopes.shape)}"
        )
    if slopes.dtype != torch.float32:
        raise TypeError(f"{op}: alibi_slopes must be float32; got {slopes.dtype}: cast them")
    if slopes.device != q.device:
        raise ValueError(
            f"{op}: alibi_slopes must be on the device of q, {q.device}; got {slopes.device}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: alibi_slopes have no gradient; got slopes that require grad: detach them"
        )
