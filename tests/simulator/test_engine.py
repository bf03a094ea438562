"""The engine that runs Metal sources on the CPU: language, counters, concurrency, caching.

Grids and refused launches are in test_engine_launch.py, what check mode finds in
test_engine_checks.py, what the compiler refuses in test_engine_lint.py,
PyTorch's kernels in test_engine_pytorch.py.
"""

import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from simulator import engine
from simulator.engine import arrays, compiler

ROOT = Path(__file__).parents[2]
MODES = pytest.mark.parametrize("check", [False, True], ids=["plain", "check"])


def launch(source, name, threads, group, arguments, *, check=False, constants=None, **options):
    library = engine.compile(source, check=check, function_constants=constants)
    return arrays.launch(library, name, threads, group, arguments, **options)


# ---- language

MATRIX = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
// C = A * transpose(B), one simdgroup for each 8x8 tile of C
template <typename T>
kernel void multiply(const device T* A [[buffer(0)]], const device T* B [[buffer(1)]],
                     device float* C [[buffer(2)]], constant int3& dims [[buffer(3)]],
                     uint2 tg [[threadgroup_position_in_grid]],
                     ushort sg [[simdgroup_index_in_threadgroup]],
                     ushort nsg [[simdgroups_per_threadgroup]]) {
  simdgroup_matrix<T, 8, 8> a, b;
  simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  const int N = dims.y, K = dims.z;
  const ulong column = (tg.x * nsg + sg) * 8;
  for (int k = 0; k < K; k += 8) {
    simdgroup_load(a, A + tg.y * 8 * K + k, K);
    simdgroup_load(b, B, K, ulong2(k, column), true);
    simdgroup_multiply_accumulate(c, a, b, c);
  }
  simdgroup_store(c, C, N, ulong2(column, tg.y * 8));
}
template [[host_name("multiply_half")]] [[kernel]] decltype(multiply<half>) multiply<half>;
template [[host_name("multiply_" "float")]] kernel void multiply<float>(
    const device float*, const device float*, device float*, constant int3&, uint2, ushort, ushort);
"""


@MODES
@pytest.mark.parametrize("dtype", ["half", "float"])
def test_matrix_product(dtype, check):
    m, n, k = 24, 64, 40
    rng = np.random.default_rng(0)
    type_ = np.float16 if dtype == "half" else np.float32
    a, b = (rng.standard_normal(shape).astype(type_) for shape in [(m, k), (n, k)])
    c = np.zeros((m, n), np.float32)
    arguments = {0: a, 1: b, 2: c, 3: struct.pack("4i", m, n, k, 0)}
    grid, group = (n // 16 * 64, m // 8, 1), (64, 1, 1)
    counters = launch(MATRIX, f"multiply_{dtype}", grid, group, arguments, check=check)
    assert np.abs(c - a.astype(np.float64) @ b.T.astype(np.float64)).max() < 1e-5
    assert counters.mma == (m // 8) * (n // 8) * (k // 8)
    assert (counters.mma_half, counters.mma_float) == (
        (counters.mma, 0) if dtype == "half" else (0, counters.mma)
    )
    assert counters.threadgroups == (n // 16) * (m // 8)
    assert (counters.device_bytes_written == m * n * 4) if check else True


def test_operand_types_of_products():
    source = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
kernel void k(device float* o [[buffer(0)]]) {
  auto h = make_filled_simdgroup_matrix<half, 8, 8>(half(1));
  auto b = make_filled_simdgroup_matrix<bfloat, 8, 8>(bfloat(1));
  auto f = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int i = 0; i < 2; i++) simdgroup_multiply_accumulate(c, h, h, c);
  for (int i = 0; i < 3; i++) simdgroup_multiply_accumulate(c, b, b, c);
  simdgroup_multiply_accumulate(c, h, f, c);
  simdgroup_multiply_accumulate(c, f, f, c);
  simdgroup_store(c, o, 8);
}"""
    out = np.zeros(64, np.float32)
    counters = launch(source, "k", (64, 1, 1), (32, 1, 1), {0: out})
    assert set(out) == {7 * 8}
    assert (counters.mma_half, counters.mma_bfloat, counters.mma_float) == (4, 6, 4)
    assert counters.mma == 14


