"""score_mod and mask_mod as Metal text: every operation, and mods of the kinds people write.

Each text runs on the engine in check mode, and is compared with PyTorch's own evaluation of the
function: values and derivatives with float64 autograd, integers and conditions exactly.
"""

from __future__ import annotations

import functools

import flex_mods
import published_mods
import pytest
import pytorch_mods
import torch
import torch.nn.functional as F
from dialect import check as dialect_findings
from flex_evaluation import (
    Points,
    check,
    evaluate,
    exact,
    mask_text,
    points,
    score_text,
    source,
    torch_scores,
    torch_seen,
)

from orchard_ops.flex.metal import lower, lower_graph
from orchard_ops.flex.mod import Mod, NotLowered
from orchard_ops.flex.trace import SCORE, trace

AT = points(*flex_mods.SHAPE)
SCORES = flex_mods.SCORES | published_mods.SCORES | pytorch_mods.SCORES
PURE = flex_mods.PURE | published_mods.PURE | pytorch_mods.PURE
MASKS = flex_mods.MASKS | published_mods.MASKS
WEIGHTS = torch.tensor([0.75, -1.25, 2.0])

# ---- mods ---------------------------------------------------------------------------------------


@functools.cache
def _scores() -> dict:
    return _evaluated({name: score_text(f) for name, f in SCORES.items()})


@functools.cache
def _masks() -> dict:
    return _evaluated({name: mask_text(f) for name, f in MASKS.items()})


def _evaluated(mods: dict, at: Points = AT) -> dict:
    given = {name: mod for name, mod in mods.items() if mod.text}
    ones = torch.ones_like(at.score)
    nothing = dict.fromkeys(mods.keys() - given.keys(), (at.score, ones))
    return nothing | dict(zip(given, evaluate(list(given.values()), at)))


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_people_write(name: str):
    function = SCORES[name]
    value, slope = _scores()[name]
    pure = PURE.get(name, function)
    true = exact(pure, AT)
    hidden = true.value == -torch.inf
    assert torch.equal(value == -torch.inf, hidden)
    check(name, (value, slope), true)


def test_what_does_nothing_has_no_text():
    assert score_text(flex_mods.nothing) == mask_text(flex_mods.everything) == Mod("", ())
    assert score_text(flex_mods.without_derivative).text
    assert score_text(lambda s, b, h, q, kv: s.detach()).text


@pytest.mark.parametrize("name", [n for n in MASKS if n != "everything"])
def test_masks_that_people_write(name: str):
    seen = torch_seen(MASKS[name], AT)
    assert torch.equal(_masks()[name][0].bool(), seen)
    assert seen.any() and not seen.all()


def test_results_in_float16_are_rounded_as_pytorch_rounds():
    def rounded(score, b, h, q_idx, kv_idx):
        x = flex_mods.OF_KEYS[kv_idx]
        return (x * x + x / 3) * 2 - x.sqrt().nan_to_num(1.0)

    def rounded_less(score, b, h, q_idx, kv_idx):
        x = flex_mods.OF_QUERIES[q_idx]
        return x * x + x / 3

    for function in (rounded, rounded_less):
        (value, _), *_ = evaluate([score_text(function)], AT)
        with_torch, _ = torch_scores(function, AT, torch.float32)
        assert torch.equal(value, with_torch.float())


def test_numbers_are_compared_in_float16():
    tenths = torch.tensor([0.1, 0.2, 0.3] * 6).half()

    def equal(score, b, h, q_idx, kv_idx):
        x = tenths[kv_idx]
        return score * 0 + (x == 0.1) + 2 * (x < 0.2) + 4 * (x >= 0.3) + 8 * (x != 0.3)

    (value, _), *_ = evaluate([score_text(equal)], AT)
    with_torch, _ = torch_scores(equal, AT, torch.float32)
    assert torch.equal(value, with_torch)


# ---- operations ---------------------------------------------------------------------------------

