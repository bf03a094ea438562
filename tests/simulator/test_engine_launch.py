"""Launches: the grid, threadgroups at its edges, and what is refused."""

import numpy as np
import pytest
from simulator import engine
from simulator.engine import arrays

MODES = pytest.mark.parametrize("check", [False, True], ids=["plain", "check"])


def launch(source, name, threads, group, arguments, *, check=False, **options):
    library = engine.compile(source, check=check)
    return arrays.launch(library, name, threads, group, arguments, **options)


# ---- grids

POSITIONS = """
#include <metal_stdlib>
using namespace metal;
kernel void positions(device uint4* out [[buffer(0)]], uint3 p [[thread_position_in_grid]],
                      uint3 size [[threads_per_threadgroup]],
                      uint3 nominal [[dispatch_threads_per_threadgroup]],
                      uint3 grid [[threads_per_grid]], uint3 groups [[threadgroups_per_grid]],
                      uint3 group [[threadgroup_position_in_grid]],
                      uint3 local [[thread_position_in_threadgroup]],
                      uint index [[thread_index_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]],
                      uint nominal_simdgroups [[dispatch_simdgroups_per_threadgroup]]) {
  ulong i = (p.z * grid.y + p.y) * grid.x + p.x;
  out[i * 4] = uint4(size, index);
  out[i * 4 + 1] = uint4(nominal, lane);
  out[i * 4 + 2] = uint4(groups, simdgroup);
  out[i * 4 + 3] = uint4(simdgroups, nominal_simdgroups, grid.x * 100 + grid.y * 10 + grid.z,
                         all(p == group * nominal + local));
}
"""


@pytest.mark.parametrize(
    ("threads", "group"),
    [
        ((10, 1, 1), (4, 1, 1)),
        ((7, 5, 3), (4, 2, 2)),
        ((3, 2, 1), (8, 8, 1)),
        ((64, 1, 1), (64, 1, 1)),
    ],
    ids=["edge", "edges in 3 dimensions", "grid smaller than a group", "exact"],
)
@MODES
def test_threadgroups_at_the_edge_are_smaller(threads, group, check):
    out = np.zeros((*threads[::-1], 4, 4), np.uint32)
    counters = launch(POSITIONS, "positions", threads, group, {0: out}, check=check)
    assert counters.threads == np.prod(threads)
    counts = [-(-t // g) for t, g in zip(threads, group, strict=True)]
    assert counters.threadgroups == np.prod(counts)
    for z, y, x in np.ndindex(*threads[::-1]):
        position = (x, y, z)
        start = [p // g * g for p, g in zip(position, group, strict=True)]
        size = [min(g, t - s) for g, t, s in zip(group, threads, start, strict=True)]
        local = [p - s for p, s in zip(position, start, strict=True)]
        index = (local[2] * size[1] + local[1]) * size[0] + local[0]
        simdgroups = [-(-int(np.prod(n)) // 32) for n in (size, group)]
        assert out[z, y, x].tolist() == [
            [*size, index],
            [*group, index % 32],
            [*counts, index // 32],
            [*simdgroups, threads[0] * 100 + threads[1] * 10 + threads[2], 1],
        ]


def test_collectives_in_a_partial_threadgroup():
    source = """
#include <metal_stdlib>
using namespace metal;
kernel void k(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]],
              uint i [[thread_index_in_threadgroup]], uint n [[threads_per_threadgroup]]) {
  threadgroup float s[64];
  s[i] = 1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = simd_sum(s[n - 1 - i]);
  o[t] = sum;
}"""
    out = np.zeros(107, np.float32)
    for seed in (None, 3):
        launch(source, "k", (107, 1, 1), (64, 1, 1), {0: out}, check=True, seed=seed)
        assert (out == [32] * 96 + [11] * 11).all()


def test_empty_grid_does_nothing():
    assert launch(POSITIONS, "positions", (0, 1, 1), (4, 1, 1), {}).threads == 0


# ---- refused launches

LIMITS = """
#include <metal_stdlib>
using namespace metal;
[[max_total_threads_per_threadgroup(64)]]
kernel void small(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]]) { o[t] = 1; }
template <int N>
[[kernel, max_total_threads_per_threadgroup(N * 32)]] void sized(device float* o [[buffer(0)]]) {}
template [[host_name("sized_2")]] [[kernel]] decltype(sized<2>) sized<2>;
#define THREADS(N) ((N) * ((31) + 1))
template <int N>
[[kernel, max_total_threads_per_threadgroup(THREADS(N))]] void nested(
    device float* o [[buffer(0)]]) {}
template [[host_name("nested_3")]] [[kernel]] decltype(nested<3>) nested<3>;
kernel void large(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  threadgroup float s[8193];
  s[t] = t;
  o[t] = s[t];
}
kernel void fits(device float* o [[buffer(0)]], uint t [[thread_position_in_grid]]) {
  threadgroup float s[8192];
  s[t] = t;
  o[t] = s[t];
}
"""


def test_max_threads():
    library = engine.compile(LIMITS)
    limits = {name: library.max_threads(name) for name in library.names}
    assert limits == dict(fits=1024, large=1024, nested_3=96, sized_2=64, small=64)


@pytest.mark.parametrize(
    ("name", "group", "buffers", "message"),
    [
        ("small", (65, 1, 1), [0], "65 threads; the kernel allows 64"),
        ("sized_2", (8, 3, 3), [0], "72 threads; the kernel allows 64"),
        ("fits", (1025, 1, 1), [0], "the kernel allows 1024"),
        ("fits", (0, 1, 1), [0], "invalid"),
        ("fits", (32, 1, 1), [0, 31], "Metal has 31 buffers"),
        (
            "large",
            (32, 1, 1),
            [0],
            r"threadgroup memory: 327\d\d bytes with 's'; the limit is 32768",
        ),
        ("absent", (32, 1, 1), [0], "no kernel 'absent'"),
    ],
)
@MODES
def test_refused_launch(name, group, buffers, message, check):
    arguments = {i: np.zeros(64, np.float32) for i in buffers}
    with pytest.raises(engine.KernelError, match=message):
        launch(LIMITS, name, (64, 1, 1), group, arguments, check=check)
    launch(LIMITS, "fits", (64, 1, 1), (64, 1, 1), {0: np.zeros(64, np.float32)}, check=check)


def test_dynamic_threadgroup_memory_counts():
    with pytest.raises(engine.KernelError, match="threadgroup memory"):
        arguments = {0: np.zeros(64, np.float32)}
        options = {"threadgroup_memory": {0: 16}}
        launch(LIMITS, "fits", (64, 1, 1), (64, 1, 1), arguments, **options)
