"""benchmarks/nvidia/exact.py and what hides unseen rows, without a GPU: on the CPU engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from representative import share
from test_nvidia_speed import CpuKernels

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import attention, build, cases, exact, plans  # noqa: E402


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> plans.Planner:
    return build.build_planner(tmp_path_factory.mktemp("planner") / "lib.so")


SMALL = [case for case in exact.cases() if case.head_dim <= 64]


@pytest.mark.parametrize("case", share(SMALL, 2, str))
def test_results_are_known_to_the_bit(
    case: cases.Case, planner: plans.Planner, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention.Guarded, "device", "cpu")
    x = torch.empty(case.batch, case.num_heads, case.q_len, case.head_dim, dtype=case.dtype)
    kernels = [
        *planner.forward(x, x, x, x, case.scoring).kernels,
        *planner.backward(x, x, x, x, x, case.scoring).kernels,
    ]
    ours = attention.Attention(CpuKernels({k.name: build.source_of(k) for k in kernels}), planner)
    exact.check(ours, case)

    def disturb(params: plans.Params) -> None:
        params.scale_log2 *= 1 + 2.0**-20

    ours.disturb = disturb
    with pytest.raises(AssertionError, match=r"row_stats: .* elements differ"):
        exact.check(ours, case)


@pytest.mark.parametrize(
    ("changes", "rows", "keys"),
    [
        ({}, (0, 8), (0, 11)),
        ({"window_right": 0}, (0, 8), (0, 8)),
        ({"window_right": 0, "diagonal": -3}, (3, 8), (0, 5)),
        ({"window_left": 2, "diagonal": 4}, (0, 8), (2, 11)),
        ({"window_left": 1, "diagonal": 9}, (0, 3), (8, 11)),
        ({"window_right": 0, "diagonal": -20}, (8, 8), (0, 0)),
    ],
    ids=str,
)
def test_unseen_rows_are_hidden(changes: dict, rows: tuple[int, int], keys: tuple[int, int]):
    case = cases.Case(8, 11, 4, torch.float32, **changes)
    x = (*(torch.zeros(1, 2, n, 4) for n in (8, 11, 11, 8)), torch.zeros(1, 2, 8))
    cases.hide_unseen(case, x)
    for tensor, (first, last) in zip(x, (rows, keys, keys, rows, rows)):
        seen = torch.zeros(tensor.shape[2], dtype=torch.bool)
        seen[first:last] = True
        assert tensor[:, :, ~seen].isnan().all() and (tensor[:, :, seen] == 0).all()
