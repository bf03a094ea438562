"""PyTorch's own attention kernels, unmodified from the installed wheel, against float64.

The engine must run them right, and its checks must not raise a false alarm.  Their barriers serve
as mutants: without a barrier that is needed, check mode must speak.
"""

import re
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from simulator import engine
from simulator.engine import arrays

INCLUDE = Path(torch.__file__).parent / "include"
KERNELS = INCLUDE / "ATen" / "native" / "mps" / "kernels"
pytestmark = pytest.mark.skipif(
    not (KERNELS / "PrefillAttention.h").exists(),
    reason="this torch has no Metal attention headers",
)

SOURCE = """
#include <c10/metal/utils.h>
#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;
#include <ATen/native/mps/kernels/DecodeAttention.h>
#include <ATen/native/mps/kernels/PrefillAttention.h>
"""
MODES = pytest.mark.parametrize("check", [False, True], ids=["plain", "check"])
TOLERANCE = {"float16": 3e-3, "bfloat16": 3e-2, "float32": 3e-6}
SHORT = {"float16": "half", "bfloat16": "bfloat", "float32": "float"}
HEAD_DIMS = (32, 64, 72, 80, 96, 128, 256)
VECTOR_HEAD_DIMS = (64, 96, 128, 256)
MASKS = ("none", "bool", "additive")


# ---- reference


