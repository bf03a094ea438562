"""The speed model of Apple GPUs: its traces are the kernels', its parameters fit what is published,
and its core does what simple cases demand."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.apple_model import core_model, counts, fit, kernels, problems  # noqa: E402
from benchmarks.apple_model.__main__ import markdown  # noqa: E402
from benchmarks.apple_model.core_model import Parameters, Trace, simulate  # noqa: E402
from benchmarks.apple_model.ensemble import ENSEMBLE, Spread, ensemble  # noqa: E402
from benchmarks.apple_model.issue_model import issue  # noqa: E402
from benchmarks.apple_model.peers import prefill  # noqa: E402
from benchmarks.apple_model.predictions import kernel_row, published_row, result  # noqa: E402
from benchmarks.apple_model.structures import BackwardDkv, BackwardDqStored, Forward  # noqa: E402

FITTED = json.loads(ENSEMBLE.read_text())
PREDICTIONS = ROOT / "benchmarks" / "results" / "apple_model" / "predictions.json"
needs_prefill = pytest.mark.skipif(
    not counts.PREFILL_HEADER.exists(), reason="this torch has no Metal prefill kernel"
)
CASES = [
    *((family, dtype, 64) for family in kernels.FAMILIES for dtype in counts.DTYPES),
    *((family, "float16", head_dim) for family in kernels.FAMILIES for head_dim in (80, 128, 256)),
    (kernels.PREFILL, "float32", 96),
    (kernels.PREFILL, "bfloat16", 32),
]


# ---- traces against the engine


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_trace_is_the_kernel(case):
    if case[0] == kernels.PREFILL and not counts.PREFILL_HEADER.exists():
        pytest.skip("this torch has no Metal prefill kernel")
    assert kernels.disagreements(kernels.structure(*case), counts.count(*case)) == {}


def test_check_sees_another_kernel():
    """A trace with a wider block, or one that streams Q, is not the kernel."""
    real = kernels.structure(kernels.FORWARD, "float16", 64)
    counted = counts.count(kernels.FORWARD, "float16", 64)
    for change in (dict(bk=2 * real.bk), dict(keep_q=False), dict(value_operand="float")):
        wrong = Forward(**{**vars(real), **change})
        assert kernels.disagreements(wrong, counted)


def test_counts_are_repeatable():
    first = counts.count(kernels.FORWARD, "float16", 64)
    counts.count.cache_clear()
    assert counts.count(kernels.FORWARD, "float16", 64) == first


# ---- the core

PLAIN = Parameters(
    mma_half=17.0, mma_float=18.0, mma_latency=2.0, barrier=50.0, shared_bytes=64.0, slowdown=1.0
)


def chain(length: int, dependent: bool) -> Trace:
    t = Trace(PLAIN)
    last = None
    for _ in range(length):
        last = t.mma("half", last if dependent else None)
    return t


def test_products_back_to_back_and_in_a_chain():
    assert simulate(chain(64, False), 1, 1).cycles == pytest.approx(18 * 4, rel=0.01)
    assert simulate(chain(64, True), 1, 1).cycles == pytest.approx(36 * 4, rel=0.05)
    # A second simdgroup of the same scheduler fills the latency.
    assert simulate(chain(64, True), 2, 4).cycles == pytest.approx(18, rel=0.02)
    half = Trace(PLAIN)
    for _ in range(64):
        half.mma("half", sums="half")
    assert simulate(half, 1, 1).cycles == pytest.approx(17 * 4, rel=0.01)


def test_threadgroup_port_is_shared():
    """At 1024 bytes a product, 4 products keep the port busy for 64 cycles, in which each of
    the four schedulers starts one; at 256 bytes it keeps up."""
    for nbytes, cycles in ((256, 18), (1024, 64)):
        t = Trace(PLAIN)
        for _ in range(64):
            t.mma("half", t.read_shared(nbytes))
        assert simulate(t, 4, 4).cycles == pytest.approx(cycles, rel=0.08)


def test_barrier_costs_once_a_block():
    def body(barriers: int) -> Trace:
        t = Trace(PLAIN)
        for _ in range(barriers):
            t.barrier()
        for _ in range(16):
            t.mma("half")
        return t

    def block(barriers: int) -> float:
        return simulate(body(barriers), 1, 4).cycles * 16

    assert block(1) - block(0) == pytest.approx(50, abs=20)
    assert block(4) - block(1) == pytest.approx(150, abs=20)


def test_residency():
    assert core_model.simdgroups_by_registers(128) == 384 // 32
    assert core_model.simdgroups_by_registers(104) == 512 // 32
    assert core_model.simdgroups_by_registers(52) == 1024 // 32
    p = Parameters(shared_capacity=60 * 1024, shared_granule=1)
    assert core_model.resident_threadgroups(p, 9216, 4, 60) == 6
    assert core_model.resident_threadgroups(p, 30000, 4, 60) == 2
    rounded = Parameters(shared_capacity=60 * 1024, shared_granule="power of two")
    assert core_model.resident_threadgroups(rounded, 9216, 4, 60) == 3


# ---- what it is fitted to


def test_ensemble_reproduces_the_published_points():
    """Every tenth set anew, all sets as recorded: within the fit's tolerance."""
    assert len(FITTED["sets"]) >= 40
    for entry in FITTED["sets"][::10]:
        again = fit.ratios(Parameters(**entry["parameters"]))
        assert again == pytest.approx(entry["predicted_over_measured"], abs=1e-3)
        assert fit.rms(again) < fit.TOLERANCE
    for i, point in enumerate(FITTED["points"]):
        median = statistics.median(x["predicted_over_measured"][i] for x in FITTED["sets"])
        assert abs(median - 1) < fit.TOLERANCE, point


