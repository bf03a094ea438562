"""The comparison of five and seven products without a GPU: its plans, and all of it on the CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from test_nvidia_peers import Engine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import build, choice, products, products_cases, products_report  # noqa: E402
from benchmarks.nvidia.paths import RESULTS  # noqa: E402
from benchmarks.nvidia.peers.launches import Text  # noqa: E402
from benchmarks.nvidia.peers.problems import Problem  # noqa: E402


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    return build.build_planner(tmp_path_factory.mktemp("planner") / "lib.so")


def test_problems_are_the_shapes_that_the_choice_is_for():
    found = list(products_cases.problems())
    assert len(set(found)) == len(found)
    assert {(p.length, p.head_dim, p.group) for p in found} == {
        (length, head_dim, group)
        for length in (512, 1024, 2048, 4096, 8192, 16384, 32768)
        for head_dim in (64, 128)
        for group in (1, 4, 8, 16)
    }
    assert {p.mask for p in found} == {"causal", "dense", "window 1024"}
    assert [p.length for p in found] == sorted(p.length for p in found)


def test_a_window_is_of_as_many_keys_as_it_says():
    scoring = Problem("float16", 64, 4096, True, window=1024).scoring()
    assert (scoring.window_left, scoring.window_right) == (1023, 0)


def test_budgets_with_one_plan_are_one(planner):
    case = products_cases.case(Problem("float16", 64, 2048, True), planner)
    assert list(case.distinct) == ["325 MiB", "none"]
    assert {b: case.same_as(b) for b in case.plans} == {
        **dict.fromkeys(("325 MiB", "325 MiB, five", "1170 MiB", "1170 MiB, five"), "325 MiB"),
        "none": "none",
    }
    case = products_cases.case(Problem("float16", 64, 4096, True), planner)
    assert len(case.plans["325 MiB"].kernels) > len(case.plans["1170 MiB"].kernels)


def test_the_other_choice_is_timed_too(planner):
    """Under 325 MiB seven products take less, under 1170 MiB five."""
    problem = Problem("float16", 64, 16384, True)
    case = products_cases.case(problem, planner)
    assert list(case.distinct) == ["325 MiB", "325 MiB, five", "1170 MiB"]
    assert case.same_as("none") == "325 MiB" and case.same_as("1170 MiB, five") == "1170 MiB"
    stored = {budget: plan.ds_elements > 0 for budget, plan in case.plans.items()}
    assert [budget for budget, stores in stored.items() if not stores] == ["325 MiB", "none"]
    heads, keys = products_cases.at_once(case.plans["1170 MiB"])
    assert (heads, keys) == (2, 16384) and products_cases.at_once(case.plans["none"]) == (
        16, 16384,
    )  # fmt: skip


def small_bench(planner, clock, once=lambda work: 1.0):
    problem = Problem("float16", 64, 96, True, num_heads=2, num_kv_heads=1)
    texts = {}
    for kernels in (
        problem.forward_kernels(planner),
        *(plan.kernels for plan in products_cases.case(problem, planner).plans.values()),
    ):
        for kernel in kernels:
            texts[kernel.name] = lambda kernel=kernel: Text(build.source_of(kernel))
    return products.Bench(Engine(texts), planner, clock, once, "cpu"), problem


def fake_clock(works):
    for start in works.values():
        start()
    return {name: [1.0 + i] * 3 for i, name in enumerate(works)}


@pytest.mark.parametrize("gated", [True, False], ids=["float64", "each other"])
def test_run(planner, monkeypatch, gated):
    if not gated:
        monkeypatch.setattr(products, "GATED", 0)
    bench, problem = small_bench(planner, fake_clock)
    bench.run(problem)
    (record,) = bench.records
    assert not record.failure
    five, same, seven = (record.budgets[b] for b in ("325 MiB", "1170 MiB, five", "none"))
    assert (five.products, five.milliseconds, five.same_as) == (5, [1.0] * 3, "325 MiB")
    assert (five.heads_at_once, five.keys_at_once, five.dkv_parts) == (2, 96, 1)
    assert (same.products, same.milliseconds, same.same_as) == (5, [], "325 MiB")
    assert (seven.products, seven.milliseconds, seven.scratch_bytes) == (7, [2.0] * 3, 0)


def test_what_takes_far_longer_is_timed_once(planner):
    times = iter([1.0, products.FAR])
    bench, problem = small_bench(planner, fake_clock, lambda work: next(times))
    bench.run(problem)
    outcomes = bench.records[0].budgets
    assert outcomes["325 MiB"].milliseconds == [1.0] * 3
    assert outcomes["none"].milliseconds == [products.FAR] and not outcomes["none"].failure


def test_results_that_change_while_timed_are_noticed(planner, monkeypatch):
    def clock(works):
        samples = fake_clock(works)
        for contender in made:
            contender.results["dk"].zero_()
        return samples

    made = []
    prepare = products.contenders.ours_backward

    def keep(*arguments):
        made.append(prepare(*arguments))
        return made[-1]

    monkeypatch.setattr(products.contenders, "ours_backward", keep)
    bench, problem = small_bench(planner, clock)
    bench.run(problem)
    failures = {b: o.failure for b, o in bench.records[0].budgets.items()}
    assert failures["325 MiB"] == failures["none"] == "the results changed while they were timed"


@pytest.mark.parametrize("gated", [True, False], ids=["float64", "each other"])
def test_nothing_is_timed_that_is_wrong(planner, monkeypatch, gated):
    if not gated:
        monkeypatch.setattr(products, "GATED", 0)
    prepare = products.contenders.ours_backward

    def wrong(attention, x, mode, scoring, name):
        contender = prepare(attention, x, mode, scoring, name)
        if name == "none":
            spoil = contender.results["dq"]
            contender.order.append(("dq", lambda: spoil.mul_(1.1)))
        return contender

    monkeypatch.setattr(products.contenders, "ours_backward", wrong)
    bench, problem = small_bench(planner, fake_clock)
    bench.run(problem)
    (record,) = bench.records
    assert record.failure.startswith("AssertionError: dq")
    assert not any(outcome.milliseconds for outcome in record.budgets.values())


# ---- report


def record(num_kv_heads, milliseconds, length=4096, failure=""):
    budgets = {
        budget: {
            "launches": launches,
            "products": number,
            "scratch_bytes": 0,
            "heads_at_once": 16,
            "keys_at_once": length,
            "dkv_parts": 1,
            "same_as": budget,
            "milliseconds": [time] * 3 if time else [],
            "failure": "",
        }
        for (budget, launches, number), time in zip(
            (("325 MiB", 9, 5), ("325 MiB, five", 5, 5), ("none", 3, 7)), milliseconds
        )
    }
    return {
        "problem": f"L{length} H16/{num_kv_heads}",
        "head_dim": 64,
        "length": length,
        "num_heads": 16,
        "num_kv_heads": num_kv_heads,
        "mask": "causal",
        "budgets": budgets,
        "failure": failure,
        "seconds": 1.0,
    }


def test_a_run_goes_on_with_what_is_left(tmp_path):
    result = json.loads((RESULTS / "products.json").read_text())
    environment, records = result["environment"], result["records"]
    result["records"][1]["failure"] = "AssertionError: dq"
    (tmp_path / "products.json").write_text(products_report.json_lines(result))
    found = products.earlier(tmp_path, environment)
    assert [asdict(record) for record in found] == [records[0], *records[2:]]
    assert products.earlier(tmp_path, environment | {"driver": "1.0"}) == []
    assert products.earlier(tmp_path / "none", environment) == []


def test_docs_show_the_committed_result():
    result = json.loads((RESULTS / "products.json").read_text())
    shown = products_report.in_docs(products_report.DOCS.read_text())
    assert shown == products_report.section(result)
    assert (RESULTS / "products.md").read_text() == products_report.page(result)


def test_summary_has_shapes_by_length():
    records = [record(16, [10.2, 10.0, 14.0]), record(1, [30.0, 25.0, 20.0])]
    records.append(record(16, [9.0, 9.0, 9.0], length=1024))
    lines = products_report.summary({"records": records})
    assert lines[0] == "| shape | L 4096 | L 1024 |"
    assert lines[2:] == [
        "| causal, D 64, H 16/16 | 1.02 (5) | 1.00 (5) |",
        "| causal, D 64, H 16/1 | **1.50 (5)** | - |",
    ]


def test_report():
    shared = record(4, [0.0, 12.0, 0.0])
    for budget in ("325 MiB", "none"):
        shared["budgets"][budget]["same_as"] = "325 MiB, five"
    result = {
        "environment": {
            "gpu": "A GPU",
            "driver": "1",
            "torch": "2",
            "date": "today",
            "sources": {"commit": "abc", "edited": False, "digest": "def"},
        },
        "not_run": ["L32768 H16/1"],
        "records": [
            record(16, [10.2, 10.0, 14.0]),
            shared,
            record(2, [0.0, 0.0, 0.0], failure="broken"),
            record(1, [30.0, 25.0, 20.0]),
            record(16, [1.0, 1.0, 1.0], length=1024),
            record(1, [9.0, 9.0, 9.0], length=1024),
        ],
    }
    lines = products_report.page(result).splitlines()
    assert "| L4096 H16/16 | 1.02 (5, 9) | 1.00 (5, 5) | 1.40 (7, 3) | 10.000 | 1.00 |" in lines
    assert "| L4096 H16/4 | 1.00 (5, 9) | 1.00 (5, 5) | 1.00 (7, 3) | 12.000 | 1.20 |" in lines
    assert "| L4096 H16/2 | failed: broken | | | | |" in lines
    assert "| L4096 H16/1 | **1.50 (5, 9)** | 1.25 (5, 5) | 1.00 (7, 3) | 20.000 | 2.00 |" in lines
    assert "1 of 4 choices." in lines  # the second record has one plan for all
    lost = "* L4096 H16/1: 1.50 (5 products, 9 launches, 325 MiB)"
    listed = [line for line in lines[lines.index(lost) :] if line.startswith("*")]
    assert listed == [
        lost,
        "* L4096 H16/1: 2.00",
        "* L4096 H16/4: 1.20",  # L 1024 is too short to count
        "* L32768 H16/1",
    ]


# ---- the estimate beside what was timed


def test_the_estimate_prefers_what_is_faster(tmp_path: Path):
    """Of all that was timed it never prefers what takes more than 3 % longer."""
    library = tmp_path / "libplanner.so"
    choice.planner.compile_planner(library)
    records = json.loads((RESULTS / "products.json").read_text())["records"]
    found = list(choice.comparisons(records, library))
    assert len(found) > 200 and choice.spread(found) < 1.08
    assert not choice.lost(found)


def test_a_wrong_preference_is_noticed():
    right = choice.Comparison("a", "1170 MiB", 0.7, 0.8)
    wrong = (
        choice.Comparison("b", "1170 MiB", 0.7, 1.1),
        choice.Comparison("c", "1170 MiB", 1.5, 0.9),
    )
    near = choice.Comparison("d", "1170 MiB", 0.98, 1.1)
    assert choice.lost([right, *wrong, near]) == [wrong[1], wrong[0]]
    assert [round(x.loss, 2) for x in (right, *wrong, near)] == [1.0, 1.43, 1.5, 1.02]
