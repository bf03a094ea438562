"""What a score_mod or mask_mod reads from outside, so that it is traced once and not in every call.

A mod is a Python function. Its trace stays right for as long as its code and everything that the
code reads (closure cells, globals, attributes, defaults) stay the same, except that a tensor may be
replaced by another one of its kind. `snapshot` reads those values along the paths that the byte
code takes. It answers None for code which reads in a way that it does not follow; such a mod is
traced in every call, which is slow and right.
"""

from __future__ import annotations

import dis
import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Snapshot(NamedTuple):
    """What a mod is, apart from which tensors it reads."""

    key: tuple[Any, ...]
    """Equal keys stand for the same trace. It holds the objects whose identity it names."""
    tensors: tuple[Tensor, ...]
    """Each tensor that the mod can read, in the order of the paths, without repetition."""


class _NotFollowed(Exception):
    """The code reads something by a way that is not followed."""


class _ById:
    """An object that is taken for the same only if it is that object. It is kept alive."""

    __slots__ = ("thing",)

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


class _Paths(NamedTuple):
    """What a code object reads: names, each with the attributes that are read one after another."""

    free: tuple[tuple[str, ...], ...]
    of_globals: tuple[tuple[str, ...], ...]
    of_first: tuple[tuple[str, ...], ...]
    """From the first argument, which a bound method fills."""


_PLAIN_NUMBERS = (int, bool, str, bytes, type(None), torch.dtype, torch.device, complex)
_CONSTANT_PACKAGES = ("torch", "math", "operator", "builtins", "numpy")
"""Packages whose functions and classes a program does not change."""
_DEEPEST = 16
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_NAMES = {dis.opname[n] for n in (*dis.hasname, *dis.hasfree)}
"""Instructions that name something other than a local variable, of the Python that runs."""
_FOLLOWED = (*_ATTRIBUTES, "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLOSURE", "MAKE_CELL")
_REFUSED = (_NAMES - {*_FOLLOWED}) | {"LOAD_LOCALS", "YIELD_VALUE"}
"""Imports, names of classes, changes of globals, cells and attributes, and what newer Pythons have
besides: what is not known is not followed."""
_READ_ANYTHING = ("super", "globals", "locals", "vars", "eval", "exec", "__import__")
"""Builtins that read what no instruction names."""


@functools.lru_cache(maxsize=1024)
def _read_paths(code: types.CodeType) -> _Paths | None:
    """The paths of one code object and of the functions that it makes; None if not followed."""
    try:
        return _Paths(*(tuple(dict.fromkeys(paths)) for paths in _collect(code, code.co_freevars)))
    except _NotFollowed:
        return None


def _collect(code: types.CodeType, outer: tuple[str, ...]) -> tuple[list[Any], ...]:
    free: list[tuple[str, ...]] = []
    of_globals: list[tuple[str, ...]] = []
    of_first: list[tuple[str, ...]] = []
    first = code.co_varnames[0] if code.co_argcount else None
    instructions = [x for x in dis.get_instructions(code) if x.opname not in ("CACHE", "NOP")]
    for n, instruction in enumerate(instructions):
        name, value = instruction.opname, instruction.argval
        if name in _REFUSED:
            raise _NotFollowed
        if name.startswith("LOAD_GLOBAL"):
            if value in _READ_ANYTHING:
                raise _NotFollowed
            of_globals.append((value, *_attributes(instructions, n + 1)))
        elif name in ("LOAD_DEREF", "LOAD_CLOSURE"):
            if value in outer:
                free.append((value, *_attributes(instructions, n + 1)))
        elif "LOAD_FAST" in name and first is not None:
            # Python 3.13 and later load two at once, or store one and load the next.
            names = value if isinstance(value, tuple) else (value,)
            if value in outer:  # Python 3.13 makes a closure's cells of these
                free.append((value,))
            if first in names:
                last = names[-1] == first and names.count(first) == 1
                of_first.append((first, *(_attributes(instructions, n + 1) if last else ())))
    if first is not None and first in code.co_cellvars:
        of_first.append((first,))  # a function within reads it
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            within = tuple(x for x in inner.co_freevars if x in outer)
            more_free, more_globals, _ = _collect(inner, within)
            free += more_free
            of_globals += more_globals
    return free, of_globals, of_first


def _attributes(instructions: list[dis.Instruction], start: int) -> Iterator[str]:
    for instruction in instructions[start:]:
        if instruction.opname not in _ATTRIBUTES:
            return
        yield instruction.argval


