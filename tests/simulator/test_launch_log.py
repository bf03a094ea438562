"""The record of launches: what a recording block sees, and that nothing else is kept."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from pathlib import Path

import pytest
import simulator
import torch

if sys.platform != "linux":
    pytest.skip("the simulated device is for Linux", allow_module_level=True)

simulator.enable()

SOURCE = """
#include <metal_stdlib>
using namespace metal;

kernel void scale(device float* out [[buffer(0)]],
                  device const float* x [[buffer(1)]],
                  constant float& factor [[buffer(2)]],
                  uint i [[thread_position_in_grid]]) {
  out[i] = factor * x[i];
}
"""


@pytest.fixture(scope="module")
def shaders():
    return torch.mps.compile_shader(SOURCE)


def test_what_is_recorded_of_a_launch(shaders):
    x = torch.ones(10, device="mps")
    out = torch.empty(10, device="mps")
    with simulator.recording() as launches:
        shaders.scale(out[2:], x, 2.0, threads=8, group_size=4)
    (launch,) = launches
    assert (launch.kernel, launch.threads, launch.group) == ("scale", (8, 1, 1), (4, 1, 1))
    assert [(a.index, a.nbytes, a.is_tensor) for a in launch.arguments] == [
        (0, 32, True),
        (1, 40, True),
        (2, 4, False),
    ]
    assert launch.counters is not None and launch.seconds > 0


def test_recordings_nest_and_end(shaders):
    x = torch.ones(4, device="mps")
    with simulator.recording() as outer:
        shaders.scale(x, x, 1.0)
        with simulator.recording() as inner:
            shaders.scale(x, x, 1.0)
    shaders.scale(x, x, 1.0)
    assert (len(outer), len(inner)) == (2, 1)


def memory_of_launches(launch, count: int) -> int:
    """Bytes that `count` launches leave behind, of those that a line of the simulator asked for.

    Other threads of the process, which a compiler of an earlier test may have left, are not
    counted.
    """
    of_the_simulator = tracemalloc.Filter(
        True, str(Path(simulator.__file__).parent / "*"), all_frames=True
    )

    def memory() -> int:
        gc.collect()
        snapshot = tracemalloc.take_snapshot().filter_traces([of_the_simulator])
        return sum(trace.size for trace in snapshot.traces)

    tracemalloc.start(8)
    try:
        for _ in range(10):
            launch()
        before = memory()
        for _ in range(count):
            launch()
        return memory() - before
    finally:
        tracemalloc.stop()


def test_launches_that_nobody_records_leave_nothing_behind(shaders):
    x = torch.ones(4, device="mps")

    def launch() -> None:
        shaders.scale(x, x, 1.0)

    assert memory_of_launches(launch, 400) < 400 * 16  # bytes
    with simulator.recording():  # a record of a launch has about 1.6 KiB
        assert memory_of_launches(launch, 400) > 400 * 512
