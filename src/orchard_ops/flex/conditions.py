"""Conditions on q_idx and kv_idx in the graph of a mod, as symbols (mask_symbols.py)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..mask_symbols import _ALWAYS, _NEVER, _UNKNOWN, Symbol, _keeps
from .trace import Traced

_aten = torch.ops.aten
FAR = 1 << 30
"""Lengths are less, and sums of two indices and such a number are exact in int32."""
PASSED = (_aten.clone, _aten.alias)
"""What changes nothing. detach() changes gradients."""


def arguments_of(traced: Traced) -> list[Node]:
    return [n for n in traced.graph.graph.nodes if n.op == "placeholder"]


def packet_of(node: Any) -> Any:
    return getattr(getattr(node, "target", None), "overloadpacket", None)


_OF_A_KIND = (_aten.new_ones, _aten.ones_like, _aten.new_zeros, _aten.zeros_like)


def is_read(argument: Node) -> bool:
    """Whether a mod depends on an argument: `and_masks` begins with a constant of b's kind."""
    return any(packet_of(x) not in _OF_A_KIND for x in argument.users)


def passed(node: Any) -> Any:
    while packet_of(node) in PASSED:
        node = node.args[0]
    return node


def constant(node: Any) -> Any:
    """The number that a node is, or None."""
    if not isinstance(node, Node):
        return node
    node = passed(node)
    packet = packet_of(node)
    if packet is _aten.scalar_tensor:
        return _held(node, node.args[0])
    if packet in (_aten.full, _aten.full_like) and not isinstance(node.args[1], Node):
        return _held(node, node.args[1])
    if packet in (_aten.new_ones, _aten.ones, _aten.ones_like):
        return 1
    if packet in (_aten.new_zeros, _aten.zeros, _aten.zeros_like):
        return 0
    return None


def _held(node: Node, number: Any) -> Any:
    """What a tensor that is filled with a number holds: its dtype may round it."""
    try:
        return torch.full((), number, dtype=node.meta["val"].dtype, device="cpu").item()
    except RuntimeError:  # the dtype does not hold it
        return None


_COMPARISONS: dict[Any, tuple[str, str]] = {
    _aten.lt: ("lt", "ge"),
    _aten.le: ("le", "gt"),
    _aten.gt: ("gt", "le"),
    _aten.ge: ("ge", "lt"),
}
_SWAPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_AND = (_aten.bitwise_and, _aten.logical_and, _aten.__and__)
_OR = (_aten.bitwise_or, _aten.logical_or, _aten.__or__)
_NOT = (_aten.bitwise_not, _aten.logical_not)


class Conditions:
    """Reads numbers and conditions of a graph as symbols. What it does not know is unknown."""

    def __init__(self, traced: Traced, first_capture: int) -> None:
        self.traced = traced
        self.arguments = arguments_of(traced)
        b, _, q, kv, *captures = self.arguments[traced.inputs - 4 :]
        self._batch, self._captures = b, captures
        self._numbers = {x: ("of", first_capture + n) for n, x in enumerate(captures)}
        self._places = {
            q: Symbol("place", 1, 0, 0, None),
            kv: Symbol("place", 0, 1, 0, None),
        }

    def value(self, node: Any) -> Any:
        """A number, a symbol of one, or unknown."""
        if not isinstance(node, Node):
            return node
        node = passed(node)
        if node in self._places:
            return self._places[node]
        packet = packet_of(node)
        if packet is _aten._to_copy:
            return self._converted(node)
        if packet is _aten.abs:
            return _within(abs(self._symbol(node.args[0])))
        if packet in (_aten.add, _aten.sub) and node.kwargs.get("alpha", 1) == 1:
            a, b = map(self.value, node.args[:2])
            if type(a) is not Symbol and type(b) is not Symbol:
                return _UNKNOWN  # their dtype may wrap round
            return _within(a + b if packet is _aten.add else a - b)
        if packet is _aten.neg:
            return _within(-self._symbol(node.args[0]))
        if packet is _aten.index:
            return self._read(node)
        found = constant(node)
        return _UNKNOWN if found is None else found

    def _symbol(self, node: Any) -> Symbol:
        found = self.value(node)
        return found if type(found) is Symbol else _UNKNOWN

    def _converted(self, node: Node) -> Symbol:
        """Numbers in another dtype, where it holds them all."""
        dtype, before = (x.meta["val"].dtype for x in (node, node.args[0]))  # type: ignore
        found = self._symbol(node.args[0])
        if dtype not in (torch.int32, torch.int64):
            return _UNKNOWN
        return (
            found
            if _keeps(found, dtype) or torch.promote_types(before, dtype) == dtype
            else _UNKNOWN
        )

    def _read(self, node: Node) -> Symbol:
        source, places = passed(node.args[0]), [passed(x) for x in node.args[1]]  # type: ignore
        if source not in self._numbers or source.meta["val"].dtype not in _INTEGERS:
            return _UNKNOWN
        table = self._numbers[source]
        if source.meta["val"].dim() != len(places):
            return _UNKNOWN
        if places == [self._batch]:
            return Symbol("entry", table)
        place = self.value(places[-1])
        if len(places) > 2 or (len(places) == 2 and places[0] is not self._batch):
            return _UNKNOWN
        if type(place) is not Symbol or place.parts not in ((1, 0, 0, None), (0, 1, 0, None)):
            return _UNKNOWN
        return Symbol("number", table, *place.parts[:2])

    def condition(self, node: Any, negated: bool = False) -> Symbol:
        node = passed(node)
        if isinstance(node, Node) and node.meta["val"].dtype != torch.bool:
            return _UNKNOWN  # of integers, & | and ~ are operations on bits
        packet = packet_of(node)
        if packet in _NOT:
            return self.condition(node.args[0], not negated)
        if packet in _AND + _OR:
            a, b = (self.condition(x, negated) for x in node.args[:2])
            return a & b if (packet in _AND) != negated else a | b
        if packet in _COMPARISONS:
            return self._compared(_COMPARISONS[packet][negated], *map(self.value, node.args[:2]))
        if packet is _aten.eq and not negated:
            a, b = map(self.value, node.args[:2])
            return a == b if type(a) is Symbol else _UNKNOWN
        found = constant(node)
        if found is None:
            return _UNKNOWN
        return _ALWAYS if bool(found) != negated else _NEVER

    def _compared(self, name: str, a: Any, b: Any) -> Symbol:
        if type(a) is not Symbol or (a.kind == "entry" and type(b) is Symbol):
            if type(b) is not Symbol:
                return _UNKNOWN
            a, b, name = b, a, _SWAPPED[name]
        if type(b) is float:
            return _UNKNOWN
        is_key = a.kind == "place" and a.parts[:2] == (0, 1) and a.parts[3] is None
        if is_key and name in ("lt", "le"):
            length = b.parts[0] if type(b) is Symbol and b.kind == "entry" else b
            if type(length) is not Symbol:  # keys before a length
                return Symbol("keys", length, (name == "le") - a.parts[2])
        return getattr(operator, name)(a, b)


_INTEGERS = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8)


def _within(x: Any) -> Any:
    """x, where int32 holds it for every length."""
    if type(x) is not Symbol or x.kind != "place":
        return x
    a, b, c, _ = x.parts
    return x if abs(a) + abs(b) <= 2 and abs(c) < FAR else _UNKNOWN
