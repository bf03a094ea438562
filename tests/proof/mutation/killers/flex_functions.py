"""The functions that the text of mods calls, at single points against Python's integers and
float64."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from simulator.engine import arrays
from torch import Tensor

from ..harness import Sources
from .compiled import compile_kernel
from .properties import Property

_FAMILY = "attention_flex_map"  # whose text has the functions
_INTEGERS = {"char": (8, True), "uchar": (8, False), "short": (16, True), "int": (32, True),
             "long": (64, True)}  # fmt: skip
_TYPES = {"char": np.int8, "uchar": np.uint8, "short": np.int16, "int": np.int32, "long": np.int64}
_OF_ALL = ("divide", "fmod", "remainder", "floor_divide")
_OF_WIDE = ("shift_left", "shift_right", "power")
_OF_TWO = ("remainder", "floor_divide", "power")
_OF_ONE = ("log1p", "expm1", "erf", "gelu", "gelu_tanh", "tanh")


def _kernel(name: str, of: str, to: str, functions: Sequence[str], operands: str) -> str:
    lines = "".join(
        f"  out[{len(functions)} * gid + {n}] = {to}(flex_{f}({operands}));\n"
        for n, f in enumerate(functions)
    )
    return (
        f"kernel void {name}(\n"
        f"    const device {of}* a [[buffer(0)]], const device {of}* b [[buffer(1)]],\n"
        f"    device {to}* out [[buffer(2)]], uint gid [[thread_position_in_grid]]) {{\n{lines}}}\n"
    )


def _functions_of(kind: str) -> tuple[str, ...]:
    return _OF_ALL + (_OF_WIDE if kind in ("int", "long") else ())


_TEXT = "".join(
    (
        *(_kernel(f"functions_of_{kind}", kind, "long", _functions_of(kind), "a[gid], b[gid]")
          for kind in _INTEGERS),
        _kernel("functions_of_two_floats", "float", "float", _OF_TWO, "a[gid], b[gid]"),
        _kernel("functions_of_one_float", "float", "float", _OF_ONE, "a[gid]"),
    )
)  # fmt: skip


def _launch(sources: Sources, note: Callable[[str], None], name: str, a: np.ndarray,
            b: np.ndarray, out: np.ndarray, check: bool = False) -> None:  # fmt: skip
    library = compile_kernel(sources, _FAMILY, {"name": name, "instantiation": _TEXT}, check)
    note("compiled")
    arrays.launch(library, name, (len(a), 1, 1), (1, 1, 1), {0: a, 1: b, 2: out})


# ---- integers


def _wrapped(x: int, bits: int, signed: bool) -> int:
    x %= 1 << bits
    return x - (1 << bits) if signed and x >> (bits - 1) else x


def _right(function: str, a: int, b: int, bits: int) -> int:
    """Before it wraps round."""
    if function in ("shift_left", "shift_right"):
        far = not 0 <= b < bits
        return (0 if far else a << b) if function == "shift_left" else a >> (bits - 1 if far else b)
    if function == "power":
        if b < 0:
            return {1: 1, -1: -1 if b % 2 else 1}.get(a, 0)
        return pow(a, b, 1 << bits)
    if b == 0:
        return 0
    towards_zero = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return {
        "divide": towards_zero,
        "fmod": a - b * towards_zero,
        "remainder": a % b,
        "floor_divide": a // b,
    }[function]


def _numbers(bits: int, signed: bool) -> list[int]:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    near = [x for x in (*range(-7, 9), 31, 32, 33, 63, 64, 65, -31, -33, -64) if low <= x <= high]
    return [low, low + 1, *near, 100, high // 3, high - 1, high]


def _integers(
    sources: Sources, note: Callable[[str], None], kind: str, check: bool = False
) -> None:
    bits, signed = _INTEGERS[kind]
    pairs = list(itertools.product(_numbers(bits, signed), repeat=2))
    a, b = (np.array([pair[n] for pair in pairs], _TYPES[kind]) for n in (0, 1))
    functions = _functions_of(kind)
    out = np.full(len(functions) * len(pairs), 77, np.int64)
    _launch(sources, note, f"functions_of_{kind}", a, b, out, check)
    for (n, function), (m, pair) in itertools.product(enumerate(functions), enumerate(pairs)):
        right = _wrapped(_right(function, *pair, bits), bits, signed)
        found = int(out[len(functions) * m + n])
        assert found == right, f"{function}{pair} of {kind} is {found}, not {right}"


# ---- floats

_SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5, -0.5, 2.5, -2.5, 7.25, -7.25, 1e-3,
            -1e-3, 33.0, -33.0, 1e10, -1e10, math.inf, -math.inf, math.nan)  # fmt: skip


def _compare(function: str, found: Tensor, right: Tensor, size: Tensor, at: Tensor) -> None:
    """Errors are of units of `size`, the results' own or what they cancel from."""
    found = found.double()
    finite = right.isfinite() & (right.abs() < 3e38)
    assert torch.equal(found.isnan(), right.isnan()), f"{function}: NaN elsewhere"
    same = torch.where(finite | right.isnan(), 0.0, found) == torch.where(
        finite | right.isnan(), 0.0, torch.where(right > 0, math.inf, -math.inf).double()
    )
    assert bool(same.all()), f"{function}: infinity elsewhere"
    zeros = (right == 0) & (found == 0)
    assert torch.equal(found.signbit()[zeros], right.signbit()[zeros]), f"{function}: -0"
    error = torch.where(finite, (found - right).abs(), 0.0) / size.clamp_min(1e-30)
    error = torch.where(finite, error, 0.0)
    worst = int(error.argmax())
    assert error[worst] <= 8e-7, f"{function} of {at[worst]}: {found[worst]}, not {right[worst]}"