FEATURES = """
#include <metal_stdlib>
using namespace metal;
constant bool has_bias [[function_constant(0)]];
constant int repeats [[function_constant(1)]];
constant float table[4] = {1.0, 2.0, 4.0, 8.0};
struct Parameters { int n; float s; float4 f; };
inline float first(constant const float table[4]) { return table[0]; }
kernel void features(device float4* out [[buffer(0)]], constant Parameters& p [[buffer(1)]],
                     device atomic_uint* counter [[buffer(2)]],
                     threadgroup float* dynamic [[threadgroup(0)]],
                     uint gid [[thread_position_in_grid]],
                     uint tid [[thread_position_in_threadgroup]],
                     uint lane [[thread_index_in_simdgroup]], uint n [[threads_per_grid]]) {
  half2 h = half2(float2(float(gid), 0.5));
  float4 v = float4(h.x, float2(h.y, p.s), 1e-1);
  v.zw = v.wz;
  v += p.f.wzyx * 2.0;
  dynamic[tid] = v.x;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float neighbour = dynamic[tid ^ 33];
  uint prefix = simd_prefix_inclusive_sum(lane);
  float sum = simd_sum(float(lane)), largest = simd_max(float(lane ^ 5));
  uint down = simd_shuffle_down(lane, 3), up = simd_shuffle_and_fill_up(lane, 100u, 2);
  uint ballot = uint(ulong(simd_ballot((lane & 1) != 0)));
  atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
  out[gid * 3] = v;
  out[gid * 3 + 1] = float4(neighbour, prefix, sum, largest);
  float last = has_bias ? table[gid & 3] + repeats : n + first(table);
  out[gid * 3 + 2] = float4(down, up, as_type<float>(ballot), last);
}
"""


@MODES
def test_language_features(check):
    out, counter = np.zeros((128, 3, 4), np.float32), np.zeros(1, np.uint32)
    parameters = struct.pack("if8x4f", 5, 2.5, 1, 2, 3, 4)
    arguments = {0: out, 1: parameters, 2: counter}
    options = {"check": check, "threadgroup_memory": {0: 64 * 4}}
    constants = {"has_bias": True, 1: 3}
    launch(FEATURES, "features", (128, 1, 1), (64, 1, 1), arguments, constants=constants, **options)
    assert counter[0] == 128
    assert out[70, 0].tolist() == pytest.approx([78.0, 6.5, 4.1, 4.5])
    assert out[70, 1].tolist() == [111.0, 21.0, 496.0, 31.0]
    assert out[70, 2, [0, 1, 3]].tolist() == [9.0, 4.0, 4.0 + 3]
    assert out[70, 2, 2:3].view(np.uint32)[0] == 0xAAAAAAAA
    launch(FEATURES, "features", (128, 1, 1), (64, 1, 1), arguments, **options)
    assert out[70, 2, 3] == 128 + 1


DIVERGENT = """
#include <metal_stdlib>
using namespace metal;
kernel void divergent(device float* o [[buffer(0)]], device uint* b [[buffer(1)]],
                      uint t [[thread_position_in_threadgroup]]) {
  float x = t;
  uint ballot = 0;
  if (t % 4 == 1 && t < 40) {
    x = simd_sum(x);
    o[64 + t] = simd_prefix_inclusive_sum(float(t)) + 1000 * float(simd_is_first());
    o[128 + t] = simd_broadcast_first(float(t)) + 1000 * simd_min(float(t));
    ballot = uint(ulong(simd_ballot(t != 5)));
  }
  threadgroup_barrier(mem_flags::mem_none);
  o[t] = simd_max(x);
  b[t] = ballot;
}
"""


