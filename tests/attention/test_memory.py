"""The memory of a training step: row_stats, delta, outputs and gradients, byte for byte."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import memory  # noqa: E402
from benchmarks.memory import PROBLEMS, Allocated, Problem  # noqa: E402
from orchard_ops import gpu  # noqa: E402
from orchard_ops.training_memory import scratch_budget_mb  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the simulated device's allocator")

RAGGED = Problem(2, 6, 2, 40, "float32")
SMALL = [(problem, length) for problem in (*PROBLEMS, RAGGED) for length in (33, 64)]


def bytes_of(problem: Problem, length: int) -> int:
    """The formula written out once more, for row_stats and delta in float32, and for out, dq, dk
    and dv."""
    b, h, h_kv, d = problem.batch, problem.num_heads, problem.num_kv_heads, problem.head_dim
    size = {"float16": 2, "bfloat16": 2, "float32": 4}[problem.dtype]
    return b * length * (3 * 4 * h + size * d * (2 * h + 2 * h_kv))


def ds_of(problem: Problem, length: int) -> int:
    """dS of all heads in float32, in tiles of 8 x 8: of the causal half, as rows of one tile more,
    64 keys or more."""
    tiles = math.ceil(length / 8)
    rows = min(8 * math.ceil(tiles / 16) * (tiles + 1), tiles * tiles)
    return 4 * 64 * problem.batch * problem.num_heads * rows


def check_scratch(problem: Problem, length: int, budget_mb: int, planned: int) -> None:
    """No more than the budget: dS of all heads where it fits, and else as much as saves time."""
    ds, budget = ds_of(problem, length), budget_mb << 20
    assert 0 <= planned <= budget
    if problem.head_dim < 64:
        assert planned == 0
    elif ds <= budget:
        assert planned == ds


def check_step(problem: Problem, length: int, budget_mb: int, execute: bool) -> None:
    with memory.scratch_budget(budget_mb):
        planned = memory.planned_scratch(problem, length)
        found = memory.on_simulated_device(memory.our_step, problem, length, execute)
    check_scratch(problem, length, budget_mb, planned)
    expected = bytes_of(problem, length)
    assert found == Allocated(peak=expected + planned, total=expected + planned)
    assert sum(memory.formula(problem, length).values()) == expected


@pytest.mark.parametrize("budget_mb", memory.SCRATCH_BUDGETS_MB)
@pytest.mark.parametrize("execute", (True, False), ids=("executed", "recorded"))
@pytest.mark.parametrize(("problem", "length"), SMALL, ids=str)
def test_a_step_allocates_the_formula(problem: Problem, length: int, execute: bool, budget_mb: int):
    check_step(problem, length, budget_mb, execute)


@pytest.mark.parametrize("budget_mb", memory.SCRATCH_BUDGETS_MB)
@pytest.mark.parametrize("length", memory.LENGTHS)
def test_a_long_step_allocates_the_formula(length: int, budget_mb: int):
    check_step(PROBLEMS[0], length, budget_mb, execute=False)


@pytest.mark.parametrize(
    ("budget_mb", "heads", "keys"),
    ((0, 0, 0), (8, 4, 192), (9, 1, 2048), (16, 1, 2048), (17, 2, 2048), (65, 8, 2048)),
)
def test_scratch_is_of_as_many_heads_or_keys_as_share_it(budget_mb: int, heads: int, keys: int):
    """At L = 2048 dS of each of eight heads takes 8.03 MiB: half of the scores' 16, and a tile in
    each row."""
    problem, length = PROBLEMS[0], 2048
    check_step(problem, length, budget_mb, execute=False)
    with memory.scratch_budget(budget_mb):
        planned = memory.planned_scratch(problem, length)
    if 0 < keys < length:  # beside the sums of dq
        assert planned == 4 * heads * length * (keys + problem.head_dim)
    else:
        assert planned == ds_of(problem, length) * heads // problem.num_heads


@pytest.mark.parametrize("execute", (True, False), ids=("executed", "recorded"))
def test_sums_of_a_divided_group_are_scratch(execute: bool):
    """Four parts of the one group: dk and dv of each in float32."""
    problem, length = Problem(1, 16, 1, 64, "float16"), 64
    sums = 4 * 4 * length * 2 * 64
    with memory.scratch_budget(1):
        planned = memory.planned_scratch(problem, length)
        found = memory.on_simulated_device(memory.our_step, problem, length, execute)
    assert planned == ds_of(problem, length) + sums
    expected = bytes_of(problem, length) + planned
    assert found == Allocated(peak=expected, total=expected)
    memory.check_ours(found, bytes_of(problem, length), planned, 1)


def test_unset_budget_is_the_machine_s(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(memory.SCRATCH_VARIABLE, raising=False)
    assert scratch_budget_mb() == gpu.here().scratch_mb == 520
    planned = memory.planned_scratch(PROBLEMS[0], 4096)
    assert planned == ds_of(PROBLEMS[0], 4096) == (256 << 20) + (1 << 19)


def test_scratch_budget_is_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(memory.SCRATCH_VARIABLE, "5")
    with memory.scratch_budget(0):
        assert os.environ[memory.SCRATCH_VARIABLE] == "0"
    assert os.environ[memory.SCRATCH_VARIABLE] == "5"


@pytest.mark.parametrize("kept", (True, False), ids=("at the peak", "in between"))
def test_one_more_tensor_is_noticed(kept: bool):
    def step(q, k, v, dout):
        further = torch.empty(3, dtype=torch.uint8, device=q.device)
        if not kept:
            del further
        return memory.our_step(q, k, v, dout)

    problem, length = PROBLEMS[0], 64
    expected, scratch = bytes_of(problem, length), ds_of(problem, length)
    with memory.scratch_budget(1):
        found = memory.on_simulated_device(step, problem, length, execute=False)
    assert found == Allocated(expected + scratch + 3 * kept, expected + scratch + 3)
    with pytest.raises(AssertionError, match="bytes, the formula has"):
        memory.check_ours(found, expected, scratch, 1)  # though it would fit into the budget
    memory.check_ours(found, expected, scratch, 1, others=3)


def test_scratch_above_its_budget_is_noticed():
    found = Allocated(10 + (2 << 20), 10 + (2 << 20))
    memory.check_ours(found, 10, 2 << 20, 2)
    with pytest.raises(AssertionError, match="the budget is 1 MiB"):
        memory.check_ours(found, 10, 2 << 20, 1)
    with pytest.raises(AssertionError, match="the plan's scratch 2097152"):
        memory.check_ours(Allocated(10, 10), 10, 2 << 20, 2)


def test_a_leak_is_noticed(monkeypatch: pytest.MonkeyPatch):
    leaked = []

    def step(q, k, v, dout):
        leaked.append(memory.our_step(q, k, v, dout))

    monkeypatch.setattr(memory, "_PATIENCE", 0.1)
    with pytest.raises(AssertionError, match="leaves memory behind"):
        memory.on_simulated_device(step, PROBLEMS[0], 64, execute=False)


@pytest.mark.parametrize(("problem", "length"), [*SMALL, (PROBLEMS[1], 300)], ids=str)
def test_the_unfused_count_is_what_the_device_allocates(problem: Problem, length: int):
    """At length 300 the peak is in the forward, inside of safe_softmax."""
    found = memory.on_simulated_device(memory.unfused_step, problem, length, execute=True)
    assert memory.peak_on_meta_device(memory.unfused_step, problem, length) == found.peak


def test_committed_results_are_what_the_code_finds():
    """The unfused count, formula and scratch again; the device's figures equal their sum."""
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
        budgets = [ours["scratch_budget_mb"] for ours in record["ours"]]
        assert budgets == list(memory.SCRATCH_BUDGETS_MB)
        for ours in record["ours"]:
            found = Allocated(ours["peak"], ours["total"])
            with memory.scratch_budget(ours["scratch_budget_mb"]):
                assert ours["scratch_bytes"] == memory.planned_scratch(problem, length)
            memory.check_ours(
                found, bytes_of(problem, length), ours["scratch_bytes"], ours["scratch_budget_mb"]
            )


def test_plot_and_table_from_the_committed_results(tmp_path: Path):
    result = json.loads(memory.RESULTS.read_text())
    committed = memory.RESULTS.with_suffix(".md").read_text()
    assert memory.table(result, "python -m benchmarks.memory") == committed
    memory.plot(result, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_out_of_memory_has_no_figure(tmp_path: Path):
    """A record as it stands in a GPU's result file."""
    result = json.loads(memory.RESULTS.read_text())
    result["records"][-1]["unfused"] = {"peak": None, "out of memory": "CUDA out of memory"}
    *_, row = memory.table(result, "").splitlines()
    assert row.endswith("| 652.0 | 652.0 | 908.0 | out of memory |  |  |")
    memory.plot(result, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000
