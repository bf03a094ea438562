"""Random score_mods and mask_mods of prove_flex.py: trees of operations, drawn from a seed.

Functions of the score are smooth: where rounding chooses between two branches, float64 has nothing
to say of the derivative. Those that are not are tested at single points (tests/flex).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .flex_mods import Tables

Node = Callable[..., Any]

_INTEGERS_OF_ONE: tuple[Node, ...] = (
    lambda x: -x,
    torch.abs,
    torch.sign,
    lambda x: ~x,
    lambda x: x << 3,
    lambda x: x >> 1,
    lambda x: x // 3,
    lambda x: x % -5,
    lambda x: torch.fmod(x, 4),
    lambda x: x.clamp(-30, 90),
    lambda x: x**2,
)
_INTEGERS_OF_TWO: tuple[Node, ...] = (
    lambda x, y: x + y,
    lambda x, y: x - y,
    lambda x, y: x * y,
    lambda x, y: x & y,
    lambda x, y: x | y,
    lambda x, y: x ^ y,
    torch.minimum,
    torch.maximum,
    lambda x, y: x // (y & 7 | 1),
    lambda x, y: x % (y & 7 | 1),
)
_COMPARED: tuple[Node, ...] = (
    lambda x, y: x < y,
    lambda x, y: x <= y,
    lambda x, y: x > y,
    lambda x, y: x >= y,
    lambda x, y: x == y,
    lambda x, y: x != y,
)
_CONDITIONS: tuple[Node, ...] = (
    lambda x, y: x & y,
    lambda x, y: x | y,
    lambda x, y: x ^ y,
    torch.logical_and,
)
_FLOATS_OF_ONE: tuple[Node, ...] = (
    lambda x: -x,
    torch.tanh,
    torch.sigmoid,
    lambda x: torch.exp(torch.tanh(x)),
    lambda x: torch.exp2(-x * x),
    lambda x: torch.log1p(x * x),
    lambda x: torch.log(x * x + 1),
    lambda x: torch.sqrt(x * x + 0.5),
    lambda x: torch.rsqrt(x * x + 1),
    torch.nn.functional.silu,
    lambda x: x * 0.37,
    lambda x: x / 7,
    lambda x: 1 - x,
)
_FLOATS_OF_TWO: tuple[Node, ...] = (
    lambda x, y: x + y,
    lambda x, y: x - y,
    lambda x, y: x * torch.tanh(y),
    lambda x, y: x / (1 + y * y),
)


class _Draw:
    """Trees of functions of (score, b, h, q, kv)."""

    def __init__(self, seed: int, t: Tables):
        self._random = random.Random(seed)
        document = t.below(f"documents_{seed}", 9, max(t.q_len, t.kv_len))
        steps = t.below(f"steps_{seed}", 40, t.q_len + t.kv_len, dtype=torch.int32)
        relative = t.normal(f"relative_{seed}", t.heads, 65)
        of_keys = t.normal(f"keys_{seed}", t.kv_len, dtype=torch.float16)
        self._integer_leaves: tuple[Node, ...] = (
            lambda s, b, h, q, kv: b,
            lambda s, b, h, q, kv: h,
            lambda s, b, h, q, kv: q,
            lambda s, b, h, q, kv: kv,
            lambda s, b, h, q, kv: q - kv,
            lambda s, b, h, q, kv: document[kv].int(),
            lambda s, b, h, q, kv: steps[q + kv],
        )
        self._float_leaves: tuple[Node, ...] = (
            *[lambda s, b, h, q, kv: s] * 6,
            lambda s, b, h, q, kv: relative[h, (q - kv).clamp(-32, 32)],
            lambda s, b, h, q, kv: of_keys[kv].float(),
        )

    def _applied(self, nodes: tuple[Node, ...], *parts: Node) -> Node:
        node = self._random.choice(nodes)
        return lambda *at: node(*(part(*at) for part in parts))

    def integer(self, leaves: int) -> Node:
        if leaves == 1:
            found = self._random.choice(self._integer_leaves)
        else:
            left = self._random.randrange(1, leaves)
            found = self._applied(_INTEGERS_OF_TWO, self.integer(left), self.integer(leaves - left))
        return self._applied(_INTEGERS_OF_ONE, found) if self._random.random() < 0.4 else found

    def condition(self, leaves: int) -> Node:
        if leaves == 1:
            number = self._random.choice((-3, 0, 2, 5, 11, 700))
            other = self._random.choice((self.integer(1), lambda *at: number))
            return self._applied(_COMPARED, self.integer(2), other)
        left = self._random.randrange(1, leaves)
        return self._applied(_CONDITIONS, self.condition(left), self.condition(leaves - left))

    def floating(self, leaves: int) -> Node:
        if leaves == 1:
            found = self._random.choice(self._float_leaves)
            if self._random.random() < 0.15:
                integer = self.integer(2)
                found = lambda *at: (integer(*at) % 16).float() * 0.125  # noqa: E731
        else:
            left = self._random.randrange(1, leaves)
            parts = self.floating(left), self.floating(leaves - left)
            if self._random.random() < 0.2:
                condition = self.condition(1)
                found = lambda *at: torch.where(  # noqa: E731
                    condition(*at), parts[0](*at), parts[1](*at)
                )
            else:
                found = self._applied(_FLOATS_OF_TWO, *parts)
        return self._applied(_FLOATS_OF_ONE, found) if self._random.random() < 0.5 else found


def score(number: int, t: Tables) -> Callable[..., Tensor]:
    """A score_mod: a tree of seven leaves, and a part of the score itself."""
    floating = _Draw(1000 + number, t).floating(7)
    return lambda score, b, h, q, kv: torch.tanh(floating(score, b, h, q, kv)) * 4 + 0.25 * score


def mask(number: int, t: Tables) -> Callable[..., Tensor]:
    """A mask_mod: a condition on the places, beside which each query sees the keys near it."""
    condition = _Draw(2000 + number, t).condition(3)
    return lambda b, h, q, kv: condition(None, b, h, q, kv) | ((q - kv).abs() < 9)
