"""The patterns that transformers builds masks from, read as intervals of keys.

transformers describes a mask by a function (batch, head, query, key) -> bool, put together from
closures of `transformers.masking_utils`. `interval_of` knows those closures by their code, and says
the mask as an interval of keys per query. Under torch.compile closures cannot be opened; there
`interval_of_neighbours` finds the interval by asking the function which neighbours see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as theirs

MaskFunction = Callable[..., Any]


def _code(function: MaskFunction) -> CodeType:
    return function.__code__


_ANY: Any = None
CAUSAL = theirs.causal_mask_function
FULL = theirs.bidirectional_mask_function
_AND = _code(theirs.and_masks(CAUSAL))
_OR = _code(theirs.or_masks(CAUSAL))
_SLIDING = _code(theirs.sliding_window_overlay(1))
_SLIDING_BOTH = _code(theirs.sliding_window_bidirectional_overlay(1))
_CHUNKS = _code(theirs.chunked_overlay(1, _ANY))
_BLOCKS = _code(theirs.blockwise_overlay(_ANY))
_PACKED = _code(theirs.packed_sequence_mask_function(_ANY))
_REMAPPED = _code(theirs.remap_positions_for_packed_sequence(CAUSAL, _ANY))


class Unsayable(Exception):
    """The function is no interval of keys per query, as far as is known."""


@dataclass
class Interval:
    """Keys from max(begin, q - left) to before min(end, q + right + 1); None and -1 are open.

    All count keys of the whole sequence, as transformers does.
    """

    left: int = -1
    right: int = -1
    begin: Tensor | None = None
    """(1 or B, L)"""
    end: Tensor | None = None
    holds_itself: bool = True
    """Whether a query is known to see the key that it stands at."""

    def __and__(self, other: Interval) -> Interval:
        return Interval(
            _narrower(self.left, other.left),
            _narrower(self.right, other.right),
            _both(torch.maximum, self.begin, other.begin),
            _both(torch.minimum, self.end, other.end),
            self.holds_itself and other.holds_itself,
        )

    def ends(self, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The interval without windows."""
        begin = None if self.left < 0 else q - self.left
        end = None if self.right < 0 else q + (self.right + 1)
        return _both(torch.maximum, self.begin, begin), _both(torch.minimum, self.end, end)