_UNARY = {
    name: getattr(torch, name)
    for name in (
        *("exp", "exp2", "expm1", "sigmoid", "tanh", "sin", "cos", "tan", "atan", "sinh", "cosh"),
        *("asinh", "erf", "abs", "neg", "sign", "sgn", "floor", "ceil", "round", "trunc", "frac"),
        *("relu", "square", "reciprocal", "sinc", "deg2rad", "rad2deg", "positive"),
        *("nan_to_num", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "acosh"),
    )
}
_UNARY |= {
    name: getattr(F, name)
    for name in (
        *("gelu", "softplus", "silu", "logsigmoid", "leaky_relu", "hardtanh", "elu", "relu6"),
        *("selu", "celu", "mish", "hardswish", "hardsigmoid", "softsign", "tanhshrink"),
    )
}
_UNARY |= {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "threshold": lambda x: F.threshold(x, 0.5, 0.25),
    "asin": lambda x: torch.asin(x / 20),
    "acos": lambda x: torch.acos(x / 20),
    "atanh": lambda x: torch.atanh(x / 20),
    "logit": lambda x: torch.logit(torch.sigmoid(x)),
    "clamp": lambda x: x.clamp(-1, 2) + x.clamp(min=0.5) * x.clamp(max=0.25),
    "clip_by_tensors": lambda x: torch.clamp(x, WEIGHTS[1], WEIGHTS[0]),
    "erfc": lambda x: 1 - torch.erf(x / 2),
    "to": lambda x: x.to(torch.int32) * 0.5 + x.long() + x.bool() + x.to(torch.uint8) * 0,
    "masked_fill": lambda x: x.masked_fill(x < 0.5, 0.25) + torch.where(x > 1, x, 2 * x),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5) + torch.lerp(x, x * x, 0.25),
    "isnan": lambda x: torch.where(torch.isnan(x) | torch.isinf(x) | ~torch.isfinite(x), 0.0, x),
    "full": lambda x: (
        x + torch.full((), 2.0) + torch.ones(()) - torch.zeros_like(x) + x.new_ones(())
    ),
    "stack_of_scalars": lambda x: x + float("1e-3") - 7 + True,
}
_APART = {
    # In one piece, the rounding of its inner sum would not be seen.
    "gelu": lambda score, *_: 0.5 * score * (1 + torch.erf(score * 0.5**0.5)),
    "gelu_tanh": lambda score, *_: (
        0.5 * score * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (score + 0.044715 * score**3)))
    ),
}
_POSITIVE = ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "acosh", "pow_tensor", "pow_half")
_BINARY = {
    "add_alpha": lambda x, y: torch.add(x, y, alpha=0.5) - torch.sub(y, x, alpha=2),
    "mul": torch.mul,
    "div": torch.div,
    "rsub": lambda x, y: 3 - x * y,
    "fmod": lambda x, y: torch.fmod(x, 1.5),
    "remainder": lambda x, y: torch.remainder(x, 1.5) + x % -2.5,
    "div_floor": lambda x, y: torch.div(x, y, rounding_mode="floor") + x,
    "div_trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc") + x,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "max": torch.max,
    "atan2": torch.atan2,
    "copysign": torch.copysign,
    "logaddexp": torch.logaddexp,
    "xlogy": lambda x, y: torch.xlogy(y, x * x + 1),
    "pow_tensor": lambda x, y: torch.pow(x, y),
    "pow_half": lambda x, y: x**0.5 + x**-0.5 + x**1.5,
    "pow_whole": lambda x, y: x**2 + x**3 - x**4 + x**5,
    "pow_negative": lambda x, y: x**-1 + x**-2 + x**0 + x**1,
    "pow_of_number": lambda x, y: 2**x + 2.5**y,
    "compare": lambda x, y: torch.where(x < y, x, y) + (x <= 1) * (x > y) * (x >= 0.5) + (y != x),
    "logic": lambda x, y: torch.where(torch.logical_xor(x > 0, y > 0) & ~(x == y), x, 0.5 * x),
    "hypot": lambda x, y: torch.sqrt(x * x + y * y),
    "heaviside": lambda x, y: x * torch.heaviside(x.detach(), y.to(x.dtype)),
}


