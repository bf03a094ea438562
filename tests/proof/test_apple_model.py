"""The speed model of Apple GPUs: its traces are the kernels', its core does what simple cases
demand, and its committed predictions are new. What it is fitted to: test_apple_model_fit.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.apple_model import __main__ as tables  # noqa: E402
from benchmarks.apple_model import (  # noqa: E402
    core_model,
    counts,
    kernels,
    problems,
    targets,
)
from benchmarks.apple_model.__main__ import markdown  # noqa: E402
from benchmarks.apple_model.core_model import Parameters, Trace, simulate  # noqa: E402
from benchmarks.apple_model.ensemble import ENSEMBLE, Spread  # noqa: E402
from benchmarks.apple_model.issue_model import issue  # noqa: E402
from benchmarks.apple_model.peers import prefill  # noqa: E402
from benchmarks.apple_model.predictions import kernel_row, result  # noqa: E402
from benchmarks.apple_model.structures import (  # noqa: E402
    BackwardDkv,
    BackwardDkvPairs,
    BackwardDqStored,
    Forward,
)

FITTED = json.loads(ENSEMBLE.read_text())
PREDICTIONS = ROOT / "benchmarks" / "results" / "apple_model" / "predictions.json"
PAIRS = (kernels.DKV_PAIRS, kernels.DKV_PAIRS_STORING)
NARROW = tuple(x for x in kernels.FAMILIES if x not in PAIRS)
WIDE = tuple(x for x in kernels.FAMILIES if x not in (kernels.DKV, kernels.DKV_STORING))
CASES = [
    *((family, dtype, 64) for family in NARROW for dtype in counts.DTYPES),
    *((family, dtype, 128) for family in PAIRS for dtype in counts.DTYPES),
    *((family, "float16", head_dim) for family in NARROW for head_dim in (80, 96)),
    *((family, "float16", head_dim) for family in WIDE for head_dim in (128, 256)),
    *((family, dtype, 96) for family in PAIRS for dtype in ("bfloat16", "float32")),
    *((kernels.FORWARD, dtype, 32) for dtype in counts.DTYPES),
    (kernels.FORWARD, "bfloat16", 80),
    (kernels.FORWARD, "float32", 96),
    (kernels.FORWARD, "bfloat16", 256),
    (kernels.DKV, "float32", 32),
    (kernels.DKV_STORING, "bfloat16", 80),
    (kernels.DKV_PAIRS_STORING, "bfloat16", 256),
    (kernels.DQ, "float16", 32),
    (kernels.DQ, "bfloat16", 96),
    (kernels.DQ, "float32", 256),
    (kernels.DQ_FROM_DS, "float32", 80),
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
    for change in (
        dict(bk=2 * real.bk),
        dict(keep_q=False),
        dict(value_operand="float"),
        dict(buffers=1),
    ):
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


def test_pairs_play_two_bodies():
    """Two simdgroups multiply as much, and one has scalar work besides. The other waits for it at
    the barrier, although each has a scheduler of its own."""

    def pair(cycles: float) -> Trace:
        second = Trace(PLAIN)
        first = Trace(PLAIN, partner=second)
        for t in (first, second):
            for _ in range(16):
                t.mma("half")
        second.alu(cycles)
        for t in (first, second):
            t.barrier()
        return first

    def block(cycles: float) -> float:
        return simulate(pair(cycles), 1, 4).cycles * 16

    assert block(500) - block(0) == pytest.approx(500, abs=20)
    uneven = pair(0)
    uneven.partner.mma("half")
    with pytest.raises(ValueError, match="as many products"):
        simulate(uneven, 1, 4)


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


# ---- predictions


def test_committed_predictions_are_of_these_models():
    """PyTorch's rows depend on model B and the ensemble alone, not on our kernels."""
    rows = json.loads(PREDICTIONS.read_text())["kernels"]
    committed = next(
        x
        for x in rows
        if (x["family"], x["dtype"], x["head_dim"]) == (kernels.PREFILL, "float16", 128)
    )
    spread = Spread.of(list(result(kernels.PREFILL, "float16", 128).cycles))
    now = [spread.median, spread.low, spread.high]
    assert now == pytest.approx(committed["b_cycles"], abs=1e-3)


@pytest.mark.parametrize("family", [x for x in kernels.FAMILIES if x != kernels.PREFILL])
def test_committed_predictions_of_our_kernels_are_new(family: str):
    """A row of each family, all parameter sets; `make model` makes them anew."""
    if family == kernels.FORWARD and not counts.PREFILL_HEADER.exists():
        pytest.skip("its row compares with the Metal prefill kernel, which this torch lacks")
    head_dim = 128 if family in PAIRS else 64
    rows = json.loads(PREDICTIONS.read_text())["kernels"]
    (committed,) = (
        x for x in rows if (x["family"], x["dtype"], x["head_dim"]) == (family, "float16", head_dim)
    )
    now = kernel_row(family, "float16", head_dim)
    assert now.keys() == committed.keys()
    for name, value in committed.items():
        assert now[name] == pytest.approx(value, abs=1e-3), name


