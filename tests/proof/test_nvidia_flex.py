"""What benchmarks/nvidia does with scores that are functions, without a GPU: small problems on the
CPU engine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from representative import share
from test_nvidia_speed import CpuKernels

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import (  # noqa: E402
    build,
    controls,
    feature_works,
    flex_cases,
    flex_mods,
    flex_report,
    flex_speed,
    flex_texts,
    flex_works,
    prove_flex,
)
from benchmarks.nvidia.flex_cases import FlexCase  # noqa: E402
from benchmarks.nvidia.flex_plans import FlexParams, FlexPlanner, Mods  # noqa: E402
from benchmarks.nvidia.paths import RESULTS  # noqa: E402
from benchmarks.nvidia.plans import Planner  # noqa: E402
from benchmarks.planner import ROOT as PLANNED  # noqa: E402
from benchmarks.planner import compile_planner  # noqa: E402

CASES = [case for group in flex_cases.GROUPS.values() for case in group()]


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> FlexPlanner:
    library = tmp_path_factory.mktemp("planner") / "lib.so"
    compile_planner(library, PLANNED, "-O0")
    return FlexPlanner(library)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.nvidia.attention.Guarded.device", "cpu")
    monkeypatch.setattr(FlexCase, "device", "cpu")
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)


def shrunk(case: FlexCase) -> FlexCase:
    """The case with lengths of a few blocks."""
    q_len, kv_len = (min(n, 70 + n % 29) for n in (case.q_len, case.kv_len))
    if case.mask in ("neighbourhood", "block_diffusion"):
        q_len = kv_len = 256 if case.mask == "neighbourhood" else 100
    blocks = case.blocks and tuple(min(n, 1 + n % 64) for n in case.blocks)
    return case.but(q_len=q_len, kv_len=kv_len, blocks=blocks, batch=1)


def mods_of(case: FlexCase) -> Mods:
    planned = flex_cases.on_meta(case)
    tables = planned.tables()
    functions = planned.functions(tables)
    return flex_texts.mods_of(flex_texts.entry_of(case), functions, tables)


def prover(planner: FlexPlanner, *cases: FlexCase) -> prove_flex.FlexProver:
    kernels = {}
    for case in cases:
        kernels |= flex_cases.kernels_of(planner, case, mods_of(case))
    sources = {name: build.source_of(kernel) for name, kernel in kernels.items()}
    texts = {str(case): flex_texts.entry_of(case) for case in cases}
    return prove_flex.FlexProver(CpuKernels(sources), planner, texts)


# ---- the plan


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_plans_are_those_of_the_native_library(case: FlexCase, planner: FlexPlanner):
    """Names, families, texts, grids and tiles of native/flex_plan.cpp, to the letter."""
    case = case.but(q_len=300, kv_len=257)
    if case.mask in ("neighbourhood", "block_diffusion"):
        case = case.but(q_len=256, kv_len=256)
    mods = mods_of(case)
    *operands, out, dout = flex_cases.on_meta(case).shaped()
    q, k, v = (torch.empty(x.shape, dtype=x.dtype, device="mps") for x in operands)
    given = torch.ops.orchard.flex_attn_plan(
        q, k, v, [x.to("mps") for x in mods.captures],
        None if mods.states is None else mods.states.to("mps"),
        mods.block_q, mods.block_kv, mods.score, mods.mask, case.scale, "metal",
    )  # fmt: skip
    _, _, _, families, names, texts, *_ = given
    own = []
    for more in ((), (v.new_empty(out.shape, device="meta"),)):
        like = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (q, k, v)]
        plan = planner.plan(
            mods, case.scale, 256 << 20, *like, torch.empty_like(dout, device="meta"), *more
        )
        own += plan.kernels
    assert [x.name for x in own] == names and [x.family for x in own] == families
    assert [x.instantiation for x in own] == texts


def test_every_mod_has_a_problem_and_every_width_and_dtype():
    scores, masks = ({getattr(c, name) for c in CASES} - {""} for name in ("score", "mask"))
    assert scores == set(flex_mods.SCORES) and masks == set(flex_mods.MASKS)
    assert {c.head_dim for c in CASES} >= {64, 128, 192, 256, 37}
    assert {c.dtype for c in CASES} == {torch.float16, torch.bfloat16, torch.float32}
    assert {c.num_heads // c.num_kv_heads for c in CASES} >= {1, 2, 4}
    assert sum(min(c.q_len, c.kv_len) >= 4099 for c in CASES) >= 10
    assert {c.blocks for c in CASES} >= {None, (128, 128), (33, 47), (5, 7), (37, 53)}
    assert len(set(map(str, CASES))) == len(CASES)  # a text is found by it


def test_lists_have_whole_partial_and_empty_blocks():
    for case in CASES:
        states = case.states()
        if states is not None and case.density is None:
            assert set(states.unique().tolist()) == {0, 1, 2}
            empty = (states == 0).all(-1)
            assert not bool(empty.all())
            assert states.shape[2] < 3 or bool(empty.any())


# ---- all of it, on the CPU


@pytest.mark.parametrize("case", share(CASES[::5], 2, str))
def test_a_problem(case: FlexCase, planner: FlexPlanner):
    small = shrunk(case)
    of = prover(planner, small)
    of.case("score_mods", small)
    (record,) = of.records
    assert record.failure == "" and record.repeats_bitwise
    assert record.kernels == sorted(of.kernels._sources)
    assert set(record.errors) == {"out", "lse", "dq", "dk", "dv"}


def test_a_trained_table(planner: FlexPlanner):
    case = next(flex_cases.trained())
    small = dataclasses.replace(case, case=case.case.but(q_len=40, kv_len=70), by_batch=True)
    kernels = small.kernels(Planner(planner.library))
    sources = {name: build.source_of(kernel) for name, kernel in kernels.items()}
    of = prove_flex.FlexProver(CpuKernels(sources), planner, {})
    of.trained(small)
    (record,) = of.records
    assert record.failure == "" and record.kernels == sorted(sources)
    assert "dmask" in record.errors and "relative" not in str(small)


@pytest.mark.parametrize("fault", list(controls.disturbed_parameters_of_flex()), ids=lambda f: f[0])
def test_every_planted_fault_is_noticed(fault: controls.FlexFault, planner: FlexPlanner):
    label, case, disturb = fault
    small = shrunk(case)
    of = prover(planner, small)
    of.fault(label, small, disturb)
    assert of.records[0].failure == "" and "max error" in of.records[0].noticed


def test_a_fault_that_is_none_is_said(planner: FlexPlanner):
    small = shrunk(next(controls.disturbed_parameters_of_flex())[1])
    of = prover(planner, small)
    of.fault("nothing", small, lambda params: None)
    assert "went unnoticed" in of.records[0].failure


# ---- what is timed

ONES = list(flex_works.comparisons((64,), 200, 2))


def fake_clock(yardstick, works):
    for start in (yardstick, *works.values()):
        start()
    return {name: [(2.0, 0.5)] * 3 for name in works}


def bench_of(comparison: feature_works.Comparison, planner: FlexPlanner) -> flex_speed.FlexBench:
    used = {}
    for work in (comparison.yardstick, *comparison.works):
        for backward in (False, True):
            used |= {x.name: x for x in flex_works.kernels_of(work, planner, backward)}
    sources = {name: build.source_of(kernel) for name, kernel in used.items()}
    return flex_speed.FlexBench(CpuKernels(sources), planner, fake_clock, "cpu")


@pytest.mark.parametrize("comparison", ONES, ids=lambda c: str(c.yardstick))
def test_functions_are_timed_beside_fixed_kernels(comparison, planner: FlexPlanner):
    bench = bench_of(comparison, planner)
    bench.run(comparison)
    assert [r.failure for r in bench.records] == [""] * len(bench.records)
    assert [(r.work, r.feature) for r in bench.records] == [
        (direction, work.feature)
        for direction in ("forward", "backward")
        for work in comparison.works
    ]
    shares = {r.feature: r.share for r in bench.records if r.work == "forward"}
    hiding = {*flex_works.DENSITIES, flex_works.CAUSAL}
    assert {x for x, share in shares.items() if share is not None} == hiding & set(shares)
    assert all(0.0 < share < 1.0 for share in shares.values() if share is not None)


def test_a_function_that_does_nothing_runs_the_plain_kernels(planner: FlexPlanner):
    (comparison, *_) = ONES
    noop = comparison.works[0]
    for backward in (False, True):
        own, plain = (
            [x.name for x in flex_works.kernels_of(work, planner, backward)]
            for work in (noop, comparison.yardstick)
        )
        assert own == plain


def test_a_wrong_kernel_is_not_timed(planner: FlexPlanner):
    comparison = ONES[1]
    bench = bench_of(comparison, planner)
    bench.planted_fault(comparison.works[0])

    def spoil(params: FlexParams) -> None:
        params.captures[0].strides[0] = 0

    bench.flex.disturb = spoil
    bench.run(comparison)
    assert all("max error" in r.failure and r.ratio is None for r in bench.records)


# ---- what is committed


def result(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_docs_show_the_committed_run():
    """And no figure, as long as there is none."""
    text = flex_report.DOCS.read_text()
    assert text.count(flex_report.BEGIN) == text.count(flex_report.END) == 1
    timed = result("flex_speed")
    assert flex_report.in_docs(text) == (flex_report.section(timed) if timed else "\n")


def test_the_committed_proof_is_whole_and_the_docs_say_of_which_kernels():
    proof = result("flex")
    assert proof is not None, "run benchmarks.nvidia.prove_flex"
    made_of = hashlib.sha256()
    for family in build.embed_shaders.FLEX_FAMILIES:
        made_of.update(build.family_text(family).encode())
    assert not [r["case"] for r in proof["records"] if r["failure"]]
    proven = {r["case"] for r in proof["records"]}
    assert set(map(str, (*CASES, *flex_cases.trained()))) <= proven
    assert {label for label, _, _ in controls.disturbed_parameters_of_flex()} <= proven
    docs = (ROOT / "docs" / "proof.md").read_text()
    present = proof["environment"]["sources"]["digest"] == made_of.hexdigest()[:12]
    older = "as they were before their last change, since which they have been timed"
    assert present == (older not in docs)
    said = f"of {len(proof['kernels'])} kernels whose scores are functions, on an H200, none of "
    assert f"{said}{len(proof['records'])} problems" in docs
