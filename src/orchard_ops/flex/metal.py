"""A traced score_mod or mask_mod as Metal text.

Every scalar of the graph becomes a constant of the text. A tensor that is not a scalar has no text
of its own: it is a function of its indices, asked where the graph indexes it. So nothing is
computed beforehand, and nothing that the user captured is copied.

The text is made of the tables of `operations.py`, names made here and numbers printed here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from .mod import MAX_CAPTURE_DIM, MAX_CAPTURES, Mod, NotLowered
from .operations import BY_NAME, POINTWISE
from .reductions import LAZY
from .scalars import FLOATS, MEMORY, Scalar, Unprintable, convert, literal
from .trace import SCORE, Traced, is_literal, place, trace

_INF = float("inf")
_ALIASES = (torch.ops.aten.alias, torch.ops.aten.detach, torch.ops.aten.clone)
_MAX_LENGTH = 1 << 28
"""Batches, heads, queries and keys are fewer (shaders/params.h)."""
_INDICES = ("b", "h", "q", "kv")


def lower(traced: Traced, first_capture: int = 0) -> Mod:
    """The text of a traced function, whose captures are numbered from `first_capture` on.

    The text of a score_mod that changes no score, and of a mask_mod that hides nothing, is empty.

    Raises:
        NotLowered: an operation, a dtype or the number of captures has no text.
    """
    text = _Text(traced, first_capture)
    results = traced.joint.graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    scalars = [text.scalar(x) for x in results]
    if scalars[0].text == ("s" if traced.kind == SCORE else "true") and (
        traced.kind != SCORE or scalars[1].number == 1
    ):
        return Mod("", ())
    if traced.kind == SCORE:
        score = convert(text, scalars[0], torch.float32)
        slope = text.slope_where_seen(score, scalars[1])
        is_unit = slope.number == 1.0
        return Mod(_score_struct(text, score, slope, is_unit), tuple(text.captures), is_unit)
    return Mod(_mask_struct(text, scalars[0]), tuple(text.captures))


def lower_graph(
    graph: GraphModule, captures: Sequence[Any], kind: str, first_capture: int = 0
) -> Mod:
    """The text of a graph ([score,] b, h, q_idx, kv_idx, *captures) -> result, of torch.compile's.

    Args:
        captures: what stands for the arguments behind the indices: tensors, of which only shapes
            and dtypes are read, or integers, which are read as 0-dim int64 tensors.

    `Mod.captures` are those of the arguments that the text reads.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        stand_ins = [_stand_in(x) for x in captures]
    traced = trace(graph, kind, captures=stand_ins)
    given = {id(s): x for s, x in zip(stand_ins, captures)}
    mod = lower(traced, first_capture)
    return mod._replace(captures=tuple(given.get(id(x), x) for x in mod.captures))