class _Reader:
    """Collects the values of one mod."""

    def __init__(self) -> None:
        self.key: list[Any] = []
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self._functions: dict[tuple[int, int], int] = {}

    def value(self, x: Any, depth: int = 0) -> None:
        """One value, and all that it may be asked for."""
        kind = type(x)
        if isinstance(x, Tensor):
            self._tensor(x)
        elif kind is float:
            self.key += (float, x, math.copysign(1.0, x)) if x == x else (float, "nan")
        elif kind in _PLAIN_NUMBERS:
            self.key += (kind, x)
        elif depth > _DEEPEST:
            raise _NotFollowed
        elif kind in (tuple, list) or (isinstance(x, tuple) and hasattr(kind, "_fields")):
            self.key += (kind, len(x))
            for item in x:
                self.value(item, depth + 1)
        elif kind is dict:
            self.key += (kind, len(x))
            for name, item in x.items():
                self.value(name, depth + 1)
                self.value(item, depth + 1)
        elif kind is functools.partial:
            self.key.append(kind)
            for part in (x.func, x.args, x.keywords):
                self.value(part, depth + 1)
        elif kind is types.MethodType:
            self._function(x.__func__, depth + 1, x.__self__)
        elif kind is types.FunctionType:
            self._function(x, depth + 1)
        elif isinstance(x, (types.BuiltinFunctionType, torch._ops.OpOverloadPacket)):
            owner = getattr(x, "__self__", None)
            if owner is not None and not isinstance(owner, (types.ModuleType, type)):
                raise _NotFollowed  # a method of something that may change, such as a list's
            self.key.append(_ById(x))
        elif (isinstance(x, type) and _is_constant(x)) or isinstance(x, types.MethodDescriptorType):
            self.key.append(_ById(x))
        elif _is_mask_wrapper(x):
            self.key.append(kind)
            self.value(x.fn, depth + 1)
        else:
            raise _NotFollowed

    def _tensor(self, x: Tensor) -> None:
        place = self._places.setdefault(id(x), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(x)
        # Code may read the shape, as in table.shape[0] - 1, so that the trace holds its numbers.
        self.key += (Tensor, place, type(x), x.dtype, x.shape, x.device, x.requires_grad)

    def _function(self, x: types.FunctionType, depth: int, bound: Any = _NotFollowed) -> None:
        if _is_constant(x) and bound is _NotFollowed:
            self.key.append(_ById(x))
            return
        seen = self._functions.setdefault((id(x), id(bound)), len(self._functions))
        self.key += ("function", seen, x.__code__)
        if seen != len(self._functions) - 1:
            return  # a function that calls itself, or is called twice
        paths = _read_paths(x.__code__)
        if paths is None or depth > _DEEPEST:
            raise _NotFollowed
        for default in (x.__defaults__, x.__kwdefaults__):
            self.value(default, depth)
        cells = dict(zip(x.__code__.co_freevars, x.__closure__ or ()))
        for name, *attributes in paths.free:
            try:
                self._along(cells[name].cell_contents, attributes, depth)
            except ValueError:  # an empty cell
                raise _NotFollowed from None
        for name, *attributes in paths.of_globals:
            if name in x.__globals__:
                self._along(x.__globals__[name], attributes, depth)
            else:
                builtin = getattr(__import__("builtins"), name, _NotFollowed)
                if builtin is _NotFollowed:
                    raise _NotFollowed
                self.key.append(_ById(builtin))
        if bound is not _NotFollowed:
            for _, *attributes in paths.of_first:
                self._along(bound, attributes, depth)

    def _along(self, x: Any, attributes: list[str], depth: int) -> None:
        """The value at the end of a path, or the first tensor or number on it."""
        for attribute in attributes:
            if isinstance(x, Tensor):
                if not _is_of_tensors(x, attribute):
                    raise _NotFollowed
                break
            if isinstance(x, (int, float, str)):
                break
            if isinstance(x, types.FunctionType) and _is_constant(x):
                break
            owner = x
            x = getattr(owner, attribute, _NotFollowed)
            if x is _NotFollowed:
                raise _NotFollowed
            if type(x) not in (float, *_PLAIN_NUMBERS) and _is_computed(owner, attribute):
                raise _NotFollowed
        self.value(x, depth + 1)


def _is_constant(x: Any) -> bool:
    return (getattr(x, "__module__", None) or "").partition(".")[0] in _CONSTANT_PACKAGES and not (
        isinstance(x, types.FunctionType) and x.__closure__
    )


_NOT_IN_THE_KEY = (
    *("grad", "grad_fn", "is_leaf", "_version", "data_ptr", "storage", "untyped_storage"),
    *("stride", "storage_offset", "is_contiguous"),
)


def _is_of_tensors(x: Tensor, attribute: str) -> bool:
    """Whether an attribute tells of a tensor what the key holds, or is an operation on it."""
    if attribute in _NOT_IN_THE_KEY or attribute in vars(x):
        return False
    own = getattr(type(x), attribute, None)
    return own is not None and own is getattr(Tensor, attribute, None)


_STORED = (
    types.FunctionType, types.MemberDescriptorType, classmethod, staticmethod,
    type(Snapshot.key),
)  # fmt: skip
"""Things in a class that give the same object each time, or a method of the same code."""


def _is_computed(x: Any, attribute: str) -> bool:
    """Whether code answers for an attribute, as a property's does. Such code may read anything."""
    for kind in (x if isinstance(x, type) else type(x)).__mro__:
        if attribute in vars(kind):
            found = vars(kind)[attribute]
            if hasattr(type(found), "__set__") and not isinstance(found, _STORED):
                return True
            if isinstance(found, _STORED) or not hasattr(type(found), "__get__"):
                return False
            break
    own = getattr(x, "__dict__", {})
    if attribute in own:
        return False
    if isinstance(x, torch.nn.Module):
        return not any(attribute in own[n] for n in ("_parameters", "_buffers", "_modules"))
    return True


def _is_mask_wrapper(x: Any) -> bool:
    """Newer PyTorch wraps the mask_mod of a BlockMask, so that torch.compile can compare it."""
    return type(x).__name__ == "_MaskModWrapper" and callable(getattr(x, "fn", None))


def snapshot(mod: Callable[..., Any]) -> Snapshot | None:
    """What `mod` is and reads now, or None where that is not known."""
    reader = _Reader()
    try:
        own = vars(type(mod)).get("__call__")
        if type(own) is types.FunctionType and not isinstance(mod, torch.nn.Module):
            mod = types.MethodType(own, mod)
        reader.value(mod)
    except _NotFollowed:
        return None
    return Snapshot(tuple(reader.key), tuple(reader.tensors))