def _two_floats(sources: Sources, note: Callable[[str], None]) -> None:
    pairs = torch.tensor(list(itertools.product(_SPECIAL, repeat=2)))
    drawn = torch.rand(400, 2, generator=torch.Generator().manual_seed(3)) * 20 - 10
    # Quotients that are not whole, as a - rest is rounded before it is divided.
    far = drawn * torch.tensor([1e5, 1.0])
    pairs = torch.cat((pairs, drawn, far))
    a, b = pairs.unbind(1)
    out = np.full(3 * len(pairs), 77, np.float32)
    _launch(sources, note, "functions_of_two_floats", a.contiguous().numpy(),
            b.contiguous().numpy(), out)  # fmt: skip
    found = torch.from_numpy(out).view(-1, 3)
    right = {
        "remainder": torch.remainder(a, b).double(),
        "floor_divide": torch.floor_divide(a, b).double(),
        "power": torch.pow(a.double(), b.double()),
    }
    for n, function in enumerate(_OF_TWO):
        size = right[function].abs()
        _compare(function, found[:, n], right[function], 4 * size, pairs)


def _far_quotients(sources: Sources, note: Callable[[str], None]) -> None:
    """Of some the rounded quotient is half way between two integers: as PyTorch, bit for bit."""
    drawn = torch.rand(4000, 2, generator=torch.Generator().manual_seed(5)) + 1.0
    a, b = drawn[:, 0] * 2**22, drawn[:, 1] * 0.75
    quotients = (a - torch.fmod(a, b)) / b
    assert (quotients - quotients.floor() == 0.5).sum() >= 10
    out = np.full(3 * len(a), 77, np.float32)
    _launch(sources, note, "functions_of_two_floats", a.contiguous().numpy(),
            b.contiguous().numpy(), out)  # fmt: skip
    found = torch.from_numpy(out).view(-1, 3)[:, _OF_TWO.index("floor_divide")]
    right = torch.floor_divide(a, b)
    assert torch.equal(found, right), f"{(found != right).sum()} far quotients differ"


def _one_float(sources: Sources, note: Callable[[str], None]) -> None:
    small = torch.logspace(-12, 0, 100)
    a = torch.cat((torch.tensor(_SPECIAL), torch.linspace(-5, 5, 801), small, -small * 0.999))
    out = np.full(len(_OF_ONE) * len(a), 77, np.float32)
    _launch(sources, note, "functions_of_one_float", a.numpy(), a.numpy(), out)
    found = torch.from_numpy(out).view(-1, len(_OF_ONE))
    x = a.double()
    right = (
        torch.log1p(x), torch.expm1(x), torch.erf(x), torch.nn.functional.gelu(x),
        torch.nn.functional.gelu(x, approximate="tanh"), torch.tanh(x),
    )  # fmt: skip
    for n, function in enumerate(_OF_ONE):
        y = right[n]
        size = x.abs() if function in ("gelu", "gelu_tanh") else y.abs()
        if function in ("gelu", "gelu_tanh"):  # of -inf it is NaN in PyTorch, too
            kept = a.isfinite()
            y, size, own, at = y[kept], size[kept], found[:, n][kept], a[kept]
        else:
            own, at = found[:, n], a
        _compare(function, own, y, size, at)


@functools.cache
def killers() -> tuple[Property, ...]:
    return tuple(_killers())


def _killers() -> Iterator[Property]:
    for kind in _INTEGERS:
        test = functools.partial(_integers, kind=kind)
        yield Property(f"flex functions of {kind}", _FAMILY, test)
    yield Property("flex functions of two floats", _FAMILY, _two_floats)
    yield Property("flex functions of two floats: far quotients", _FAMILY, _far_quotients)
    yield Property("flex functions of one float", _FAMILY, _one_float)
    for kind in ("int", "long"):  # shifts by what C++ does not define
        test = functools.partial(_integers, kind=kind, check=True)
        yield Property(f"flex functions of {kind}, checked", _FAMILY, test)
