"""What benchmarks/nvidia says features cost, without a GPU: small problems on the CPU engine."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_nvidia_speed import CpuKernels

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import (  # noqa: E402
    build,
    feature_works,
    features,
    features_report,
    plans,
    timing,
)
from benchmarks.nvidia.feature_works import Comparison, Work  # noqa: E402
from benchmarks.nvidia.paths import RESULTS  # noqa: E402

SMALL = list(feature_works.comparisons((64, 128), {72: 2}, 46, 1))
ALL = list(feature_works.comparisons())


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> plans.Planner:
    return build.build_planner(tmp_path_factory.mktemp("planner") / "lib.so")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.nvidia.attention.Guarded.device", "cpu")


def fake_clock(yardstick, works):
    for start in (yardstick, *works.values()):
        start()
    return {name: [(2.0, 0.5)] * 3 for name in works}


def bench_of(
    comparison: Comparison, planner: plans.Planner, clock: features.Clock = fake_clock
) -> features.Bench:
    kernels = {
        kernel.name: build.source_of(kernel)
        for work in (comparison.yardstick, *comparison.works)
        for backward in (False, True)
        for kernel in work.plan(planner, backward)
    }
    return features.Bench(CpuKernels(kernels), planner, clock, "cpu")


# ---- what is timed ------------------------------------------------------------------------------


def test_every_feature_is_beside_a_yardstick():
    named = {work.feature for comparison in ALL for work in comparison.works}
    yardsticks = {comparison.yardstick.feature for comparison in ALL}
    assert named | yardsticks == set(feature_works.FEATURES) and not named & yardsticks
    forward, backward = ({w.feature for c in ALL for w in c.of(x)} for x in (False, True))
    assert backward == named
    assert named - forward == {"additive bias and its gradient", feature_works.PACKED_SEVEN}


def families(work: Work, planner: plans.Planner, backward: bool) -> list[str]:
    return [kernel.family for kernel in work.plan(planner, backward)]


def test_a_feature_runs_the_kernels_of_its_yardstick(planner: plans.Planner):
    """Five products beside five, in as many launches; and what a feature has besides."""
    gradient = "attention_backward_dmask_from_ds"
    more = {"attention_mask_map", gradient, "attention_backward_dsinks"}
    for comparison in ALL:
        for work in comparison.works:
            for backward in (False, True):
                own, plain = (
                    [x for x in families(y, planner, backward) if x not in more]
                    for y in (work, comparison.yardstick)
                )
                if work.feature == feature_works.PACKED_SEVEN and backward:
                    assert "attention_backward_dq" in own and own != plain
                else:
                    assert own == plain
    bias = next(w for w in ALL[0].works if w.feature == "additive bias and its gradient")
    assert {"attention_mask_map", gradient} < set(families(bias, planner, True))


def test_the_default_budget_stores_no_ds_of_the_packed_documents(planner: plans.Planner):
    """What "no scratch" is timed for."""
    for comparison in ALL:
        for work in comparison.works:
            if work.feature == feature_works.PACKED_SEVEN:
                usual = dataclasses.replace(work, scratch_bytes=256 << 20)
                names = [[k.name for k in w.plan(planner, True)] for w in (work, usual)]
                assert names[0] == names[1]


def test_tiles_are_those_of_the_grid(planner: plans.Planner):
    """A block's rows, or keys, are what a threadgroup of the plan takes."""
    for comparison in ALL:
        work = comparison.yardstick
        for kernel in work.plan(planner, False) + work.plan(planner, True):
            if kernel.family in feature_works.PRODUCTS:
                rows, keys = feature_works.tile(kernel)
                of_grid = keys if "_dkv" in kernel.family else rows
                assert kernel.groups[1] == work.length // of_grid
    with pytest.raises(ValueError, match="no tile in its name"):
        feature_works.tile(dataclasses.replace(kernel, name="attention_backward_delta"))


def test_share_of_blocks():
    seen = torch.zeros(2, 1, 70, 50, dtype=torch.bool)
    seen[0, 0, 31, 0] = seen[1, 0, 69, 49] = seen[1, 0, 0, 16] = True
    assert feature_works.share_of_blocks(seen, 32, 16) == 3 / (2 * 3 * 4)
    assert feature_works.share_of_blocks(seen, 64, 32) == 3 / (2 * 2 * 2)
    assert feature_works.share_of_blocks(torch.ones_like(seen), 32, 16) == 1.0


