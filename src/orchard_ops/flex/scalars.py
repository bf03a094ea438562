"""Scalars of a Metal text: names and numbers with PyTorch's dtypes.

float16 and bfloat16 scalars are held as float, rounded to their dtype by every operation, as
PyTorch's kernels round what they write. Operations on them compute in float, with Python's numbers
not rounded beforehand.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

MEMORY = {
    torch.bool: "uchar",
    torch.uint8: "uchar",
    torch.int8: "char",
    torch.int16: "short",
    torch.int32: "int",
    torch.int64: "long",
    torch.float16: "half",
    torch.bfloat16: "bfloat",
    torch.float32: "float",
}
"""Metal's types of elements in memory. float64 and complex numbers have none."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_BITS = {torch.uint8: 8, torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}


class Scalar(NamedTuple):
    text: str
    """A name or a number."""
    dtype: torch.dtype
    number: bool | int | float | None = None
    """What it is, where that is known."""


def limits_of(dtype: torch.dtype) -> tuple[Any, Any]:
    """The least and the largest number of a dtype."""
    if dtype in FLOATS:
        return -math.inf, math.inf
    if dtype == torch.bool:
        return False, True
    found = torch.iinfo(dtype)
    return found.min, found.max


class Unprintable(Exception):
    """A number that its dtype does not hold."""


def literal(number: Any, dtype: torch.dtype) -> Scalar:
    """A number as Metal writes it."""
    if dtype == torch.bool:
        return Scalar("true" if number else "false", dtype, bool(number))
    if dtype in FLOATS:
        value = _rounded(float(number), dtype)
        return Scalar(_float_text(value), dtype, value)
    if isinstance(number, float) and (not math.isfinite(number) or number != int(number)):
        raise Unprintable(f"{number} as {dtype}")
    number = int(number)
    least, largest = limits_of(dtype)
    if not least <= number <= largest:
        raise Unprintable(f"{number} as {dtype}")
    return Scalar(_integer_text(number, dtype), dtype, number)


def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=torch.float64).to(dtype).double().item()


def _float_text(value: float) -> str:
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = f"{value!r}f"
    return f"({text})" if text.startswith("-") else text


def _integer_text(number: int, dtype: torch.dtype) -> str:
    if dtype == torch.int64:
        if number == -(1 << 63):
            return "(-long(9223372036854775807) - 1)"
        return f"long({number})"
    if dtype != torch.int32:
        return f"{MEMORY[dtype]}({number})"
    if number == -(1 << 31):
        return "(-2147483647 - 1)"
    return f"({number})" if number < 0 else str(number)


_LIMITS = {
    torch.int64: ("-9223372036854775808.0f", "9223371487098961920.0f"),
    torch.int32: ("-2147483648.0f", "2147483520.0f"),
}


def convert(text: Any, x: Scalar, dtype: torch.dtype) -> Scalar:
    """x in a dtype, as PyTorch's `to`. A float beyond an integer's range becomes its nearest."""
    if x.dtype == dtype:
        return x
    if x.number is not None and not (dtype in _BITS and x.dtype in FLOATS):
        return (
            literal(x.number, dtype)
            if dtype == torch.bool or dtype in FLOATS
            else literal(_wrapped(int(x.number), dtype), dtype)
        )
    if dtype == torch.bool:
        return text.emit(dtype, f"{x.text} != {'0.0f' if x.dtype in FLOATS else '0'}")
    if dtype in FLOATS:
        if x.dtype in FLOATS and dtype == torch.float32:
            return Scalar(x.text, dtype, x.number)  # it is held as float
        if x.text in text.sizes:  # an instruction less than the absolute integer
            return text.emit(dtype, f"fabs(float({text.sizes[x.text].text}))")
        return text.emit(dtype, x.text if x.dtype in FLOATS else f"float({x.text})")
    if x.dtype in FLOATS:
        low, high = _LIMITS.get(dtype, _LIMITS[torch.int32])
        held = "long" if dtype == torch.int64 else "int"
        inner = f"{held}(clamp({x.text}, {low}, {high}))"
        return text.emit(dtype, inner if MEMORY[dtype] == held else f"{MEMORY[dtype]}({inner})")
    return text.emit(dtype, f"{MEMORY[dtype]}({x.text})")


def _wrapped(number: int, dtype: torch.dtype) -> int:
    bits = _BITS[dtype]
    number &= (1 << bits) - 1
    is_negative = dtype != torch.uint8 and number >> (bits - 1)
    return number - (1 << bits) if is_negative else number