def _unary_mod(name: str):
    function = _UNARY[name]
    return lambda score, b, h, q_idx, kv_idx: function(score)


def _binary_mod(name: str):
    function = _BINARY[name]
    return lambda score, b, h, q_idx, kv_idx: function(score, WEIGHTS[h] + kv_idx * 0.125)


_OPERATIONS = {**{n: _unary_mod(n) for n in _UNARY}, **{n: _binary_mod(n) for n in _BINARY}}


def _place(name: str) -> Points:
    """Where a function is defined."""
    if name not in _POSITIVE:
        return AT
    least = 1.125 if name == "acosh" else 0.03125
    return AT._replace(score=AT.score.abs() + least)


@functools.cache
def _operations() -> dict:
    texts = {name: score_text(mod) for name, mod in _OPERATIONS.items()}
    ordinary = {name: text for name, text in texts.items() if name not in _POSITIVE}
    found = _evaluated(ordinary)
    for name in texts.keys() - ordinary.keys():
        found |= _evaluated({name: texts[name]}, _place(name))
    return found


@pytest.mark.parametrize("name", _OPERATIONS)
def test_operations_and_their_derivatives(name: str):
    pure = _APART.get(name, _OPERATIONS[name])
    check(name, _operations()[name], exact(pure, _place(name)))


_SPECIAL = torch.tensor(
    [
        *(0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 0.5, -0.5, 1e-30, -1e-30, 1e30),
        *(-1e30, 89.0, -89.0, 500.0, -500.0, 1e-7, -1e-7, 2.5, -3.5, 1e-40, 3e38, -3e38),
    ]
)
_UNCERTAIN = {
    # PyTorch's own results at these numbers differ between its devices.
    *("gelu", "to", "remainder", "fmod", "div_floor", "div_trunc", "sinc", "tan", "sin", "cos"),
}


@functools.cache
def _special() -> tuple[Points, dict]:
    zeros = torch.zeros(len(_SPECIAL), dtype=torch.int32)
    at = Points(_SPECIAL, *[zeros] * 4)
    texts = {n: score_text(f) for n, f in _OPERATIONS.items() if n not in _UNCERTAIN}
    return at, _evaluated(texts, at)


@pytest.mark.parametrize("name", [n for n in _OPERATIONS if n not in _UNCERTAIN])
def test_infinities_nans_and_extremes(name: str):
    at, found = _special()
    value = found[name][0]
    # With some vector instructions PyTorch's own have infinity before float32 has.
    dtype = torch.float64 if name in ("sinh", "cosh") else torch.float32
    true = torch_scores(_OPERATIONS[name], at, dtype)[0].float()
    for is_kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = is_kind(value) != is_kind(true)
        assert not wrong.any(), (
            f"{name} of {at.score[wrong].tolist()}: {value[wrong].tolist()}, "
            f"in PyTorch {true[wrong].tolist()}"
        )


