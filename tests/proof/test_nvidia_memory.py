"""benchmarks/nvidia/memory.py without a GPU: its steps on the CPU engine, in the CPU's memory."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_nvidia_speed import CpuKernels
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import memory  # noqa: E402
from benchmarks.memory import Allocated, Problem  # noqa: E402
from benchmarks.nvidia import attention, build, plans  # noqa: E402
from benchmarks.nvidia import memory as nvidia_memory  # noqa: E402

PROBLEM, LENGTH = Problem(1, 6, 3, 64, "float16"), 260
OF_ALL, IN_TURNS = 4 * 6 * 64 * 24 * 34, 4 * 4 * 64 * 24 * 34
"""Bytes of dS, and of dS of 64 keys beside dq's sums, which fit into 1 MiB: five turns."""


def measure_step(step: memory.Step, problem: Problem, length: int, check: Any = None):
    """Does what the GPU's allocator does, with the changes of the CPU's allocator that the profiler
    saw."""
    operands = problem.operands(length, "cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        results = step(*operands)
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = total = 0
    for _, nbytes in changes:
        held += nbytes
        peak, total = max(peak, held), total + max(nbytes, 0)
    if check is not None:
        check(results)
    return Allocated(peak, total), peak


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> plans.Planner:
    return build.build_planner(tmp_path_factory.mktemp("planner") / "lib.so")


@pytest.fixture
def on_cpu(planner: plans.Planner, monkeypatch: pytest.MonkeyPatch) -> attention.Attention:
    monkeypatch.setattr(attention.Guarded, "device", "cpu")
    monkeypatch.setattr(nvidia_memory, "measure_step", measure_step)
    monkeypatch.setattr(memory, "SCRATCH_BUDGETS_MB", (0, 1, 2))
    # In turns even where so little work should take longer
    plain = nvidia_memory._scoring
    storing = lambda q, budget_mb: replace(plain(q, budget_mb), stores_ds=True)  # noqa: E731
    monkeypatch.setattr(nvidia_memory, "_scoring", storing)
    q, k, v, dout = PROBLEM.operands(LENGTH, "meta")
    kernels = {}
    for scratch_bytes in (0, 1 << 20):
        scoring = plans.Scoring(1.0, window_right=0, scratch_bytes=scratch_bytes, stores_ds=True)
        for plan in (
            planner.forward(q, k, v, q, scoring),
            planner.backward(q, k, v, q, dout, scoring),
        ):
            kernels |= {kernel.name: build.source_of(kernel) for kernel in plan.kernels}
    ours = attention.Attention(CpuKernels(kernels), planner)
    ours.outputs = nvidia_memory.Unguarded
    return ours


def test_a_record_has_every_budget(on_cpu: attention.Attention, planner: plans.Planner):
    record = nvidia_memory.measure(on_cpu, planner, PROBLEM, LENGTH)
    scratch = [(ours["scratch_budget_mb"], ours["scratch_bytes"]) for ours in record["ours"]]
    assert scratch == [(0, 0), (1, IN_TURNS), (2, OF_ALL)]
    formula = sum(memory.formula(PROBLEM, LENGTH).values())
    # Forward and delta; then dk/dv and dq of all keys without dS, of heads in turns, and of all.
    for ours, launches in zip(record["ours"], (4, 6, 4)):
        parameters = ours["total"] - formula - ours["scratch_bytes"]
        assert parameters == launches * ctypes.sizeof(plans.Params)
    assert sum(n for name, n in on_cpu.ran.items() if "dq_from_ds" in name) == 2 + 1
    assert sum(n for name, n in on_cpu.ran.items() if "backward_dq_float16" in name) == 1
    memory.table({"environment": {"measured": "", "torch": ""}, "records": [record]}, "")


def test_another_tensor_is_noticed(
    on_cpu: attention.Attention, planner: plans.Planner, monkeypatch: pytest.MonkeyPatch
):
    """A row statistic too many is noticed: it is larger than the parameters of the launches."""
    prepare = on_cpu.prepare_forward

    def careless(*args: Any) -> list:
        torch.empty(PROBLEM.num_heads * LENGTH)
        return prepare(*args)

    monkeypatch.setattr(on_cpu, "prepare_forward", careless)
    with pytest.raises(AssertionError, match=r"total: .* bytes, the formula has"):
        nvidia_memory.measure(on_cpu, planner, PROBLEM, LENGTH)
