"""Problems whose scores are not plain: their tensors, what each row sees, their mathematics."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_cases import SEED, Case
from torch import Tensor

from orchard_ops import dropout
from orchard_ops.testing import MathResult, math_attention

from ..harness import BOOL, DTYPE_NUMBERS, MaskPlace

_RUNS = torch.tensor((2, 130, 260, 263, 392, 395))
"""Blocks of 32 queries and 32 keys that are seen, by the sum of their numbers: between them, 127,
129, 2, 128 and 2 are hidden."""


@dataclass(frozen=True)
class Scores:
    """A problem: a case, and how its mask lies in memory and what it hides."""

    case: Case
    #: "": as the case draws it; "blocks", "entries", "padding", "rows", "sixteens", "firsts" (of
    #: blocks), "first keys" (of blocks), "runs" (of blocks) and "mirrored runs", "tail", "gap" (all
    #: blocks but the first and the last); "half": half as much; "late" raises keys instead.
    hides: str = ""
    side_by_side: bool = False  # whether the mask's elements lie in pairs
    transposed: bool = False  # whether those of a key do, of one query after the other
    folded: tuple[int, int] = (0, 0)  # the mask's two batch dimensions, if it has two
    dlse: bool = True
    store_ds: bool = False
    mask_grad: bool = False
    parts: int = 0  # threadgroups that share a tile of the mask's gradient; 0: as planned
    extreme: bool = False  # whether some numbers of key_ranges are the lowest and the highest
    aligned: bool = False  # whether key_ranges begin and end with blocks, of keys and of rows
    edges: str = ""  # what becomes of these: see _with_edges
    span: int = 0  # of keys, as the plan hears of it
    raised: float = 0.0  # what sinks are raised by
    columns: bool = False  # whether it is the queries of one column that lie side by side

    @property
    def ds_keys(self) -> int:
        """Keys that have a place of their own in dS of 8 queries, where not all have."""
        return -(-(self.span + 7) // 64) * 64 if self.span else 0

    def mask(self) -> Tensor | None:
        mask = self.case.scoring().attn_mask
        if mask is None:
            return None
        rows, keys = torch.arange(mask.shape[2])[:, None], torch.arange(mask.shape[3])
        if self.hides == "firsts":
            return _without_firsts(rows, keys).expand(mask.shape)
        if self.hides == "late":  # the first weights would be right below 2^16 of the later ones
            return torch.where(keys < 32, 0.0, 15.9998 * math.log(2)).expand(mask.shape)
        if self.hides == "half":
            batches, heads = (torch.arange(n)[:, None, None] for n in mask.shape[:2])
            return mask | ((rows // 32 + heads + batches[:, None]) % 2 == 0)
        entries, heads = (torch.arange(mask.shape[d]) for d in (0, 1))
        entries = entries[:, None, None, None] + heads[:, None, None]
        hidden = {
            "": rows + keys < 0, "blocks": (rows // 32 + keys // 32) % 2 == 1,
            "entries": (rows // 32 + keys // 32 + entries) % 2 == 1,
            "runs": (rows // 32 + keys // 32)[..., None].ne(_RUNS).all(-1),
            "mirrored runs": (keys // 32 - rows // 32)[..., None].ne(_RUNS).all(-1),
            "tail": (rows >= 32) | (keys >= 32), "gap": _between_ends(rows // 32 + keys // 32),
            "padding": (keys >= 40) | (keys < 3), "rows": (rows % 5 == 2) | (keys % 3 == 1),
            "first keys": keys % 32 == 0, "sixteens": keys // 16 % 2 == 0,
        }[self.hides]  # fmt: skip
        hidden = hidden.expand(mask.shape)
        if mask.dtype == torch.bool:
            return mask & ~hidden
        return mask.masked_fill(hidden, -math.inf)


def _between_ends(blocks: Tensor) -> Tensor:
    return (blocks > 0) & (blocks < blocks.max())


def _without_firsts(rows: Tensor, keys: Tensor) -> Tensor:
    """A boolean mask of blocks of 32 queries and 32 keys, whose first ones stand out: each first
    query sees nothing; the first key of the first block is hidden, and of the next two blocks only
    one key is seen, that in the middle and the first; the fifth is left to some queries. One block
    lets all pairs through, unlike that across the diagonal.
    """
    block = keys // 32
    hidden = (rows % 32 == 0) | (keys == 0) | ((block == 4) & (rows // 32 != 2))
    hidden = hidden | ((block == 1) & (keys != 48)) | ((block == 2) & (keys != 64))
    return ~hidden | ((rows // 32 == 3) & (block == 2))


@dataclass(frozen=True)
class Sight:
    """The keys of each row, by key_ranges: [begin, end), [0, prefix), as ranges.h keeps them.

    All are (B, Hq, L). Where a row's first range is empty, it begins beyond all keys, with an end
    of 0.
    """

    begin: Tensor
    end: Tensor
    prefix: Tensor
    position: Tensor

    @classmethod
    def of(cls, case: Case, key_ranges: Tensor) -> Sight:
        full = (case.batch, case.num_heads, -1, -1)
        begin, end, position, prefix = key_ranges.long().expand(full).unbind(-1)
        position = position.clamp(-(1 << 29), 1 << 29)
        left, right = (w if w >= 0 else 1 << 30 for w in (case.window_left, case.window_right))
        last = (position + right + 1).clamp(max=case.kv_len)
        begin = torch.maximum(begin.clamp(min=0), position - left)
        end, prefix = torch.minimum(end, last), torch.minimum(prefix, last).clamp(min=0)
        empty = begin >= end
        return cls(begin.masked_fill(empty, 1 << 30), end.masked_fill(empty, 0), prefix, position)

    def sees(self, kv_len: int) -> Tensor:
        key = torch.arange(kv_len)
        begin, end, prefix = (x[..., None] for x in (self.begin, self.end, self.prefix))
        return (key < prefix) | ((key >= begin) & (key < end))

    def hull(self, batch: int, head: int, rows: slice) -> tuple[int, int, int]:
        """begin, end and prefix of what several rows see."""
        begin, end, prefix = (x[batch, head, rows] for x in (self.begin, self.end, self.prefix))
        return int(begin.min()), int(end.max()), int(prefix.max())


def fits(hull: tuple[int, int, int], keys: int) -> bool:
    begin, end, prefix = hull
    return max(prefix, end) <= (0 if prefix else begin) // 8 * 8 + keys


def meets(hull: tuple[int, int, int], key0: int, key1: int) -> bool:
    begin, end, prefix = hull
    return key0 < prefix or (begin < key1 and end > key0)


@dataclass(frozen=True)
class Given:
    """A problem's tensors by the names of their buffers, and what its results must be."""

    tensors: dict[str, Tensor]
    mask: MaskPlace | None
    ref: MathResult
    eager: MathResult
    seen: Tensor  # (B, Hq, L, S)
    within: Tensor  # (L, S), what the windows leave; with key ranges all
    passes: Tensor  # (B, Hq, L, S), what the mask lets through
    sight: Sight | None  # by key ranges
    map_has_ranges: bool  # where rows of the mask differ
    ds: Tensor  # float64, of scale * q k^T
    dscores: Tensor  # float64, of what the mask is added to
    fields: dict[str, Any] = field(default_factory=dict)


