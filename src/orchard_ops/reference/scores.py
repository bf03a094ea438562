"""Blocks of query rows, the keys they see, their scores and the exponentials of those."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dropout
from ..scoring import Scoring
from .products import is_normal, product, scale_and_add, scaled
from .ranges import Ranges


class Limits(NamedTuple):
    """How large a block may be, in scores over all batches and query heads."""

    elements: int
    """What a block has ..."""
    enough_rows: int
    """... unless it has fewer rows: these make too many operations, and read and write all of dk
    and dv too often. Then it has as many rows ..."""
    most_elements: int
    """... but not more scores than these. Where a single group of rows (`dropout.GROUP`) exceeds
    that, the block is this group: 64 bytes for every batch, query head and key."""
    whole: int = 0
    """A call with a mask, and nothing else that needs memory or leaves out keys, is a single block
    if it has no more scores than these: then a step is few operations."""


CPU_LIMITS = Limits(1 << 21, 128, 1 << 23, 1 << 24)
"""8, 32 and 64 MiB in float32: larger blocks do not stay in the caches."""
GPU_LIMITS = Limits(1 << 22, 256, 1 << 24, 1 << 24)
"""16, 64 and 64 MiB in float32: every operation of a block is a launch."""

_LOG2_E = math.log2(math.e)

_OPEN = 1 << 42
"""A window this wide hides nothing (`scoring.MAX_DIAGONAL`); wider ones would overflow int64."""


@dataclass(frozen=True)
class Block:
    """Query rows [row0, row1) and the keys [col0, col1) that any of them may see."""

    row0: int
    row1: int
    col0: int
    col1: int

    def rows(self, x: Tensor, dim: int = 2) -> Tensor:
        """The block's rows, which are dimension `dim` of x."""
        return _range(x, dim, self.row0, self.row1)

    def cols(self, x: Tensor, dim: int = 1) -> Tensor:
        """The block's keys, which are dimension `dim` of x."""
        return _range(x, dim, self.col0, self.col1)

    def of_mask(self, mask: Tensor) -> Tensor:
        """The block's part of what broadcasts to (..., L, S)."""
        mask = self.rows(mask, -2) if mask.shape[-2] != 1 else mask
        return self.cols(mask, -1) if mask.shape[-1] != 1 else mask


def _range(x: Tensor, dim: int, first: int, end: int) -> Tensor:
    """x from `first` to `end` along `dim`: one operation, or none if that is all of x."""
    return x if end - first == x.shape[dim] else x.narrow(dim, first, end - first)


def _has_only_a_mask(s: Scoring) -> bool:
    """Whether a mask is all that there is beside sinks: no block would leave out keys, and none
    needs memory for distances, for softcap's derivative or for dropout."""
    bare = s.alibi_slopes is None and s.softcap == 0.0 and s.dropout_p == 0.0
    return s.attn_mask is not None and bare and s.window_left < 0 and s.window_right < 0


