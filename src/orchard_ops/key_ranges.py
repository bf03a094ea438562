"""`KeyRanges`: which keys each query sees, in four numbers a query.

A mask of L x S numbers takes quadratic memory and has to be read; what padding, packing, prefixes
and chunks hide is an interval per query, which kernels skip without reading anything.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace

import torch
from torch import Tensor

OPEN = 2**31 - 1
"""An end behind every key."""
_FAR = 1 << 42
"""A window this wide hides nothing; wider ones would overflow int64."""
INTEGERS = (int, torch.SymInt, numbers.Integral)
_OP = "orchard_ops.KeyRanges"


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """The keys that each query may see, and where among the keys the query stands.

    Query i of the tensor's row (begin, end, position, prefix) sees key j if 0 <= j < S,
    j <= position + window_right, and either j < prefix, or begin <= j < end and
    j >= position - window_left. The windows are those of the call, which a causal one sets
    window_right of to 0; open ones hide nothing. ALiBi counts its distance from the position. A row
    whose numbers leave no key (begin >= end, say) gives 0.

    Every constructor computes on the device of its arguments and waits for nothing, so the numbers
    are never checked: ends beyond the keys and negative begins are cut off. Constructors work under
    torch.compile.

    `a & b` sees what both see; see `__and__`.
    """

    tensor: Tensor
    """int32 (1 or B, 1 or Hq, L, 4)."""
    diagonal: int | None = None
    """Query i stands at key i + diagonal; None where the positions are not known to be such."""
    has_prefix: bool = True
    """False where every prefix is known to be 0."""
    from_first: bool = False
    """True where every begin is known to be 0."""
    reach: int | None = None
    """No query sees a key farther than this from where it stands; None where that is not known. It
    says how much memory a backward is worth. A number too small costs time, not the result."""

    def __post_init__(self) -> None:
        check_ranges(_OP, "tensor", self.tensor)
        if self.reach is None or torch.compiler.is_compiling():
            return
        if isinstance(self.reach, bool) or not isinstance(self.reach, INTEGERS):
            raise TypeError(f"{_OP}: reach must be an integer or None; got {self.reach!r}")
        if isinstance(self.reach, int) and self.reach < 0:
            raise ValueError(f"{_OP}: reach must be 0 or more, or None; got {self.reach}")

    # ---- from what a batch is described by ------------------------------------------------------

    @staticmethod
    def from_padding_mask(
        mask: Tensor, q_len: int | None = None, *, diagonal: int = 0, check: bool = False
    ) -> KeyRanges:
        """Keys that are tokens, not padding: from the first True of a row to its last.

        Args:
            mask: (B, S) bool, True for a token, or integers, not 0 for a token (the attention_mask
                of a tokenizer). Each row must be one run of tokens, with padding on the left, the
                right, or both. A hole in the run would be seen: finding it means to wait for the
                device, which only `check` does.
            q_len: the number of queries; by default S (self-attention).
            diagonal: query i stands at key i + diagonal; S - q_len where the queries are the last.
            check: wait for the device, and raise where a row has a hole.

        The queries of the padding are not hidden: as with a mask of (B, 1, 1, S), they see the
        tokens that the windows leave them.

        Raises:
            ValueError, TypeError: another shape or dtype; with `check` a row with a hole.
        """
        op = f"{_OP}.from_padding_mask"
        _check_integers(op, "mask", mask, 2, "(B, S)", bools=True)
        kv_len = mask.shape[1]
        tokens = mask if mask.dtype == torch.bool else mask != 0
        if kv_len == 0:
            begin = end = torch.zeros((mask.shape[0], 1), dtype=torch.int32, device=mask.device)
        else:
            j = _count(kv_len, mask.device)
            begin = j.masked_fill(~tokens, kv_len).amin(-1, keepdim=True)
            end = (j + 1).masked_fill(~tokens, 0).amax(-1, keepdim=True)
        if check:
            holes = (end - begin).clamp(min=0) != tokens.sum(-1, keepdim=True)
            if holes.any():
                rows = holes.squeeze(-1).nonzero().flatten().tolist()
                raise ValueError(
                    f"{op}: each row of mask must be one run of tokens; there is padding between "
                    f"tokens in rows {rows}: pass it as attn_mask, mask[:, None, None, :]"
                )
        return _rows(kv_len if q_len is None else q_len, diagonal, begin, end)

    @staticmethod
    def from_lengths(
        lengths: Tensor, q_len: int, *, starts: Tensor | None = None, diagonal: int = 0
    ) -> KeyRanges:
        """The first `lengths` keys of each sample, or as many from `starts` on.

        Args:
            lengths: (B) integers.
            q_len: the number of queries.
            starts: (B) integers: where the keys begin, S - lengths for padding on the left.
            diagonal: query i stands at key i + diagonal.
        """
        op = f"{_OP}.from_lengths"
        _check_integers(op, "lengths", lengths, 1, "(B)")
        begin = torch.zeros_like(lengths)
        if starts is not None:
            _check_integers(op, "starts", starts, 1, "(B)")
            if starts.shape != lengths.shape or starts.device != lengths.device:
                raise ValueError(
                    f"{op}: starts must have the shape and device of lengths, "
                    f"{tuple(lengths.shape)} on {lengths.device}; got {tuple(starts.shape)} on "
                    f"{starts.device}"
                )
            begin = starts
        end = (begin + lengths)[:, None]
        return _rows(q_len, diagonal, begin[:, None], end, from_first=starts is None)

    @staticmethod
    def from_document_ids(
        ids: Tensor, *, padding_id: int | None = None, max_length: int | None = None
    ) -> KeyRanges:
        """Packed documents: a query sees the keys of the document it is in.

        Args:
            ids: (B, L) integers, the document of each token; (L) is one row. A document is a run of
                equal ids: the same id further on is another document.
            padding_id: an id whose tokens see nothing and are seen by nobody.
            max_length: the longest document, where that is known: memory for a faster backward
                (docs/packed-batches.md). A number too small costs time, not the result.

        Self-attention: there are as many keys as queries.
        """
        op = f"{_OP}.from_document_ids"
        ids = _check_tokens(op, "ids", ids)
        is_padding = None if padding_id is None else ids == padding_id
        return _documents(ids != ids.roll(1, -1), is_padding, _reach(op, max_length))

    @staticmethod
    def from_position_ids(position_ids: Tensor, *, max_length: int | None = None) -> KeyRanges:
        """Packed documents, from the places of their tokens, as collators without padding give.

        Args:
            position_ids: (B, L) integers that count up within a document; (L) is one row. A token
                whose number is not its predecessor's plus 1 begins a document.
            max_length: as in `from_document_ids`.

        Self-attention: there are as many keys as queries.
        """
        op = f"{_OP}.from_position_ids"
        position_ids = _check_tokens(op, "position_ids", position_ids)
        begins = position_ids != position_ids.roll(1, -1) + 1
        return _documents(begins, reach=_reach(op, max_length))

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        q_len: int,
        max_length: int | None = None,
        seqused_k: Tensor | None = None,
        leftpad_k: Tensor | None = None,
    ) -> KeyRanges:
        """Sequences one behind another, in the cumulative lengths of FlashAttention's varlen calls.

        Query i of sequence n sees that sequence's keys, cu_seqlens_k[n] to cu_seqlens_k[n + 1]. It
        stands where the sequence's last query is at its last key (bottom-right). Queries before the
        first sequence or behind the last see nothing; sequences may be empty.

        Args:
            cu_seqlens_q: (N + 1) integers: where each sequence's queries begin, and where the last
                ends.
            cu_seqlens_k: the same of the keys; by default those of the queries (self-attention).
            q_len: the number of queries, all sequences together.
            max_length: as in `from_document_ids`; it counts only where cu_seqlens_k is not given.
            seqused_k: (N) integers: how many of a sequence's keys there are, from its first place
                on; the places behind them may hold anything. All by default.
            leftpad_k: (N) integers: how many of these, from the first on, are padding.
        """
        op = f"{_OP}.from_cu_seqlens"
        reach = _reach(op, max_length)
        same = cu_seqlens_k is None
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        check_cu_seqlens(op, cu_seqlens_q, keys)
        device, count = cu_seqlens_q.device, cu_seqlens_q.shape[0] - 1
        i = _count(q_len, device)
        if count == 0:
            return _rows(q_len, 0, torch.zeros_like(i), torch.zeros_like(i))
        of_query, of_key = cu_seqlens_q.to(torch.int32), keys.to(torch.int32)
        n = torch.searchsorted(of_query.contiguous(), i, right=True) - 1
        outside = (n < 0) | (n >= count)
        n = n.clamp(0, count - 1)
        first, last = of_key[n], of_key[n + 1]
        if seqused_k is not None:
            used = _of_sequences(op, "seqused_k", seqused_k, count, device)
            last = first + torch.minimum(used[n], last - first)
        position = i + last - of_query[n + 1]
        if leftpad_k is not None:
            padding = _of_sequences(op, "leftpad_k", leftpad_k, count, device)
            first = first + torch.minimum(padding[n], last - first)
        tensor = _stack(
            first.masked_fill(outside, 0),
            last.masked_fill(outside, 0),
            position,
            torch.zeros_like(i),
        )
        if not same or seqused_k is not None:
            return KeyRanges(tensor, has_prefix=False)
        return KeyRanges(tensor, 0, has_prefix=False, reach=reach)

    # ---- from the shape of a pattern ------------------------------------------------------------

    @staticmethod
    def prefix_lm(lengths: Tensor, q_len: int, *, diagonal: int = 0) -> KeyRanges:
        """A prefix that every query sees whole, and causal attention behind it.

        The causal part is in the ranges: a call with is_causal=True would cut the prefix.

        Args:
            lengths: (B) integers: the length of each sample's prefix; 0-dim: of all.
            q_len: the number of queries.
            diagonal: query i stands at key i + diagonal.
        """
        op = f"{_OP}.prefix_lm"
        if isinstance(lengths, Tensor) and lengths.dim() == 0:
            lengths = lengths.unsqueeze(0)
        _check_integers(op, "lengths", lengths, 1, "(B) or ()")
        behind = _count(q_len, lengths.device) + (diagonal + 1)
        end = torch.maximum(behind, lengths.to(torch.int32)[:, None])
        return _rows(q_len, diagonal, torch.zeros_like(end), end, from_first=True)

    @staticmethod
    def chunked(
        chunk_size: int, q_len: int, *, diagonal: int = 0, device: torch.device | str | None = None
    ) -> KeyRanges:
        """Keys in chunks: a query sees the chunk that it stands in (with is_causal: up to itself).

        Args:
            chunk_size: keys in a chunk; chunks begin at its multiples.
            q_len: the number of queries.
            diagonal: query i stands at key i + diagonal.
            device: of the query.
        """
        if chunk_size < 1:
            raise ValueError(f"{_OP}.chunked: chunk_size must be at least 1; got {chunk_size}")
        position = _count(q_len, device) + diagonal
        begin = torch.div(position, chunk_size, rounding_mode="floor") * chunk_size
        return _rows(q_len, diagonal, begin, begin + chunk_size, reach=chunk_size - 1)

    @staticmethod
    def sliding_window(
        left: int,
        right: int,
        q_len: int,
        *,
        prefix: int = 0,
        diagonal: int = 0,
        device: torch.device | str | None = None,
    ) -> KeyRanges:
        """A window of keys round each query, and the first keys too (global tokens, StreamingLLM).

        Args:
            left, right: a query at position p sees keys p - left to p + right; -1 is open.
            q_len: the number of queries.
            prefix: how many of the first keys every query sees whatever `left` is; `right` hides
                those that lie ahead of it.
            diagonal: query i stands at key i + diagonal.
            device: of the query.
        """
        op = f"{_OP}.sliding_window"
        for name, n in (("left", left), ("right", right), ("prefix", prefix)):
            least = 0 if name == "prefix" else -1
            if n < least:
                raise ValueError(f"{op}: {name} must be at least {least}; got {n}")
        position = _count(q_len, device) + diagonal
        begin = torch.zeros_like(position) if left < 0 else position - left
        end = torch.full_like(position, OPEN) if right < 0 else position + (right + 1)
        first = torch.clamp(end, min=0, max=prefix)
        tensor = _stack(begin, end, position, first)
        reach = max(left, right) if left >= 0 and right >= 0 else None
        return KeyRanges(tensor, diagonal, prefix > 0, from_first=left < 0, reach=reach)

    # ---- what they can do -----------------------------------------------------------------------

    def __and__(self, other: KeyRanges) -> KeyRanges:
        """The keys that both see. Batch and heads broadcast.

        Raises:
            ValueError: where one interval and one prefix cannot say it, or not for all numbers that
                the tensors may hold: the queries stand at other positions, or one has a prefix and
                the other's intervals are not known to begin at the first key.
        """
        if not isinstance(other, KeyRanges):
            return NotImplemented
        a, b = self.tensor, other.tensor
        if a.shape[2] != b.shape[2]:
            raise ValueError(f"{_OP}: & needs as many queries; got {a.shape[2]} and {b.shape[2]}")
        if self.diagonal is None or self.diagonal != other.diagonal:
            raise ValueError(
                f"{_OP}: & needs ranges whose queries stand at the same keys, i + diagonal; got "
                f"diagonals {self.diagonal} and {other.diagonal} (None: not known)"
            )
        exact = not (self.has_prefix or other.has_prefix) or (
            (self.from_first and not self.has_prefix) or (other.from_first and not other.has_prefix)
        )
        if not exact:
            raise ValueError(
                f"{_OP}: & of ranges with a prefix needs others without one that begin at the "
                "first key (from_lengths without starts, prefix_lm): pass one of them as attn_mask"
            )
        # The other's interval begins at the first key: cut, a prefix remains one.
        begin = torch.maximum(a[..., 0], b[..., 0])
        end = torch.minimum(a[..., 1], b[..., 1])
        prefix = torch.zeros_like(end)
        if self.has_prefix:
            prefix = torch.minimum(a[..., 3], b[..., 1])
        elif other.has_prefix:
            prefix = torch.minimum(b[..., 3], a[..., 1])
        position = (a[..., 2] + torch.zeros_like(b[..., 2])).to(torch.int32)
        return KeyRanges(
            torch.stack((begin, end, position, prefix), -1),
            self.diagonal,
            self.has_prefix or other.has_prefix,
            self.from_first and other.from_first,
            _lower(self.reach, other.reach),
        )

    def key_span(self, window_left: int = -1, window_right: int = -1) -> int:
        """The keys that any 8 queries in a row see lie within so many; 0 where that is not known.

        The windows are those of the call.
        """
        if self.diagonal is None or self.has_prefix or torch.compiler.is_exporting():
            return 0  # an exported program is for any number
        left = _lower(self.reach, window_left if window_left >= 0 else None)
        right = _lower(self.reach, window_right if window_right >= 0 else None)
        if left is None or right is None:
            return 0
        span = min(left + right + 8, _FAR)
        if not torch.compiler.is_compiling():
            return span
        # A compiled call is for one number, and would be compiled again for each.
        rounded = 64
        while rounded < min(span, 1 << 28):
            rounded *= 2
        return rounded

    def to(self, device: torch.device | str) -> KeyRanges:
        """The same on another device."""
        return replace(self, tensor=self.tensor.to(device))

    def dense(self, kv_len: int, *, window_left: int = -1, window_right: int = -1) -> Tensor:
        """(1 or B, 1 or Hq, L, S) bool, True where a query sees a key, in quadratic memory.

        For looking at it, and for functions that take a mask.
        """
        return visible(self.tensor, 0, kv_len, window_left, window_right)


# ---- the mathematics, and the checks ------------------------------------------------------------


def visible(
    ranges: Tensor, first: int, end: int, window_left: int = -1, window_right: int = -1
) -> Tensor:
    """True where rows (..., 4) see the keys from `first` to before `end`: (..., end - first)."""
    begin, last, position, prefix = ranges.unsqueeze(-2).unbind(-1)
    j = torch.arange(first, end, device=ranges.device)
    near = (j >= begin) & (j < last)
    if window_left >= 0:
        near = near & (j >= position.long() - min(window_left, _FAR))
    seen = near | (j < prefix)
    return seen if window_right < 0 else seen & (j <= position.long() + min(window_right, _FAR))


def check_ranges(op: str, name: str, x: Tensor) -> None:
    """That x may be key ranges of some query."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor or KeyRanges; got a {type(x).__name__}")
    if x.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32; got {x.dtype}")
    if x.dim() != 4 or x.shape[3] != 4:
        raise ValueError(
            f"{op}: {name} must have shape (1 or batch, 1 or heads, queries, 4), each row (begin, "
            f"end, position, prefix); got shape {tuple(x.shape)}"
        )


