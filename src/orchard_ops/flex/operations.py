"""The pointwise operations that have Metal text: a closed table of texts by operands' scalars.

What an element is of operations that make, move and read tensors is in elements.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from .scalars import FLOATS, MEMORY, Scalar, convert, literal

_aten = torch.ops.aten
_INF = float("inf")
Pointwise = Callable[[Any, Node, list[Any]], Scalar]
POINTWISE: dict[Any, Pointwise] = {}


def _pointwise(*names: str) -> Callable[[Pointwise], Pointwise]:
    return enter(POINTWISE, names)


def enter(table: dict[Any, Any], names: Sequence[str]) -> Callable[[Any], Any]:
    def enter(function: Any) -> Any:
        for name in names:
            space, _, own = name.rpartition(".")
            table[getattr(getattr(torch.ops, space or "aten"), own)] = function
        return function

    return enter


def result_dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _as(text: Any, x: Any, dtype: torch.dtype) -> Scalar:
    """An operand in the dtype that an operation computes in. Python's numbers are not rounded to
    less than float32."""
    if isinstance(x, Scalar):
        return convert(text, x, dtype)
    return literal(x, torch.float32 if dtype in FLOATS else dtype)


def apply_form(
    text: Any, node: Node, form: str, operands: Sequence[Any], dtype: Any = None
) -> Scalar:
    """The result from a form with {0}, {1}, ... for the operands, in the result's dtype."""
    dtype = result_dtype(node) if dtype is None else dtype
    parts = [_as(text, x, dtype).text for x in operands]
    return text.emit(result_dtype(node), form.format(*parts))


def name_of(node: Node) -> str:
    return node.target.overloadpacket.__name__  # type: ignore[union-attr]


# ---- arithmetic ---------------------------------------------------------------------------------

_UNSIGNED = {torch.int32: "uint", torch.int64: "ulong"}


def integer_form(dtype: torch.dtype, sign: str) -> str:
    """Integers wrap round, which signed ones of C++ must not."""
    kind = MEMORY[dtype]
    if dtype in _UNSIGNED:
        unsigned = _UNSIGNED[dtype]
        return f"{kind}({unsigned}({{0}}) {sign} {unsigned}({{1}}))"
    return f"{kind}({{0}} {sign} {{1}})"


def _arithmetic(text: Any, node: Node, operands: Sequence[Any], sign: str) -> Scalar:
    dtype = result_dtype(node)
    if dtype == torch.int32:
        a, b = (_as(text, x, dtype) for x in operands)
        largest = [text.largest(x) for x in (a, b)]
        limit = largest[0] * largest[1] if sign == "*" else sum(largest)
        if limit < 1 << 31:  # no such integers wrap round
            result = text.emit(dtype, f"{a.text} {sign} {b.text}")
            text.limits[result.text] = limit
            return result
    if dtype == torch.bool:
        return apply_form(text, node, "{0} && {1}" if sign == "*" else "{0} || {1}", operands)
    form = f"{{0}} {sign} {{1}}" if dtype in FLOATS else integer_form(dtype, sign)
    return apply_form(text, node, form, operands)


def _is(x: Any, number: int) -> bool:
    return (x.number if isinstance(x, Scalar) else x) == number


@_pointwise("add", "sub")
def _sum(text: Any, node: Node, operands: list[Any]) -> Scalar:
    a, b = operands[:2]
    dtype = result_dtype(node)
    alpha = node.kwargs.get("alpha", operands[2] if len(operands) > 2 else 1)
    if alpha != 1:
        product = "{0} * {1}" if dtype in FLOATS else integer_form(dtype, "*")
        held = torch.float32 if dtype in FLOATS else dtype
        parts = _as(text, b, dtype).text, _as(text, alpha, dtype).text
        b = text.emit(held, product.format(*parts))
    is_sum = name_of(node) == "add"
    if _is(b, 0) and (not is_sum or dtype not in FLOATS):
        return _as(text, a, dtype)
    if _is(a, 0) and is_sum and dtype not in FLOATS:
        return _as(text, b, dtype)
    return _arithmetic(text, node, (a, b), "+" if is_sum else "-")


@_pointwise("mul")
def _product(text: Any, node: Node, operands: list[Any]) -> Scalar:
    for x, other in (operands, operands[::-1]):
        if _is(x, 1) and isinstance(other, Scalar):
            return convert(text, other, result_dtype(node))
    return _arithmetic(text, node, operands, "*")