def _five(x: Tensor, folded: tuple[int, int]) -> Tensor:
    return x.unflatten(0, folded) if folded != (0, 0) else x[:, None]


def _placed(mask: Tensor, problem: Scores) -> tuple[Tensor, MaskPlace, Tensor, Tensor]:
    """The mask's memory, its place in it, the mask, and what it means with four dimensions."""
    folded, case = problem.folded, problem.case
    if folded != (0, 0):
        mask = mask[: math.prod(folded)]
    five = _five(mask, folded)
    if problem.transposed:
        wide = five.new_ones((*five.shape[:3], five.shape[4], five.shape[3] + 1))
        view, offset = wide[..., : five.shape[3]].mT, 0
    else:
        pad = 2 if problem.side_by_side else 1 + five.shape[4] % 2
        pad = 0 if problem.side_by_side and five.shape[4] == 1 else pad
        wide = five.new_ones((*five.shape[:4], five.shape[4] + pad))
        offset = pad if five.shape[4] > 1 else 0
        view = wide[..., offset:] if offset else wide[..., :1]
    view.copy_(five)
    outer, inner = five.shape[:2]
    inner_size = inner if inner > 1 else case.batch // outer
    number = BOOL if mask.dtype == torch.bool else DTYPE_NUMBERS[mask.dtype]
    place = MaskPlace(tuple(view.shape), view.stride(), view.storage_offset(), inner_size, number)
    if folded == (0, 0):
        return wide, place, mask, mask
    batches = (case.batch // inner_size, inner_size)
    meaning = five.expand(*batches, *five.shape[2:]).flatten(0, 1)
    return wide, place, five, meaning


def _aligned(key_ranges: Tensor) -> Tensor:
    """The same for all rows of a block, which sees whole blocks of keys: 8 each, or 32 each in
    every other head. Some see none, whose first range begins where it ends.
    """
    aligned = key_ranges.clone()
    for entry, heads in enumerate(aligned):
        for head, rows in enumerate(heads):
            block = 8 if (entry + head) % 2 == 0 else 32
            for first in range(0, len(rows), block):
                begin, end, _, prefix = (rows[first] // block * block).tolist()
                prefix = 0 if first // block % 3 else prefix
                for column, key in ((0, begin), (1, end), (3, prefix)):
                    rows[first : first + block, column] = key
    return aligned


def _with_edges(key_ranges: Tensor, edges: str) -> Tensor:
    """What `edges` names. "inside": a key less at each end. "outside": one more. "first key": every
    prefix is one key, every other 8 rows see nothing else. "long": 65 keys. "late": none from row
    520 on. "other rows": 12 keys, and of every other row more, as a prefix. "apart": 8 keys of 8
    rows, with many keys between the first and those of the next.
    """
    edged, rows = key_ranges.clone(), torch.arange(key_ranges.shape[2])
    begin, end, _, prefix = edged.unbind(-1)
    if edges == "inside":
        begin += 1
        end -= 1
        prefix.sub_(1).clamp_(min=0)
    elif edges == "outside":
        begin -= 1
        end += 1
    elif edges == "first key":
        prefix[:] = 1
        end[:] = torch.where(rows // 8 % 2 == 0, begin, end)
    elif edges == "long":
        prefix[:] = 0
        end[:] = begin + 65
    elif edges == "apart":
        prefix[:] = 0
        begin[:] = torch.where(rows // 8 == 4, 40, rows // 8 % 2 * 90)
        end[:] = begin + 8
    elif edges == "other rows":
        begin[:], end[:] = 0, 12
        prefix[:] = torch.where(rows % 2 == 0, 24, 0)
    else:
        begin[:], prefix[:] = 0, 0
        end[:] = torch.where(rows < 520, 1 << 20, 0)
    return edged


@functools.cache
def given(problem: Scores) -> Given:
    case = problem.case
    q, k, v, dout = case.operands()
    scoring, mask = case.scoring(), problem.mask()
    if scoring.sinks is not None:
        scoring = scoring._replace(sinks=scoring.sinks + problem.raised)
    tensors = {"query": q, "key": k, "value": v, "dout": dout}
    mask_place = meaning = None
    if mask is not None:
        memory, mask_place, mask, meaning = _placed(mask, problem)
        tensors["mask"] = memory.view(torch.uint8) if memory.dtype == torch.bool else memory
    if scoring.sinks is not None:
        tensors["sinks"] = scoring.sinks
    if scoring.alibi_slopes is not None:  # every other number
        between = torch.full_like(scoring.alibi_slopes, math.nan)
        tensors["alibi_slopes"] = torch.stack((scoring.alibi_slopes, between), -1)
    dlse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(2))
    if problem.dlse:
        tensors["dlse"] = dlse
    key_ranges = scoring.key_ranges
    if key_ranges is not None:
        key_ranges = key_ranges.clone()
        if problem.extreme:
            key_ranges[..., ::7, 0], key_ranges[..., 1::7, 1] = -(1 << 31), (1 << 31) - 1
            key_ranges[..., 2::7, 2], key_ranges[..., 4::7, 2] = -(1 << 31), (1 << 31) - 1
            key_ranges[..., 3::7, 2] = (1 << 28) + 40
        if problem.aligned:
            key_ranges = _aligned(key_ranges)
        if problem.edges:
            key_ranges = _with_edges(key_ranges, problem.edges)
        tensors["key_ranges"] = key_ranges.contiguous()
    scoring = scoring._replace(attn_mask=mask, key_ranges=key_ranges)
    arguments = scoring._asdict() | {"dropout_seed": SEED}
    ref, eager = (
        math_attention(q, k, v, dout, dlse if problem.dlse else None, dtype=t, **arguments)
        for t in (torch.float64, case.dtype)
    )
    row = torch.arange(case.q_len)[:, None] + case.diagonal
    key = torch.arange(case.kv_len)
    left, right = (w if w >= 0 else 1 << 30 for w in (case.window_left, case.window_right))
    within = (key >= row - left) & (key <= row + right)
    sight = None if key_ranges is None else Sight.of(case, key_ranges)
    if sight is not None:
        within = torch.ones_like(within)
    seen = within.expand(case.batch, case.num_heads, -1, -1)
    passes = torch.ones_like(seen)
    if meaning is not None:
        passes = passes & (meaning if meaning.dtype == torch.bool else meaning != -math.inf)
    seen = seen & passes
    hidden = [seen]
    if sight is not None:
        hidden.append(sight.sees(case.kv_len))
        seen = seen & hidden[1]
    map_has_ranges = sight is not None and mask_place is not None and mask_place.sizes[3] > 1
    if map_has_ranges:
        hidden = [seen]
    slopes = scoring.alibi_slopes
    fields = {
        "scale": scoring.scale, "dropout_p": case.dropout_p, "diagonal": case.diagonal,
        "window_left": case.window_left, "window_right": case.window_right,
        "softcap": case.softcap, "has_alibi": slopes is not None,
        "has_sinks": scoring.sinks is not None, "mask_grad": problem.mask_grad,
    }  # fmt: skip
    if key_ranges is not None:
        batches, heads = key_ranges.shape[:2]
        fields |= {
            "has_key_ranges": True,
            "ranges_batch": 4 * heads * case.q_len if batches > 1 else 0,
            "ranges_head": 4 * case.q_len if heads > 1 else 0,
            "key_span": problem.span,
        }
    if slopes is not None:
        fields |= {"alibi_batch": 2 * slopes.stride(0) if slopes.dim() == 2 else 0, "alibi_head": 2}
    if mask_place is not None:
        fields["mask"] = mask_place
    ds = _ds(case, (q, k, v, dout), dlse * problem.dlse, meaning, seen, sight, scoring.sinks)
    _hide(case, tensors, seen, hidden)
    if problem.columns:
        tensors["query"] = tensors["query"].mT.contiguous().mT
    return Given(
        tensors, mask_place, ref, eager, seen, within, passes, sight, map_has_ranges, *ds, fields
    )


def _hide(case: Case, tensors: dict[str, Tensor], seen: Tensor, hidden: Sequence[Tensor]) -> None:
    """What takes no part becomes NaN: keys that no row sees, rows that see no key.

    Of the keys, those that one of `hidden` (a mask with the window, key ranges) hides from all
    rows. A mask whose rows do not differ hides nothing together with key ranges.
    """
    by_group = (x.unflatten(1, (case.num_kv_heads, -1)).any(2).any(2) for x in hidden)
    of_group = functools.reduce(torch.logical_and, by_group)
    blind = ~seen.any(-1)
    for name, unseen in (("query", blind), ("dout", blind), ("key", ~of_group),
                         ("value", ~of_group)):  # fmt: skip
        tensors[name] = tensors[name].masked_fill(unseen[..., None], math.nan)


def _ds(case: Case, operands: tuple[Tensor, ...], dlse: Tensor, mask: Tensor | None,
        seen: Tensor, sight: Sight | None,
        sinks: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of scale * q k^T, and of what a mask is added to, in float64."""
    q, k, v, dout = (x.double() for x in operands)
    group, scoring = case.num_heads // case.num_kv_heads, case.scoring()
    product = (scoring.scale * q @ k.repeat_interleave(group, 1).mT).requires_grad_()
    score = product
    if case.softcap:
        score = case.softcap * torch.tanh(score / case.softcap)
    if scoring.alibi_slopes is not None:
        place = torch.arange(case.q_len) + case.diagonal if sight is None else sight.position
        distance = place[..., None] - torch.arange(case.kv_len)
        slopes = scoring.alibi_slopes.double().view(-1, case.num_heads, 1, 1)
        score = score - slopes * distance.abs()
    addend = torch.zeros_like(score, requires_grad=True)
    score = score + addend
    if mask is not None and mask.dtype != torch.bool:
        score = score + mask.double()
    score = score.masked_fill(~seen, -1e30)
    logits = score
    if sinks is not None:
        sink = sinks.double().view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        logits = torch.cat((score, sink), -1)
    weights = torch.softmax(logits, -1)[..., : case.kv_len] * seen
    if case.dropout_p:
        kept = dropout.dropout_mask(SEED, case.dropout_p, tuple(score.shape))
        weights = weights * kept * dropout.rescale(case.dropout_p)
    out = weights @ v.repeat_interleave(group, 1)
    lse = torch.logsumexp(logits, -1).masked_fill(~seen.any(-1) & (logits is score), 0.0)
    loss = (out * dout).sum() + (lse * dlse.double()).sum()
    return torch.autograd.grad(loss, (product, addend))