def check_cu_seqlens(op: str, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """That both are cumulative lengths of as many sequences on one device."""
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_integers(op, name, x, 1, "(sequences + 1)")
        if x.shape[0] == 0:
            raise ValueError(f"{op}: {name} must have at least one number, 0; got none")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must have the same length, sequences + 1; got "
            f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )
    if cu_seqlens_q.device != cu_seqlens_k.device:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must be on the same device; got "
            f"{cu_seqlens_q.device} and {cu_seqlens_k.device}"
        )


def _of_sequences(op: str, name: str, x: Tensor, count: int, device: torch.device) -> Tensor:
    """Counts of keys as int32, of which none is negative."""
    _check_integers(op, name, x, 1, "(sequences)")
    if x.shape[0] != count or x.device != device:
        raise ValueError(
            f"{op}: {name} must be of the {count} sequences of cu_seqlens_q, on {device}; got "
            f"{x.shape[0]} on {x.device}"
        )
    return x.clamp(0, OPEN).to(torch.int32)


def _check_integers(
    op: str, name: str, x: Tensor, dim: int, dimensions: str, bools: bool = False
) -> None:
    kinds = "bool or integers" if bools else "integers"
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of {kinds}; got a {type(x).__name__}")
    if x.dtype.is_floating_point or x.dtype.is_complex or (x.dtype == torch.bool and not bools):
        raise TypeError(f"{op}: {name} must be a tensor of {kinds}; got {x.dtype}")
    if x.dim() != dim:
        raise ValueError(f"{op}: {name} must have shape {dimensions}; got shape {tuple(x.shape)}")