def test_leave_one_out_error():
    """The error that docs quote is the file's; predictions: see below."""
    errors = {x["point"]: x for x in FITTED["leave_one_out"]}
    assert list(errors) == FITTED["points"] == [x["name"] for x in fit.POINTS]
    assert all(x["sets"] == 60 for x in errors.values())
    text = (ROOT / "docs" / "apple-model.md").read_text()
    for point in ("prefill 32x16", "MFA head_dim 64", "MFA head_dim 128"):
        x = errors[point]
        assert f"{x['median']:.2f} [{x['low']:.2f}..{x['high']:.2f}]" in text, point


@needs_prefill
def test_prefill_of_pytorch_against_its_published_times():
    """float16, causal, head_dim 128 on M1 Max: the kernel from the wheel, counted here."""
    row = published_row(step=4)
    median, low, high = row["b_milliseconds"]
    for published in row["published"].values():
        assert abs(median / published - 1) < 0.1
        assert abs(row["a_milliseconds"] / published - 1) < 0.15
    assert low < high


def test_search_is_deterministic():
    a, b = (fit.search(7, 6) for _ in range(2))
    assert a == b and len(a) > 2


def test_a_point_left_out_breeds_nothing(monkeypatch: pytest.MonkeyPatch):
    """Whatever it was measured to be, the same sets are tried; for the search without another
    point it matters."""
    monkeypatch.setattr(fit, "predicted", functools.cache(fit.predicted))

    def tried(without: int) -> list[Parameters]:
        return [p for p, _ in fit.search(7, 32, without)]

    before = {without: tried(without) for without in (1, 2)}
    monkeypatch.setitem(fit.POINTS[1], "milliseconds", 2 * fit.POINTS[1]["milliseconds"])
    assert tried(1) == before[1]
    assert tried(2) != before[2]


# ---- predictions


def test_committed_predictions_are_of_these_models():
    """PyTorch's rows depend on model B and the ensemble alone, not on our kernels."""
    rows = json.loads(PREDICTIONS.read_text())["kernels"]
    committed = next(
        x for x in rows if (x["family"], x["dtype"], x["head_dim"])
        == (kernels.PREFILL, "float16", 128)
    )  # fmt: skip
    spread = Spread.of(list(result(kernels.PREFILL, "float16", 128).cycles))
    now = [spread.median, spread.low, spread.high]
    assert now == pytest.approx(committed["b_cycles"], abs=1e-3)


