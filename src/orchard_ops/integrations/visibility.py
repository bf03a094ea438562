"""Which keys each query of a model's layers sees, in memory linear in the lengths.

`Visibility` is what a mask function of transformers says to `flash_attn`. `LazyMask` and
`TracedMask` hand it through a model's layers in the place of a mask: layers that call our attention
function read the visibility, and code that touches the mask as a tensor gets the float mask that
transformers' eager attention adds to the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..key_ranges import visible
from ..mask_symbols import changes


@dataclass
class Visibility:
    """The keys that each of q_len queries sees among kv_len keys.

    Query i stands at key i + diagonal, or at the position in its row of `ranges`. It sees the keys
    of the window round that, of its range, and of `keys`; or those of `dense` alone.
    """

    batch: int
    q_len: int
    kv_len: int
    dtype: torch.dtype
    """Of the float mask."""
    device: torch.device
    window_left: int = -1
    window_right: int = -1
    diagonal: int = 0
    ranges: Tensor | None = None
    """int32 (1 or B, 1, L, 4), see `orchard_ops.KeyRanges`."""
    keys: Tensor | None = None
    """bool (B, 1, 1, S): False for padding, which may lie anywhere."""
    dense: Tensor | None = None
    """bool (B, 1, L, S): a mask that ranges cannot say."""
    whole: Visibility | None = None
    index: Any = None
    """Of a slice: what it is a slice of, and where. Its float mask is a view of the whole one's."""
    _bool: Tensor | None = None
    _float: Tensor | None = None
    _version: int = 0  # of _float as it was made
    _lent: bool = False  # whether other code may hold memory of _float
    _uncounted: bool = False  # whether changes of _float may not show in its version

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, 1, self.q_len, self.kv_len)

    def to_bool(self) -> Tensor:
        """(1 or B, 1, L, S), True where a query sees a key. It is made once."""
        if self._bool is None:
            self._bool = self._make_bool()
        return self._bool

    def _make_bool(self) -> Tensor:
        if self.dense is not None:
            return self.dense
        ranges = self.ranges
        if ranges is None:
            position = torch.arange(self.q_len, device=self.device) + self.diagonal
            zeros = torch.zeros_like(position)
            ranges = torch.stack((zeros, zeros + self.kv_len, position, zeros), -1)[None, None]
        seen = visible(ranges, 0, self.kv_len, self.window_left, self.window_right)
        return seen if self.keys is None else seen & self.keys

    def to_float(self) -> Tensor:
        """(B, 1, L, S): 0 where a query sees a key, else the dtype's lowest number. Made once."""
        if self.whole is not None:
            return self.whole.to_float()[self.index]
        if self._float is None:
            with torch.inference_mode(False):  # whose tensors do not count their changes
                zero = torch.zeros((), dtype=self.dtype, device=self.device)
                # Memory of its own for each sample, which code may write to one at a time.
                seen = self.to_bool().expand(self.shape)
                self._float = torch.where(seen, zero, torch.finfo(self.dtype).min).contiguous()
            self._version = self._float._version
        return self._float

    def lend(self, counted: bool = True) -> Tensor:
        """The float mask for code that may keep a view of it, and write to that."""
        whole = self
        while whole.whole is not None:
            whole = whole.whole
        dense = self.to_float()
        whole._lent = True
        whole._uncounted = whole._uncounted or not counted
        return dense

    @property
    def edited(self) -> Tensor | None:
        """The float mask, if code has written to it since: then it says more than the numbers.

        In a graph of torch.compile nobody sees whether it has: that it may have is enough there.
        """
        if self.whole is not None:
            return None if self.whole.edited is None else self.to_float()
        if self._float is None:
            return None
        if torch.compiler.is_compiling():
            return self._float if self._lent else None
        return self._float if self._uncounted or self._float._version != self._version else None

    def sliced(self, index: Any) -> Visibility | None:
        """What `mask[index]` leaves, for slices of queries and of the first keys; else None."""
        items = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in [x for x in items if not isinstance(x, Tensor)]:
            at = next(n for n, x in enumerate(items) if x is Ellipsis)
            items[at : at + 1] = [slice(None)] * (5 - len(items))
        items += [slice(None)] * (4 - len(items))
        if len(items) != 4 or not all(isinstance(x, slice) for x in items):
            return None
        bounds = [x.indices(n) for x, n in zip(items, self.shape)]
        (b0, b1, _), (h0, h1, _), (q0, q1, _), (k0, k1, _) = bounds
        whole = (b0, b1, h0, h1, k0) == (0, self.batch, 0, 1, 0)
        if not whole or any(step != 1 for _, _, step in bounds):
            return None
        q1, k1 = max(q0, q1), max(k0, k1)
        return replace(
            self,
            q_len=q1 - q0,
            kv_len=k1,
            diagonal=self.diagonal + q0,
            ranges=None if self.ranges is None else self.ranges[:, :, q0:q1],
            keys=None if self.keys is None else self.keys[..., :k1],
            dense=None if self.dense is None else self.dense[:, :, q0:q1, :k1],
            whole=self,
            index=index,
            _bool=None,
            _float=None,
            _lent=False,
            _uncounted=False,
        )


_METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad", "grad_fn"),
        *("is_leaf", "is_mps", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized"),
        *("is_nested", "_base", "_version", "retains_grad", "output_nr", "_backward_hooks"),
    )
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex}
_METADATA |= {Tensor.__len__, Tensor.__hash__, Tensor.get_device, Tensor.stride}


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]

_OPERATORS = (
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
    *("__rtruediv__", "__neg__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
)
_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__")
_MAKES_NEW = frozenset(
    {
        *_OPERATORS,
        *("add", "sub", "mul", "div", "neg", "eq", "ne", "lt", "le", "gt", "ge", "bool", "clone"),
        *("masked_fill", "where", "repeat", "cat", "stack", "sum", "all", "any", "min", "max"),
        *("amin", "amax", "isinf", "exp", "softmax", "logical_and", "logical_not"),
        "scaled_dot_product_attention",
    }
)
"""Functions whose result is never memory of their arguments. All others may give a view."""


def _reader(func: Any, kwargs: dict | None = None) -> Any:
    """How a function is given the float mask: it may write to memory that it was lent."""
    name = func if isinstance(func, str) else getattr(func, "__name__", "")
    return _fresh if name in _MAKES_NEW and not changes(name, kwargs or {}) else _lent


class LazyMask(Tensor):
    """A float mask (B, 1, L, S) that takes memory when other code than ours reads it."""

    visibility: Visibility

    @staticmethod
    def __new__(cls, visibility: Visibility) -> LazyMask:
        mask = Tensor._make_wrapper_subclass(
            cls, visibility.shape, dtype=visibility.dtype, device=visibility.device
        )
        mask.visibility = visibility
        return mask

    def __init__(self, visibility: Visibility) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        read = _reader(func, kwargs)
        if isinstance(first, LazyMask):
            if func is Tensor.__getitem__ and first.visibility.edited is None:
                rest = first.visibility.sliced(args[1])
                if rest is not None:
                    return LazyMask(rest)
            if func == _DATA:
                first.visibility.lend(counted=False)
            if func in (Tensor.detach, Tensor.contiguous) or (
                func is Tensor.to and _changes_nothing(first, args[1:], kwargs)
            ):
                return first
            if changes(getattr(func, "__name__", ""), {}):
                func(_lent(first), *tree_map(_fresh, tuple(args[1:])), **tree_map(_fresh, kwargs))
                return first
        return func(*tree_map(read, tuple(args)), **tree_map(read, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict | None = None
    ) -> Any:
        return func(*tree_map(_lent, tuple(args)), **tree_map(_lent, kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyMask({self.visibility})"

    def __deepcopy__(self, memo: dict) -> LazyMask:
        return self


def _fresh(x: Any) -> Any:
    return x.visibility.to_float() if isinstance(x, LazyMask | TracedMask) else x


def _lent(x: Any) -> Any:
    return x.visibility.lend() if isinstance(x, LazyMask | TracedMask) else x


def _changes_nothing(mask: LazyMask, args: Sequence[Any], kwargs: dict) -> bool:
    """Whether `mask.to(...)` would return the same mask."""
    if any(type(x) is bool for x in args) or kwargs.get("copy"):
        return False
    wanted = [*args, *(kwargs.get(name) for name in ("device", "dtype", "other"))]
    for x in wanted:
        if isinstance(x, torch.dtype) and x != mask.dtype:
            return False
        if isinstance(x, str | int | torch.device) and not _same_device(x, mask.device):
            return False
        if isinstance(x, Tensor) and (x.dtype != mask.dtype or x.device != mask.device):
            return False
    return True


def _same_device(a: str | int | torch.device, b: torch.device) -> bool:
    a = torch.device(a)
    return a.type == b.type and (a.index or 0) == (b.index or 0)


class TracedMask:
    """`LazyMask` within a graph of torch.compile: an object that exists while it is traced."""

    def __init__(self, visibility: Visibility) -> None:
        self.visibility = visibility

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.visibility.shape)

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return self.visibility.dtype

    @property
    def device(self) -> torch.device:
        return self.visibility.device

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __getitem__(self, index: Any) -> Any:
        rest = self.visibility.sliced(index) if self.visibility.edited is None else None
        return self.visibility.lend()[index] if rest is None else TracedMask(rest)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.visibility.lend()[index] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(_reader(name)(self), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict | None = None
    ) -> Any:
        read = _reader(func, kwargs)
        return func(*_each(read, args), **{k: _each(read, v) for k, v in (kwargs or {}).items()})


def _each(read: Any, x: Any) -> Any:
    return type(x)(_each(read, y) for y in x) if type(x) in (tuple, list) else read(x)


def _operator(name: str) -> Any:
    def method(self: TracedMask, *others: Any) -> Any:
        read = _reader(name)
        return getattr(read(self), name)(*map(read, others))

    return method


for _name in (*_OPERATORS, *_IN_PLACE):  # which Python looks up in the class
    setattr(TracedMask, _name, _operator(_name))