INTS = torch.tensor([-9, 4, 7, 2**31 - 1, -(2**31), 3, -5, 12], dtype=torch.int32)
LONGS = torch.tensor([-(2**40) - 3, 2**40 + 9, 5, -1, 2**63 - 1], dtype=torch.int64)
BYTES = torch.tensor([3, 250, 128, 7], dtype=torch.uint8)
_INTEGERS = {
    "add": lambda x, y: x + y * 3 - 7,
    "wrap": lambda x, y: INTS[3] + x * INTS[3] - INTS[4] * y,
    "floor_divide": lambda x, y: (x - y) // 3 + (x - y) // -4 + x // (y + 1),
    "remainder": lambda x, y: (x - y) % 3 + (x - y) % -4 + x % (y + 1),
    "fmod": lambda x, y: torch.fmod(x - y, 3) + torch.fmod(y - x, -4),
    "div_trunc": lambda x, y: torch.div(x - y, 3, rounding_mode="trunc"),
    "extreme": lambda x, y: INTS[4] // -1 + INTS[4] % -1 + torch.abs(INTS[4]) + -INTS[4],
    "shift": lambda x, y: (x << 3) + (INTS[0] >> 1) - (x << y) + (INTS[4] >> y) + (1 << x),
    "shift_far": lambda x, y: (x << 40) + (INTS[0] >> 33) + (LONGS[0] >> 70),
    "bits": lambda x, y: ((x & 5) | (y ^ 3)) - ~x + (x & y),
    "sign": lambda x, y: torch.sign(x - y) + torch.abs(x - y) + torch.neg(x) - torch.sgn(y - 3),
    "minimum": lambda x, y: torch.minimum(x, y) + torch.maximum(x, y + 1) + x.clamp(2, 9),
    "pow": lambda x, y: x**2 + y**3 + (x - y) ** 5 + x ** (y % 4) + INTS[0] ** 11,
    "long": lambda x, y: (LONGS[0] + x) // (LONGS[2] + y) - LONGS[1] * y + (LONGS[4] + x),
    "long_remainder": lambda x, y: (LONGS[0] - x) % (LONGS[2] + y) + torch.fmod(LONGS[1], y + 1),
    "byte": lambda x, y: BYTES[x % 4] + BYTES[1] * 2 + BYTES[2] - ~BYTES[x % 4],
    "byte_quotient": lambda x, y: BYTES[x % 4] // 255 + BYTES[x % 4] // 7 + BYTES[y % 4] % 255,
    "short": lambda x, y: (x.to(torch.int16) * 1000 * y.to(torch.int16)) + x.to(torch.int8) * 9,
    "short_quotient": lambda x, y: (
        (x - y).to(torch.int16) // -3 + (x - y).to(torch.int8) % -5 + torch.fmod(-x.short(), 4)
    ),
    "short_choice": lambda x, y: (
        (x - y).to(torch.int8).clamp(-3, 4) + abs((x - y).short()) ** 2 + torch.sign(y.char() - 3)
    ),
    "bool": lambda x, y: ((x > y) | (x == 3)).int() + ((x < y) ^ (y >= 5)) + ~(x != y),
    "compare_mixed": lambda x, y: (x > 2.5).int() + (LONGS[x % 5] > y) + (y <= 3.0) + (x == True),  # noqa: E712
    "rounding": lambda x, y: torch.floor(x) + torch.round(y) + x.trunc() + y.ceil(),
    "relu": lambda x, y: torch.relu(x - y) + (x - y).masked_fill(x < y, 4),
    "where": lambda x, y: torch.where(x > y, x, y) + torch.where(x > 3, 1, LONGS[2]),
    "logical": lambda x, y: torch.logical_and(x, y).int() + torch.logical_not(x) * 2,
    "square": lambda x, y: torch.square(x - y) + torch.clamp_min(x, 4) - torch.clamp_max(y, 3),
    "max": lambda x, y: torch.max(x, y) - torch.min(x, y),
    "isnan": lambda x, y: torch.isnan(x).int() + x,
}


def _integer_mod(name: str, modulus: int):
    """The low or the high bits of a result: a float32 holds 24 of them."""
    function = _INTEGERS[name]

    def mod(score, b, h, q_idx, kv_idx):
        x = function(q_idx, kv_idx).long()
        return (x & 0xFFFF) if modulus == 0 else (x >> (20 * modulus)) & 0xFFFFF

    return mod


_PARTS = {(n, part): _integer_mod(n, part) for n in _INTEGERS for part in range(3)}


@functools.cache
def _integers() -> dict:
    return _evaluated({key: score_text(mod) for key, mod in _PARTS.items()})