@MODES
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_reductions_are_those_of_the_active_lanes(check, seed):
    out, ballots = np.zeros((3, 64), np.float32), np.zeros(64, np.uint32)
    arguments = {0: out, 1: ballots}
    grid = (64, 1, 1)
    counters = launch(DIVERGENT, "divergent", grid, grid, arguments, check=check, seed=seed)
    active = [t for t in range(64) if t % 4 == 1 and t < 40]
    first = [t for t in active if t < 32]
    assert (out[0, :32] == sum(first)).all()
    assert (out[0, 32:] == 33 + 37).all()
    for t in active:
        before = [s for s in active if s // 32 == t // 32 and s <= t]
        assert out[1, t] == sum(before) + 1000 * (len(before) == 1)
        assert out[2, t] == 1001 * before[0]
        lanes = [s % 32 for s in active if s // 32 == t // 32 and s != 5]
        assert ballots[t] == sum(1 << lane for lane in lanes)
    assert counters.divergent_simd_ops > 0


def test_as_type_and_strings_are_visible_as_in_metal():
    source = """
#include <metal_stdlib>
inline metal::uint length(constant const char* text) {
  metal::uint n = 0;
  while (text[n] != 0) n++;
  return n;
}
constant char array[] = "four" "teen";
static_assert(sizeof(array) == 9, "text");
struct [[deprecated("unused")]] Old {};
kernel void k(device uint* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  o[0] = as_type<uint>(1.0f);
  o[1] = length("twenty" "-three");
  o[2] = length(__func__) + length(array);
  constant char* text = t == 0 ? "yes" : "no";
  o[3] = length(text);
}"""
    out = np.zeros(4, np.uint32)
    launch(source, "k", (1, 1, 1), (1, 1, 1), {0: out}, check=True)
    assert out.tolist() == [0x3F800000, 12, 9, 3]


def test_vector_construction():
    source = """
#include <metal_stdlib>
using namespace metal;
float4 swap(float2 a, float2 b);
float4 swap(float2 a, float2 b) { return float4(b, a); }
template <typename T> T pair(float a, float b) { return T(a, b); }
kernel void k(device float4* o [[buffer(0)]], uint3 p [[thread_position_in_grid]]) {
  float4 a(1, float2(2, 3), 4), b = {5, 6, 7, 8};
  float2 c[2] = {float2(9, 10), float2(11)};
  uint2 d{p.x, 2};
  o[0] = a;
  o[1] = b.wzyx;
  o[2] = float4(c[0], c[1]);
  o[3] = swap(float2(d), pair<float2>(3, 4));
  o[4] = float4(vec<float, 2>(a.yx), metal::vec<float, 2>(1, 2));
  o[5] = select(a, b, bool4(true, false, true, false));
  o[6] = float4(bfloat4(1.00390625) + bfloat4(half4(0.5h)));
}"""
    out = np.zeros((7, 4), np.float32)
    launch(source, "k", (1, 1, 1), (1, 1, 1), {0: out}, check=True)
    assert out.tolist() == [
        [1, 2, 3, 4],
        [8, 7, 6, 5],
        [9, 10, 11, 11],
        [3, 4, 0, 2],
        [2, 1, 1, 2],
        [5, 2, 7, 4],
        [1.5] * 4,
    ]


def test_conversions_and_small_floats():
    source = """
#include <metal_stdlib>
using namespace metal;
kernel void k(device bfloat* b [[buffer(0)]], device half* h [[buffer(1)]],
              const device float* x [[buffer(2)]], uint t [[thread_position_in_grid]]) {
  b[t] = bfloat(x[t]);
  h[t] = half(x[t]) * 1.5h + 0.25h;
}"""
    x = np.float32([1.0, 1.00390625, 1.01171875, -3.4e38, np.inf, np.nan, 1e-40, 65504.0])
    b, h = np.zeros(8, np.uint16), np.zeros(8, np.float16)
    launch(source, "k", (8, 1, 1), (8, 1, 1), {0: b, 1: h, 2: x})
    bits = x.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert np.isnan((b[5:6].astype(np.uint32) << 16).view(np.float32))[0]
    np.testing.assert_array_equal(np.delete(b, 5), np.delete(expected, 5))
    with np.errstate(over="ignore"):
        product = (x.astype(np.float16) * np.float16(1.5)).astype(np.float16) + np.float16(0.25)
        fused = (x.astype(np.float16).astype(np.float64) * 1.5 + 0.25).astype(np.float16)
    same = (h == product) | (h == fused) | (np.isnan(h) & np.isnan(product))
    assert same.all()


@MODES
def test_atomics_of_all_threadgroups(check):
    source = """
#include <metal_stdlib>
using namespace metal;
kernel void k(device atomic_uint* n [[buffer(0)]], device atomic_float* f [[buffer(1)]],
              device atomic_int* m [[buffer(2)]], uint t [[thread_position_in_grid]]) {
  atomic_fetch_add_explicit(n, t, memory_order_relaxed);
  atomic_fetch_add_explicit(f, 0.5f, memory_order_relaxed);
  atomic_fetch_max_explicit(m, int(t * 7 % 1000), memory_order_relaxed);
  uint seen = atomic_load_explicit(n + 1, memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(n + 1, &seen, seen + 2, memory_order_relaxed,
                                                memory_order_relaxed)) {}
}"""
    n, f, m = np.zeros(2, np.uint32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    launch(source, "k", (1000, 1, 1), (64, 1, 1), {0: n, 1: f, 2: m}, check=check)
    assert n.tolist() == [499500, 2000]
    assert f[0] == 500
    assert m[0] == max(t * 7 % 1000 for t in range(1000))


def test_many_threadgroup_variables_in_one_source():
    kernels = "\n".join(
        f"""kernel void k{i}(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {{
  threadgroup float a[64], b[64];
  a[t] = t; b[t] = {i};
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = a[63 - t] + b[t ^ 1];
}}"""
        for i in range(50)
    )
    source = "#include <metal_stdlib>\nusing namespace metal;\n" + kernels
    out = np.zeros(64, np.float32)
    for i in (0, 49):
        counters = launch(source, f"k{i}", (64, 1, 1), (64, 1, 1), {0: out}, check=True)
        assert (out == np.arange(63, -1, -1) + i).all()
        assert counters.threadgroup_memory == 512


# ---- schedules, counters, concurrency


def test_random_schedules_agree():
    results = []
    for seed in (None, 1, 2, 3):
        out, counter = np.zeros((128, 3, 4), np.float32), np.zeros(1, np.uint32)
        arguments = {0: out, 1: struct.pack("if8x4f", 5, 2.5, 1, 2, 3, 4), 2: counter}
        options = {"threadgroup_memory": {0: 256}, "seed": seed}
        launch(FEATURES, "features", (128, 1, 1), (64, 1, 1), arguments, **options)
        results.append(out.tobytes())
    assert len(set(results)) == 1


def test_instruction_mix():
    source = """
#include <metal_stdlib>
using namespace metal;
kernel void k(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  float x = o[t];
  for (int i = 0; i < 10; i++) x = fma(x, x, o[t + 64 * i]);
  o[t] = x;
}"""
    library = engine.compile(source, check=True)
    data = np.zeros(640, np.float32)
    arguments = {0: engine.Buffer(data.ctypes.data, data.nbytes)}
    counters, mix = library.instruction_mix("k", (64, 1, 1), (32, 1, 1), arguments)
    assert mix["fma"] == 64 * 10
    assert mix["store_device"] == counters.device_writes == 64
    assert mix["load_device"] == counters.device_reads
    assert mix["load_device:4"] == mix["load_device"]
    plain = engine.compile(source)
    with pytest.raises(ValueError, match="check=True"):
        plain.instruction_mix("k", (64, 1, 1), (32, 1, 1), arguments)


def test_instruction_mix_leaves_the_engine_out():
    """Counters, lanes and barriers of the engine are no integer operations of the kernel."""
    source = """
#include <metal_stdlib>
using namespace metal;
kernel void k(device float* o [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  float x = o[t];
  BODY
  o[t] = x;
}"""
    data = np.zeros(32, np.float32)
    arguments = {0: engine.Buffer(data.ctypes.data, data.nbytes)}

    def mix(body):
        library = engine.compile(source.replace("BODY", body), check=True)
        return library.instruction_mix("k", (32, 1, 1), (32, 1, 1), arguments)[1]

    address_work = ("int", "imul", "icmp", "gep", "branch")
    plain = [mix("x *= 2.0f;").get(x, 0) for x in address_work]
    body = """
  x = exp2(x) + simd_shuffle_xor(x, ushort(1));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  x = max(x, exp2(x));"""
    counted = mix(body)
    assert [counted.get(x, 0) for x in address_work] == plain
    assert counted["fminmax"] == counted["fadd"] == 32
    assert mix("x += float(t * 5 + 7);")["int"] > plain[0]


def test_accesses_by_width():
    source = """
#include <metal_stdlib>
using namespace metal;
kernel void k(const device uint4* a [[buffer(0)]], device half* o [[buffer(1)]],
              uint t [[thread_index_in_threadgroup]]) {
  threadgroup uint4 shared[32];
  shared[t] = a[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup half2* pairs = reinterpret_cast<threadgroup half2*>(shared);
  half2 pair = pairs[127 - 4 * t] + pairs[4 * (31 - t)];
  o[t] = pair.x + pair.y;
}"""
    library = engine.compile(source, check=True)
    a, out = np.zeros((32, 4), np.uint32), np.zeros(32, np.float16)
    arguments = {i: engine.Buffer(x.ctypes.data, x.nbytes) for i, x in enumerate((a, out))}
    counters, mix = library.instruction_mix("k", (32, 1, 1), (32, 1, 1), arguments)
    by_width = {name: n for name, n in mix.items() if ":" in name}
    assert by_width == {
        "load_device:16": 32,
        "store_threadgroup:16": 32,
        "load_threadgroup:4": 64,
        "store_device:2": 32,
    }
    assert counters.threadgroup_bytes_read == 256


def test_two_python_threads_launch_at_once():
    library = engine.compile(FEATURES, check=True)
    errors = []

    def work(seed):
        try:
            for i in range(10):
                out, counter = np.zeros((256, 3, 4), np.float32), np.zeros(1, np.uint32)
                arguments = {0: out, 1: struct.pack("if8x4f", 5, 2.5, 1, 2, 3, 4), 2: counter}
                options = {"threadgroup_memory": {0: 256}, "seed": seed * 100 + i}
                arrays.launch(library, "features", (256, 1, 1), (64, 1, 1), arguments, **options)
                assert counter[0] == 256
                assert (out[:, 1, 2] == 496).all()
                arguments[0] = out[:255].copy()  # the last thread writes behind it
                with pytest.raises(engine.KernelError, match="out-of-bounds"):
                    arrays.launch(
                        library, "features", (256, 1, 1), (64, 1, 1), arguments, **options
                    )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---- cache


def fresh_source(tag):
    return f"""
kernel void k(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {{
  o[t] = {tag};
}} // {time.time_ns()}"""


def test_included_files_are_part_of_the_cache_key(tmp_path):
    source = '#include "value.h"\n' + fresh_source("VALUE + EXTRA")
    out = np.zeros(4, np.float32)
    for value in (1, 2):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "value.h").write_text(f"#define VALUE {value}")
        for extra in (10, 20):
            library = engine.compile(source, include_dirs=[folder], defines=[f"EXTRA={extra}"])
            arrays.launch(library, "k", (4, 1, 1), (4, 1, 1), {0: out})
            assert out[0] == value + extra


def test_only_selects_kernels():
    library = engine.compile(MATRIX, only=["*_half"])
    assert library.names == ["multiply_half"]


SCALING = """#include <metal_stdlib>
using namespace metal;
#define TWO 2
#line 40 "scale.h"
template <typename T, int N>
[[kernel, max_total_threads_per_threadgroup(32 * N)]] void
scale(device T* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  x[i] *= T(N);
}
"""
COMMENT = "// which is more than instantiations\n"


def scaling(name, factor, kernel="scale"):
    of = f"{kernel}<float, {factor}>"
    return f'template [[host_name("{name}")]] [[kernel]] decltype({of}) {of};\n'


def test_what_sources_begin_with_is_preprocessed_once():
    begin = compiler.preprocess.cache_info().misses
    for factor in (3, 5):
        source = SCALING + scaling(f"by_{factor}", factor) + scaling("again", factor)
        x = np.ones(32, np.float32)
        launch(source, f"by_{factor}", (32, 1, 1), (32, 1, 1), {0: x})
        assert (x == factor).all()
        apart, whole = (compiler.translate(text, compiler.Options(False)).split("\n")
                        for text in (source, source + COMMENT))  # fmt: skip
        assert [x.split() for x in apart if x[:1] != "#" and x.strip()] == [
            x.split() for x in whole if x[:1] != "#" and x.strip()
        ]
    assert compiler.preprocess.cache_info().misses <= begin + 3  # two of which are whole


def test_an_instantiation_may_name_a_macro():
    x = np.ones(32, np.float32)
    launch(SCALING + scaling("twice", "TWO"), "twice", (32, 1, 1), (32, 1, 1), {0: x})
    assert (x == 2).all()


@pytest.mark.parametrize("end", ["", COMMENT], ids=["apart", "whole"])
@pytest.mark.parametrize(
    "last, words",
    [
        (scaling("other", 3, "scal"), "scale.h:46: error: 'scal' does not name a kernel template"),
        (scaling("by_3", 5), "scale.h:46: error: two kernels are named 'by_3'"),
        (scaling("unknown", "three"), "scale.h:46:"),
    ],
    ids=["template", "name", "argument"],
)
def test_an_instantiation_that_is_wrong_is_named_by_its_line(last, words, end):
    with pytest.raises(engine.CompileError) as error:
        engine.compile(SCALING + scaling("by_3", 3) + last + end)
    assert words in str(error.value)


def test_compile_many_fills_the_cache(monkeypatch):
    sources = [fresh_source(i) for i in range(3)] + ["kernel void k(device double* o) {}"]
    errors = engine.compile_many(sources, jobs=2)
    assert errors[:3] == [None] * 3
    assert "double" in str(errors[3])
    monkeypatch.setattr("simulator.engine.compiler._compile", None)  # nothing is compiled any more
    for i, source in enumerate(sources[:3]):
        out = np.zeros(4, np.float32)
        arrays.launch(engine.compile(source), "k", (4, 1, 1), (4, 1, 1), {0: out})
        assert out[0] == i


def test_concurrent_processes_with_an_empty_cache(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from simulator import engine
print(engine.compile({fresh_source(1)!r}).names)
"""
    environment = dict(os.environ, SIMULATOR_CACHE=str(tmp_path))
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["['k']"] * 2
    assert not list(tmp_path.rglob("tmp-*"))
