"""What a mask function computes, found by calling it with symbols in the place of numbers.

`said_by` is for functions (batch, head, query, key) -> bool as transformers has them. A symbol
knows the operations that masks are made of; whatever else is done with it says nothing. What asks
a symbol for numbers, or for more than an index tensor's few attributes that are known here, ends
the reading, and so does whatever changes a tensor or a symbol in place.

Two questions get the answer of a symbol, not of a tensor: type(q), and within a graph of
torch.compile isinstance(q, Tensor). Outside of one, isinstance ends the reading.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MaskFunction = Callable[..., Any]


class Unsayable(Exception):
    """The function is no interval of keys per query, as far as is known."""


class _State(threading.local):
    """Of the reading that goes on in this thread."""

    device = torch.device("cpu")
    """Where queries and keys are counted."""
    is_refused = False
    """Whether Unsayable was raised: the function may have caught it."""
    hides_class = False
    """While functions are called. torch.compile, which traces them, has to know the class."""


_state = _State()


def _refuse(*_: Any, **__: Any) -> Any:
    _state.is_refused = True
    raise Unsayable


def said_by(function: MaskFunction, device: torch.device) -> Symbol:
    """The condition that a mask function is, of queries and keys counted on a device.

    Raises:
        Unsayable: the function needs numbers, or gives something else than a condition.
    """
    _state.device, _state.is_refused = device, False
    try:
        with _Reading():
            _state.hides_class = not torch.compiler.is_compiling()
            said = function(_BATCH, _UNKNOWN, _place(1, 0), _place(0, 1))
    except Unsayable:
        raise
    except Exception as error:  # of code that wants numbers
        raise Unsayable from error
    finally:
        _state.hides_class = False
    if type(said) is not Symbol or _state.is_refused:
        raise Unsayable
    return said


class Symbol:
    """What stands for a number or a condition while a mask function is called. By kind, parts are

    - "place": a, b, c, table: a * query + b * key + c, or the numbers of `table` at these places;
    - "distance": table: how far query and key are from each other;
    - "entry": table: a number of the row of the batch;
    - "past": place, table: a place, counted from such a number;
    - "piece": past, size: the number of the chunk that it is in;
    - "number": table, a, b: what a table of numbers says at the query or the key;
    - "band": low, high, table: whether low <= key - query <= high, None being open;
    - "chunk": size, table of entries, table: whether both are in the same chunk;
    - "same": table: whether both have the same number in it;
    - "is block": table: whether the query's number is one of a block;
    - "block": table: both of these;
    - "and", "or": conditions.

    Any other kind says nothing.
    """

    def __init__(self, kind: str, *parts: Any) -> None:
        self.kind, self.parts = kind, parts

    @property
    def device(self) -> torch.device:
        return _state.device

    def to(self, *args: Any, **kwargs: Any) -> Symbol:
        """The same numbers or conditions, elsewhere or in a dtype that changes none of them."""
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.dtype):
                if not _keeps(self, x):
                    _refuse()
            elif x is not None and not isinstance(x, bool | str | int | torch.device):
                _refuse()
        return self

    def new_ones(self, size: Any, dtype: Any = None, device: Any = None) -> Symbol:
        return _ALWAYS if size == () and dtype == torch.bool else _refuse()

    def new_zeros(self, size: Any, dtype: Any = None, device: Any = None) -> Symbol:
        return _NEVER if size == () and dtype == torch.bool else _refuse()

    def __add__(self, other: Any) -> Symbol:
        return _sum(self, other, 1)

    def __sub__(self, other: Any) -> Symbol:
        return _sum(self, other, -1)

    def __neg__(self) -> Symbol:
        if self.kind != "place":
            return _UNKNOWN
        a, b, c, table = self.parts
        return Symbol("place", -a, -b, -c, table)

    def __abs__(self) -> Symbol:
        if self.kind != "place":
            return _UNKNOWN
        a, b, c, table = self.parts
        return Symbol("distance", table) if a * b == -1 and c == 0 else _UNKNOWN

    def __floordiv__(self, size: Any) -> Symbol:
        return Symbol("piece", self, size) if self.kind == "past" and _counts(size) else _UNKNOWN

    def __le__(self, other: Any) -> Symbol:
        if self.kind == "distance" and _is_number(other):
            return Symbol("band", -other, other, self.parts[0])
        return _at_most(self - other)

    def __lt__(self, other: Any) -> Symbol:
        if self.kind == "distance" and _is_number(other):
            return Symbol("band", 1 - other, other - 1, self.parts[0])
        return _at_most(self - other + 1)

    def __ge__(self, other: Any) -> Symbol:
        if self.kind == "number" and _is_number(other) and other == 0:
            table, a, _ = self.parts
            return Symbol("is block", table) if a == 1 else _UNKNOWN
        return _at_most(-(self - other))

    def __gt__(self, other: Any) -> Symbol:
        return _at_most(-(self - other) + 1)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return _equal(self, other)

    def __and__(self, other: Any) -> Symbol:
        return _conjunction(self, other)

    def __or__(self, other: Any) -> Symbol:
        return _disjunction(self, other)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _refuse()

    def __rsub__(self, other: Any) -> Symbol:
        return -self + other

    def _unknown(self, *_: Any, **__: Any) -> Symbol:
        return _UNKNOWN

    __radd__, __rand__, __ror__ = __add__, __and__, __or__
    __mul__ = __rmul__ = __mod__ = __rmod__ = __truediv__ = __rtruediv__ = __rfloordiv__ = _unknown
    __pow__ = __rpow__ = __xor__ = __rxor__ = __invert__ = __ne__ = _unknown  # type: ignore
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __pos__ = _unknown

    # What gives numbers, and what changes a tensor.
    __class__ = property(lambda _: _refuse() if _state.hides_class else Symbol)
    __bool__ = __int__ = __float__ = __index__ = __len__ = __iter__ = __hash__ = _refuse
    __contains__ = __getitem__ = __setitem__ = __delitem__ = __array__ = _refuse
    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = _refuse
    __ipow__ = __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _read(func, args)


class _Reading(TorchFunctionMode):
    """While a function is asked: what PyTorch's own functions do with symbols, and that they change
    nothing: the function may be called again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if changes(getattr(func, "__name__", ""), kwargs):
            return _refuse()
        if _has_symbol(args) or _has_symbol(tuple(kwargs.values())):
            return _read(func, args)
        if func is torch.tensor and isinstance(args[0], bool) and kwargs.get("dtype") is None:
            return _ALWAYS if args[0] else _NEVER  # for every query and key
        return func(*args, **kwargs)


