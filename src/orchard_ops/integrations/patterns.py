"""The masks of transformers, read as intervals of keys.

transformers describes a mask by a function (batch, head, query, key) -> bool. `interval_of` has it
say what it computes (mask_symbols.py), and reads that as an interval of keys per query. It does not
matter who wrote the function or how it was put together, and torch.compile traces it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import masking_utils

from ..mask_symbols import MaskFunction, Symbol, Unsayable, said_by

NUMBER_EACH_BLOCK = frozenset(
    ("gemma3_text", "gemma4_text", "gemma4_unified_text", "diffusion_gemma_text")
)
"""Families whose blocks, such as images, have a number each. With others (Molmo 2, GIT, PaliGemma)
all images have the same one and see each other, wherever they stand, which is no interval."""


@dataclass
class Interval:
    """Keys from max(begin, q - left) to before min(end, q + right + 1); None and -1 are open.

    The key that the query stands at is one of them. All count keys of the whole sequence, as
    transformers does.
    """

    left: int = -1
    right: int = -1
    begin: Tensor | None = None
    """(1 or B, L)"""
    end: Tensor | None = None

    def __and__(self, other: Interval) -> Interval:
        return Interval(
            _narrower(self.left, other.left),
            _narrower(self.right, other.right),
            _both(torch.maximum, self.begin, other.begin),
            _both(torch.minimum, self.end, other.end),
        )

    @property
    def hides_nothing(self) -> bool:
        return self.begin is None and self.end is None and self.left < 0 and self.right < 0

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


def interval_of(
    function: MaskFunction, q: Tensor, blocks_are_runs: bool, is_packed: bool = True
) -> Interval:
    """The interval that a mask function leaves the queries at q (1 or B, L).

    Args:
        blocks_are_runs: whether the keys of a block of transformers stand together.
        is_packed: whether equal numbers of transformers mean documents, which stand together.

    Both hold only where all of the function is transformers' own code: what a user's numbers mean
    is not known.

    Raises:
        Unsayable: for a function that is not known to be an interval.
    """
    said = said_by(function, q.device)
    if blocks_are_runs or is_packed:
        own = is_of_transformers(function)
        blocks_are_runs, is_packed = blocks_are_runs and own, is_packed and own
    return _interval(said, q, blocks_are_runs, is_packed)


_FILE = masking_utils.causal_mask_function.__code__.co_filename


def is_of_transformers(function: MaskFunction) -> bool:
    """Whether transformers wrote a mask function and every function that this is put together of.

    In a graph of torch.compile it is the outermost function that is looked at: torch.compile cannot
    say what functions are put together of.
    """
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename != _FILE:
        return False
    if torch.compiler.is_compiling():
        return True
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, tuple | list) else (held,):
            if callable(part) and not is_of_transformers(part):
                return False
    return True


def _interval(said: Symbol, q: Tensor, blocks_are_runs: bool, is_packed: bool) -> Interval:
    """Of a conjunction of any number of conditions, or of one."""
    parts = said.parts if said.kind == "and" else (said,)
    packed = [part for part in parts if part.kind == "same"]
    if len(packed) > (1 if is_packed else 0):
        raise Unsayable
    result = Interval()
    for part in parts:
        if part.kind == "same":
            result &= _runs(part.parts[0], q)
        elif part.kind == "or":
            result &= _union(part, q, blocks_are_runs, bool(packed))
        else:
            result &= _of_one(part, q, bool(packed))
    return result


def _of_one(part: Symbol, q: Tensor, packed: bool) -> Interval:
    """Of a condition without others. Within a document positions count up by one, so that what is
    near in positions is as near in keys; without documents positions may be anything."""
    if part.kind == "band":
        low, high, positions = part.parts
        if positions is not None and not packed:
            raise Unsayable
        if (low is not None and low > 0) or (high is not None and high < 0):
            raise Unsayable
        return Interval(left=-1 if low is None else -low, right=-1 if high is None else high)
    if part.kind != "chunk":
        raise Unsayable
    size, first, positions = part.parts
    place = q
    if positions is not None:
        if not packed:
            raise Unsayable
        place = positions.gather(1, q.expand(positions.shape[0], -1))
    begin = torch.div(place - first[:, None], size, rounding_mode="floor") * size + first[:, None]
    begin = begin + (q - place)
    return Interval(begin=begin, end=begin + size)


def _union(said: Symbol, q: Tensor, blocks_are_runs: bool, packed: bool) -> Interval:
    """Of an interval round the query with the block that the query is in."""
    first, block = said.parts
    if block.kind != "block" or not blocks_are_runs:
        raise Unsayable
    conditions = first.parts if first.kind == "and" else (first,)
    interval = Interval()
    for condition in conditions:
        interval &= _of_one(condition, q, packed)
    begin, end = interval.ends(q)
    (ids,) = block.parts
    is_block = ids.gather(1, q.expand(ids.shape[0], -1)) >= 0
    run = _runs(ids, q)
    assert run.begin is not None and run.end is not None
    return Interval(
        begin=None if begin is None else torch.where(is_block, begin.minimum(run.begin), begin),
        end=None if end is None else torch.where(is_block, end.maximum(run.end), end),
    )


def _runs(ids: Tensor, q: Tensor) -> Interval:
    """The run of equal ids (B, T) that each query stands in."""
    number = (ids != ids.roll(1, -1)).cumsum(-1)
    of_query = number.gather(1, q.expand(ids.shape[0], -1))
    return Interval(
        begin=torch.searchsorted(number, of_query),
        end=torch.searchsorted(number, of_query, right=True),
    )
