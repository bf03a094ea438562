"""What the parts of FlexAttention tell each other about a user's score_mod or mask_mod."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

MAX_CAPTURES = 8
"""Captured tensors that a score_mod and a mask_mod may have together in a Metal kernel."""
MAX_CAPTURE_DIM = 4

Function = Callable[..., Any]
"""score_mod(score, batch, head, q_idx, kv_idx) or mask_mod(batch, head, q_idx, kv_idx)."""


class Mod(NamedTuple):
    """A user's function as Metal text."""

    text: str
    """The struct ScoreMod or MaskMod, empty where the function does nothing. The same graph always
    gives the same text."""
    captures: tuple[Any, ...]
    """The tensors that the text reads, in the order of its numbers; the user's own objects."""
    is_unit_slope: bool = True
    """Whether the derivative by the score is 1 everywhere."""


class NotLowered(Exception):
    """The function has no Metal text; the message names what in it has none."""