def changes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function or method of PyTorch, called so, changes a tensor that it is given."""
    return name in _IN_PLACE or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


_IN_PLACE = frozenset(
    {
        *("__setitem__", "__set__", "__delitem__", "__iadd__", "__isub__", "__imul__", "__imod__"),
        *("__itruediv__", "__ifloordiv__", "__idiv__", "__ipow__", "__iand__", "__ior__"),
        *("__ixor__", "__ilshift__", "__irshift__"),
        *(
            name
            for names in map(dir, (Tensor, torch, torch.nn.functional))
            for name in names
            if name.endswith("_") and not name.startswith("__")
        ),
    }
)


def _has_symbol(x: Any) -> bool:
    return any(map(_has_symbol, x)) if type(x) in (tuple, list) else type(x) is Symbol


def _read(func: Any, args: Any) -> Any:
    if func is not Tensor.__getitem__ or type(args[0]) is Symbol:
        return _UNKNOWN
    table, items = args
    if table.is_floating_point() or table.is_complex():
        return _UNKNOWN
    if type(items) is Symbol:
        is_row = items.kind == "batch" and table.dim() == 1
        return Symbol("entry", table) if is_row else _UNKNOWN
    if type(items) is not tuple or len(items) != 2 or table.dim() != 2:
        return _UNKNOWN
    row, place = items
    if type(row) is not Symbol or type(place) is not Symbol:
        return _UNKNOWN
    if row.kind != "batch" or place.kind != "place":
        return _UNKNOWN
    a, b, c, of = place.parts
    is_one = c == 0 and of is None and a + b == 1 and a * b == 0
    return Symbol("number", table, a, b) if is_one else _UNKNOWN


def _place(a: int, b: int) -> Symbol:
    return Symbol("place", a, b, 0, None)


_BATCH, _UNKNOWN = Symbol("batch"), Symbol("unknown")
_ALWAYS, _NEVER = Symbol("band", None, None, None), Symbol("never")


_CONDITIONS = ("band", "never", "chunk", "same", "is block", "block", "and", "or")


def _keeps(x: Symbol, dtype: torch.dtype) -> bool:
    """Whether a symbol means the same in that dtype. Numbers of a table may not fit into int32."""
    if x.kind in _CONDITIONS:
        return dtype == torch.bool
    is_place = x.kind == "place" and x.parts[3] is None
    return dtype == torch.int64 or (dtype == torch.int32 and is_place)


def _is_number(x: Any) -> bool:
    return type(x) is not Symbol and isinstance(x, int) and not isinstance(x, bool)


def _counts(x: Any) -> bool:
    return _is_number(x) and x >= 1


def _as_place(x: Symbol) -> Symbol:
    """Numbers of a table as places of their own: those of positions within documents."""
    if x.kind == "number":
        table, a, b = x.parts
        return Symbol("place", a, b, 0, table)
    return x


def _sum(x: Symbol, y: Any, sign: int) -> Symbol:
    x = _as_place(x)
    if x.kind != "place":
        return _UNKNOWN
    a, b, c, table = x.parts
    if _is_number(y):
        return Symbol("place", a, b, c + sign * y, table)
    if type(y) is not Symbol:
        return _UNKNOWN
    if y.kind == "entry" and sign == -1:
        return Symbol("past", x, y.parts[0])
    y = _as_place(y)
    if y.kind != "place" or y.parts[3] is not table:
        return _UNKNOWN
    return Symbol(
        "place", a + sign * y.parts[0], b + sign * y.parts[1], c + sign * y.parts[2], table
    )


def _at_most(x: Symbol) -> Symbol:
    """Whether x <= 0."""
    if x.kind != "place":
        return _UNKNOWN
    a, b, c, table = x.parts
    if (a, b) == (-1, 1):
        return Symbol("band", None, -c, table)
    if (a, b) == (1, -1):
        return Symbol("band", c, None, table)
    is_known = (a, b) == (-1, 0) and c <= 0 and table is None  # places are not negative
    return _ALWAYS if is_known else _UNKNOWN


def _equal(x: Symbol, y: Any) -> Symbol:
    if type(y) is not Symbol or x.kind != y.kind:
        return _UNKNOWN
    if x.kind == "number":
        (table, a, b), (other, c, d) = x.parts, y.parts
        return Symbol("same", table) if table is other and (a, b) == (d, c) else _UNKNOWN
    if x.kind == "piece":
        (past, size), (other_past, other_size) = x.parts, y.parts
        (place, first), (other_place, other_first) = past.parts, other_past.parts
        (a, b, c, table), (d, e, f, other) = place.parts, other_place.parts
        alike = size == other_size and first is other_first and table is other
        if alike and (a, b, c) == (e, d, f) and a + b == 1 and a * b == 0 and c == 0:
            return Symbol("chunk", size, first, table)
    return _UNKNOWN


def _conjunction(x: Symbol, y: Any) -> Symbol:
    if type(y) is not Symbol:
        return _UNKNOWN
    if x.kind == "never" or y.kind == "never":
        return _NEVER
    if x is _ALWAYS or y is _ALWAYS:
        return y if x is _ALWAYS else x
    if x.kind == "same" and y.kind == "is block":
        return Symbol("block", x.parts[0]) if x.parts[0] is y.parts[0] else _UNKNOWN
    if x.kind == y.kind == "band" and x.parts[2] is y.parts[2]:
        (low, high, table), (more, less, _) = x.parts, y.parts
        low = more if low is None else low if more is None else max(low, more)
        high = less if high is None else high if less is None else min(high, less)
        return Symbol("band", low, high, table)
    parts = (x.parts if x.kind == "and" else (x,)) + (y.parts if y.kind == "and" else (y,))
    return Symbol("and", *parts)


def _disjunction(x: Symbol, y: Any) -> Symbol:
    if type(y) is not Symbol:
        return _UNKNOWN
    if x.kind == "never" or y.kind == "never":
        return y if x.kind == "never" else x
    if x is _ALWAYS or y is _ALWAYS:
        return _ALWAYS
    if x.kind == y.kind == "band" and x.parts[2] is y.parts[2]:
        (low, high, table), (more, less, _) = x.parts, y.parts
        apart = (high is not None and more is not None and more > high + 1) or (
            less is not None and low is not None and low > less + 1
        )
        low = None if low is None or more is None else min(low, more)
        high = None if high is None or less is None else max(high, less)
        return _UNKNOWN if apart else Symbol("band", low, high, table)
    return Symbol("or", x, y)