@pytest.mark.parametrize("family", [x for x in kernels.FAMILIES if x != kernels.PREFILL])
def test_committed_predictions_of_our_kernels_are_new(family: str):
    """A row of each family, all parameter sets; `make model` makes them anew."""
    if family == kernels.FORWARD and not counts.PREFILL_HEADER.exists():
        pytest.skip("its row compares with the Metal prefill kernel, which this torch lacks")
    rows = json.loads(PREDICTIONS.read_text())["kernels"]
    (committed,) = (
        x for x in rows if (x["family"], x["dtype"], x["head_dim"]) == (family, "float16", 64)
    )
    now = kernel_row(family, "float16", 64)
    assert now.keys() == committed.keys()
    for name, value in committed.items():
        assert now[name] == pytest.approx(value, abs=1e-3), name


def test_committed_predictions_quote_the_error():
    """Of the ensemble, and the text is that of the figures."""
    content = json.loads(PREDICTIONS.read_text())
    assert content["leave_one_out"] == FITTED["leave_one_out"]
    assert markdown(content) == PREDICTIONS.with_suffix(".md").read_text()


def test_issue_model_adds_up():
    counted = counts.count(kernels.FORWARD, "float16", 64)
    a = issue(kernels.FORWARD, counted)
    assert a.products == 64 and a.parts["mma"] == 18 * 64
    assert a.port == (8192 + 2048) / 64
    assert a.per_product == pytest.approx(sum(a.parts.values()) / 64)


def test_blocks_of_a_problem():
    causal, dense = problems.Problem(128, 1), problems.Problem(128, 1, causal=False)
    kernel = prefill("half", 128)  # 32 x 16
    assert problems.blocks(kernel, causal) == [8, 6, 4, 2]
    assert problems.blocks(kernel, dense) == [8] * 4
    keys = BackwardDkv(
        dtype="half", head_dim=64, score_operand="half", value_operand="float", bq=16
    )
    assert problems.blocks(keys, causal) == [8, 6, 4, 2]
    assert problems.products(kernel, 64, causal) == 20 * 64 * 4
    assert problems.tail(kernel, causal, 4) == pytest.approx(8 / 5)
    assert problems.tail(kernel, causal, 1) == 1


def test_structures_say_what_their_parameters_mean():
    common = dict(dtype="half", head_dim=128, score_operand="half", value_operand="float")

    def said(x, name):
        return x.trace(PLAIN).counts[name]

    whole = BackwardDkv(**common)
    for split in (2, 4):
        part = BackwardDkv(**common, split=split)
        assert split * said(part, "mma_half") == said(whole, "mma_half")
        assert split * said(part, "mma_float") == said(whole, "mma_float")
        assert part.register_estimate < whole.register_estimate
        assert said(part, "barrier") == said(whole, "barrier") + 1
        # Of 4 simdgroups, partial S and dP in float32 go out once and come in split - 1 times.
        exchanged = 4 * 2 * 2 * 256
        assert part.threadgroup_bytes() == whole.threadgroup_bytes() + exchanged
    # dS of 8 keys x 16 queries as float32
    stored = BackwardDkv(**common, store="float")
    extra = said(stored, "device_bytes_written") - said(whole, "device_bytes_written")
    assert extra == 8 * 16 * 4
    reader = BackwardDqStored(**common, rows=1, bk=32)
    assert said(reader, "device_bytes_read") == 8 * 32 * 4 + 32 * 128 * 2 / 4


def test_sweep_prints_structures():
    command = [sys.executable, "-m", "benchmarks.apple_model.sweep", "dqs", "--json"]
    command += ["--head-dim", "64", "--rows", "1", "2", "--bk", "32", "--step", "40"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(result.stdout)
    assert len(rows) == 8 and all(17 < r["cycles"][0] < 40 for r in rows)


def test_ensemble_is_spread():
    """The sets differ, or their range would mean nothing."""
    sets = ensemble()
    for name in ("mma_float", "shared_latency", "bank_conflicts", "unexplained"):
        assert len({getattr(p, name) for p in sets}) > 1