def test_committed_predictions_quote_the_error():
    """The ranges are those of the ensemble, and the text has the figures of the file."""
    content = json.loads(PREDICTIONS.read_text())
    assert content["leave_one_out"] == FITTED["leave_one_out"]
    assert markdown(content) == PREDICTIONS.with_suffix(".md").read_text()


def test_docs_have_the_tables_of_the_predictions():
    content = json.loads(PREDICTIONS.read_text())
    text = tables.DOCS.read_text()
    assert tables.documented(text, content) == text, (
        "run python -m benchmarks.apple_model --only-error"
    )
    with pytest.raises(ValueError, match="0 marks"):
        tables.documented("nothing", content)


def test_docs_quote_the_targets_tables():
    """Docs quote every row of the tables, word for word."""
    text = "\n".join(x.read_text() for x in (ROOT / "docs").glob("*.md"))
    for _, (header, rows) in targets.tables(json.loads(PREDICTIONS.read_text())):
        assert len(rows) >= 6
        for row in (header, *rows):
            assert f"| {' | '.join(row)} |" in text


def test_docs_say_which_target_is_out_of_reach():
    """At head_dim 64: PyTorch's cycles, a kernel's ratio at the ceiling, and what targets need."""
    text = " ".join((ROOT / "docs" / "performance-tables.md").read_text().split())
    rows = json.loads(PREDICTIONS.read_text())["kernels"]
    known = {(x["family"], x["dtype"], x["head_dim"]): x for x in rows}
    for dtype, reached in (("float16", False), ("bfloat16", True)):
        peer = known[kernels.PREFILL, dtype, 64]["b_cycles"][0]
        target = targets.FORWARD_RATIO[dtype, 64]
        at_ceiling, needed = core_model.CEILING / peer, target * peer
        assert (at_ceiling <= target) == reached
        assert f"{peer:.1f} cycles" in text
        assert f"{needed:.1f} cycles, {core_model.CEILING / needed:.0%} of the ceiling" in text
        if not reached:
            assert f"a ratio of {at_ceiling:.2f}, above the target of {target:.2f}" in text


def test_target_is_met_or_missed():
    assert targets.verdict(2.0, 2.0, at_least=True) == "met"
    assert targets.verdict(1.999, 2.0, at_least=True) == "missed by less than 1%"
    assert targets.verdict(1.5, 2.0, at_least=True) == "missed by 25%"
    assert targets.verdict(0.7, 0.8, at_least=False) == "met"
    assert targets.verdict(1.0, 0.8, at_least=False) == "missed by 25%"


def test_issue_model_adds_up():
    counted = counts.count(kernels.FORWARD, "float16", 64)
    a = issue(kernels.FORWARD, counted)
    assert a.products == 64 and a.parts["mma"] == 18 * 64
    moved = sum(counted.steady[f"threadgroup_bytes_{x}"] for x in ("read", "written"))
    assert a.port == moved / 64 > 0
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
    common = dict(dtype="half", head_dim=128, score_operand="half", value_operand="half")

    def said(x, name):
        return x.trace(PLAIN).counts[name]

    whole = BackwardDkv(**common | dict(value_operand="float"))
    pairs = BackwardDkvPairs(**common | dict(value_operand="float"))
    assert pairs.keys == whole.keys // 2
    assert pairs.register_estimate < whole.register_estimate
    assert pairs.trace(PLAIN).products == whole.trace(PLAIN).products / 2
    assert said(pairs, "mma_half") == said(whole, "mma_half") / 2
    assert said(pairs, "barrier") == said(whole, "barrier") + 1
    # Of 2 keys' blocks, P of 2 fragments waits as float32: the first writes it, the second reads it
    # and alone asks for no exponentials. The first reads two statistics of each query, the second
    # only delta.
    tiles = 2 * 256
    assert pairs.threadgroup_bytes() == whole.threadgroup_bytes() + 2 * tiles
    first, second = pairs.trace(PLAIN).roles
    same = (first.counts - second.counts) + (second.counts - first.counts)
    one_number = 2 * 2 * 32 * 4  # of both queries of each lane in each fragment
    assert same == dict(
        exp2=4,
        threadgroup_bytes_read=tiles,
        threadgroup_bytes_written=tiles,
        device_bytes_read=one_number,
    )
    # dS of 8 keys x 16 queries as float32
    for kind, plain, writers in ((BackwardDkv, whole, 1), (BackwardDkvPairs, pairs, 2)):
        stored = kind(**vars(plain) | dict(store=True)).trace(PLAIN).mean_counts
        unstored = plain.trace(PLAIN).mean_counts
        extra = stored["device_bytes_written"] - unstored.get("device_bytes_written", 0)
        assert extra == 8 * 16 * 4 / writers
    reader = BackwardDqStored(**common, rows=1, bk=32)
    assert said(reader, "device_bytes_read") == 8 * 32 * 4 + 32 * 128 * 2 / 4
    # 8, 10, 12 and 16 chunks a row for 128 threads: 16 or 8 rows at once, and no more than a block
    for head_dim, bk, steps in ((64, 32, 2), (80, 32, 4), (96, 32, 4), (128, 32, 4), (64, 8, 1)):
        staging = Forward(**common | dict(head_dim=head_dim), bk=bk)
        assert len(staging.fetch(Trace(PLAIN), bk)) == steps
    # bfloat16 is widened when it is staged: K and V of 4 simdgroups, two elements a conversion
    forward = dict(dtype="bfloat", head_dim=64, score_operand="float", value_operand="float")
    one = Forward(**forward, buffers=1)
    assert said(one, "fcvt") == 2 * 32 * 64 / 4 / 32
    assert said(one, "barrier") == 4
    direct = Forward(**forward, buffers=0)
    assert said(direct, "barrier") == said(direct, "threadgroup_bytes_read") == 0
    assert said(direct, "fcvt") == 2 * 2 * 32 * 64 / 64