@_pointwise("div", "true_divide", "floor_divide")
def _quotient(text: Any, node: Node, operands: list[Any]) -> Scalar:
    dtype = result_dtype(node)
    mode = node.kwargs.get("rounding_mode", operands[2] if len(operands) > 2 else None)
    if name_of(node) == "floor_divide":
        mode = "floor"
    elif mode is None and dtype not in FLOATS:  # of prims
        mode = "trunc"
    if mode == "floor":
        return apply_form(text, node, "flex_floor_divide({0}, {1})", operands[:2])
    if mode == "trunc":
        form = "trunc({0} / {1})" if dtype in FLOATS else "flex_divide({0}, {1})"
        return apply_form(text, node, form, operands[:2])
    if _is(operands[1], 1):
        return _as(text, operands[0], dtype)
    return apply_form(text, node, "{0} / {1}", operands[:2])


@_pointwise("remainder")
def _remainder(text: Any, node: Node, operands: list[Any]) -> Scalar:
    return apply_form(text, node, "flex_remainder({0}, {1})", operands)


@_pointwise("fmod")
def _fmod(text: Any, node: Node, operands: list[Any]) -> Scalar:
    is_float = result_dtype(node) in FLOATS
    form = "precise::fmod({0}, {1})" if is_float else "flex_fmod({0}, {1})"
    return apply_form(text, node, form, operands)


@_pointwise("neg")
def _negative(text: Any, node: Node, operands: list[Any]) -> Scalar:
    if result_dtype(node) in FLOATS:
        return apply_form(text, node, "-{0}", operands)
    return _arithmetic(text, node, (0, *operands), "-")


@_pointwise("abs")
def _absolute(text: Any, node: Node, operands: list[Any]) -> Scalar:
    dtype = result_dtype(node)
    if dtype in FLOATS:
        return apply_form(text, node, "fabs({0})", operands)
    if dtype in (torch.bool, torch.uint8):
        return operands[0]
    x = operands[0]
    if text.largest(x) < 1 << 31:
        found = text.emit(dtype, f"abs({x.text})")
        text.limits[found.text] = text.largest(x)
        text.sizes[found.text] = x
        return found
    negative = _arithmetic(text, node, (0, x), "-")
    return text.emit(dtype, f"{x.text} < 0 ? {negative.text} : {x.text}")


@_pointwise("sign", "sgn")
def _sign(text: Any, node: Node, operands: list[Any]) -> Scalar:
    dtype = result_dtype(node)
    zero = "0.0f" if dtype in FLOATS else "0"
    if dtype == torch.bool:
        return operands[0]
    kind = "float" if dtype in FLOATS else MEMORY[dtype]
    return apply_form(text, node, f"{kind}(int({{0}} > {zero}) - int({{0}} < {zero}))", operands)


@_pointwise("pow")
def _power(text: Any, node: Node, operands: list[Any]) -> Scalar:
    dtype = result_dtype(node)
    base, exponent = operands[:2]
    if isinstance(exponent, Scalar) and exponent.number is not None:
        exponent = exponent.number
    if dtype not in FLOATS:
        if dtype == torch.bool:
            raise text.fail(node, "of bools has no Metal text")
        form = "flex_power({0}, {1})"
        if not isinstance(exponent, Scalar) and exponent in (1, 2, 3):
            x = _as(text, base, dtype)
            result = x
            for _ in range(int(exponent) - 1):
                result = _arithmetic(text, node, (result, x), "*")
            return result
        return apply_form(text, node, form, operands)
    forms = {
        0: "1.0f",
        1: "{0}",
        2: "{0} * {0}",
        3: "{0} * {0} * {0}",
        0.5: "precise::sqrt({0})",
        -0.5: "1.0f / precise::sqrt({0})",
        -1: "1.0f / {0}",
        -2: "1.0f / ({0} * {0})",
    }
    if not isinstance(exponent, Scalar) and exponent in forms:
        return apply_form(text, node, forms[exponent], (base,))
    return apply_form(text, node, "flex_power({0}, {1})", (base, exponent))


# ---- functions of one float ---------------------------------------------------------------------