def test_kernels_weigh_as_they_multiply(planner: plans.Planner):
    work = next(w for w in ALL[0].works if w.feature == "causal window of 512")
    seen = feature_works.seen_pairs(work, "cpu")
    assert seen is not None and seen.sum(-1)[0, 0, :514].tolist() == [*range(1, 513), 512, 512]
    kernels = work.plan(planner, True)
    dkv, dq = (
        feature_works.share_of_blocks(seen, *feature_works.tile(k))
        for k in kernels
        if k.family in feature_works.PRODUCTS
    )
    assert dq > dkv > seen.double().mean().item()
    assert feature_works.share_of_work(kernels, seen) == pytest.approx((4 * dkv + dq) / 5)
    assert feature_works.share_of_work(kernels, None) == 1.0


def test_each_work_runs_between_two_of_the_yardstick():
    order = []
    times = {"plain": 4.0, "a": 2.0, "b": 8.0}

    def clock(work, repeats):
        order.append(work())
        return times[work()]

    works = {name: (lambda name=name: name) for name in ("a", "b")}
    samples = timing.between(lambda: "plain", works, 1e-3, clock)
    assert order[:6] == ["plain", "plain", "a", "a", "b", "b"]
    assert order[6:16] == ["plain", "a", "plain", "b", "plain", "plain", "b", "plain", "a", "plain"]
    assert samples == {"a": [(2.0, 0.5)] * 5, "b": [(8.0, 2.0)] * 5}


# ---- all of it, on the CPU ----------------------------------------------------------------------


@pytest.mark.parametrize("comparison", SMALL, ids=lambda c: str(c.yardstick))
def test_run(comparison: Comparison, planner: plans.Planner):
    bench = bench_of(comparison, planner)
    bench.run(comparison)
    assert [r.failure for r in bench.records] == [""] * len(bench.records)
    wanted = [
        (direction, work.feature)
        for direction, backward in (("forward", False), ("backward", True))
        for work in comparison.of(backward)
    ]
    assert [(r.work, r.feature) for r in bench.records] == wanted
    assert all(r.ratio.median == 0.5 and r.milliseconds.median == 2.0 for r in bench.records)
    shares = {r.feature: r.share for r in bench.records if r.work == "forward"}
    if comparison.yardstick.feature == feature_works.PLAIN:
        hides = {x for x, share in shares.items() if share is not None}
        assert hides == {
            "causal window of 512",
            "8 ragged documents",
            "half of the keys padding",
            "block-sparse bool mask",
        }
    else:  # eight of 46 x 46 pairs in the padded batch
        assert 0 < shares[feature_works.PACKED] < 1
    gradients = {x for r in bench.records if r.work == "backward" for x in r.errors}
    assert {"dq", "dk", "dv"} <= gradients
    if comparison.yardstick.feature == feature_works.PLAIN:
        assert {"dmask", "dsinks"} <= gradients
    assert set(bench.attributes()) == {name for r in bench.records for name in r.kernels}


ONE = Comparison(SMALL[0].yardstick, SMALL[0].works[1:2])


def test_a_planted_fault_is_noticed(planner: plans.Planner, monkeypatch: pytest.MonkeyPatch):
    bench = bench_of(ONE, planner)
    bench.planted_fault(ONE.yardstick)
    monkeypatch.setattr(features.Problem, "check", lambda self, side: {})
    with pytest.raises(AssertionError, match="unnoticed"):
        bench.planted_fault(ONE.yardstick)


def spoil_ranges(params: plans.Params) -> None:
    params.ranges.right = -3


def test_nothing_is_timed_that_is_wrong(planner: plans.Planner):
    bench = bench_of(ONE, planner)
    bench.attention.disturb = spoil_ranges
    bench.run(ONE)
    assert ["max error" in r.failure or "NaN" in r.failure for r in bench.records] == [True] * 2
    assert not any(r.ratio for r in bench.records)