def _narrower(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _both(choose: Callable, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return choose(a, b)


def interval_of(function: MaskFunction, q: Tensor) -> Interval:
    """The interval that a mask function leaves the queries at q (1 or B, L).

    Raises:
        Unsayable: for a function that is not known to be an interval.
    """
    if function is CAUSAL:
        return Interval(right=0)
    if function is FULL:
        return Interval()
    code = getattr(function, "__code__", None)
    if code is _AND:
        (parts,) = _captured(function)
        return _intersection(parts, q)
    if code is _OR:
        (parts,) = _captured(function)
        return _union(parts, q)
    if code is _SLIDING:
        (size,) = _captured(function)
        return Interval(left=_size(size) - 1)
    if code is _SLIDING_BOTH:
        (size,) = _captured(function)
        return Interval(left=_size(size), right=_size(size))
    if code is _CHUNKS:
        size, padding = _captured(function)
        first = padding[:, None]
        begin = torch.div(q - first, _size(size), rounding_mode="floor") * size + first
        return Interval(begin=begin, end=begin + size)
    raise Unsayable


def _captured(function: MaskFunction) -> tuple[Any, ...]:
    """The captured variables, in the order of their names."""
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


def _size(n: Any) -> int:
    if not isinstance(n, int) or n < 1:
        raise Unsayable
    return n


def _intersection(parts: tuple[MaskFunction, ...], q: Tensor) -> Interval:
    """Of a conjunction. Packing comes as two parts, which mean something together only."""
    codes = [getattr(part, "__code__", None) for part in parts]
    packed = [part for part, code in zip(parts, codes) if code is _PACKED]
    if len(packed) > 1 or ((_REMAPPED in codes or _holds_remapped(parts)) and not packed):
        raise Unsayable
    result = Interval()
    for part, code in zip(parts, codes):
        if code is _PACKED:
            result &= _runs(_captured(part)[0], q)
        elif packed and (code is _REMAPPED or code is _OR):
            result &= _in_packed(part, q)
        else:
            result &= interval_of(part, q)
    return result


def _holds_remapped(parts: tuple[MaskFunction, ...]) -> bool:
    return any(
        getattr(part, "__code__", None) is _OR
        and any(getattr(f, "__code__", None) is _REMAPPED for f in _captured(part)[0])
        for part in parts
    )


def _in_packed(function: MaskFunction, q: Tensor) -> Interval:
    """Of a part that stands beside `_PACKED`: within a document positions count up by one, so that
    what is near in positions is as near in keys."""
    code = getattr(function, "__code__", None)
    if code is _OR:
        (parts,) = _captured(function)
        return _union(parts, q, in_packed=True)
    if code is not _REMAPPED:
        return interval_of(function, q)
    inner, position_ids = _captured(function)
    place = position_ids.gather(1, q.expand(position_ids.shape[0], -1))
    found = interval_of(inner, place)
    shift = q - place
    begin = None if found.begin is None else found.begin + shift
    end = None if found.end is None else found.end + shift
    return Interval(found.left, found.right, begin, end, found.holds_itself)


def _union(parts: tuple[MaskFunction, ...], q: Tensor, in_packed: bool = False) -> Interval:
    """Of a disjunction of an interval round the query with the block that the query is in."""
    if len(parts) != 2 or getattr(parts[1], "__code__", None) is not _BLOCKS:
        raise Unsayable
    first = _in_packed(parts[0], q) if in_packed else interval_of(parts[0], q)
    if not first.holds_itself:
        raise Unsayable
    (ids,) = _captured(parts[1])
    begin, end = first.ends(q)
    is_block = ids.gather(1, q.expand(ids.shape[0], -1)) >= 0
    block = _runs(ids, q)
    assert block.begin is not None and block.end is not None
    return Interval(
        begin=None if begin is None else torch.where(is_block, begin.minimum(block.begin), begin),
        end=None if end is None else torch.where(is_block, end.maximum(block.end), end),
    )


def _runs(ids: Tensor, q: Tensor) -> Interval:
    """The run of equal ids (B, T) that each query stands in."""
    number = (ids != ids.roll(1, -1)).cumsum(-1)
    of_query = number.gather(1, q.expand(ids.shape[0], -1))
    return Interval(
        begin=torch.searchsorted(number, of_query),
        end=torch.searchsorted(number, of_query, right=True),
    )


def interval_of_neighbours(
    function: MaskFunction,
    q: Tensor,
    batch: int,
    keys: tuple[int, int],
    local_size: int | None,
    both_ways: bool,
) -> Interval:
    """The interval of each query, from which neighbours see each other: for torch.compile.

    What transformers puts together without functions of the user is told apart by the neighbours.
    A key that does not see the one before it begins a document or a chunk. A key that sees the next
    one is in a block with it. Chunks and blocks do not come together.

    Args:
        q: where the queries stand, (1 or B, L).
        keys: the first key, and how many there are.
        local_size: the size of the window or of the chunks, if there are any.
        both_ways: whether the mask is not causal.

    Raises:
        Unsayable: for a function that transformers has not put together.
    """
    if function is CAUSAL:
        return Interval(right=0)
    if function is FULL:
        return Interval()
    code = function.__code__
    if both_ways:
        if code is not _AND or local_size is None:
            raise Unsayable
        return Interval(left=local_size, right=local_size)
    if not (code is _AND or code is _OR or code is _REMAPPED):
        raise Unsayable
    first, count = keys
    of_batch = torch.arange(batch, device=q.device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=q.device)
    j = torch.arange(first + 1, first + count, device=q.device)[None]
    document = _numbered(function(of_batch, head, j, j - 1), batch)
    block = _numbered(function(of_batch, head, j - 1, j), batch)
    at = (q - first).clamp(0, count - 1).expand(batch, -1)
    of_query = document.gather(1, at)
    begin = torch.searchsorted(document, of_query) + first
    if local_size is not None:
        begin = torch.maximum(begin, q - (local_size - 1))
    of_query = block.gather(1, at)
    begin = torch.minimum(begin, torch.searchsorted(block, of_query) + first)
    return Interval(begin=begin, end=torch.searchsorted(block, of_query, right=True) + first)


def _numbered(linked: Tensor, batch: int) -> Tensor:
    """The number of the run that each key is in, (B, T), from whether it is linked to the one
    before it, (1 or B, T - 1)."""
    parts = (~linked).expand(batch, -1).cumsum(-1)
    return torch.cat([parts.new_zeros((batch, 1)), parts], 1)
