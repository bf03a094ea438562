"""The cases of benchmarks/nvidia with key ranges, without a GPU: their plans, and small ones on the
CPU engine."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from representative import share
from simulator.engine import ptx
from test_nvidia_speed import CpuKernels

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import attention, build, cases, listed, plans, prove, reference  # noqa: E402
from orchard_ops.testing import Case, math_attention  # noqa: E402

RANGES = list(cases.ranges())
FAMILIES = (
    "attention_forward",
    "attention_backward_delta",
    "attention_backward_dkv",
    "attention_backward_dkv_pairs",
    "attention_backward_dq",
    "attention_backward_dq_from_ds",
    "attention_backward_dmask",
)
"""Those whose variants know of key ranges."""


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> plans.Planner:
    return build.build_planner(tmp_path_factory.mktemp("planner") / "lib.so")


@pytest.fixture(scope="module")
def kernels(planner: plans.Planner) -> dict[str, plans.Kernel]:
    """Metal takes every case: the plan refuses none."""
    return cases.kernels_of(planner, RANGES)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_with_ranges(
    family: str, dtype: torch.dtype, kernels: dict[str, plans.Kernel]
):
    pattern = rf"{family}_{str(dtype).removeprefix('torch.')}_d\d+_\w*ranges\w*"
    assert any(re.fullmatch(pattern, name) for name in kernels)


def test_cases_have_every_kind_of_ranges():
    assert {case.ranges for case in RANGES} == set(listed.KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_variant_becomes_ptx(family: str, kernels: dict[str, plans.Kernel]):
    """The one that knows most, by its name."""
    name = max((n for n, k in kernels.items() if k.family == family), key=len)
    assert "_ranges" in name
    assert f".entry {name}(" in ptx.compile(build.source_of(kernels[name])).replace(" (", "(")


def small(case: cases.Case) -> cases.Case:
    """The case with short sequences and narrow heads, which keep what the plan chooses by width."""
    changes = {"q_len": 70 + case.q_len % 2, "kv_len": 60 - case.kv_len % 2}
    for name in ("window_left", "window_right"):
        if getattr(case, name) > 0:
            changes[name] = getattr(case, name) // 10
    return case.but(batch=2, **changes)


def shortened() -> Iterator[cases.Case]:
    """In the dtype that is fastest here; the other dtypes where they have a case of their own."""
    for case in RANGES:
        if case.dtype == torch.float32 and max(case.head_dim, case.value_dim or 0) <= 128:
            yield small(case)
    yield small(RANGES[1])
    assert RANGES[1].dtype == torch.float16


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.Guarded, "device", "cpu")
    monkeypatch.setattr(cases.Case, "device", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def proved(case: cases.Case, planner: plans.Planner, spoil: str = "") -> prove.Record:
    found = cases.kernels_of(planner, [case])
    sources = {name: build.source_of(kernel) for name, kernel in found.items()}
    prover = prove.Prover(CpuKernels(sources), planner)
    if spoil:

        def disturb(params: plans.Params) -> None:
            setattr(params.ranges, spoil, getattr(params.ranges, spoil) - 1)

        prover.attention.disturb = disturb
    prover.case("control" if spoil else "key ranges", case)
    assert set(found) == set(prover.attention.ran)
    return prover.records[0]


@pytest.mark.parametrize("case", share(shortened(), 2, str))
def test_small_cases(case: cases.Case, planner: plans.Planner, on_cpu: None):
    assert proved(case, planner).failure == ""


def test_a_run_that_was_stopped_goes_on(planner: plans.Planner, on_cpu: None, tmp_path: Path):
    case, path = next(iter(shortened())), tmp_path / "proof.jsonl"
    found = cases.kernels_of(planner, [case])
    sources = {name: build.source_of(kernel) for name, kernel in found.items()}
    for digest, kernels, passes in (("a", sources, True), ("a", {}, True), ("b", {}, False)):
        prover = prove.Prover(CpuKernels(kernels), planner, prove.Progress(path, digest))
        prover.case("key ranges", case)
        assert (prover.records[0].failure == "") == passes
        assert (set(prover.attention.ran) == set(found)) == passes
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("field", ("left", "right"))
def test_a_window_off_by_one_is_noticed(field: str, planner: plans.Planner, on_cpu: None):
    case = small(RANGES[0]).but(dtype=torch.float32, window_left=9, window_right=9)
    assert "max error" in proved(case, planner, field).failure


@pytest.mark.parametrize("kind", ("any", "documents", "padding", "prefix"))
def test_reference_by_blocks_is_the_mathematics(kind: str, monkeypatch: pytest.MonkeyPatch):
    """reference.attention in blocks of 16 rows, beside math_attention of the whole matrix."""
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 1)
    case = Case(
        41, 37, 16, batch=2, num_heads=4, num_kv_heads=2, window_left=9, window_right=5,
        alibi="batch", ranges=kind,
    )  # fmt: skip
    q, k, v, do = case.operands()
    of_case = case.scoring()
    scoring = plans.Scoring(
        of_case.scale,
        window_left=9,
        window_right=5,
        alibi_slopes=of_case.alibi_slopes,
        key_ranges=of_case.key_ranges,
    )
    found = reference.attention(q, k, v, do, None, scoring, torch.float64)
    arguments = of_case._asdict() | {"dropout_seed": None}
    exact = math_attention(q, k, v, do, dtype=torch.float64, **arguments)
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name))


def test_what_nobody_sees_is_nan(on_cpu: None):
    """Keys that one head of a group sees are not hidden, and a sink's dlse never."""
    case = cases.Case(
        40, 50, 8, torch.float32, batch=2, num_heads=4, num_kv_heads=2, ranges="any",
        window_right=0, sinks=True, has_dlse=True,
    )  # fmt: skip
    q, k, v, dout, dlse = case.operands()
    cases.hide_unseen(case, (q, k, v, dout, dlse))
    scoring = case.scoring
    seen = listed.KeyRanges(scoring.key_ranges).dense(50, window_right=0)
    rows, keys = seen.any(-1), seen.any(-2).unflatten(1, (2, 2)).any(2)
    assert 0 < rows.sum() < rows.numel() and keys.any()
    for tensor, sees in ((q, rows), (dout, rows), (k, keys), (v, keys)):
        assert tensor[~sees].isnan().all() and tensor[sees].isfinite().all()
    assert dlse is not None and dlse.isfinite().all()