def test_backward_as_the_plan_launches_it():
    """dS of one head: 64 MiB at 4096, four at a time in 256 MiB; 1 GiB at 16384, so that the keys
    of all heads are divided between dispatches."""
    from benchmarks.apple_model import predictions

    def launches(length, scratch, head_dim=64):
        return counts.backward_launches("float16", head_dim, length, 16, scratch, 32)

    with_ds, without = predictions.SCRATCH
    delta, *four = launches(4096, with_ds)
    assert (delta.family, delta.heads) == (counts.DELTA, 16)
    assert [(x.family, x.heads) for x in four] == 4 * [
        (counts.DKV_STORING, 4),
        (counts.DQ_FROM_DS, 4),
    ]
    assert {(x.key_begin, x.key_end) for x in four} == {(0, 4096)}
    seven = [(counts.DELTA, 16), (counts.DKV, 16), (counts.DQ, 16)]
    assert [(x.family, x.heads) for x in launches(4096, without)] == seven
    assert launches(4096, with_ds, head_dim=128)[1].family == counts.DKV_PAIRS_STORING
    of_heads = launches(16384, with_ds)[1:]  # of all 16 at once
    assert {x.heads for x in of_heads} == {16}
    assert of_heads[0].key_begin == 0 and of_heads[-1].key_end == 16384 > of_heads[0].key_end
    for causal in (True, False):
        problem = problems.Problem(16384, 1, causal)
        for family in (counts.DKV_STORING, counts.DQ_FROM_DS):
            # Together, the dispatches are the undivided kernel.
            kernel = kernels.structure(family, "float16", 64)
            of_family = [x for x in of_heads if x.family == family]
            parts = [problems.blocks(kernel, problem, (x.key_begin, x.key_end)) for x in of_family]
            assert [len(x) for x in parts] == [x.blocks for x in of_family]
            assert sum(map(sum, parts)) == sum(problems.blocks(kernel, problem))
    divided = predictions.backward_row("float16", 64, problems.Problem(16384), with_ds, step=40)
    assert divided["products"] == 5 and divided["key_parts"] == len(of_heads) // 2
    # dq's sums in float, behind dS: all dispatches but the last write them, all but the first read.
    first, *_, last = (x for x in of_heads if x.family == counts.DQ_FROM_DS)
    for x in (first, last):
        keys = x.key_end - x.key_begin
        moved = 4 * 16 * (16384 * keys + 16384 * 64) / predictions.MEMORY_BANDWIDTH * 1e3
        dense = problems.Problem(16384, causal=False)
        assert predictions.ds_milliseconds(x, 64, dense) == pytest.approx(moved)
    problem = problems.Problem(2048)
    row = predictions.backward_row("float16", 64, problem, with_ds, step=40)
    assert row["products"] == 5
    ms = row["milliseconds"][0]
    assert ms <= row["tail_milliseconds"] and ms <= row["pessimistic_milliseconds"]
    # Both kernels' dS on top: 4 bytes of half the pairs each way.
    moved = 2 * 4 * 16 * 2048**2 / 2 / predictions.MEMORY_BANDWIDTH * 1e3
    assert row["exposed_milliseconds"] == pytest.approx(ms + moved, abs=2e-3)
    assert row["speedup"][0] >= row["worst_speedup"]


def test_sweep_prints_structures():
    command = [sys.executable, "-m", "benchmarks.apple_model.sweep", "dqs", "--json"]
    command += ["--head-dim", "64", "--rows", "1", "2", "--bk", "32", "--step", "40"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(result.stdout)
    assert len(rows) == 2 and all(17 < r["cycles"][0] < 40 for r in rows)