def test_results_that_change_while_timed_are_noticed(planner: plans.Planner):
    made: list[features.Side] = []

    def clock(yardstick, works):
        made[-1].results["out"].zero_()
        return fake_clock(lambda: None, dict.fromkeys(works, lambda: None))

    bench = bench_of(ONE, planner, clock)
    prepare: Callable[[Work], features.Problem] = bench._problem

    def keep(work: Work) -> features.Problem:
        problem = prepare(work)
        forward = problem.forward

        def of_forward() -> features.Side:
            made.append(forward())
            return made[-1]

        problem.forward = of_forward  # type: ignore[method-assign]
        return problem

    bench._problem = keep  # type: ignore[method-assign]
    bench.run(ONE)
    failed = [r for r in bench.records if r.failure]
    assert "the results changed" in failed[0].failure and failed[0].feature == feature_works.PLAIN


# ---- report -------------------------------------------------------------------------------------


def canned(feature: str, median: float, share: float | None = None, **changes: object) -> dict:
    spread = {"median": median, "p20": median - 0.01, "p80": median + 0.01, "rounds": 5}
    record = features.Record("forward", feature, "plain", 64, 4096, 2, 16, share)
    return {**dataclasses.asdict(record), "ratio": spread, **changes}


def result_of(*records: dict) -> dict:
    sources = {"commit": "abc", "edited": False, "digest": "def"}
    environment = {"gpu": "A GPU", "driver": "1", "torch": "2", "date": "today", "sources": sources}
    sizes = {"registers": 90, "shared_bytes": 1024, "local_bytes": 0}
    return {"environment": environment, "records": list(records), "kernels": {"one": sizes}}


def test_report():
    result = result_of(
        canned("8 ragged documents", 0.25, 0.2),
        canned("8 ragged documents", 0.22, 0.2, work="backward"),
        canned("softcap", 1.1),
        canned("ALiBi", 1.0, failure="AssertionError: no\nmore", ratio=None),
        canned("packed, dS stored", 0.3, 0.3, yardstick="padded batch", num_heads=4),
    )
    lines = features_report.page(result).splitlines()
    assert "A GPU, driver 1, torch 2, today; commit abc, kernels def" in lines[2]
    assert "| feature | forward, D 64, L 4096 | backward, D 64, L 4096 |" in lines
    documents = "0.250 (0.240 to 0.260), x1.25 | 0.220 (0.210 to 0.230), x1.10"
    assert f"| 8 ragged documents | {documents} |" in lines
    assert "| softcap | 1.100 (1.090 to 1.110) |" in lines
    assert "| ALiBi | failed |" in lines and "Failed: ALiBi: AssertionError: no." in lines
    assert "| packed, dS stored | 0.300 (0.290 to 0.310), x1.00 |" in lines
    above = "8 ragged documents, forward, D 64, L 4096"
    assert f"More than 1.15 times the ideal: {above}." in lines
    assert "| `one` | 90 | 1024 | 0 |" in lines
    assert "| 8 ragged documents | 0.250, x1.25 | 0.220, x1.10 |" in features_report.section(result)
    good = features_report.tables(result_of(canned("8 ragged documents", 0.22, 0.2)))
    assert good[-1] == "Nothing takes more than 1.15 times its ideal."
    assert json.loads(features_report.json_lines(result)) == result


def test_docs_are_written_between_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "page.md"
    marks = features_report.BEGIN, features_report.END
    page.write_text(f"before\n{marks[0]}old{marks[1]}\nbehind\n")
    monkeypatch.setattr(features_report, "DOCS", page)
    result = result_of(canned("softcap", 1.1))
    features_report.write_docs(result)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nbehind\n") and "old" not in text
    assert features_report.in_docs(text) == features_report.section(result)


def test_docs_show_the_committed_run():
    """And no figure, as long as there is none."""
    path = RESULTS / "features.json"
    text = features_report.DOCS.read_text()
    assert text.count(features_report.BEGIN) == 1
    assert text.count("<!-- benchmarks.") == text.count(features_report.END)  # each section ends
    shown = features_report.in_docs(text)
    assert shown == (
        features_report.section(json.loads(path.read_text())) if path.exists() else "\n"
    )