_FUNCTIONS = {
    **{
        name: f"precise::{name}({{0}})"
        for name in (
            *("exp", "exp2", "log", "log2", "log10", "sqrt", "sin", "cos", "tan", "asin", "acos"),
            *("atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
        )
    },
    "tanh": "flex_tanh({0})",
    "rsqrt": "1.0f / precise::sqrt({0})",
    "reciprocal": "1.0f / {0}",
    "expm1": "flex_expm1({0})",
    "log1p": "flex_log1p({0})",
    "erf": "flex_erf({0})",
    "sigmoid": "1.0f / (1.0f + precise::exp(-{0}))",
    "silu": "{0} / (1.0f + precise::exp(-{0}))",
}


def _function(form: str) -> Pointwise:
    def function(text: Any, node: Node, operands: list[Any]) -> Scalar:
        return apply_form(text, node, form, operands[:1])

    return function


for _name, _text in _FUNCTIONS.items():
    POINTWISE[getattr(_aten, _name)] = _function(_text)


@_pointwise("gelu")
def _gelu(text: Any, node: Node, operands: list[Any]) -> Scalar:
    approximate = node.kwargs.get("approximate", operands[1] if len(operands) > 1 else "none")
    form = "flex_gelu_tanh({0})" if approximate == "tanh" else "flex_gelu({0})"
    return apply_form(text, node, form, operands[:1])


_ROUNDINGS = {"floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "rint", "fix": "trunc"}


def _rounding(function: str) -> Pointwise:
    def rounded(text: Any, node: Node, operands: list[Any]) -> Scalar:
        if node.kwargs.get("decimals", 0) != 0:
            raise text.fail(node, "with decimals has no Metal text")
        if result_dtype(node) not in FLOATS:
            return operands[0]
        return apply_form(text, node, f"{function}({{0}})", operands[:1])

    return rounded


for _name, _text in _ROUNDINGS.items():
    POINTWISE[getattr(_aten, _name)] = _rounding(_text)


@_pointwise("frac")
def _fraction(text: Any, node: Node, operands: list[Any]) -> Scalar:
    return apply_form(text, node, "{0} - trunc({0})", operands)


@_pointwise("relu")
def _relu(text: Any, node: Node, operands: list[Any]) -> Scalar:
    zero = "0.0f" if result_dtype(node) in FLOATS else "0"
    return apply_form(text, node, f"{{0}} < {zero} ? {zero} : {{0}}", operands)


@_pointwise("atan2")
def _angle(text: Any, node: Node, operands: list[Any]) -> Scalar:
    return apply_form(text, node, "precise::atan2({0}, {1})", operands)


@_pointwise("copysign")
def _copysign(text: Any, node: Node, operands: list[Any]) -> Scalar:
    return apply_form(text, node, "copysign({0}, {1})", operands)


# ---- choices ------------------------------------------------------------------------------------

# A NaN is the larger and the smaller one, but for fmax and fmin, which prefer numbers.
_CHOICES = {
    "maximum": ("{0} < {1}", "{1} != {1}"),
    "minimum": ("{0} > {1}", "{1} != {1}"),
    "fmax": ("{0} < {1}", "{0} != {0}"),
    "fmin": ("{0} > {1}", "{0} != {0}"),
}


def choice_form(name: str, dtype: torch.dtype) -> str:
    compared, is_nan = _CHOICES[name]
    condition = f"{compared} || {is_nan}" if dtype in FLOATS else compared
    return f"{condition} ? {{1}} : {{0}}"


def _choice(name: str) -> Pointwise:
    def choice(text: Any, node: Node, operands: list[Any]) -> Scalar:
        return apply_form(text, node, choice_form(name, result_dtype(node)), operands[:2])

    return choice


for _name in _CHOICES:
    POINTWISE[getattr(_aten, _name)] = _choice(_name)


@_pointwise("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(text: Any, node: Node, operands: list[Any]) -> Scalar:
    name = name_of(node)
    low = node.kwargs.get("min", operands[1] if len(operands) > 1 else None)
    high = node.kwargs.get("max", operands[2] if len(operands) > 2 else None)
    if name == "clamp_max":
        low, high = None, node.kwargs.get("max", low)
    if name == "hardtanh":
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    low, high = (text.scalar(x) if isinstance(x, Node) else x for x in (low, high))
    x = _as(text, operands[0], result_dtype(node))
    for bound, compared in ((low, "maximum"), (high, "minimum")):
        if bound is not None:
            x = _choice(compared)(text, node, [x, bound])
    return x


@_pointwise("where")
def _where(text: Any, node: Node, operands: list[Any]) -> Scalar:
    condition, a, b = operands
    dtype = result_dtype(node)
    condition = convert(text, condition, torch.bool)
    a, b = _as(text, a, dtype), _as(text, b, dtype)
    if condition.number is not None:
        return a if condition.number else b
    if a.text == b.text:
        return a
    chosen = text.emit(dtype, f"{condition.text} ? {a.text} : {b.text}")
    text.selects[chosen.text] = (condition, a, b)
    return chosen


# ---- conditions and bits ------------------------------------------------------------------------

_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _comparison(sign: str) -> Pointwise:
    def compared(text: Any, node: Node, operands: list[Any]) -> Scalar:
        sides: list[Any] = [x.meta["val"] if isinstance(x, Node) else x for x in node.args[:2]]
        dtype = torch.result_type(*sides)
        if dtype not in MEMORY:
            raise text.fail(node, f"of {dtype} has no Metal text")
        # Python's numbers too are compared in the dtype.
        parts = [x if isinstance(x, Scalar) else literal(x, dtype) for x in operands[:2]]
        return apply_form(text, node, f"{{0}} {sign} {{1}}", parts, dtype)

    return compared


for _name, _text in _COMPARISONS.items():
    POINTWISE[getattr(_aten, _name)] = _comparison(_text)

_LOGIC = {"logical_and": "{0} && {1}", "logical_or": "{0} || {1}", "logical_xor": "{0} != {1}"}
_LOGIC["logical_not"] = "!{0}"


def _logic(form: str) -> Pointwise:
    def logical(text: Any, node: Node, operands: list[Any]) -> Scalar:
        return apply_form(text, node, form, operands, torch.bool)

    return logical


for _name, _text in _LOGIC.items():
    POINTWISE[getattr(_aten, _name)] = _logic(_text)

_BITS = {
    "bitwise_and": ("{0} && {1}", "{0} & {1}"),
    "bitwise_or": ("{0} || {1}", "{0} | {1}"),
    "bitwise_xor": ("{0} != {1}", "{0} ^ {1}"),
    "bitwise_not": ("!{0}", "~{0}"),
    "__and__": ("{0} && {1}", "{0} & {1}"),
    "__or__": ("{0} || {1}", "{0} | {1}"),
    "__xor__": ("{0} != {1}", "{0} ^ {1}"),
}


def _bits(of_bools: str, of_integers: str) -> Pointwise:
    def bits(text: Any, node: Node, operands: list[Any]) -> Scalar:
        dtype = result_dtype(node)
        form = of_bools if dtype == torch.bool else f"{MEMORY[dtype]}({of_integers})"
        return apply_form(text, node, form, operands)

    return bits


for _name, _forms in _BITS.items():
    POINTWISE[getattr(_aten, _name)] = _bits(*_forms)

_SHIFTS = {
    "bitwise_left_shift": "flex_shift_left",
    "__lshift__": "flex_shift_left",
    "bitwise_right_shift": "flex_shift_right",
    "__rshift__": "flex_shift_right",
}


def _shift(function: str) -> Pointwise:
    def shifted(text: Any, node: Node, operands: list[Any]) -> Scalar:
        if result_dtype(node) not in (torch.int32, torch.int64):
            raise text.fail(node, f"of {result_dtype(node)} has no Metal text")
        return apply_form(text, node, f"{function}({{0}}, {{1}})", operands)

    return shifted


for _name, _text in _SHIFTS.items():
    POINTWISE[getattr(_aten, _name)] = _shift(_text)

_KINDS = {"isnan": "{0} != {0}", "isinf": "fabs({0}) == INFINITY"}


def _is_kind(form: str) -> Pointwise:
    def is_kind(text: Any, node: Node, operands: list[Any]) -> Scalar:
        if operands[0].dtype not in FLOATS:
            return literal(False, torch.bool)
        return apply_form(text, node, form, operands, torch.float32)

    return is_kind


for _name, _text in _KINDS.items():
    POINTWISE[getattr(_aten, _name)] = _is_kind(_text)


@_pointwise("_to_copy", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh", "positive")
def _same_number(text: Any, node: Node, operands: list[Any]) -> Scalar:
    return convert(text, operands[0], result_dtype(node))


@_pointwise("copy")
def _copied(text: Any, node: Node, operands: list[Any]) -> Scalar:
    return convert(text, operands[1], result_dtype(node))


BY_NAME = {"approx::tanh": POINTWISE[_aten.tanh]}
"""Operations of other libraries, which may be registered or not. attention-gym has this one for an
instruction of NVIDIA's."""

# What PyTorch takes operations apart into besides.
for _name in (
    *("add", "sub", "mul", "div", "neg", "abs", "sign", "maximum", "minimum", "fmax", "fmin"),
    *("where", "eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_xor"),
    *("bitwise_not", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"),
    *("atanh", "erf", "floor", "ceil", "round", "trunc", "reciprocal", "pow", "fmod", "remainder"),
    *("atan2",),
):
    if hasattr(torch.ops.prims, _name):
        POINTWISE[getattr(torch.ops.prims, _name)] = POINTWISE[getattr(_aten, _name)]
POINTWISE[torch.ops.prims.convert_element_type] = _same_number