def _check_tokens(op: str, name: str, x: Tensor) -> Tensor:
    if isinstance(x, Tensor) and x.dim() == 1:
        x = x.unsqueeze(0)
    _check_integers(op, name, x, 2, "(B, L) or (L)")
    return x


def _count(n: int, device: torch.device | str | None) -> Tensor:
    return torch.arange(n, dtype=torch.int32, device=device)


def _stack(begin: Tensor, end: Tensor, position: Tensor, prefix: Tensor) -> Tensor:
    """(L) or (B, L) or (B, 1) each -> (1 or B, 1, L, 4)."""
    columns = torch.broadcast_tensors(begin, end, position, prefix)
    tensor = torch.stack([x.to(torch.int32) for x in columns], -1)
    return tensor[None, None] if tensor.dim() == 2 else tensor.unsqueeze(1)


def _lower(a: int | None, b: int | None) -> int | None:
    """Of two numbers, as far as they are known."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def _reach(op: str, max_length: int | None) -> int | None:
    if max_length is None:
        return None
    if isinstance(max_length, bool) or not isinstance(max_length, INTEGERS):
        raise TypeError(f"{op}: max_length must be an integer or None; got {max_length!r}")
    if torch.compiler.is_compiling():  # a number that a tensor holds cannot be asked about
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # it imports sympy

        return max_length - 1 if guard_or_false(max_length > 0) else None
    return max_length - 1 if max_length > 0 else 0


def _rows(
    q_len: int,
    diagonal: int,
    begin: Tensor,
    end: Tensor,
    from_first: bool = False,
    reach: int | None = None,
) -> KeyRanges:
    """Intervals of queries that stand at i + diagonal; no prefix."""
    position = _count(q_len, begin.device) + diagonal
    tensor = _stack(begin, end, position, torch.zeros_like(position))
    return KeyRanges(tensor, diagonal, has_prefix=False, from_first=from_first, reach=reach)


def _documents(
    begins: Tensor, is_padding: Tensor | None = None, reach: int | None = None
) -> KeyRanges:
    """From whether a token begins a document, (B, L); of the first of a row it may say either."""
    number = begins.cumsum(-1, dtype=torch.int32)
    begin = torch.searchsorted(number, number)
    end = torch.searchsorted(number, number, right=True)
    if is_padding is not None:
        end = end.masked_fill(is_padding, 0)
    return _rows(number.shape[1], 0, begin, end, reach=reach)
