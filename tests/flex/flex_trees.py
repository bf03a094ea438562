"""Random score_mods and mask_mods: trees of what has Metal text, drawn by hypothesis.

A float is compared with another only where both are exact (the score itself, integers), since the
rounding of float32 would decide otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import flex_mods as mods
import torch
from hypothesis import strategies as st
from torch import Tensor

Leaf = Callable[..., Tensor]


class Tree:
    """A function of (score, b, h, q_idx, kv_idx), and how it is written."""

    def __init__(self, written: str, function: Leaf) -> None:
        self.written, self.function = written, function

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.function(score, b, h, q_idx, kv_idx)

    def __repr__(self) -> str:
        return self.written


def _leaf(written: str, function: Leaf) -> Tree:
    return Tree(written, function)


def _node(form: str, function: Callable[..., Tensor]) -> Callable[..., Tree]:
    def make(*parts: Tree) -> Tree:
        written = form.format(*parts)
        return Tree(written, lambda *at: function(*(part(*at) for part in parts)))

    return make


def _constant(x: float) -> Tree:
    return _leaf(repr(x), lambda *_: x)


_INTEGER_LEAVES = [
    _leaf("b", lambda s, b, h, q, kv: b),
    _leaf("h", lambda s, b, h, q, kv: h),
    _leaf("q", lambda s, b, h, q, kv: q),
    _leaf("kv", lambda s, b, h, q, kv: kv),
    _leaf("(q - kv)", lambda s, b, h, q, kv: q - kv),
    _leaf("DOCUMENTS[kv]", lambda s, b, h, q, kv: mods.DOCUMENTS[kv]),
    _leaf("BUCKETS[q + kv]", lambda s, b, h, q, kv: mods.BUCKETS[q + kv]),
    _leaf("PREFIX[b].int()", lambda s, b, h, q, kv: mods.PREFIX[b].int()),
    _leaf("PAGES[b, -h]", lambda s, b, h, q, kv: mods.PAGES[b, -h]),
]
_FLOAT_LEAVES = [
    *[_leaf("score", lambda s, b, h, q, kv: s)] * 5,
    _leaf("SLOPES[h]", lambda s, b, h, q, kv: mods.SLOPES[h]),
    _leaf("RELATIVE[h, q - kv]", lambda s, b, h, q, kv: mods.RELATIVE[h, q - kv]),
    _leaf("BIAS[b, h, q, kv]", lambda s, b, h, q, kv: mods.BIAS[b, h, q, kv]),
    _leaf("OF_KEYS[kv].float()", lambda s, b, h, q, kv: mods.OF_KEYS[kv].float()),
]


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x)


_UNARY_INTEGERS = [
    _node("(-{})", lambda x: -x),
    _node("abs({})", torch.abs),
    _node("sign({})", torch.sign),
    _node("(~{})", lambda x: ~x),
    _node("({} << 3)", lambda x: x << 3),
    _node("({} >> 1)", lambda x: x >> 1),
    _node("({} // 3)", lambda x: x // 3),
    _node("({} % -5)", lambda x: x % -5),
    _node("fmod({}, 4)", lambda x: torch.fmod(x, 4)),
    _node("clamp({}, -3, 9)", lambda x: x.clamp(-3, 9)),
    _node("({} ** 2)", lambda x: x**2),
]
_BINARY_INTEGERS = [
    _node("({} + {})", lambda x, y: x + y),
    _node("({} - {})", lambda x, y: x - y),
    _node("({} * {})", lambda x, y: x * y),
    _node("({} & {})", lambda x, y: x & y),
    _node("({} | {})", lambda x, y: x | y),
    _node("({} ^ {})", lambda x, y: x ^ y),
    _node("minimum({}, {})", torch.minimum),
    _node("maximum({}, {})", torch.maximum),
    _node("({0} // ({1} & 7 | 1))", lambda x, y: x // (y & 7 | 1)),
    _node("({0} % ({1} & 7 | 1))", lambda x, y: x % (y & 7 | 1)),
]
_COMPARED = [
    _node("({} < {})", lambda x, y: x < y),
    _node("({} <= {})", lambda x, y: x <= y),
    _node("({} > {})", lambda x, y: x > y),
    _node("({} >= {})", lambda x, y: x >= y),
    _node("({} == {})", lambda x, y: x == y),
    _node("({} != {})", lambda x, y: x != y),
]
_CONDITIONS = [
    _node("({} & {})", lambda x, y: x & y),
    _node("({} | {})", lambda x, y: x | y),
    _node("({} ^ {})", lambda x, y: x ^ y),
    _node("logical_and({}, {})", torch.logical_and),
]
_UNARY_FLOATS = [
    _node("(-{})", lambda x: -x),
    _node("abs({})", torch.abs),
    _node("tanh({})", torch.tanh),
    _node("sigmoid({})", torch.sigmoid),
    _node("exp(tanh({}))", lambda x: torch.exp(torch.tanh(x))),
    _node("exp2(-abs({}))", lambda x: torch.exp2(-torch.abs(x))),
    _node("log1p(abs({}))", lambda x: torch.log1p(torch.abs(x))),
    _node("log({0} * {0} + 1)", lambda x: torch.log(x * x + 1)),
    _node("sqrt({0} * {0} + 0.5)", lambda x: torch.sqrt(x * x + 0.5)),
    _node("rsqrt({0} * {0} + 1)", lambda x: torch.rsqrt(x * x + 1)),
    _node("sin({})", torch.sin),
    _node("cos({})", torch.cos),
    _node("erf({})", torch.erf),
    _node("relu({})", torch.relu),
    _node("silu({})", torch.nn.functional.silu),
    _node("softplus({})", torch.nn.functional.softplus),
    _node("clamp({}, -2.5, 1.5)", lambda x: x.clamp(-2.5, 1.5)),
    _node("({} ** 3)", lambda x: x**3),
    _node("({} * 0.37)", lambda x: x * 0.37),
    _node("({} / 7)", lambda x: x / 7),
    _node("(1 - {})", lambda x: 1 - x),
]
_BINARY_FLOATS = [
    _node("({} + {})", lambda x, y: x + y),
    _node("({} - {})", lambda x, y: x - y),
    _node("({} * {})", lambda x, y: x * y),
    _node("({0} / (1 + abs({1})))", lambda x, y: x / (1 + torch.abs(y))),
    _node("maximum({}, {})", torch.maximum),
    _node("minimum({}, {})", torch.minimum),
    _node("atan2({0}, 1 + abs({1}))", lambda x, y: torch.atan2(x, 1 + torch.abs(y))),
]
_CHOICES = [_node("where({}, {}, {})", torch.where)]


def _trees(leaves: Any, extend: Callable[[Any], Any], most: int) -> Any:
    return st.recursive(leaves, extend, max_leaves=most)


def _applied(nodes: list[Callable[..., Tree]], *parts: Any) -> Any:
    return st.builds(lambda node, *given: node(*given), st.sampled_from(nodes), *parts)


integers = _trees(
    st.sampled_from(_INTEGER_LEAVES),
    lambda x: _applied(_UNARY_INTEGERS, x) | _applied(_BINARY_INTEGERS, x, x),
    6,
)
_numbers = st.sampled_from([_constant(x) for x in (-3, 0, 2, 5, 11)])
conditions = _trees(
    _applied(_COMPARED, integers, integers | _numbers)
    | _applied(
        _COMPARED, st.just(_FLOAT_LEAVES[0]), st.sampled_from([_constant(x) for x in (-1.0, 0.5)])
    ),
    lambda x: _applied(_CONDITIONS, x, x) | _applied([_node("(~{})", lambda c: ~c)], x),
    3,
)
masks = _trees(
    _applied(_COMPARED, integers, integers | _numbers),
    lambda x: _applied(_CONDITIONS, x, x) | _applied([_node("(~{})", lambda c: ~c)], x),
    4,
)
_small = _applied([_node("({} % 16).float()", lambda x: (x % 16).float())], integers)
floats = _trees(
    st.sampled_from(_FLOAT_LEAVES) | _small,
    lambda x: (
        _applied(_UNARY_FLOATS, x)
        | _applied(_BINARY_FLOATS, x, x)
        | _applied(_CHOICES, conditions, x, x)
    ),
    8,
)
scores = floats


# ---- the same by a seed, without hypothesis, which draws small ones first


class Seeded:
    """Trees of the same nodes, always the same ones for a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integers(self, leaves: int) -> Tree:
        if leaves == 1:
            found = self._random.choice(_INTEGER_LEAVES)
        else:
            found = self._random.choice(_BINARY_INTEGERS)(*self._two(self.integers, leaves))
        return self._random.choice(_UNARY_INTEGERS)(found) if self._random.random() < 0.5 else found

    def masks(self, leaves: int) -> Tree:
        if leaves == 1:
            number = _constant(self._random.choice((-3, 0, 2, 5, 11)))
            other = self._random.choice((number, self.integers(2)))
            return self._random.choice(_COMPARED)(self.integers(2), other)
        found = self._random.choice(_CONDITIONS)(*self._two(self.masks, leaves))
        return _node("~{}", lambda c: ~c)(found) if self._random.random() < 0.3 else found

    def scores(self, leaves: int) -> Tree:
        if leaves == 1:
            small = _node("({} % 16).float()", lambda x: (x % 16).float())(self.integers(2))
            found = self._random.choice((*_FLOAT_LEAVES, small))
        elif self._random.random() < 0.25:
            found = _CHOICES[0](self._condition(), *self._two(self.scores, leaves))
        else:
            found = self._random.choice(_BINARY_FLOATS)(*self._two(self.scores, leaves))
        return self._random.choice(_UNARY_FLOATS)(found) if self._random.random() < 0.6 else found

    def _condition(self) -> Tree:
        if self._random.random() < 0.3:
            return self._random.choice(_COMPARED)(_FLOAT_LEAVES[0], _constant(0.5))
        return self.masks(1)

    def _two(self, of: Callable[[int], Tree], leaves: int) -> tuple[Tree, Tree]:
        left = self._random.randrange(1, leaves)
        return of(left), of(leaves - left)


# ---- reading what is written --------------------------------------------------------------------

_NAMES = {
    name: getattr(torch, name)
    for name in (
        *("abs", "sign", "fmod", "clamp", "minimum", "maximum", "logical_and", "tanh", "sigmoid"),
        *("exp", "exp2", "log1p", "log", "sqrt", "rsqrt", "sin", "cos", "erf", "relu", "atan2"),
        "where",
    )
} | {"silu": torch.nn.functional.silu, "softplus": torch.nn.functional.softplus}
_TABLES = ("DOCUMENTS", "BUCKETS", "PREFIX", "PAGES", "SLOPES", "RELATIVE", "BIAS", "OF_KEYS")


def read(written: str) -> Tree:
    """The tree that is written so."""
    names = {"__builtins__": {}, **_NAMES, **{name: getattr(mods, name) for name in _TABLES}}
    return Tree(written, eval(f"lambda score, b, h, q, kv: {written}", names))