def encode(x, dtype):
    """numpy has no bfloat16: the upper 16 bits, rounded to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(x, dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(x, dtype):
    if dtype == "bfloat16":
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def attention(q, k, v, scale, causal, mask):
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("bhld,bhsd->bhls", q, k) * scale
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        l, s = scores.shape[2:]
        scores = np.where(np.arange(l)[:, None] >= np.arange(s)[None], scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isinf(largest), 0, largest))
    total = p.sum(-1, keepdims=True)
    return np.einsum("bhls,bhsd->bhld", p / np.where(total == 0, 1, total), v)


class Problem:
    """Random operands of one call, and its exact result."""

    def __init__(self, dtype, B, H, HK, L, S, D, causal, mask):
        rng = np.random.default_rng(0)
        shapes = [(B, H, L, D), (B, HK, S, D), (B, HK, S, D)]
        self.dtype, self.sizes = dtype, (B, H, HK, L, S, D)
        self.q, self.k, self.v = (encode(rng.standard_normal(n), dtype) for n in shapes)
        self.out = np.full_like(self.q, np.nan if dtype != "bfloat16" else 0xFFFF)
        self.scale = D**-0.5
        self.mask = wide_mask = None
        if mask == "bool":
            self.mask = wide_mask = rng.random((B, H, L, S)) < 0.7
        elif mask == "additive":
            self.mask = encode(rng.standard_normal((B, H, L, S)), dtype)
            wide_mask = decode(self.mask, dtype)
        q, k, v = (decode(x, dtype) for x in (self.q, self.k, self.v))
        self.exact = attention(q, k, v, self.scale, causal, wide_mask)

    def check(self):
        error = np.abs(decode(self.out, self.dtype) - self.exact).max()
        assert error < TOLERANCE[self.dtype], error


def strides(array):
    return [n // array.itemsize for n in array.strides]


def compile_kernels(names, check, include_dirs=(INCLUDE,)):
    return engine.compile(SOURCE, check=check, include_dirs=include_dirs, only=names)


# ---- the two families


def prefill_name(dtype, D, causal, mask):
    bq, bk, wm = (16, 8, 2) if D == 256 else (32, 16, 4) if D == 128 else (32, 32, 4)
    name = f"prefill_attention_{dtype}_bq{bq}_bk{bk}_bd{D}_wm{wm}_wn1"
    kind = "bool_" if mask == "bool" else dtype
    return f"{name}_hm{int(mask != 'none')}_dc{int(causal)}_mask{kind}", bq, wm


def run_prefill(
    library, dtype, B=1, H=2, HK=1, L=43, S=50, D=64, causal=False, mask="none", **options
):
    p = Problem(dtype, B, H, HK, L, S, D, causal, mask)
    name, bq, wm = prefill_name(dtype, D, causal, mask)
    layout = [n for x in (p.q, p.k, p.v, p.out) for n in strides(x)[:3]]
    parameters = struct.pack("6i2f12i", B, H, D, L, S, H // HK, p.scale, 1.0, *layout)
    arguments = {0: p.q, 1: p.k, 2: p.v, 3: p.out, 4: parameters}
    if p.mask is not None:
        arguments |= {5: struct.pack("4i", *strides(p.mask)), 6: p.mask}
    grid, group = (-(-L // bq) * 32, H * wm, B), (32, wm, 1)
    arrays.launch(library, name, grid, group, arguments, writable=[3], **options)
    p.check()
    return name


def decode_names(dtype, D, causal, mask, two_pass):
    short = SHORT[dtype]
    kind = {"none": "none", "bool": "bool", "additive": short}[mask] + ("_causal" if causal else "")
    if two_pass:
        first = f"sdpa_vector_2pass_1_{short}_{D}_{D}_mask{kind}"
        return [first, f"sdpa_vector_2pass_2_{short}_{D}"]
    return [f"sdpa_vector_{short}_{D}_{D}_mask{kind}"]


def run_decode(library, dtype, D, causal, mask, two_pass, L=3, S=300):
    B, H, HK = 1, 2, 1
    p = Problem(dtype, B, H, HK, L, S, D, causal, mask)
    names = decode_names(dtype, D, causal, mask, two_pass)
    words = lambda *values: struct.pack(f"{len(values)}I", *values)  # noqa: E731
    q, k, v = strides(p.q), strides(p.k), strides(p.v)
    mask_strides = strides(p.mask)[::-1] if p.mask is not None else (0, 0, 0, 0)
    common = [
        words(H // HK),
        words(S),
        words(q[1], k[1], v[1], 0),
        words(q[2], k[2], v[2], 0),
        struct.pack("f", p.scale),
        p.mask if p.mask is not None else bytes(4),
        words(*mask_strides),
        words(q[0], k[0], v[0], H),
    ]
    if two_pass:
        rows = B * H * L * 32
        partial = np.zeros((rows, D), p.q.dtype)
        sums, largest = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        arguments = dict(enumerate([p.q, p.k, p.v, partial, sums, largest, *common]))
        grid, group = (B * H * 256, L, 32), (256, 1, 1)
        arrays.launch(library, names[0], grid, group, arguments, writable=[3, 4, 5])
        arguments = dict(enumerate([partial, sums, largest, p.out]))
    else:
        arguments = dict(enumerate([p.q, p.k, p.v, p.out, *common]))
    grid, group = (B * H * 1024, L, 1), (1024, 1, 1)
    arrays.launch(library, names[-1], grid, group, arguments, writable=[3])
    p.check()
    return names


# ---- a representative set: each head dimension, dtype, mask kind, causal or not

PREFILL = [
    ("float16", 32, False, "none"),
    ("float16", 64, False, "bool"),
    ("float32", 64, True, "none"),
    ("bfloat16", 72, True, "additive"),
    ("float16", 80, True, "bool"),
    ("float32", 96, False, "additive"),
    ("bfloat16", 128, False, "bool"),
    ("float16", 128, True, "none"),
    ("float32", 256, True, "bool"),
    ("bfloat16", 256, False, "none"),
]
DECODE = [
    ("float16", 64, False, "none", False),
    ("bfloat16", 96, False, "bool", False),
    ("float32", 128, False, "additive", False),
    ("float16", 256, True, "none", False),
    ("float16", 64, True, "none", True),
    ("bfloat16", 128, False, "none", True),
    ("float32", 256, False, "bool", True),
    ("float16", 96, False, "additive", True),
]


def identify(case):
    words = [str(x) for x in case if not isinstance(x, bool)]
    flags = [x for x in case if isinstance(x, bool)]
    extra = ["causal"] * flags[0] + ["2pass"] * (len(flags) > 1 and flags[1])
    return "-".join(words + extra)


@pytest.fixture(scope="module")
def libraries():
    """Both modes of the representative set, compiled side by side."""
    names = [prefill_name(dtype, D, causal, mask)[0] for dtype, D, causal, mask in PREFILL]
    for case in DECODE:
        names += decode_names(*case)
    return compile_in_parallel([(tuple(names), False), (tuple(names), True)])


def compile_in_parallel(requests):
    results = {}

    def work(names, check):
        results[check, names] = compile_kernels(names, check)

    threads = [threading.Thread(target=work, args=request) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {key[0]: library for key, library in results.items()}


@MODES
@pytest.mark.parametrize("case", PREFILL, ids=identify)
def test_prefill(libraries, case, check):
    dtype, D, causal, mask = case
    run_prefill(libraries[check], dtype, D=D, causal=causal, mask=mask)


@MODES
@pytest.mark.parametrize("case", DECODE, ids=identify)
def test_decode(libraries, case, check):
    run_decode(libraries[check], *case)


@MODES
def test_random_schedule(libraries, check):
    for seed in range(3):
        run_prefill(libraries[check], "float16", D=64, mask="bool", seed=seed)


def test_headers_cause_no_lint_findings():
    every = compile_kernels(["sdpa_vector_2pass_2_half_64"], False)
    assert every.names == ["sdpa_vector_2pass_2_half_64"]


# ---- mutants

PREFILL_TEXT = (KERNELS / "PrefillAttention.h").read_text() if KERNELS.exists() else ""
BARRIERS = [m.span() for m in re.finditer(r"threadgroup_barrier\(mem_flags::\w+\);", PREFILL_TEXT)]


@pytest.mark.parametrize("number", range(len(BARRIERS)))
def test_deleted_barrier(number, tmp_path):
    """Check mode speaks exactly if some schedule gives wrong numbers without the barrier."""
    begin, end = BARRIERS[number]
    folder = tmp_path / "ATen" / "native" / "mps" / "kernels"
    folder.mkdir(parents=True)
    (folder / "PrefillAttention.h").write_text(PREFILL_TEXT[:begin] + PREFILL_TEXT[end:])
    name = prefill_name("float16", 64, False, "none")[0]
    checked = compile_kernels([name], True, [tmp_path, INCLUDE])
    plain = compile_kernels([name], False, [tmp_path, INCLUDE])

    def fails(library, **options):
        try:
            run_prefill(library, "float16", D=64, L=64, S=128, **options)
        except (engine.KernelError, AssertionError) as error:
            return str(error)
        return ""

    report = fails(checked)
    wrong = any(fails(plain, seed=seed) for seed in (None, 1, 2))
    assert bool(report) == wrong
    if report:
        assert re.search(r"PrefillAttention\.h:\d+.*(race|uninitialised)", report)


# ---- error reports of a kernel


def test_reported_error():
    """As inductor's bounds checks use it."""
    source = """
#include <metal_stdlib>
#include <c10/metal/error.h>
using namespace metal;
kernel void check(device c10::metal::ErrorMessages* errors [[buffer(0)]],
                  uint t [[thread_position_in_grid]]) {
  if (t == 3) TORCH_REPORT_ERROR(errors, "index ", int(t) - 8, " is out of bounds");
}"""
    library = engine.compile(source, check=True, include_dirs=[INCLUDE])
    errors = np.zeros(30 * 512 + 4, np.uint8)
    arrays.launch(library, "check", (8, 1, 1), (8, 1, 1), {0: errors})
    texts = [
        bytes(errors[i:j]).rstrip(b"\0").decode() for i, j in [(4, 132), (132, 260), (260, 510)]
    ]
    assert errors[0] == 1
    assert texts == ["program_source", "check", "index -5 is out of bounds"]


# ---- everything


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_kernel(dtype, check):
    short = SHORT[dtype]
    patterns = [f"prefill_attention_{dtype}_*", f"sdpa_vector*_{short}_*"]
    library = compile_kernels(patterns, check)
    seen = set()
    for D in HEAD_DIMS:
        for mask in MASKS:
            for causal in (False, True):
                seen.add(run_prefill(library, dtype, D=D, causal=causal, mask=mask))
    for D in VECTOR_HEAD_DIMS:
        for mask, causal in [("none", False), ("none", True), ("bool", False), ("additive", False)]:
            for two_pass in (False, True):
                seen.update(run_decode(library, dtype, D, causal, mask, two_pass))
    assert seen == set(library.names)
    assert len(seen) == 78
