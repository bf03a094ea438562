"""Check mode: every fault of the corpus is reported at its line, its legal twin stays silent."""

import re

import numpy as np
import pytest
from simulator import engine
from simulator.engine import arrays

# A kernel with an "expect:" comment must be reported at that line with text that matches the
# pattern; a kernel without one must run silently.  Each runs as one threadgroup of 64 threads;
# buffer 0 has 64 floats, buffer 1 has 64 floats and is bound read-only, both zero.
CORPUS = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
#define OUT device float* o [[buffer(0)]]
#define TID uint t [[thread_position_in_threadgroup]]

// ---- races
kernel void race_across_simdgroups(OUT, TID) {
  threadgroup float s[64]; s[t] = t;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = s[63 - t];  // expect: uninitialised|race: read .* thread \\d+ wrote it
}
kernel void legal_inside_simdgroup(OUT, TID) {
  threadgroup float s[64]; s[t] = t;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = s[t ^ 7];
}
kernel void race_no_simdgroup_barrier(OUT, TID) {
  threadgroup float s[64]; s[t] = t;
  simdgroup_barrier(mem_flags::mem_none);
  o[t] = s[t ^ 7];  // expect: race: read .* of 's', thread \\d+ wrote it
}
kernel void race_write_after_read(OUT, TID) {
  threadgroup float s[64];
  for (int i = 0; i < 3; i++) {
    s[t] = t + i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[t] = s[63 - t];  // expect: race
  }
}
kernel void legal_write_after_read(OUT, TID) {
  threadgroup float s[64];
  for (int i = 0; i < 3; i++) {
    s[t] = t + i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[t] = s[63 - t];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
kernel void race_wrong_flag(OUT, TID) {
  threadgroup float s[64]; s[t] = t;
  threadgroup_barrier(mem_flags::mem_device);
  o[t] = s[63 - t];  // expect: race: read
}
kernel void race_wrong_simdgroup_flag(OUT, TID) {
  threadgroup float s[64]; s[t] = t;
  simdgroup_barrier(mem_flags::mem_device);
  o[t] = s[t ^ 1];  // expect: race: read
}
kernel void race_same_element(OUT, TID) {
  threadgroup float s[1];
  s[0] = t;  // expect: race: write at offset 0 of 's'
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = s[0];
}
kernel void legal_broadcast_read_then_write(OUT, TID) {
  threadgroup float s[2];
  for (int i = 0; i < 20; i++) {  // only simdgroup barriers, many of them
    if (t % 32 == 0) s[t / 32] = i;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    o[t] = s[t / 32];
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}
kernel void race_read_by_both_simdgroups(OUT, TID) {
  threadgroup float s[1];
  if (t == 0) s[0] = 1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = s[0];  // expect: race: read at offset 0 of 's', thread 40 wrote it
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (t == 40) s[0] = 2;  // expect: race: write at offset 0 of 's', several threads read it
}
kernel void legal_atomics(OUT, TID) {
  threadgroup atomic_uint n;
  if (t == 0) atomic_store_explicit(&n, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&n, 1u, memory_order_relaxed);
  o[t] = atomic_load_explicit(&n, memory_order_relaxed);
}
kernel void race_atomic_and_plain(OUT, TID) {
  threadgroup uint n[1];
  if (t < 32) atomic_fetch_add_explicit((threadgroup atomic_uint*)n, 1u, memory_order_relaxed);
  else o[t] = n[0];  // expect: race: read at offset 0 of 'n', an atomic operation wrote it
}

// ---- threadgroup memory
kernel void uninitialised(OUT, TID) {
  threadgroup float s[64]; if (t != 5) s[t] = t;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = s[63 - t];  // expect: read of uninitialised threadgroup memory at offset 20 of 's'
}
kernel void threadgroup_index(OUT, TID) {
  threadgroup float s[64];
  s[t + 1] = t;  // expect: array index out of bounds
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = s[63 - t];
}
kernel void threadgroup_pointer(OUT, TID) {
  threadgroup float s[64]; threadgroup float u[64]; u[t] = t;
  threadgroup float* p = s;
  p[t + 1] = t;  // expect: out-of-bounds threadgroup write of 4 bytes at offset 256 of 's' .256 byt
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = u[63 - t];
}

// ---- device memory
kernel void write_behind(OUT, TID) {
  o[t + 1] = 1;  // expect: out-of-bounds device write of 4 bytes; nearest is buffer.0. .* 256$
}
kernel void read_before(OUT, const device float* i [[buffer(1)]], TID) {
  o[t] = i[int(t) - 1];  // expect: device read .* buffer.1. of 256 bytes, at offset -4
}
kernel void write_read_only(OUT, device float* i [[buffer(1)]], TID) {
  i[t] = 1;  // expect: device write of 4 bytes in buffer.1., which is read-only
}
kernel void write_const(const device float* i [[buffer(0)]], TID) {
  ((device float*)i)[t] = 1;  // expect: device write of 4 bytes in buffer.0., which is read-only
}
kernel void unbound(OUT, device float* i [[buffer(7)]], TID) {
  o[t] = i[t];  // expect: device read through a buffer that is not bound .missing: 7.
}
kernel void unbound_reference(OUT, constant float& scale [[buffer(9)]], TID) {
  o[t] = scale;  // expect: constant read through a buffer that is not bound .missing: 9.
}
kernel void legal_unbound_unused(OUT, const device float* i [[buffer(7)]], TID) { o[t] = 1; }
kernel void constant_behind(OUT, constant float* i [[buffer(1)]], TID) {
  o[t] = i[t * 2];  // expect: out-of-bounds constant read
}
kernel void atomic_behind(device atomic_uint* o [[buffer(0)]], TID) {
  atomic_fetch_add_explicit(o + t + 1, 1u, memory_order_relaxed);  // expect: out-of-bounds device
}

// ---- alignment
kernel void misaligned_vector(OUT, TID) {
  device float4* v = (device float4*)(o + 1);
  if (t == 0) v[1] = float4(1);  // expect: misaligned write of 16 bytes: .* 16-byte alignment
}
kernel void misaligned_half2(OUT, TID) {
  const device half2* v = (const device half2*)((const device half*)o + 1);
  if (t < 8) o[t + 32] = v[t].x;  // expect: misaligned read of \\d bytes: .* 4-byte alignment
}
kernel void misaligned_threadgroup(OUT, TID) {
  threadgroup float s[64]; s[t] = t;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t < 8) ((device packed_float2*)o)[t] = ((threadgroup float2*)(s + 1))[t];  // expect: misali
}
kernel void legal_packed(OUT, TID) {
  device packed_float4* v = (device packed_float4*)(o + 1);
  if (t == 0) v[1] = float4(1);
}
kernel void legal_aligned(OUT, TID) {
  device float4* v = (device float4*)o;
  if (t < 16) v[t] = float4(t);
}

// ---- divergence
kernel void barrier_not_reached(OUT, TID) {
  if (t < 40)
    threadgroup_barrier(mem_flags::mem_threadgroup);  // expect: has returned without reaching it
  o[t] = 1;
}
kernel void barriers_differ(OUT, TID) {
  if (t < 32) threadgroup_barrier(mem_flags::mem_threadgroup);
  else threadgroup_barrier(mem_flags::mem_device);  // expect: different threadgroup_barriers
  o[t] = 1;
}
kernel void legal_reduction_in_a_branch(OUT, TID) {
  float x = t;
  if (t & 1) {
    x = simd_sum(x) + quad_sum(x) + simd_prefix_inclusive_sum(x) + float(simd_is_first());
  }
  threadgroup_barrier(mem_flags::mem_device);
  o[t] = simd_max(x);
}
kernel void same_operation_at_two_places(OUT, TID) {
  float x = t;
  if (t & 1) x = simd_sum(x);  // expect: divergent simdgroup operation
  else x = simd_sum(x * 2);  // expect: divergent simdgroup operation
  o[t] = x;
}
kernel void legal_shuffle_among_those_in_a_branch(OUT, TID) {
  if (t & 1) o[t] = simd_shuffle_xor(float(t), 2) + simd_shuffle_down(float(t), 2);
  threadgroup_barrier(mem_flags::mem_device);
}
kernel void shuffle_from_another_branch(OUT, TID) {
  if (t & 1) {
    o[t] = simd_shuffle_xor(float(t), 1);  // expect: from lane \\d+, which takes no part in it
  }
  threadgroup_barrier(mem_flags::mem_device);
}
kernel void simdgroup_barrier_in_a_branch(OUT, TID) {
  if (t & 1) {
    simdgroup_barrier(mem_flags::mem_device);  // expect: divergence: .* wait at simdgroup_barrier
  }
  threadgroup_barrier(mem_flags::mem_device);
  o[t] = t;
}
kernel void matrix_in_a_branch(OUT, TID) {
  simdgroup_float8x8 a(1.0f), b(2.0f), c;
  if (t & 1) {
    simdgroup_multiply(c, a, b);  // expect: divergence: .* wait at a simdgroup matrix product
    o[t] = c.thread_elements()[0];
  }
  threadgroup_barrier(mem_flags::mem_device);
}
kernel void different_operations(OUT, TID) {
  float x = t;
  if (t & 1) x = simd_sum(x);  // expect: divergent simdgroup operation|divergence
  else x = simd_shuffle_xor(x, 1);  // expect: divergent simdgroup operation|divergence
  o[t] = x;
}
kernel void matrix_lanes_missing(OUT, TID) {
  simdgroup_float8x8 a(1.0f), b(2.0f), c;
  if (t % 32 != 3) {
    simdgroup_multiply(c, a, b);  // expect: multiply_accumulate with lanes missing
    o[t] = c.thread_elements()[0];
  }
}
kernel void load_lanes_missing(OUT, TID) {
  simdgroup_float8x8 a;
  if (t % 32 != 3) {
    simdgroup_load(a, o, 8);  // expect: simdgroup_load or simdgroup_store with lanes missing
    o[t] = a.thread_elements()[0];
  }
}
kernel void legal_returned_lanes(OUT, TID) {
  if (t & 1) return;
  o[t] = simd_sum(float(t));
}

// ---- a thread's own state
kernel void private_index(OUT, TID) {
  float r[4] = {0, 1, 2, 3};
  int k = int(o[t]) + int(t & 7);
  o[t] = r[k];  // expect: array index out of bounds
}
struct Rows { float2 pairs[1][2]; };
kernel void private_index_of_member(OUT, TID) {
  Rows r;
  r.pairs[0][0] = r.pairs[0][1] = float2(1.0f);
  int k = int(o[t]) + int(t & 1);
  o[t] = r.pairs[k][0].x;  // expect: array index out of bounds
}
kernel void shift(OUT, TID) {
  o[t] = float(1u << (t + uint(o[t])));  // expect: shift by more than the width
}
kernel void division(OUT, TID) {
  o[t] = float(7 / int(o[t]));  // expect: integer division by zero
}
"""


def _cases():
    """(kernel, {line: pattern}) of the corpus."""
    cases, name = {}, None
    for number, line in enumerate(CORPUS.split("\n"), 1):
        kernel = re.match(r"kernel void (\w+)", line)
        if kernel:
            name = kernel[1]
            cases[name] = {}
        expected = re.search(r"// expect: (.*)", line)
        if expected:
            cases[name][number] = expected[1]
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def corpus():
    return engine.compile(CORPUS, check=True)


def run(library, name, **options):
    # An access behind a buffer counts as legal if another buffer begins there, so they are kept
    # apart.
    memory = np.zeros((3, 64), np.float32)
    out, read_only = memory[0], memory[2]
    arguments = {0: out, 1: read_only}
    arrays.launch(library, name, (64, 1, 1), (64, 1, 1), arguments, writable=[0], **options)


@pytest.mark.parametrize("name", [name for name, expected in CASES.items() if expected])
def test_fault_is_reported_at_its_line(corpus, name):
    with pytest.raises(engine.KernelError) as caught:
        run(corpus, name)
    first = caught.value.reports[0]
    line = int(re.match(r"program_source:(\d+)", first)[1])
    assert line in CASES[name], first
    assert re.search(CASES[name][line], first), first
    assert f"kernel '{name}'" in first
    assert "threadgroup (0,0,0)" in first


@pytest.mark.parametrize("name", [name for name, expected in CASES.items() if not expected])
def test_legal_kernel_is_silent(corpus, name):
    run(corpus, name)
    for seed in range(5):
        run(corpus, name, seed=seed)


@pytest.mark.parametrize("name", [n for n, expected in CASES.items() if expected])
def test_fault_is_reported_with_a_random_schedule(corpus, name):
    with pytest.raises(engine.KernelError):
        run(corpus, name, seed=7)


def test_engine_survives_every_fault(corpus):
    for name, expected in CASES.items():
        if expected:
            with pytest.raises(engine.KernelError):
                run(corpus, name)
        run(corpus, "legal_aligned")


def test_every_failing_threadgroup_is_reported(corpus):
    out = np.zeros(64, np.float32)
    with pytest.raises(engine.KernelError) as caught:
        arrays.launch(corpus, "write_behind", (256, 1, 1), (64, 1, 1), {0: out})
    groups = {re.search(r"threadgroup \((\d)", r)[1] for r in caught.value.reports}
    assert groups == {"0", "1", "2", "3"}


def test_report_names_the_thread(corpus):
    source = """
kernel void corner(device float* o [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  o[t + 1] = 1;
}"""
    library = engine.compile(source, check=True)
    out = np.zeros(64, np.float32)
    with pytest.raises(engine.KernelError, match=r"thread \(15,3,0\) of threadgroup \(0,0,0\)"):
        arrays.launch(library, "corner", (16, 4, 1), (16, 4, 1), {0: out}, workers=1)


def test_same_memory_bound_for_reading_and_for_writing():
    source = """
kernel void in_place(const device float* i [[buffer(0)]], device float* o [[buffer(1)]],
                     uint t [[thread_position_in_grid]]) { o[t] = i[t] + 1; }"""
    library = engine.compile(source, check=True)
    data = np.zeros(64, np.float32)
    arrays.launch(library, "in_place", (64, 1, 1), (32, 1, 1), {0: data, 1: data})
    assert (data == 1).all()


def test_report_inside_a_function_names_the_caller():
    source = """
inline float pick(const device float* p, uint i) {
  return p[i + 60];
}
kernel void k(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  o[t] = pick(o, t);
}"""
    library = engine.compile(source, check=True)
    with pytest.raises(engine.KernelError, match=r"^program_source:3 <- program_source:6: kernel"):
        out = np.zeros(64, np.float32)
        arrays.launch(library, "k", (64, 1, 1), (64, 1, 1), {0: out})


@pytest.mark.parametrize("check", [False, True], ids=["plain", "check"])
def test_wild_address_and_division_do_not_end_the_process(check):
    source = """
kernel void wild(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  o[t + (1ul << 40)] = 1;
}
kernel void division(device int* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  o[t] = 7 / o[t];
}
inline int deep(int n) { volatile int big[4096]; big[n & 4095] = n; return big[n & 4095]; }
kernel void misaligned(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  if (t == 0) ((device float4*)(o + 1))[2] = float4(0);
}
kernel void fine(device int* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  o[t] = deep(t);
}"""
    library = engine.compile(source, check=check)
    out = np.zeros(64, np.int32)
    for name, text in [("wild", "memory fault|out-of-bounds"), ("division", "division")]:
        with pytest.raises(engine.KernelError, match=rf"program_source:\d+: kernel.*({text})"):
            arrays.launch(library, name, (64, 1, 1), (64, 1, 1), {0: out})
    if not check:  # right on the CPU, wrong on a GPU
        arrays.launch(library, "misaligned", (64, 1, 1), (64, 1, 1), {0: out})
    arrays.launch(library, "fine", (64, 1, 1), (64, 1, 1), {0: out})
    assert (out == np.arange(64)).all()
