"""Operations that make, move and read tensors: what an element of the result is.

`LAZY` has a function of a node and of an index for each. It gives the scalar there, and asks for
those elements of the operands that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .operations import apply_form, enter, integer_form, name_of, result_dtype
from .scalars import FLOATS, Scalar, convert, literal

_aten = torch.ops.aten
Index = tuple[Scalar, ...]
Lazy = Callable[[Any, Node, Index], Scalar]
LAZY: dict[Any, Lazy] = {}


def lazy(*names: str) -> Callable[[Lazy], Lazy]:
    return enter(LAZY, names)


_FILLED = {
    "zeros": 0,
    "zeros_like": 0,
    "new_zeros": 0,
    "_efficientzerotensor": 0,
    "empty": 0,
    "empty_like": 0,
    "empty_permuted": 0,
    "ones": 1,
    "ones_like": 1,
    "new_ones": 1,
}


def _filled(number: int) -> Lazy:
    return lambda text, node, index: literal(number, result_dtype(node))


for _name, _number in _FILLED.items():
    LAZY[getattr(_aten, _name)] = _filled(_number)


@lazy("full", "full_like", "new_full", "scalar_tensor")
def _full(text: Any, node: Node, index: Index) -> Scalar:
    name = name_of(node)
    at = 0 if name == "scalar_tensor" else 2 if name == "new_full" else 1
    fill = node.args[at]
    return text.scalar(fill) if isinstance(fill, Node) else literal(fill, result_dtype(node))


@lazy("arange")
def _count(text: Any, node: Node, index: Index) -> Scalar:
    start: Any = 0
    step: Any = 1
    overload = node.target._overloadname  # type: ignore[union-attr]
    if overload != "default":
        start = node.args[0]
        step = node.args[2] if len(node.args) > 2 else 1
    dtype = result_dtype(node)
    found = convert(text, index[0], dtype)
    if step != 1:
        found = apply_form(text, node, arithmetic_form(dtype, "*"), (found, step))
    if start != 0:
        found = apply_form(text, node, arithmetic_form(dtype, "+"), (found, start))
    return found


def arithmetic_form(dtype: torch.dtype, sign: str) -> str:
    return f"{{0}} {sign} {{1}}" if dtype in FLOATS else integer_form(dtype, sign)


def shape_of(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _dim(node: Node, dim: Any) -> int:
    return int(dim) % max(len(shape_of(node)), 1)


_ZERO = literal(0, torch.int32)


@lazy("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "flatten")
def _reshape(text: Any, node: Node, index: Index) -> Scalar:
    source = node.args[0]
    before, after = shape_of(source), shape_of(node)
    kept = [i for i, n in zip(index, after) if n != 1]
    if [n for n in before if n != 1] == [n for n in after if n != 1]:
        rest = iter(kept)
        return text.element(source, tuple(_ZERO if n == 1 else next(rest) for n in before))
    flat: Any = _ZERO
    for i, n in zip(index, after):
        flat = text.emit(torch.int32, f"{flat.text} * {n} + {convert(text, i, torch.int32).text}")
    found: list[Scalar] = []
    for n in reversed(before):
        found.insert(0, text.emit(torch.int32, f"{flat.text} % {n}"))
        flat = text.emit(torch.int32, f"{flat.text} / {n}")
    return text.element(source, tuple(found))


@lazy("expand")
def _expand(text: Any, node: Node, index: Index) -> Scalar:
    return text.operand(node.args[0], index)


@lazy("prims.broadcast_in_dim")
def _broadcast(text: Any, node: Node, index: Index) -> Scalar:
    dims: Any = node.args[2]
    return text.operand(node.args[0], tuple(index[d] for d in dims))


@lazy("cat", "prims.cat")
def _joined(text: Any, node: Node, index: Index) -> Scalar:
    """The part whose place it is. Where that is not known, the others are read too, beyond their
    ends: captured tensors have a last element there."""
    dim = _dim(node, node.args[1] if len(node.args) > 1 else 0)
    parts: Any = [x for x in node.args[0] if len(shape_of(x)) == len(index)]  # type: ignore
    at, begin = convert(text, index[dim], torch.int32), 0
    found = None
    for part in parts:
        end = begin + shape_of(part)[dim]
        if begin < end and (at.number is None or begin <= at.number < end):
            place = at if begin == 0 else _moved(text, at, -begin)
            element = text.element(part, (*index[:dim], place, *index[dim + 1 :]))
            element = convert(text, element, result_dtype(node))
            if found is not None:
                choice = f"{at.text} < {begin} ? {found.text} : {element.text}"
                element = text.emit(element.dtype, choice)
            found = element
        begin = end
    return literal(0, result_dtype(node)) if found is None else found


def _moved(text: Any, x: Scalar, by: int) -> Scalar:
    if x.number is not None:
        return literal(x.number + by, torch.int32)
    return text.emit(torch.int32, f"{x.text} {'-' if by < 0 else '+'} {abs(by)}")


@lazy("constant_pad_nd")
def _padded(text: Any, node: Node, index: Index) -> Scalar:
    """The number outside, and the element inside: as in `_joined` it is read outside too."""
    source, given = node.args[:2]
    dtype = result_dtype(node)
    fill = node.args[2] if len(node.args) > 2 else 0
    outside = text.scalar(fill) if isinstance(fill, Node) else literal(fill, dtype)
    shape, pads = shape_of(source), list(given)  # type: ignore[arg-type]
    if 0 in shape:
        return convert(text, outside, dtype)
    places, bounds = list(index), []
    for n in range(len(pads) // 2):
        d, before, after = len(shape) - 1 - n, pads[2 * n], pads[2 * n + 1]
        places[d] = at = _moved(text, convert(text, index[d], torch.int32), -before)
        bounds += [f"{at.text} >= 0"] * (before > 0)
        bounds += [f"{at.text} < {shape[d]}"] * (after > 0)
    element = convert(text, text.element(source, tuple(places)), dtype)
    if not bounds:
        return element
    outside = convert(text, outside, dtype)
    return text.emit(dtype, f"{' && '.join(bounds)} ? {element.text} : {outside.text}")


def _diagonal_of(node: Node, given: tuple[Any, ...]) -> tuple[int, int, int]:
    """How far beside the main one, to the right, and the two dimensions."""
    offset, first, second = given + (0, 0, 1)[len(given) :]
    return offset, _dim(node, first), _dim(node, second)


@lazy("diagonal")
def _diagonal(text: Any, node: Node, index: Index) -> Scalar:
    source: Any = node.args[0]
    offset, row, column = _diagonal_of(source, node.args[1:])
    at, rest = convert(text, index[-1], torch.int32), iter(index[:-1])
    places = {row: _moved(text, at, max(-offset, 0)), column: _moved(text, at, max(offset, 0))}
    found = tuple(places[d] if d in places else next(rest) for d in range(len(shape_of(source))))
    return text.element(source, found)


@lazy("diagonal_scatter")
def _with_diagonal(text: Any, node: Node, index: Index) -> Scalar:
    source, diagonal = node.args[:2]
    offset, row, column = _diagonal_of(node, node.args[2:])
    element, dtype = text.element(source, index), result_dtype(node)
    if 0 in shape_of(diagonal):
        return element
    i, j = (convert(text, index[d], torch.int32) for d in (row, column))
    rest = tuple(x for d, x in enumerate(index) if d not in (row, column))
    other = text.element(diagonal, (*rest, _moved(text, i, -max(-offset, 0))))
    other = convert(text, other, dtype)
    return text.emit(dtype, f"{j.text} - {i.text} == {offset} ? {other.text} : {element.text}")


@lazy("flip", "prims.rev")
def _reversed(text: Any, node: Node, index: Index) -> Scalar:
    dims: Any = node.args[1]
    found = list(index)
    for d in (_dim(node, x) for x in dims):
        last, place = shape_of(node)[d] - 1, convert(text, index[d], torch.int32)
        if place.number is None:
            found[d] = text.emit(torch.int32, f"{last} - {place.text}")
        else:
            found[d] = literal(last - place.number, torch.int32)
    return text.element(node.args[0], tuple(found))


@lazy("permute", "transpose", "t")
def _permute(text: Any, node: Node, index: Index) -> Scalar:
    dims = list(range(len(index)))
    name = name_of(node)
    if name == "permute":
        dims = [_dim(node, d) for d in node.args[1]]  # type: ignore[union-attr]
    elif len(index) > 1:
        a, b = (0, 1) if name == "t" else (_dim(node, d) for d in node.args[1:3])
        dims[a], dims[b] = dims[b], dims[a]
    found = [_ZERO] * len(index)
    for at, d in enumerate(dims):
        found[d] = index[at]
    return text.element(node.args[0], tuple(found))


@lazy("select")
def _select(text: Any, node: Node, index: Index) -> Scalar:
    source: Any = node.args[0]
    number: Any = node.args[2]
    dim = _dim(source, node.args[1])
    at = literal(int(number) % shape_of(source)[dim], torch.int32)
    return text.element(source, (*index[:dim], at, *index[dim:]))


@lazy("slice")
def _slice(text: Any, node: Node, index: Index) -> Scalar:
    given: tuple[Any, ...] = (*node.args, None, None, None, None)
    source, dim, first, last, step = given[:5]
    dim = 0 if dim is None else _dim(source, dim)
    start, _, stride = slice(first, last, step).indices(shape_of(source)[dim])
    moved = convert(text, index[dim], torch.int32)
    if stride != 1:
        moved = text.emit(torch.int32, f"{moved.text} * {stride}")
    if start != 0:
        moved = text.emit(torch.int32, f"{moved.text} + {start}")
    return text.element(source, (*index[:dim], moved, *index[dim + 1 :]))


@lazy("index")
def _index(text: Any, node: Node, index: Index) -> Scalar:
    source: Any = node.args[0]
    given: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    shape = shape_of(source)
    given += [None] * (len(shape) - len(given))
    tensors = [x for x in given if x is not None]
    if any(x.meta["val"].dtype in (torch.bool, torch.uint8) for x in tensors):
        raise text.fail(node, "by a condition has no Metal text")
    own = max(len(shape_of(x)) for x in tensors)
    places = [d for d, x in enumerate(given) if x is not None]
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    shared, rest = index[first : first + own], iter((*index[:first], *index[first + own :]))
    found = []
    for size, x in zip(shape, given):
        if x is None:
            found.append(next(rest))
            continue
        place = text.operand(x, shared)
        is_wrapped = text.reads_whole(source)
        found.append(place if is_wrapped else _from_the_end(text, place, size))
    return text.element(source, tuple(found))


@lazy("embedding")
def _embedding(text: Any, node: Node, index: Index) -> Scalar:
    table, places = node.args[:2]
    place = text.element(places, index[:-1])
    return text.element(table, (place, index[-1]))


def _from_the_end(text: Any, x: Scalar, size: int) -> Scalar:
    """An index that may be negative, of a tensor that the text computes."""
    if text.counts(x):
        return x
    if x.number is not None:
        return literal(x.number % size, torch.int32)
    x = convert(text, x, torch.int32)
    return text.emit(torch.int32, f"{x.text} < 0 ? {x.text} + {size} : {x.text}")
