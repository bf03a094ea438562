"""Key ranges of the problems: what they are made from, and what they leave unseen."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .paths import ROOT

sys.path.insert(0, str(ROOT / "src"))

from orchard_ops import testing
from orchard_ops.key_ranges import KeyRanges
from orchard_ops.reference.ranges import Ranges

from .plans import Scoring

RAGGED = (5, 1, 23, 8, 3, 13, 2, 12)
"""The proportions of the lengths of eight documents, which therefore end inside of blocks."""
KINDS = ("any", "padding", "prefix", "short documents", "documents", "nothing in one batch entry")


def ends_of_documents(total: int) -> list[int]:
    """0 and where each of eight ragged documents ends, the last at `total`."""
    ends = torch.tensor((0, *RAGGED)).cumsum(0) * total // sum(RAGGED)
    return ends.tolist()


def documents(q_len: int, kv_len: int) -> Tensor:
    """Eight ragged documents, packed: they have other lengths in queries than in keys."""
    queries, keys = (torch.tensor(ends_of_documents(n), dtype=torch.int32) for n in (q_len, kv_len))
    return KeyRanges.from_cu_seqlens(queries, keys, q_len=q_len).tensor


def draw(
    kind: str, q_len: int, kv_len: int, batch: int, num_heads: int, full: tuple[bool, bool]
) -> Tensor:
    """Key ranges of one of KINDS, (1 or B, 1 or H, L, 4) on the CPU.

    Most are those of `orchard_ops.testing.Case`. `full` says which of (B, H) "any" numbers do not
    broadcast over.
    """
    if kind == "documents":
        return documents(q_len, kv_len)
    if kind == "nothing in one batch entry":
        lengths = torch.tensor([0] + [kv_len] * (batch - 1))
        return KeyRanges.from_lengths(lengths, q_len).tensor
    case = testing.Case(
        q_len,
        kv_len,
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        ranges=kind.removeprefix("short "),
        ranges_full=full,
    )
    ranges = case.scoring().key_ranges
    assert ranges is not None
    return ranges


def unseen(
    s: Scoring, batch: int, num_heads: int, num_kv_heads: int, kv_len: int
) -> tuple[Tensor, Tensor]:
    """Queries (B, H, L) whose ranges and windows leave them no key; keys (B, Hkv, S) that no query
    of the batch entry and group sees.
    """
    assert s.key_ranges is not None
    ranges = Ranges(s.key_ranges, kv_len, s.window_left, s.window_right)
    rows = ranges.blind_rows().expand(batch, num_heads, -1)
    keys = ranges.unseen_keys().expand(batch, num_heads, -1)
    return rows, keys.unflatten(1, (num_kv_heads, -1)).all(2)
