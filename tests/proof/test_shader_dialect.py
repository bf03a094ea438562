"""The shaders speak Apple's dialect: language rules, limits, and PyTorch's own vocabulary."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

pytest.importorskip("simulator", reason="the dialect is checked with the simulator's compiler")

import numpy as np
from dialect import check, vocabulary
from dialect.rules import RULES, threadgroup_bytes
from dialect.text import Text
from dialect.variants import variants
from mutation.harness import (
    APPEND,
    CACHE_FAMILIES,
    DELTA,
    DKV,
    DKV_PAIRS,
    DKV_SUMS,
    DMASK_FROM_DS,
    DMASK_SUM,
    DMASK_SUM_KEYS,
    DQ_FROM_DS,
    DSINKS,
    FAMILIES,
    FORWARD,
    FORWARD_MERGE,
    MASK_MAP,
    OTHER_FAMILIES,
    ROOT,
    Params,
    Sources,
)
from simulator import engine
from simulator.engine import arrays, compiler

pytestmark = pytest.mark.skipif(
    not vocabulary.headers(), reason="this torch has no Metal headers to compare with"
)

# What lies outside of the wheel's vocabulary, and why that is right. An entry that is no longer
# found fails the test.
ACCEPTED = {
    "'isfinite' is not in PyTorch's Metal sources": "a function of the Metal specification",
    "'mulhi' is not in PyTorch's Metal sources": "an integer function of the Metal specification",
    "'simd_or' is not in PyTorch's Metal sources": "a reduction of the Metal specification",
    "'simd_shuffle' is not in PyTorch's Metal sources": "a permutation of the Metal specification",
    "'xy' is not in PyTorch's Metal sources": "a swizzle",
    "swizzle of 2: not in PyTorch's Metal sources": "the wheel writes swizzles, it reads none",
    "pragma clang fp contract(off): not in PyTorch's Metal sources": (
        "Metal's compiler is a clang and takes it; one that did not would warn and go on"
    ),
    "#line: not in PyTorch's Metal sources": "a directive of C",
    "#include <metal_simdgroup>: not in PyTorch's Metal sources": "part of metal_stdlib",
    "#include <metal_simdgroup_matrix>: not in PyTorch's Metal sources": "declares the matrices",
    "reinterpret_cast to threadgroup *: not in PyTorch's Metal sources": (
        "as to device and constant pointers, which it has"
    ),
}


@functools.cache
def _source(family: str) -> str:
    return Sources().text(family)


@functools.cache
def _findings(family: str) -> list:
    lines = [kernel["instantiation"] for kernel in _sampled(family)]
    return check(_source(family), lines)


def _sampled(family: str) -> list[dict]:
    """Variants that together use all of the source."""
    kernels = variants()[family]
    if family in (*OTHER_FAMILIES, *CACHE_FAMILIES):
        return kernels[:: -(-len(kernels) // 4)]
    wanted = ("half", "bfloat", "float")
    widths = {DKV: ("_d64_", "_d64_", "_d80_"), DKV_PAIRS: ("_d128_", "_d128_", "_d256_")}.get(
        family, ("_d64_", "_d128_", "_d256_")
    )
    return [
        next(
            k
            for k in reversed(kernels)
            if f"<{t}," in k["instantiation"]
            and word in k["name"]
            and ("dropout" in k["name"] or family in (DELTA, DQ_FROM_DS))
            and all((f"_{part}" in k["name"]) == (part in score) for part in _PARTS_OF_SCORES)
        )
        for t, word in zip(wanted, widths)
        for score in _SCORES[family]
        if not score or word in ("_d64_", "_d128_")
    ]


_SCORES = dict.fromkeys(
    FAMILIES, ("", "alibi", "softcap alibi mask_bool", "softcap alibi mask_float32_pairs")
)
_SCORES |= {DELTA: ("", "mask sinks", "sinks"), DQ_FROM_DS: ("", "mask")}
_PARTS_OF_SCORES = ("softcap", "alibi", "mask", "mask_bool", "mask_float32_pairs", "sinks")
_EVERY_FAMILY = (*FAMILIES, *OTHER_FAMILIES, *CACHE_FAMILIES)


@pytest.mark.parametrize("family", _EVERY_FAMILY)
def test_nothing_is_wrong_with_the_shaders(family: str):
    unexpected = [str(f) for f in _findings(family) if f.message not in ACCEPTED]
    assert not unexpected, "\n".join(unexpected)


def test_no_exception_is_out_of_date():
    found = {f.message for family in _EVERY_FAMILY for f in _findings(family)}
    assert ACCEPTED.keys() <= found, ACCEPTED.keys() - found


@pytest.mark.parametrize("path", sorted((ROOT / "shaders").glob("*.h")), ids=lambda p: p.name)
def test_ascii(path: Path):
    assert path.read_bytes().isascii()


@pytest.mark.parametrize("family", _EVERY_FAMILY)
def test_threadgroup_memory_of_every_variant(family: str):
    kernels = variants()[family]
    sizes = threadgroup_bytes(_source(family), [k["instantiation"] for k in kernels])
    assert sizes.keys() == {k["name"] for k in kernels}
    none = family in (
        DELTA, MASK_MAP, DSINKS, DMASK_FROM_DS, DMASK_SUM, DMASK_SUM_KEYS, DKV_SUMS, APPEND,
        FORWARD_MERGE,
    )  # fmt: skip
    assert (min(sizes.values()) > 0) != none and max(sizes.values()) <= 32 * 1024


def test_threadgroup_memory_is_what_a_launch_takes():
    family = FORWARD
    kernel = _sampled(family)[0]
    source = _source(family)
    size = threadgroup_bytes(source, [kernel["instantiation"]])[kernel["name"]]
    library = engine.compile(source + kernel["instantiation"])
    params = Params(num_heads=1, num_kv_heads=1)  # q_len and kv_len 0: nothing else is read
    params = np.frombuffer(bytes(params), np.uint8)
    none = {n: np.zeros(64, np.uint8) for n in Sources().buffers.values()}
    threads = (kernel["threads"], 1, 1)
    counters = arrays.launch(library, kernel["name"], threads, threads, {**none, 12: params})
    assert counters.threadgroup_memory == size


# ---- the checks themselves

PREAMBLE = "#include <metal_stdlib>\nusing namespace metal;\n"
KERNEL = (
    PREAMBLE + "kernel void k(device float* x [[buffer(0)]], "
    "uint i [[thread_position_in_grid]]) {{ {} }}\n"
)


def _body(text: str, before: str = "") -> str:
    return KERNEL.format(text).replace("kernel void", before + "kernel void")


BAD = {
    "quad_shuffle": (
        _body("x[i] = quad_shuffle(x[i], ushort(0));"),
        "'quad_shuffle' is not in PyTorch's Metal sources",
    ),
    "lambda": (_body("auto f = [&](float y) { return y + x[i]; }; x[i] = f(1.0f);"), "lambda"),
    "if constexpr": (_body("if constexpr (sizeof(int) == 4) { x[i] = 1.0f; }"), "if constexpr"),
    "double": (_body("double y = x[i]; x[i] = y;"), "Metal has no double"),
    "long double": (_body("x[i] = 1.0L;"), "Metal has no long double"),
    "not ASCII": (_body("x[i] = 1.0f;  // \N{GREEK SMALL LETTER ALPHA}"), "not ASCII"),
    "threadgroup variable in a helper": (
        _body("f(i); x[i] = 0.0f;", "void f(uint i) { threadgroup float y[32]; y[i] = 1.0f; }\n"),
        "a threadgroup variable outside of a kernel's own scope",
    ),
    "threadgroup variable in a block": (
        _body("if (i < 4) { threadgroup float y[32]; y[i] = 1.0f; x[i] = y[i]; }"),
        "a threadgroup variable outside of a kernel's own scope",
    ),
    "recursion": (
        _body("x[i] = f(x[i]);", "float f(float y) { return y > 1.0f ? f(y / 2.0f) : y; }\n"),
        "recursion: f -> f",
    ),
    "mutual recursion": (
        _body(
            "x[i] = f(x[i]);",
            "float g(float y);\nfloat f(float y) { return g(y) + 1.0f; }\n"
            "float g(float y) { return y > 1.0f ? f(y / 2.0f) : y; }\n",
        ),
        "recursion: f -> g -> f",
    ),
    "recursive template": (
        _body(
            "x[i] = f(x[i]);",
            "template <typename T> T f(T y) { return y > T(1) ? f(y / T(2)) : y; }\n",
        ),
        "recursion: f -> f",
    ),
    "40 buffers": (
        PREAMBLE
        + "kernel void k("
        + ", ".join(f"device float* x{n} [[buffer({n})]]" for n in range(40))
        + ", uint i [[thread_position_in_grid]]) { x0[i] = x39[i]; }\n",
        "buffer",
    ),
    "40 KiB of threadgroup memory": (
        _body("threadgroup float y[10240]; y[i] = x[i]; x[i] = y[i + 1];"),
        "k: 40960 bytes of threadgroup memory, at most 32768",
    ),
    "half8": (_body("half8 y; x[i] = y[0];"), "'half8' is not in PyTorch's Metal sources"),
    "unknown metal:: function": (
        _body("x[i] = metal::frobnicate(x[i]);"),
        "'frobnicate' is not in PyTorch's Metal sources",
    ),
    "unknown attribute": (
        PREAMBLE + "kernel void k(device float* x [[buffer(0)]], uint i [[frobnicated]]) "
        "{ x[i] = 0.0f; }\n",
        "attribute [[frobnicated]]",
    ),
    "unusual parameter type": (
        PREAMBLE + "kernel void k(device float* x [[buffer(0)]], "
        "uchar i [[thread_index_in_simdgroup]]) { x[i] = 0.0f; }\n",
        "uchar parameter [[thread_index_in_simdgroup]]",
    ),
    "pointer without address space": (
        _body("float* y = 0; x[i] = y ? 1.0f : 0.0f;"),
        "no address space",
    ),
    "address spaces mixed up": (
        _body("threadgroup float y[4]; device float* z = y; x[i] = z[0];"),
        "cannot initialize a variable of type",
    ),
    "function pointer": (
        _body("float (*g)(float) = f; x[i] = g(x[i]);", "float f(float y) { return y; }\n"),
        "a function pointer",
    ),
    "virtual": (
        _body("x[i] = 0.0f;", "struct S { virtual float f() { return 1.0f; } };\n"),
        "Metal has no virtual functions",
    ),
    "new": (_body("x[i] = *new float(1.0f);"), "Metal has no new"),
    "a stage as a name": (
        _body(
            "S s = {1.0f}; x[i] = s.fragment();",
            "struct S { float a; float fragment() const { return a; } };\n",
        ),
        "a keyword of Metal",
    ),
    "goto": (_body("again: x[i] = 0.0f; goto again;"), "Metal has no goto"),
    "structured binding": (
        _body("S s = {1.0f, 2.0f}; auto [a, b] = s; x[i] = a + b;", "struct S { float a, b; };\n"),
        "Metal 3 is C++14",
    ),
    "inline variable": (
        _body("x[i] = y;", "constant inline constexpr float y = 1.0f;\n"),
        "Metal 3 is C++14",
    ),
    "fold expression": (
        _body(
            "x[i] = f(1.0f, 2.0f);",
            "template <typename... T> float f(T... y) { return (y + ...); }\n",
        ),
        "Metal 3 is C++14",
    ),
    "class template argument deduction": (
        _body(
            "S s(x[i]); x[i] = s.a;",
            "template <typename T> struct S { T a; constexpr S(T b) : a(b) {} };\n",
        ),
        "Metal 3 is C++14",
    ),
    "if with initialiser": (
        _body("if (float y = x[i]; y > 0.0f) { x[i] = y; }"),
        "Metal 3 is C++14",
    ),
    "nested namespace": (_body("x[i] = 0.0f;", "namespace a::b { }\n"), "Metal 3 is C++14"),
    "C++20": (
        _body("x[i] = 0.0f;", "template <typename T> concept C = true;\n"),
        "Metal is C++17 at most",
    ),
    "unknown header": (
        _body("x[i] = 0.0f;", "#include <metal_tensor>\n"),
        "#include <metal_tensor>: not in PyTorch's Metal sources",
    ),
    "binary literal": (_body("x[i] = 0b11;"), "binary literal"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_found(name: str):
    source, expected = BAD[name]
    found = [str(f) for f in check(source)]
    assert any(expected in text for text in found), found


def test_good_text_passes():
    source = _body(
        "threadgroup float y[8192]; y[i] = f(x[i]); "
        "threadgroup_barrier(mem_flags::mem_threadgroup); x[i] = y[i + 1];",
        "template <typename T> T f(T y) { return y > T(1) ? y / T(2) : y; }\n",
    )
    assert check(source) == []


@pytest.mark.parametrize("path", vocabulary.headers(), ids=lambda p: p.name)
def test_pytorchs_sources_are_within_their_vocabulary(path: Path):
    text = Text(vocabulary.expanded(path))
    wanted = ("known_words", "known_idioms")
    assert [str(f) for rule in RULES if rule.__name__ in wanted for f in rule(text)] == []


@pytest.mark.parametrize("name", ("PrefillAttention", "DecodeAttention"))
def test_pytorchs_attention_kernels_pass(name: str):
    header = vocabulary.TORCH / "include/ATen/native/mps/kernels" / f"{name}.h"
    if not header.exists():
        pytest.skip(f"this torch has no {name}.h")
    source = "\n".join(
        [
            PREAMBLE,
            "#include <metal_simdgroup>",
            "#include <c10/metal/utils.h>",
            f"#include <ATen/native/mps/kernels/{name}.h>",
        ]
    )
    text = compiler.preprocess(source, (str(vocabulary.TORCH / "include"),), ())
    pattern = "*float16*64*" if name == "PrefillAttention" else "*half_64*"
    assert [str(f) for f in check(text, only=(pattern,))] == []


def test_the_vocabulary_has_what_it_should():
    """The vocabulary is read from the wheel; this test only guards against reading nothing."""
    known = {"simdgroup_multiply_accumulate", "simd_shuffle_xor", "threadgroup_barrier", "bfloat"}
    assert known <= vocabulary.words() and "simd_shuffle" not in vocabulary.words()
    assert {"attribute [[host_name]]", "const member function"} <= vocabulary.idioms()
    assert "lambda" not in vocabulary.idioms()