def _stand_in(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.empty((), dtype=torch.int64)
    if any(not isinstance(n, int) for n in x.shape):
        raise NotLowered("a captured tensor's shape varies")
    return torch.empty(tuple(x.shape), dtype=x.dtype)


# ---- the graph ----------------------------------------------------------------------------------


class _Loop(NamedTuple):
    """What a line goes through before it has its value."""

    number: str
    size: int
    start: str


class _Text:
    """The lines that a graph needs, as they are asked for."""

    def __init__(self, traced: Traced, first_capture: int) -> None:
        self.first_capture = first_capture
        self.captures: list[Tensor] = []
        self.lines: dict[str, tuple[str, str]] = {}
        """The name of a constant -> Metal's type, and the expression."""
        self.loops: dict[str, _Loop] = {}
        """The name of a number that a loop makes, whose line says what becomes of it each time."""
        self._made: dict[tuple[str, str], str] = {}
        self.selects: dict[str, tuple[Scalar, Scalar, Scalar]] = {}
        """The name of a choice -> the condition, and what it is where that holds and elsewhere."""
        self.limits: dict[str, int] = dict.fromkeys(_INDICES, _MAX_LENGTH)
        """How far from 0 an integer may be, where that is known."""
        self.sizes: dict[str, Scalar] = {}
        """The name of an integer that is another's absolute value -> the other."""
        self._known: dict[tuple[Any, ...], Scalar] = {}
        self._graph = traced.joint
        placeholders = [n for n in traced.joint.graph.nodes if n.op == "placeholder"]
        names = ("s", *_INDICES) if traced.kind == SCORE else _INDICES
        self._arguments: dict[Node, str] = dict(zip(placeholders, names))
        self._tensors: dict[Node, Tensor] = dict(
            zip(placeholders[traced.inputs :], traced.captures)
        )
        self._numbers: dict[int, int] = {}
        for node in traced.joint.graph.nodes:  # in order, so that nothing below recurses deeply
            if node.op == "call_function" and _is_scalar(node):
                self.element(node, ())

    def scalar(self, node: Any) -> Scalar:
        return self.element(node, ())

    def element(self, node: Any, index: tuple[Scalar, ...]) -> Scalar:
        """The element of a node's value at an index, one scalar for each dimension."""
        assert isinstance(node, Node)
        key = (node, *(x.text for x in index))
        if key not in self._known:
            self._known[key] = self._element(node, index)
        return self._known[key]

    def _element(self, node: Node, index: tuple[Scalar, ...]) -> Scalar:
        value = node.meta["val"]
        if node in self._tensors and _is_number(value):
            return self._capture(node, index)
        if value.dtype not in MEMORY:
            raise NotLowered(f"{value.dtype} has no Metal text{place(node)}")
        if node in self._arguments:
            return Scalar(self._arguments[node], value.dtype)
        if node in self._tensors:
            return self._capture(node, index)
        if node.op == "get_attr":
            assert is_literal(node) and isinstance(node.target, str)
            number = getattr(self._graph, node.target).item()
            return literal(number, value.dtype)
        operation = getattr(node.target, "overloadpacket", None)
        try:
            if operation in LAZY:
                return LAZY[operation](self, node, index)
            pointwise = POINTWISE.get(operation) or BY_NAME.get(_name_of(node))
            if pointwise is not None:
                operands = [self.operand(x, index) for x in node.args]
                found = _number(node, operands)
                return pointwise(self, node, operands) if found is None else found
        except Unprintable as error:
            raise self.fail(node, f"needs the number {error}") from error
        if node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        raise self.fail(node, "has no Metal text")

    def operand(self, x: Any, index: tuple[Scalar, ...]) -> Any:
        """An argument of a pointwise operation: its element at the result's index."""
        if not isinstance(x, Node):
            return x
        shape = x.meta["val"].shape
        own = index[len(index) - len(shape) :]
        zero = literal(0, torch.int32)
        return self.element(x, tuple(zero if n == 1 else i for n, i in zip(shape, own)))

    def _capture(self, node: Node, index: tuple[Scalar, ...]) -> Scalar:
        tensor = self._tensors[node]
        if len(index) > MAX_CAPTURE_DIM:
            raise NotLowered(
                f"a captured tensor of {len(index)} dimensions, more than {MAX_CAPTURE_DIM}"
            )
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = self.first_capture + len(self.captures)
            self.captures.append(tensor)
            if self.first_capture + len(self.captures) > MAX_CAPTURES:
                raise NotLowered(f"more than {MAX_CAPTURES} captured tensors")
        dtype = node.meta["val"].dtype
        if dtype == torch.float64:  # a number, see `_is_number`
            dtype = torch.float32
        places = [convert(self, i, torch.int32).text for i in index]
        arguments = ", ".join([str(self._numbers[id(tensor)]), *places])
        read = f"captures.at<{MEMORY[dtype]}>({arguments})"
        return self.emit(dtype, f"{read} != 0" if dtype == torch.bool else f"{read}", is_read=True)

    def emit(self, dtype: torch.dtype, expression: str, *, is_read: bool = False) -> Scalar:
        """A constant of the text. Numbers of less than 32 bits are rounded to their dtype."""
        if dtype in (torch.float16, torch.bfloat16):
            inner = expression if is_read else f"{MEMORY[dtype]}({expression})"
            kind, expression = "float", f"float({inner})"
        elif dtype == torch.bool:
            kind = "bool"
        else:
            kind = MEMORY[dtype]
        key = (str(dtype), expression)
        if key not in self._made:
            name = f"v{len(self.lines)}"
            self.lines[name] = (kind, expression)
            self._made[key] = name
        return Scalar(self._made[key], dtype)

    def loop(
        self,
        dtype: torch.dtype,
        size: int,
        start: Scalar,
        form: str,
        term: Callable[[Scalar], Scalar],
    ) -> Scalar:
        """`start` and the terms of 0, 1, ..., size - 1, one after another by a form of {0} and {1}.

        The lines that a term adds and that depend on its number are the loop's body.
        """
        index = f"i{sum(name.startswith('i') for name in self.limits)}"
        self.limits[index] = size - 1
        added = term(Scalar(index, torch.int32))
        name = f"v{len(self.lines)}"
        kind = "float" if dtype in FLOATS else "bool" if dtype == torch.bool else MEMORY[dtype]
        self.lines[name] = (kind, form.format(name, added.text))
        self.loops[name] = _Loop(index, size, start.text)
        return Scalar(name, dtype)

    def counts(self, x: Scalar) -> bool:
        """Whether an integer is one that is never negative: an index, or a loop's."""
        return x.text in _INDICES or bool(_LOOP_INDEX.fullmatch(x.text))

    def reads_whole(self, node: Node) -> bool:
        """Whether a value is a captured tensor, whose elements are counted from the end too."""
        while node not in self._tensors:
            if getattr(node.target, "overloadpacket", None) not in _ALIASES:
                return False
            node = node.args[0]  # type: ignore[assignment]
        return True

    def slope_where_seen(self, score: Scalar, slope: Scalar) -> Scalar:
        """The derivative of a score: a number, if it is one wherever the score is not -inf.

        Where it is, the weight is 0, and any finite derivative is as good as the 0 of the graph.
        """
        hidden, at = set(), score.text
        while at in self.selects:
            condition, a, b = self.selects[at]
            if -_INF not in (a.number, b.number):
                break
            hidden.add((condition.text, b.number == -_INF))
            at = (a if b.number == -_INF else b).text
        found = slope
        while found.text in self.selects:
            condition, a, b = self.selects[found.text]
            if (condition.text, True) in hidden and b.number == 0:
                found = a
            elif (condition.text, False) in hidden and a.number == 0:
                found = b
            else:
                return slope
        return slope if found.number is None or not math.isfinite(found.number) else found

    def largest(self, x: Scalar) -> int:
        """How far from 0 an integer may be."""
        if x.number is not None:
            return abs(int(x.number))
        return self.limits.get(x.text, 1 << 63)

    def fail(self, node: Node, why: str) -> NotLowered:
        return NotLowered(f"{node.target} {why}{place(node)}")


def _name_of(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name


def _number(node: Node, operands: list[Any]) -> Scalar | None:
    """The result for operands that are numbers, as PyTorch computes it on the cpu."""
    scalars = [x for x in operands if isinstance(x, Scalar)]
    if not scalars or any(x.number is None for x in scalars):
        return None
    given = [
        torch.tensor(x.number, dtype=x.dtype) if isinstance(x, Scalar) else x for x in operands
    ]
    options = {k: v for k, v in node.kwargs.items() if k in ("alpha", "rounding_mode", "dtype")}
    try:
        found = node.target(*given, **options)  # type: ignore[operator]
    except (RuntimeError, ZeroDivisionError, TypeError):
        return None
    return literal(found.item(), found.dtype)


def _is_number(x: Tensor) -> bool:
    """Whether a captured tensor is a number on the CPU: it is read as float32 on mps."""
    return x.dim() == 0 and x.device.type == "cpu" and x.dtype == torch.float64


def _is_scalar(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0


# ---- the struct ---------------------------------------------------------------------------------

_NAME = re.compile(r"\bv\d+\b")
_LOOP_INDEX = re.compile(r"\bi\d+\b")


def _body(text: _Text, *results: str) -> tuple[list[str], list[str]]:
    """The lines that results need, numbered anew, and the results as they then are.

    A line that depends on a loop's index is in its body, in that of the innermost if there are two:
    a loop within another has the larger number.
    """
    needed: set[str] = set()
    for result in results:
        needed.update(_NAME.findall(result))
    for name in reversed(text.lines):
        if name in needed:
            needed.update(_NAME.findall(text.lines[name][1]))
    names = {name: f"v{n}" for n, name in enumerate(x for x in text.lines if x in needed)}

    def renamed(x: str) -> str:
        return _NAME.sub(lambda m: names[m[0]], x)

    indices: dict[str, set[str]] = {}
    bodies: dict[str, list[str]] = {}
    for name in names:
        expression = text.lines[name][1]
        own = set(_LOOP_INDEX.findall(expression))
        own.update(*(indices[x] for x in _NAME.findall(expression) if x != name))
        if name in text.loops:
            own.discard(text.loops[name].number)
        indices[name] = own
        bodies.setdefault(max(own, key=_number_of, default=""), []).append(name)

    def written(body: str, indent: str) -> list[str]:
        lines = []
        for name in bodies.get(body, ()):
            kind, expression = text.lines[name]
            if name not in text.loops:
                lines.append(f"{indent}const {kind} {names[name]} = {renamed(expression)};")
                continue
            i, size, start = text.loops[name]
            lines += [
                f"{indent}{kind} {names[name]} = {start};",
                f"{indent}for (int {i} = 0; {i} < {size}; ++{i}) {{",
                *written(i, indent + "  "),
                f"{indent}  {names[name]} = {renamed(expression)};",
                f"{indent}}}",
            ]
        return lines

    return written("", "    "), [renamed(x) for x in results]


def _number_of(index: str) -> int:
    return int(index[1:])


def _score_struct(text: _Text, score: Scalar, slope: Scalar, is_unit: bool) -> str:
    lines, (score_text, slope_text) = _body(text, score.text, slope.text)
    return "\n".join(
        [
            "struct ScoreMod {",
            f"  static constant constexpr const bool kUnitSlope = {str(is_unit).lower()};",
            "  FlexCaptures captures;",
            "",
            "  METAL_FUNC float score(",
            "      float s, int b, int h, int q, int kv, thread float& derivative) const {",
            *lines,
            f"    derivative = {slope_text};",
            f"    return {score_text};",
            "  }",
            "};",
            "",
        ]
    )


def _mask_struct(text: _Text, seen: Scalar) -> str:
    lines, (seen_text,) = _body(text, convert(text, seen, torch.bool).text)
    return "\n".join(
        [
            "struct MaskMod {",
            "  FlexCaptures captures;",
            "",
            "  METAL_FUNC bool sees(int b, int h, int q, int kv) const {",
            *lines,
            f"    return {seen_text};",
            "  }",
            "};",
            "",
        ]
    )