def blocks(
    batch: int,
    num_heads: int,
    q_len: int,
    kv_len: int,
    s: Scoring,
    limits: Limits,
    ranges: Ranges | None = None,
) -> Iterator[Block]:
    """Blocks that begin at multiples of `dropout.GROUP`; those of no keys too."""
    if batch * num_heads == 0:
        return
    row_elements = max(1, batch * num_heads * kv_len)
    most_rows = limits.most_elements // row_elements
    step = max(limits.elements // row_elements, min(limits.enough_rows, most_rows))
    step = max(1, step // dropout.GROUP) * dropout.GROUP
    if ranges is None and _has_only_a_mask(s) and row_elements * q_len <= limits.whole:
        step = max(1, q_len)
    for row0 in range(0, q_len, step):
        row1 = min(q_len, row0 + step)
        col0, col1 = 0, kv_len
        if ranges is not None:
            yield Block(row0, row1, *ranges.hull(row0, row1))
            continue
        if s.window_left >= 0:
            col0 = min(max(0, row0 + s.diagonal - s.window_left), kv_len)
        if s.window_right >= 0:
            col1 = max(min(kv_len, row1 + s.diagonal + s.window_right), col0)
        yield Block(row0, row1, col0, col1)


def seeing_rows(kv_len: int, s: Scoring) -> tuple[int, int]:
    """The rows that see a key by the windows: from the first to before the last."""
    begin = -s.diagonal - s.window_right if s.window_right >= 0 else -_OPEN
    end = kv_len - s.diagonal + s.window_left if s.window_left >= 0 else _OPEN
    return begin, end


def outside_window(block: Block, s: Scoring, device: torch.device) -> Tensor | None:
    """(rows, cols) bool, True where the window hides a key; None where it hides nothing."""
    first, last = block.row0 + s.diagonal, block.row1 - 1 + s.diagonal
    covers_left = s.window_left < 0 or block.col0 >= last - s.window_left
    covers_right = s.window_right < 0 or block.col1 - 1 <= first + s.window_right
    if covers_left and covers_right:
        return None
    i = torch.arange(first, last + 1, device=device).unsqueeze(1)
    j = torch.arange(block.col0, block.col1, device=device)
    if covers_left:
        return j > i + s.window_right
    if covers_right:
        return j < i - s.window_left
    return (j < i - s.window_left) | (j > i + s.window_right)


def _shown(mask: Tensor, outside: Tensor | None) -> Tensor:
    """True where neither the mask nor the window (`outside_window`) hides a key from a row."""
    shown = mask if mask.dtype == torch.bool else mask != -math.inf
    return shown if outside is None else shown & ~outside


def _addend(mask: Tensor, like: Tensor) -> Tensor:
    """What hides scores as a boolean mask does, if it is added to them."""
    return torch.where(mask, like.new_tensor(0.0), like.new_tensor(-math.inf))


def _shows_any(mask: Tensor, dim: int) -> Tensor:
    """Whether the mask shows anything along a dimension."""
    if mask.shape[dim] == 1:
        return _shown(mask.squeeze(dim), None)
    if mask.dtype != torch.bool:
        return mask.amax(dim) != -math.inf
    if mask.device.type != "cpu":
        return mask.any(dim)
    return mask.view(torch.uint8).amax(dim).view(torch.bool)  # tenfold as fast as any


class Problem:
    """One call's operands in compute precision.

    k and v are (N, S, D), N being batch * num_kv_heads; blocks of rows of q and dout are
    (N, group * rows, D), the rows of all query heads that share a key/value head.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring):
        self.batch, self.num_heads, self.q_len, self.head_dim = query.shape
        self.num_kv_heads, self.kv_len = key.shape[1], key.shape[2]
        self.group = self.num_heads // max(1, self.num_kv_heads)
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.device = query.device
        self.scoring = scoring._replace(
            window_left=min(scoring.window_left, _OPEN),
            window_right=min(scoring.window_right, _OPEN),
        )
        self.scores_in_powers = scoring.plain or self._are_only_hidden(scoring)
        self.per_exponent = _LOG2_E if self.scores_in_powers else 1.0 / scoring.unit
        self.ranges = None
        if scoring.key_ranges is not None:
            windows = scoring.window_left, scoring.window_right
            self.ranges = Ranges(scoring.key_ranges, self.kv_len, *windows)
        self._seen_range = (0, self.kv_len)  # other keys are in no block
        self._range_is_shown = False  # the mask hides nothing there
        unseen_keys, self.blind_rows = self._unseen()
        self.v = self._seen(value, unseen_keys)
        self._unseen_in_k = None
        # Under a softcap a score is finite whatever its key is, and says nothing of it.
        if self._proves_scores_finite(scoring.attn_mask) and scoring.softcap == 0.0:
            self._unseen_in_k, unseen_keys = unseen_keys, None
        self.k = self._seen(key, unseen_keys)
        self._kept: dict[str, Tensor] = {}
        self.sinks = None
        if scoring.sinks is not None:
            self.sinks = self._per_head(scoring.sinks)
        self.seed = 0 if scoring.dropout_seed is None else int(scoring.dropout_seed)
        self.has_dropout = dropout.threshold(scoring.dropout_p) > 0

    def _are_only_hidden(self, s: Scoring) -> bool:
        """Whether a mask hides scores and nothing is added to them: on the CPU they are powers of
        two then as plain ones are, which saves a pass over them (`_exp_`)."""
        boolean = s.attn_mask is not None and s.attn_mask.dtype == torch.bool
        bare = s.alibi_slopes is None and s.softcap == 0.0 and s.sinks is None
        return self.device.type == "cpu" and boolean and bare

    def _unseen(self) -> tuple[Tensor | None, Tensor | None]:
        """By a mask or key ranges: the keys that no row sees, and the rows that see no key.

        (*batch, 1 or Hkv, 1 or S, 1) and (*batch, 1 or Hq, 1 or L, 1). A key may be hidden from one
        row by the mask, and from another by the windows.
        """
        mask, ranges, s = self.scoring.attn_mask, self.ranges, self.scoring
        if mask is None or 0 in mask.shape:
            if ranges is None:
                return None, None
            keys, rows = ~ranges.unseen_keys(), ~ranges.blind_rows()
        elif ranges is None and s.window_left < 0 and s.window_right < 0:
            if self.device.type == "cpu" and mask.dtype != torch.bool and mask.amin() > -math.inf:
                return None, None
            keys, rows = _shows_any(mask, -2), _shows_any(mask, -1)
        else:
            shape = mask.shape[:-2]
            if ranges is not None:
                of_ranges = self._with_batch_of_mask(ranges.blind_rows()).shape[:-1]
                shape = torch.broadcast_shapes(shape, of_ranges)
            keys = mask.new_zeros((*shape, self.kv_len), dtype=torch.bool)
            rows = mask.new_zeros((*shape, self.q_len), dtype=torch.bool)
            for block in self.blocks():
                outside = self.outside(block)
                if ranges is not None and outside is not None:
                    outside = self._with_batch_of_mask(outside)
                shown = _shown(block.of_mask(mask), outside)
                block.cols(keys, -1).logical_or_(shown.any(dim=-2))
                block.rows(rows, -1).copy_(shown.any(dim=-1))
        if keys.shape[-2] not in (1, self.num_kv_heads):  # all query heads of a key/value head
            keys = keys.unflatten(-2, (self.num_kv_heads, -1)).any(dim=-2)
        unseen = self._hidden(keys)
        if unseen is not None and self.device.type == "cpu" and keys.shape[-1] == self.kv_len:
            unseen = self._unseen_among_seen(keys, unseen)
        return unseen, self._hidden(rows)

    def _unseen_among_seen(self, keys: Tensor, unseen: Tensor) -> Tensor | None:
        """Leaves out of all blocks the keys at both ends that no row of the call sees, as padding
        is. `keys` is True for those that some row sees; returns what is left of `unseen`."""
        in_any = keys.flatten(0, -2)
        alike = len(in_any) == 1
        seen = (in_any[0] if alike else in_any.any(dim=0)).nonzero()
        begin, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
        self._seen_range = begin, end
        if len(seen) < end - begin or not (alike or keys[..., begin:end].all()):
            return unseen
        mask, s = self.scoring.attn_mask, self.scoring
        alone = self.ranges is None and s.window_left < 0 and s.window_right < 0
        if mask is not None and mask.dtype == torch.bool and mask.shape[-2] == 1 and alone:
            self._range_is_shown = mask.numel() == keys.numel()  # of each head, not of a group
        return None

    def _hidden(self, shown: Tensor) -> Tensor | None:
        """True where `shown` is not, with a last dimension of 1; None if that is known to be
        nowhere, which only the CPU can say without waiting."""
        if self.device.type == "cpu" and shown.all():
            return None
        return ~shown.unsqueeze(-1)

    def seeing(self, x: Tensor) -> Tensor:
        """(B, Hq, L, E), 0 in rows that the mask leaves without a key, whatever was left there."""
        if self.blind_rows is None:
            return x
        return self.as_masked(x).masked_fill(self.blind_rows, 0.0).reshape(x.shape)

    def _seen(self, x: Tensor, unseen: Tensor | None) -> Tensor:
        """Keys or values as (N, S, D); what no row may see is 0, whatever the caller left there."""
        x = x.to(self.dtype)
        if unseen is not None:
            x = self.as_masked(x).masked_fill(unseen, 0.0)
        return x.reshape(self.batch * self.num_kv_heads, *x.shape[-2:])

    def as_masked(self, x: Tensor) -> Tensor:
        """(B, ...) as a view whose batch dimensions are those of the mask."""
        batch = self.scoring.mask_batch(self.batch)
        return x if len(batch) == 1 else x.unflatten(0, batch)

    def _with_batch_of_mask(self, x: Tensor) -> Tensor:
        """`as_masked` of what may also be (1, ...), for all batches."""
        batch = self.scoring.mask_batch(self.batch)
        return self.as_masked(x) if len(batch) == 1 or x.shape[0] != 1 else x.unsqueeze(0)

    def outside(self, block: Block) -> Tensor | None:
        """True where windows or key ranges hide a key of the block; None where they hide nothing.

        (rows, cols), or (1 or B, 1 or Hq, rows, cols).
        """
        if self.ranges is None:
            return outside_window(block, self.scoring, self.device)
        return self.ranges.hidden(block.row0, block.row1, block.col0, block.col1)

    def _per_head(self, x: Tensor) -> Tensor:
        """(Hq) or (B, Hq) -> (1 or B, Hq, 1, 1) in compute precision."""
        return x.to(self.dtype).view(-1, self.num_heads, 1, 1)

    def blocks(self) -> Iterator[Block]:
        limits = CPU_LIMITS if self.device.type == "cpu" else GPU_LIMITS
        sizes = self.batch, self.num_heads, self.q_len, self.kv_len
        begin, end = self._seen_range
        for block in blocks(*sizes, self.scoring, limits, self.ranges):
            if end - begin == self.kv_len:
                yield block
                continue
            col0 = min(max(block.col0, begin), end)
            yield replace(block, col0=col0, col1=max(min(block.col1, end), col0))

    def kept(self, name: str, block: Block) -> Tensor | None:
        """Memory for a number of each score of the block, (N, group * rows, cols), on the CPU.

        It is the same for all blocks: new memory costs more there than what is computed in it.
        """
        if self.device.type != "cpu":
            return None
        shape = len(self.k), self.group * (block.row1 - block.row0), block.col1 - block.col0
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or len(kept) < size:
            kept = self._kept[name] = self.k.new_empty(size)
        return _range(kept, 0, 0, size).view(shape)

    def rows(self, x: Tensor, block: Block) -> Tensor:
        """(B, Hq, L, E) -> the block's rows in compute precision.

        Rows that the windows leave without a key are 0, whatever the caller left there.
        """
        rows = block.rows(x).to(self.dtype)
        if self.ranges is not None:  # `seeing` has done it
            return rows
        begin, end = seeing_rows(self.kv_len, self.scoring)
        begin, end = max(begin - block.row0, 0), min(end, block.row1) - block.row0
        if begin > 0 or end < rows.shape[2]:
            part = rows[:, :, begin : max(begin, end)]
            rows = torch.zeros_like(rows)
            rows[:, :, begin : max(begin, end)] = part
        return rows

    def rows_by_kv_head(self, x: Tensor, block: Block) -> Tensor:
        """(B, Hq, L, E) -> the block's rows as (N, group * rows, E) in compute precision."""
        rows = self.rows(x, block)
        return rows.reshape(len(self.k), self.group * (block.row1 - block.row0), x.shape[3])

    def rows_by_head(self, x: Tensor, block: Block) -> Tensor:
        """(N, group * rows, E) -> (B, Hq, rows, E)."""
        return x.view(self.batch, self.num_heads, block.row1 - block.row0, x.shape[2])

    def by_kv_head(self, x: Tensor) -> Tensor:
        """(B, Hq, rows, E) -> (N, group * rows, E)."""
        return x.reshape(len(self.k), self.group * x.shape[2], x.shape[3])

    def scores(self, q: Tensor, block: Block) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, Hq, rows, cols) in the unit of the exponent, hidden ones -inf; softcap's tanh; and
        the largest score of each row, where that has been found on the way.

        The tanh is None without a softcap.
        """
        x, factor, tanh = self._unmasked_scores(q, block)
        hidden = self.outside(block)
        top = None
        if self.scoring.attn_mask is None or self._range_is_shown:
            scaled(x, factor)
        else:
            mask = block.of_mask(self.scoring.attn_mask)
            if mask.dtype != torch.bool:
                scale_and_add(self.as_masked(x), factor, mask)
            elif hidden is None and self._unseen_in_k is None and self._adds_sooner(mask, x):
                scale_and_add(self.as_masked(x), factor, _addend(mask, x))
                top = x.amax(dim=-1, keepdim=True)
                if math.isnan(top.sum().item()):  # maybe of a score that the mask hides
                    x, factor, tanh = self._unmasked_scores(q, block)
                    self.as_masked(scaled(x, factor)).masked_fill_(~mask, -math.inf)
                    top = None
            else:
                self._hide(scaled(x, factor), mask)
        if hidden is not None:
            x.masked_fill_(hidden, -math.inf)
        return x, tanh, top

    def _unmasked_scores(self, q: Tensor, block: Block) -> tuple[Tensor, float, Tensor | None]:
        """`scores` before a mask, windows and key ranges hide any; the factor that they still lack;
        softcap's tanh.

        The factor comes behind the product: within it, BLAS may round each operand by it, and a sum
        of numbers that are exact would not be.
        """
        s = self.scoring
        k = block.cols(self.k).transpose(1, 2)
        x = self.rows_by_head(product(q, k, into=self.kept("scores", block)), block)
        factor, tanh = s.scale * self.per_exponent, None
        if s.softcap > 0.0:
            of_cap = factor / s.softcap
            if is_normal(of_cap, x.dtype):
                tanh = scaled(x, of_cap).tanh_()
            else:
                tanh = scaled(x, factor).div_(s.softcap).tanh_()
            x, factor = tanh * s.softcap, 1.0
        if s.alibi_slopes is not None:
            distance = self._distance(block).to(self.dtype)
            scaled(x, factor).addcmul_(self._per_head(s.alibi_slopes), distance, value=-1.0)
            factor = 1.0
        return x, factor, tanh

    def _hide(self, x: Tensor, mask: Tensor) -> None:
        """Hides scores by a boolean mask."""
        if self._adds_sooner(mask, x) and math.isfinite(x.sum().item()):
            self.as_masked(x).add_(_addend(mask, x))
            return
        if self._unseen_in_k is not None:
            k = self.k.view(self.batch, self.num_kv_heads, *self.k.shape[1:])
            self.k, self._unseen_in_k = self._seen(k, self._unseen_in_k), None
        self.as_masked(x).masked_fill_(~mask, -math.inf)

    def _adds_sooner(self, mask: Tensor, x: Tensor) -> bool:
        """Whether scores take 0 and -inf for a boolean mask sooner than by a choice: where several
        heads share the mask.

        No score may be NaN or inf then. That no row's largest score is NaN says so later. Where
        keys are left as they are though no row sees them, or more is hidden, a finite sum of the
        scores is the proof. Only the CPU can look without waiting.
        """
        return self._proves_scores_finite(mask) and 0 < 4 * mask.numel() <= x.numel()

    def _proves_scores_finite(self, mask: Tensor | None) -> bool:
        """Whether `scores` looks for a score that is not finite, of which one follows from a key
        that is not. So keys need no copy with those left out that no row sees, until then."""
        return mask is not None and mask.dtype == torch.bool and self.device.type == "cpu"

    def _distance(self, block: Block) -> Tensor:
        """How far each key of the block is from the place of each row, for ALiBi."""
        if self.ranges is not None:
            return self.ranges.distance(block.row0, block.row1, block.col0, block.col1)
        i = torch.arange(block.row0, block.row1, device=self.device) + self.scoring.diagonal
        j = torch.arange(block.col0, block.col1, device=self.device)
        return (i.unsqueeze(1) - j).abs()

    def exponentials(self, x: Tensor, top: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turns the scores into exponentials counted from the largest of their row, in place.

        `top` is the largest of each row where it is known.
        Returns the origin and the sum of each row, (B, Hq, rows, 1), and the sinks' exponentials.
        A row without a key counts from the lowest finite number, and its sum is 0. Every other sum
        is at least 1, since the largest score's exponential is. A sink is among the scores: one of
        +inf makes sums NaN, but for rows without a key, where it is alone.
        """
        lowest = torch.finfo(x.dtype).min
        blind: Tensor | None = None
        if x.shape[3] == 0:  # no key in sight
            origin = x.new_full((*x.shape[:3], 1), lowest)
        else:
            top = x.amax(dim=-1, keepdim=True) if top is None else top
            if self.sinks is not None:
                blind = top == -math.inf
            origin = top.clamp_(min=lowest)
        if self.sinks is not None:
            origin = torch.maximum(origin, self.sinks)
        self._exp_(x.sub_(origin))
        total = x.sum(dim=-1, keepdim=True)
        if self.sinks is None:
            return origin, total, None
        sink = self._exp_(self.sinks - origin)
        alone = self.sinks == math.inf
        sink.masked_fill_(alone if blind is None else alone & blind, 1.0)
        return origin, total.add_(sink), sink

    def in_unit(self, origin: Tensor, total: Tensor) -> Tensor:
        """The rows' origins in the call's unit, where the scores may be powers of two."""
        if self.scores_in_powers == self.scoring.plain:
            return origin
        lowest = torch.finfo(origin.dtype).min
        return origin.div_(_LOG2_E).masked_fill_(total == 0.0, lowest)

    def _exp_(self, x: Tensor) -> Tensor:
        """The exponential in the call's unit, in place.

        On the CPU powers of e are powers of two: torch.exp there takes up to 25 times as long for
        numbers of which nothing is left, as -inf (MKL). x is a difference by now, no mask that
        could overflow, and far below 0 a digit more or less of it is lost on a weight of nearly 0.
        """
        if self.scores_in_powers:
            return torch.exp2(x, out=x)
        if self.device.type == "cpu":
            return torch.exp2(x.mul_(_LOG2_E), out=x)
        return torch.exp(x, out=x)

    def keep(self, block: Block) -> Tensor | None:
        """Dropout's multiplier on the block's weights: 0 or 1 / (1 - p)."""
        s = self.scoring
        if not self.has_dropout:
            return None
        kept = dropout.keep_block(
            self.seed, s.dropout_p, self.batch, self.num_heads,
            (block.row0, block.row1), (block.col0, block.col1), self.device,
        )  # fmt: skip
        return kept.to(self.dtype).mul_(dropout.rescale(s.dropout_p))