@pytest.mark.parametrize("name", _INTEGERS)
def test_integers_are_exact(name: str):
    for part in range(3):
        true, _ = torch_scores(_PARTS[name, part], AT)
        assert torch.equal(_integers()[name, part][0], true.float()), (name, part)


# ---- what a text is -----------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["scores", "masks", "operations", "integers"])
def test_texts_speak_the_dialect(group: str):
    texts = {
        "scores": lambda: [score_text(f) for f in SCORES.values()],
        "masks": lambda: [mask_text(f) for f in MASKS.values()],
        "operations": lambda: [score_text(f) for f in _OPERATIONS.values()],
        "integers": lambda: [score_text(f) for f in _PARTS.values()],
    }[group]()
    texts = [mod for mod in texts if mod.text]
    found = {f.message for f in dialect_findings(source(texts))}
    assert not found - OF_THE_SPECIFICATION


OF_THE_SPECIFICATION = {
    # Functions of the Metal specification that PyTorch does not happen to call.
    f"'{name}' is not in PyTorch's Metal sources"
    for name in ("asinh", "acosh", "log10")
}


def test_the_same_function_has_the_same_text():
    def one(score, b, h, q_idx, kv_idx):
        unused = score * 3  # noqa: F841
        return score + flex_mods.RELATIVE[h, q_idx]

    def other(score, b, h, query, key):
        table = flex_mods.RELATIVE
        return score + table[h][query]

    first, second = score_text(one), score_text(other)
    assert first == second and first.captures[0] is flex_mods.RELATIVE


def test_a_tensor_is_captured_once_and_not_copied():
    weight = torch.nn.Parameter(torch.randn(4))

    def mod(score, b, h, q_idx, kv_idx):
        return score * weight[b] + weight[h] + WEIGHTS[0]

    found = score_text(mod).captures
    assert len(found) == 2 and found[0] is weight and found[1] is WEIGHTS


def test_captures_are_counted_from_a_number():
    text = lower(trace(flex_mods.relative_bias, SCORE), first_capture=3).text
    assert "captures.at<float>(3, h, " in text


def test_unit_slopes_are_found():
    unit = ("nothing", "alibi", "full_bias", "causal_scores", "windowed_scores", "hashed_noise")
    for name, function in SCORES.items():
        text = score_text(function).text
        is_unit = not text or "kUnitSlope = true" in text
        assert not (name in unit and not is_unit), name
        assert not is_unit or set(_scores()[name][1].tolist()) == {1.0}


def test_no_word_of_the_user_reaches_the_text():
    evil = "x; } device int* "

    def mod(score, b, h, q_idx, kv_idx):
        return score + flex_mods.RELATIVE[h, q_idx]

    mod.__name__ = mod.__doc__ = evil
    namespace: dict = {"table": flex_mods.RELATIVE}
    code = compile(
        "def f(score, b, h, q, kv):\n  return score + table[h, q]", evil, "exec", dont_inherit=True
    )
    exec(code, namespace)
    assert score_text(namespace["f"]).text == score_text(mod).text
    assert score_text(mod).text.isascii() and "device" not in score_text(mod).text


def test_numbers_keep_their_float32():
    numbers = (0.1, 1e-45, 3.4028234e38, 1e39, -1e39, 16777217.0, -0.0, 1 / 3, 2**-126)
    mods = [score_text(lambda s, b, h, q, kv, x=x: s * 0 + torch.full((), x)) for x in numbers]
    for x, (value, _) in zip(numbers, evaluate(mods, AT)):
        assert torch.equal(value, torch.tensor(x).expand_as(value))


# ---- what has no text ---------------------------------------------------------------------------


