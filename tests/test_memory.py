"""The memory of a training step: lse, delta, outputs and gradients, byte for byte."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import memory  # noqa: E402
from benchmarks.memory import PROBLEMS, Allocated, Problem  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the simulated device's allocator")

RAGGED = Problem(2, 6, 2, 40, "float32")
SMALL = [(problem, length) for problem in (*PROBLEMS, RAGGED) for length in (33, 64)]


def bytes_of(problem: Problem, length: int) -> int:
    """The formula written out once more: lse and delta in float32; out, dq; dk, dv."""
    b, h, h_kv, d = problem.batch, problem.num_heads, problem.num_kv_heads, problem.head_dim
    size = {"float16": 2, "bfloat16": 2, "float32": 4}[problem.dtype]
    return b * length * (2 * 4 * h + size * d * (2 * h + 2 * h_kv))


@pytest.mark.parametrize("execute", (True, False), ids=("executed", "recorded"))
@pytest.mark.parametrize(("problem", "length"), SMALL, ids=str)
def test_a_step_allocates_the_formula(problem: Problem, length: int, execute: bool):
    with memory.scratch_budget(0):
        found = memory.on_simulated_device(memory.our_step, problem, length, execute)
    expected = bytes_of(problem, length)
    assert found == Allocated(peak=expected, total=expected)
    assert sum(memory.formula(problem, length).values()) == expected


@pytest.mark.parametrize("length", memory.LENGTHS)
def test_a_long_step_allocates_the_formula(length: int):
    with memory.scratch_budget(0):
        found = memory.on_simulated_device(memory.our_step, PROBLEMS[0], length, execute=False)
    expected = bytes_of(PROBLEMS[0], length)
    assert found == Allocated(peak=expected, total=expected)


@pytest.mark.parametrize("kept", (True, False), ids=("at the peak", "in between"))
def test_one_more_tensor_is_noticed(kept: bool):
    def step(q, k, v, dout):
        further = torch.empty(3, dtype=torch.uint8, device=q.device)
        if not kept:
            del further
        return memory.our_step(q, k, v, dout)

    problem, length = PROBLEMS[0], 64
    expected = bytes_of(problem, length)
    found = memory.on_simulated_device(step, problem, length, execute=False)
    assert found == Allocated(expected + 3 * kept, expected + 3)
    with pytest.raises(AssertionError, match="bytes, the formula has"):
        memory.check_ours(found, expected, 0)
    memory.check_ours(found, expected, 1)


def test_a_leak_is_noticed(monkeypatch: pytest.MonkeyPatch):
    leaked = []

    def step(q, k, v, dout):
        leaked.append(memory.our_step(q, k, v, dout))

    monkeypatch.setattr(memory, "_PATIENCE", 0.1)
    with pytest.raises(AssertionError, match="leaves memory behind"):
        memory.on_simulated_device(step, PROBLEMS[0], 64, execute=False)


@pytest.mark.parametrize(("problem", "length"), [*SMALL, (PROBLEMS[1], 300)], ids=str)
def test_the_unfused_count_is_what_the_device_allocates(problem: Problem, length: int):
    """The one at 300 has its peak in the forward, inside of safe_softmax."""
    found = memory.on_simulated_device(memory.unfused_step, problem, length, execute=True)
    assert memory.peak_on_meta_device(memory.unfused_step, problem, length) == found.peak


def test_committed_results_are_what_the_code_finds():
    """The unfused count and the formula again; the device's figures equal the formula."""
    records = json.loads(memory.RESULTS.read_text())["records"]
    assert [(r["problem"], r["length"]) for r in records] == [
        (str(problem), length) for problem in PROBLEMS for length in memory.LENGTHS
    ]
    problems = {str(problem): problem for problem in PROBLEMS}
    for record in records:
        problem, length = problems[record["problem"]], record["length"]
        assert record["formula"] == memory.formula(problem, length)
        peak = memory.peak_on_meta_device(memory.unfused_step, problem, length)
        assert record["unfused"]["peak"] == peak
        for ours in record["ours"]:
            memory.check_ours(
                Allocated(ours["peak"], ours["total"]), bytes_of(problem, length),
                ours["scratch_budget_mb"],
            )  # fmt: skip


def test_plot_and_table_from_the_committed_results(tmp_path: Path):
    result = json.loads(memory.RESULTS.read_text())
    committed = memory.RESULTS.with_suffix(".md").read_text()
    assert memory.table(result, "python -m benchmarks.memory") == committed
    memory.plot(result, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_out_of_memory_has_no_figure(tmp_path: Path):
    """As a GPU's result file has it."""
    result = json.loads(memory.RESULTS.read_text())
    result["records"][-1]["unfused"] = {"peak": None, "out of memory": "CUDA out of memory"}
    *_, row = memory.table(result, "").splitlines()
    assert row.endswith("| 648.0 | 648.0 | out of memory |  |")
    memory.plot(result, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000
