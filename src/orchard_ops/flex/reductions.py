"""Sums, products and extrema of vectors: a loop in the text.

PyTorch takes dot products, means, norms, any(), all(), softmax and more apart into these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from .elements import LAZY, Index, arithmetic_form, lazy, shape_of
from .operations import choice_form, name_of, result_dtype
from .scalars import FLOATS, Scalar, convert, limits_of, literal

__all__ = ["LAZY"]

_MOST_TERMS = 1024
"""Each score would cost more than a product of the widest query and key otherwise."""


def _reduced(
    text: Any,
    node: Node,
    sizes: Sequence[int],
    start: Any,
    form: str,
    term: Callable[[Index], Scalar],
    held: torch.dtype | None = None,
) -> Scalar:
    """`start` and each `term`, of an index of that many dimensions, by a form of {0} and {1}.

    float16 and bfloat16 numbers are rounded once, behind the loop.
    """
    count = math.prod(sizes)
    if count > _MOST_TERMS:
        raise text.fail(
            node, f"of {count} numbers for each score, more than {_MOST_TERMS}, has no Metal text"
        )
    dtype = result_dtype(node)
    held = held or _held(dtype)
    if count == 0:
        return literal(start, dtype)
    if count == 1:
        zero = literal(0, torch.int32)
        return convert(text, convert(text, term((zero,) * len(sizes)), held), dtype)

    def of(flat: Scalar) -> Scalar:
        return convert(text, term(_unravelled(text, flat, sizes)), held)

    return convert(text, text.loop(held, count, literal(start, held), form, of), dtype)


def _held(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are added up in."""
    return torch.float32 if dtype in FLOATS else dtype


def _unravelled(text: Any, flat: Scalar, sizes: Sequence[int]) -> Index:
    found: list[Scalar] = []
    longer = [n for n in sizes if n != 1]
    for n in reversed(sizes):
        if n == 1:
            found.insert(0, literal(0, torch.int32))
        elif len(longer) == 1:
            found.insert(0, flat)
        else:
            found.insert(0, text.emit(torch.int32, f"{flat.text} % {n}"))
            flat = text.emit(torch.int32, f"{flat.text} / {n}")
            longer.pop()
    return tuple(found)


def _over(
    text: Any, node: Node, start: Any, form: str, index: Index, held: torch.dtype | None = None
) -> Scalar:
    """A reduction of the first argument over the dimensions of the second: all where it has none.

    The index may have the reduced dimensions too, which `keepdim` keeps as ones.
    """
    source: Any = node.args[0]
    shape = shape_of(source)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    if isinstance(dims, int):
        dims = (dims,)
    dims = sorted({d % len(shape) for d in dims}) if dims and shape else list(range(len(shape)))
    is_kept = len(index) == len(shape) and bool(dims)
    kept = [i for d, i in enumerate(index) if d not in dims] if is_kept else list(index)

    def term(own: Index) -> Scalar:
        reduced, rest = iter(own), iter(kept)
        at = tuple(next(reduced) if d in dims else next(rest) for d in range(len(shape)))
        return text.element(source, at)

    return _reduced(text, node, [shape[d] for d in dims], start, form, term, held)


@lazy("sum", "prims.sum")
def _sum(text: Any, node: Node, index: Index) -> Scalar:
    return _over(text, node, 0, arithmetic_form(result_dtype(node), "+"), index)


@lazy("prod", "prims.prod")
def _product(text: Any, node: Node, index: Index) -> Scalar:
    return _over(text, node, 1, arithmetic_form(result_dtype(node), "*"), index)


@lazy("amax", "max", "prims.amax")
def _largest(text: Any, node: Node, index: Index) -> Scalar:
    dtype = result_dtype(node)
    return _over(text, node, limits_of(dtype)[0], choice_form("maximum", dtype), index)


@lazy("amin", "min", "prims.amin")
def _least(text: Any, node: Node, index: Index) -> Scalar:
    dtype = result_dtype(node)
    return _over(text, node, limits_of(dtype)[1], choice_form("minimum", dtype), index)


@lazy("any")
def _any(text: Any, node: Node, index: Index) -> Scalar:
    return _over(text, node, False, "{0} || {1}", index, torch.bool)


@lazy("all")
def _all(text: Any, node: Node, index: Index) -> Scalar:
    return _over(text, node, True, "{0} && {1}", index, torch.bool)


@lazy("dot", "vdot", "mv", "mm", "bmm")
def _dot(text: Any, node: Node, index: Index) -> Scalar:
    """Products of float16 and bfloat16 numbers are not rounded before they are added."""
    a, b = node.args[:2]
    (*_, size) = shape_of(a)
    dtype = result_dtype(node)
    held = _held(dtype)
    name = name_of(node)
    columns = 1 if name in ("mm", "bmm") else 0
    rows, last = index[: len(index) - columns], index[len(index) - columns :]
    batch = index[:1] if name == "bmm" else ()
    form = arithmetic_form(dtype, "*")

    def term(own: Index) -> Scalar:
        x = convert(text, text.element(a, (*rows, *own)), held)
        y = convert(text, text.element(b, (*batch, *own, *last)), held)
        return text.emit(held, form.format(x.text, y.text))

    return _reduced(text, node, [size], 0, arithmetic_form(dtype, "+"), term)
