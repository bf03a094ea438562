"""Nothing that a user can name or write as a string is in the Metal text: a text is that of its
operations and numbers, printed here."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import flex_mods
import numpy as np
import published_mods
import pytest
import pytorch_mods
import torch

from orchard_ops.flex.metal import lower
from orchard_ops.flex.mod import NotLowered
from orchard_ops.flex.trace import MASK, SCORE, trace

EVIL = '1.0f; } }; kernel void evil(device uint* x [[buffer(0)]]) { for (;;) x[0] = 1; /*"\\'
SLOPES, OTHER = torch.tensor([0.5, 0.25]), torch.tensor([3, 1])


def text(function: Callable[..., Any], kind: str = SCORE) -> str:
    return lower(trace(function, kind)).text


def plain(score, b, h, q_idx, kv_idx):
    return score * 2.5 + SLOPES[h] * (q_idx - kv_idx + 3)


PLAIN = text(plain)


# ---- names


def _renamed(words: dict[str, str]) -> Callable[..., Any]:
    """`plain`, written with other names."""
    source = (
        "def {function}(s, x, y, z, w):\n"
        "    {local} = s * 2.5\n"
        "    return {local} + {table}[y] * (z - w + 3)\n"
    ).format(**words)
    names = {words["table"]: SLOPES}
    exec(source, names)
    return names[words["function"]]


@pytest.mark.parametrize(
    "words",
    [
        {"function": "struct", "table": "kernel", "local": "float4"},
        {"function": "ScoreMod", "table": "captures", "local": "derivative"},
        {"function": "v0", "table": "v1", "local": "v2"},
        {"function": "flex_tanh", "table": "FlexCaptures", "local": "METAL_FUNC"},
        {"function": "été", "table": "表", "local": "标量"},
    ],
    ids=lambda words: words["function"],
)
def test_names_of_functions_tables_and_variables_reach_no_text(words: dict[str, str]):
    assert text(_renamed(words)) == PLAIN


def test_names_that_only_python_can_give():
    own = _renamed({"function": "f", "table": "t", "local": "x"})
    own.__name__ = own.__qualname__ = own.__module__ = own.__doc__ = EVIL
    assert text(own) == PLAIN
    code = own.__code__.replace(co_name=EVIL, co_filename=EVIL)
    renamed = type(own)(code, own.__globals__)
    assert text(renamed) == PLAIN

    def with_annotations(score: EVIL, b: EVIL, h, q_idx, kv_idx) -> EVIL:  # type: ignore
        """1.0f; } evil"""
        return plain(score, b, h, q_idx, kv_idx)

    assert text(with_annotations) == PLAIN
    first = lambda score, b, h, q_idx, kv_idx: plain(score, b, h, q_idx, kv_idx)  # noqa: E731
    first.__name__ = "<lambda>*/ evil"
    assert text(first) == PLAIN


def test_keys_and_attributes_that_hold_tables():
    tables = {EVIL: SLOPES}
    holder = SimpleNamespace(**{EVIL: SLOPES})
    by_key, by_attribute = (
        lambda score, b, h, q_idx, kv_idx, of=of: score * 2.5 + of()[h] * (q_idx - kv_idx + 3)
        for of in (lambda: tables[EVIL], lambda: getattr(holder, EVIL))
    )
    assert text(by_key) == text(by_attribute) == PLAIN


# ---- strings


def test_strings_of_the_function():
    mode = EVIL

    def mod(score, b, h, q_idx, kv_idx):
        note = f"{EVIL} {mode}"
        if mode.startswith("1.0f") and EVIL in note:
            score = score * float("2.5")
        return score + SLOPES[h] * (q_idx - kv_idx + int("3"))

    assert text(mod) == PLAIN


def test_strings_that_operations_take():
    """Where PyTorch takes one, it chooses among operations."""
    with pytest.raises((RuntimeError, TypeError, ValueError, NotLowered)):
        text(lambda s, b, h, q, kv: torch.nn.functional.gelu(s, approximate=EVIL))
    with pytest.raises((RuntimeError, TypeError, ValueError, NotLowered)):
        text(lambda s, b, h, q, kv: torch.div(s, 3.0, rounding_mode=EVIL))
    for infinite in ("-inf", "-Infinity", "-INF"):
        found = text(lambda s, b, h, q, kv, x=infinite: torch.where(q >= kv, s, float(x)))
        assert infinite not in found.replace("INFINITY", "")


# ---- numbers that print as something else


class Float(float):
    def __repr__(self) -> str:
        return EVIL

    __str__ = __repr__

    def __format__(self, form: str) -> str:
        return EVIL


class Integer(int):
    def __repr__(self) -> str:
        return EVIL

    __str__ = __repr__

    def __format__(self, form: str) -> str:
        return EVIL


class Named(enum.IntEnum):
    kernel = 3


NUMBERS = {
    "float": (Float(2.5), 3),
    "integer": (2.5, Integer(3)),
    "both": (Float(2.5), Integer(3)),
    "enum": (2.5, Named.kernel),
    "numpy": (np.float64(2.5), np.int64(3)),
    "tensors": (torch.tensor(2.5), torch.tensor(3)),
    "fraction": (float(Fraction(5, 2)), 3),
}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_numbers_are_printed_here(numbers: tuple[Any, Any]):
    factor, offset = numbers
    found = text(lambda score, b, h, q, kv: score * factor + SLOPES[h] * (q - kv + offset))
    assert "evil" not in found and "kernel" not in found
    if not isinstance(factor, torch.Tensor):  # which are captured
        assert found == PLAIN


# ---- what a text may hold

_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")
_OURS = re.compile(
    r"v\d+|flex_\w+|struct|static|constant|constexpr|const|thread|return|true|false|bool|char|uchar"
    r"|short|int|uint|long|ulong|half|bfloat|float|for|precise|fast|INFINITY|NAN|METAL_FUNC|ScoreMod"
    r"|MaskMod|FlexCaptures|captures|at|kUnitSlope|score|sees|derivative|s|b|h|q|kv|abs|fabs|min|max"
    r"|clamp|floor|ceil|rint|trunc|exp|exp2|log|log2|sqrt|rsqrt|sin|cos|tan|tanh|atan2|i\d+"
)


@pytest.mark.parametrize("module", (flex_mods, published_mods, pytorch_mods))
def test_texts_hold_our_words_alone(module: Any):
    made = [text(f) for f in module.SCORES.values()]
    made += [text(f, MASK) for f in getattr(module, "MASKS", {}).values()]
    assert sum(map(bool, made)) > 10
    for one in made:
        assert one.isascii() and not re.search(r"[\"'\\#$@`]|/\*|//|\[\[|\bkernel\b|\?\?", one)
        strange = [w for w in _WORD.findall(one) if not _OURS.fullmatch(w)]
        assert not strange, strange