def _fails(function, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        score_text(function)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_an_operation_without_text_is_named_with_its_line():
    def mod(score, b, h, q_idx, kv_idx):
        return score + torch.lgamma(score)

    _fails(mod, NotLowered, "lgamma", "test_lowering.py", "return score + torch.lgamma(score)")


def test_what_is_not_lowered():
    tables = [torch.randn(3) for _ in range(9)]
    deep = torch.randn(2, 2, 2, 2, 2)
    double = torch.randn(3, dtype=torch.float64)
    written = torch.zeros(3)

    def writes(score, b, h, q_idx, kv_idx):
        written[0] = 1.0
        return score

    _fails(lambda s, b, h, q, kv: s + sum(t[h] for t in tables), NotLowered, "8 captured")
    _fails(lambda s, b, h, q, kv: s + deep[b, h, q, kv, 0], NotLowered, "5 dimensions")
    _fails(lambda s, b, h, q, kv: s + double[h], NotLowered, "float64")
    many = torch.ones(3, 1025)
    _fails(lambda s, b, h, q, kv: s + many[h].sum(), NotLowered, "1025 numbers for each score")
    _fails(lambda s, b, h, q, kv: s + WEIGHTS.max(0).values, NotLowered, "aten.max.dim")
    _fails(lambda s, b, h, q, kv: s + WEIGHTS.argmax(), NotLowered, "argmax")
    _fails(lambda s, b, h, q, kv: s + WEIGHTS.sort().values[h], NotLowered, "sort")
    _fails(lambda s, b, h, q, kv: s + WEIGHTS[h > 1].sum(), Exception)
    _fails(lambda s, b, h, q, kv: s + torch.rand(()), NotLowered, "rand")
    _fails(writes, NotLowered, "changes a tensor")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_derivatives_do_not_depend_on_the_mode_of_the_call(mode):
    with mode():
        inside = score_text(flex_mods.softcap)
        table = torch.ones(3)
        of_table = score_text(lambda s, b, h, q, kv: s * table[h])
    assert inside == score_text(flex_mods.softcap)
    assert "derivative = v0;" in of_table.text


def test_python_branches_are_refused_with_the_line():
    def mod(score, b, h, q_idx, kv_idx):
        if q_idx > 3:
            return score
        return score * 2

    _fails(mod, TypeError, "score_mod must not read the value", "if q_idx > 3:", "torch.where")
    _fails(lambda s, b, h, q, kv: s + int(q), TypeError, "must not read the value")
    _fails(lambda s, b, h, q, kv: s + WEIGHTS[0].item(), TypeError, "must not read the value")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_indices_that_pytorch_does_not_take_are_refused_with_a_remedy(dtype: torch.dtype):
    table = torch.tensor([0, 2, 1], dtype=dtype)
    said = f"{dtype}", "WEIGHTS[table[h]]", ".long()"
    _fails(lambda s, b, h, q, kv: s + WEIGHTS[table[h]], TypeError, *said)
    assert score_text(lambda s, b, h, q, kv: s + WEIGHTS[table[h].long()]).text


def test_results_that_are_no_scores():
    _fails(lambda s, b, h, q, kv: WEIGHTS, TypeError, "score_mod must return a score", "(3,)")
    _fails(lambda s, b, h, q, kv: None, TypeError, "got NoneType")
    with pytest.raises(TypeError, match="mask_mod must return a bool"):
        mask_text(lambda b, h, q, kv: q - kv)


# ---- graphs of torch.compile --------------------------------------------------------------------


def test_graphs_with_lifted_captures():
    table = torch.randn(3, 33)

    class Graph(torch.nn.Module):
        def forward(self, score, b, h, q_idx, kv_idx, offset, unused, bias):
            return torch.where(q_idx + offset >= kv_idx, score + bias[h, q_idx], -torch.inf)

    graph = torch.fx.symbolic_trace(Graph())
    mod = lower_graph(graph, [4, torch.zeros(2), table], SCORE, first_capture=2)
    assert mod.captures == (4, table)
    assert "at<long>(2)" in mod.text and "at<float>(3, h, q)" in mod.text
    longer = lower_graph(graph, [4, torch.zeros(2), torch.randn(5, 7)], SCORE, first_capture=2)
    assert longer.text == mod.text
