"""The speed comparison of benchmarks/nvidia without a GPU: its launches on the CPU engine."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from simulator import engine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import (  # noqa: E402
    build,
    peer,
    plans,
    reference,
    speed,
    speed_report,
    timing,
    workloads,
)
from benchmarks.nvidia.driver import Launch  # noqa: E402
from orchard_ops.testing import assert_attention_close  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (peer.INCLUDE / "ATen/native/mps/kernels/PrefillAttention.h").exists(),
    reason="this torch has no Metal attention headers",
)


def _bytes_behind(x):
    return x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize


class CpuKernels:
    """driver.Kernels on the CPU engine: kernels from Metal sources, on CPU tensors."""

    def __init__(self, sources: dict[str, str]):
        self._sources = sources

    def _library(self, name):
        source = self._sources.get(name, peer.SOURCE)
        return engine.compile(source, include_dirs=[peer.INCLUDE], only=[name])

    def text(self, name):
        return name in self._sources and self._sources[name]

    def attributes(self, name):
        return {"registers": 1, "shared_bytes": 2, "local_bytes": 0}

    def prepare(self, name, groups, threads, buffers, params):
        group = (*threads, 1, 1)[:3]
        grid = tuple(n * m for n, m in zip((*groups, 1, 1)[:3], group))
        value = torch.frombuffer(bytearray(params[1]), dtype=torch.uint8).clone()
        tensors = {**buffers, params[0]: value}

        def start():
            bound = {
                i: engine.Buffer(x.data_ptr(), _bytes_behind(x), True) for i, x in tensors.items()
            }
            self._library(name).launch(name, grid, group, bound)

        return Launch(name, start)


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    return build.build_planner(tmp_path_factory.mktemp("planner") / "lib.so")


# ---- PyTorch's kernel


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize(
    "dtype, head_dim, sizes",
    [
        (torch.float16, 64, (2, 4, 2, 43, 50)),
        (torch.bfloat16, 128, (1, 2, 2, 70, 33)),
        (torch.float32, 256, (2, 2, 1, 18, 18)),
        (torch.float32, 80, (1, 2, 1, 33, 64)),
    ],
    ids=str,
)
def test_peer_agrees_with_float64(dtype, head_dim, sizes, causal):
    """From operands whose heads lie inside of the rows, so that strides matter."""
    batch, heads, kv_heads, q_len, kv_len = sizes
    torch.manual_seed(0)

    def draw(count, length):
        return torch.randn(batch, length, count, head_dim).to(dtype).transpose(1, 2)

    q, k, v = draw(heads, q_len), draw(kv_heads, kv_len), draw(kv_heads, kv_len)
    out = torch.full_like(q, torch.nan)
    scale = head_dim**-0.5
    plan = peer.prefill(q, k, v, out, scale, causal)
    buffers = {peer.BUFFERS[n]: x for n, x in {"q": q, "k": k, "v": v, "out": out}.items()}
    params = (peer.BUFFERS["params"], plan.params)
    CpuKernels({}).prepare(plan.name, plan.groups, plan.threads, buffers, params).start()
    q, scale = peer.rounded_query(q, scale)
    scoring = plans.Scoring(scale, window_right=0 if causal else -1)
    exact, eager = (
        reference.attention(q, k, v, torch.zeros_like(q), None, scoring, d)
        for d in (torch.float64, dtype)
    )
    assert_attention_close([out], exact, eager)


def test_peer_names_exist_in_the_header():
    names = {
        peer.prefill(*[torch.empty(1, 1, 9, d, dtype=t, device="meta")] * 4, 1.0, causal).name
        for d in peer.HEAD_DIMS
        for t in workloads.DTYPES.values()
        for causal in (False, True)
    }
    assert names == set(engine.compile(peer.SOURCE, include_dirs=[peer.INCLUDE], only=names).names)


def test_peer_refuses_what_pytorch_would_not_run():
    x = torch.empty(1, 1, 9, 48)
    with pytest.raises(ValueError, match=r"head_dim must be one of .*; got 48"):
        peer.prefill(x, x, x, x, 1.0, False)
    x = torch.empty(1, 1, 8, 64)
    with pytest.raises(ValueError, match="q_len must be above 8; got 8"):
        peer.prefill(x, x, x, x, 1.0, False)
    x = torch.empty(1, 1, 64, 64).transpose(2, 3)
    with pytest.raises(ValueError, match="q must have dense rows"):
        peer.prefill(x, x, x, x, 1.0, False)


def test_header_is_the_one_that_params_mirrors(monkeypatch, tmp_path):
    assert torch.__version__ in peer.check_header()
    other = tmp_path / "PrefillAttention.h"
    other.write_text("struct PrefillAttnParams {\n  int B;\n  long Q_strides[3];\n};")
    monkeypatch.setattr(peer, "_HEADER", other)
    with pytest.raises(RuntimeError, match=r"PrefillAttnParams is now intB;longQ_strides\[3\]"):
        peer.check_header()


# ---- clock


def test_works_take_turns():
    order = []
    times = {"a": 4.0, "b": 0.5}

    def clock(work, repeats):
        order.append((work(), repeats))
        return times[work()]

    samples = timing.take_turns({"a": lambda: "a", "b": lambda: "b"}, 0.06, clock)
    assert order[:4] == [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    assert order[4:8] == [("a", 1), ("b", 4), ("b", 4), ("a", 1)]
    assert samples == {"a": [4.0] * 10, "b": [0.5] * 10}  # rounds of 6 ms


def test_spread():
    spread = timing.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (spread.median, spread.p20, spread.p80, spread.rounds) == (3.5, 2.0, 5.0, 6)


# ---- what is built


def test_workloads():
    chosen = list(workloads.workloads(["float16"], [64, 96]))
    assert [(w.head_dim, w.length, w.causal) for w in chosen] == [
        *[(64, length, causal) for causal in (False, True) for length in workloads.LENGTHS],
        (96, 4096, False),
        (96, 4096, True),
    ]
    chosen = list(workloads.workloads(["float32", "bfloat16"], [64], [512]))
    assert {(w.dtype, w.length) for w in chosen} == {("float32", 512), ("bfloat16", 512)}


def test_a_second_mode_is_compiled_only_for_tensor_cores():
    asked = []

    def compile_mode(text):
        return lambda equal: asked.append(equal) or f"{text} {equal}"

    assert build.in_both_modes(compile_mode("fma")) == dict.fromkeys(
        ("native", "equal-rate"), "fma False"
    )
    assert asked == [False]
    assert build.in_both_modes(compile_mode("mma.sync"))["equal-rate"] == "mma.sync True"


# ---- all of it, on the CPU


def fake_clock(works):
    """Each kernel of ours takes twice as long as PyTorch's, and a second run is a run."""
    for start in works.values():
        start()
    return {name: [1.0 if "prefill" in name else 2.0] * 3 for name in works}


def small_bench(planner, work, second=None, clock=fake_clock):
    sources = {kernel.name: build.source_of(kernel) for kernel in work.plan(planner, True)}
    kernels = {"native": CpuKernels(sources)}
    kernels["equal-rate"] = CpuKernels(second(sources) if second else sources)
    return speed.Bench(kernels, planner, clock, "cpu")


WORK = workloads.Workload("float16", 64, 80, True, batch=1, num_heads=2)


def test_run(planner):
    """The second mode differs in the forward only."""
    forward = WORK.plan(planner, False)[0].name
    bench = small_bench(planner, WORK, lambda x: {**x, forward: x[forward] + "\n"})
    bench.planted_fault(WORK)
    bench.run(WORK, True)
    assert [(r.work, r.mode, r.same_as, r.failure) for r in bench.records] == [
        ("forward", "native", "", ""),
        ("forward", "equal-rate", "", ""),
        ("backward", "native", "", ""),
        ("backward", "equal-rate", "", ""),
    ]
    backward = bench.records[2]
    kernels = WORK.plan(planner, True)[1:]
    assert set(backward.relative) == {"forward", "ours", forward, *(x.name for x in kernels)}
    assert math.isclose(backward.relative["ours"].median, 2.0 * len(kernels))
    assert set(backward.errors["ours"]) == {"dq", "dk", "dv"}
    assert set(bench.attributes()["equal-rate"]) == set(bench.attributes()["native"])


def test_all_launches_of_a_kernel_count(planner, monkeypatch):
    """The dS of one of three heads fits, so dk/dv and dq are launched three times, backwards in
    every second turn."""
    work = workloads.Workload("float16", 64, 80, False, batch=1, num_heads=3)
    monkeypatch.setattr(
        workloads.Workload, "scoring",
        plans.Scoring(0.125, scratch_bytes=80 * 80 * 4, stores_ds=True, gpu_cores=1),
    )  # fmt: skip

    def clock(works):
        for start in [*works.values(), *reversed(works.values())]:
            start()
        return {name: [2.0 if "backward" in name else 1.0] * 3 for name in works}

    bench = small_bench(planner, work, clock=clock)
    bench.run(work, True)
    backward = bench.records[2]
    assert not backward.failure
    delta, dkv, dq = dict.fromkeys(x.name for x in work.plan(planner, True)[1:])
    assert backward.times[delta].median == 2.0
    assert backward.times[dkv].median == backward.times[dq].median == 6.0
    assert math.isclose(backward.relative["ours"].median, 14.0)


def test_same_code_is_not_timed_again(planner):
    bench = small_bench(planner, WORK)
    bench.run(WORK, False)
    assert [(r.mode, r.same_as) for r in bench.records] == [
        ("native", ""),
        ("equal-rate", "native"),
    ]
    assert not bench.records[1].times


def test_nothing_is_timed_that_is_wrong(planner):
    forward = WORK.plan(planner, False)[0].name

    def spoil(params):
        params.scale_log2 *= 1.1

    bench = small_bench(planner, WORK, lambda x: {**x, forward: x[forward] + "\n"})
    bench.attention["equal-rate"].disturb = spoil
    bench.run(WORK, False)
    good, bad = bench.records
    assert good.times and not good.failure
    assert "max error" in bad.failure
    assert not bad.times and not bad.relative


def test_a_fault_that_goes_unnoticed_ends_the_run(planner, monkeypatch):
    monkeypatch.setattr(speed.Operands, "check", lambda self, side: {})
    with pytest.raises(AssertionError, match="unnoticed"):
        small_bench(planner, WORK).planted_fault(WORK)


def test_results_that_change_while_timed_are_noticed(planner):
    def clock(works):
        samples = fake_clock(works)
        results["out"].zero_()
        return samples

    results = {}
    bench = small_bench(planner, WORK, clock=clock)
    prepare = bench._forward

    def keep(mode, x):
        prepared = prepare(mode, x)
        results.update(prepared.results)
        return prepared

    bench._forward = keep
    bench.run(WORK, False)
    assert "the results changed" in bench.records[0].failure


# ---- report


def canned(**changes):
    spread = {"median": 0.5, "p20": 0.4, "p80": 0.6, "rounds": 9}
    record = {
        "work": "forward",
        "dtype": "float16",
        "head_dim": 64,
        "length": 1024,
        "causal": True,
        "mode": "native",
        "errors": {},
        "times": {},
        "relative": {"ours": spread},
        "same_as": "",
        "failure": "",
        "seconds": 1.0,
    }
    return {**record, **changes}


def test_report():
    def spread(median):
        return {"median": median, "p20": median - 0.1, "p80": median + 0.1, "rounds": 9}

    kernels = {
        "attention_backward_delta_float16_d64": spread(0.2),
        "attention_backward_dkv_float16_d64": spread(1.8),
        "attention_forward_float16_d64": spread(0.8),
    }
    relative = {"ours": spread(2.0), "forward": spread(0.8), **kernels}
    sizes = {"registers": 90, "shared_bytes": 1024, "local_bytes": 0}
    result = {
        "environment": {
            "gpu": "A GPU",
            "driver": "1",
            "torch": "2",
            "date": "today",
            "sources": {"commit": "abc", "edited": True, "digest": "def", "peer": "torch 3"},
        },
        "records": [
            canned(),
            canned(mode="equal-rate", relative={"ours": spread(0.9)}),
            canned(causal=False),
            canned(causal=False, mode="equal-rate", same_as="native", relative={}),
            canned(length=4096, failure="AssertionError: a | b\nmore", relative={}),
            canned(work="backward", relative=relative),
            canned(work="backward", mode="equal-rate", same_as="native", relative={}),
        ],
        "kernels": {
            "native": {"one": sizes, "two": sizes},
            "equal-rate": {"one": sizes, "two": {**sizes, "registers": 91}},
        },
    }
    lines = speed_report.table(result).splitlines()
    assert "A GPU, driver 1, torch 2, today; commit abc with uncommitted changes" in lines[2]
    assert "5 comparisons, 1 failed." in lines
    half = "0.500 (0.400 to 0.600)"
    assert f"| float16 | 64 | 1024 | causal | {half} | 0.900 (0.800 to 1.000) |" in lines
    assert f"| float16 | 64 | 1024 | dense | {half} | same code |" in lines
    assert "| float16 | 64 | 4096 | causal | failed: AssertionError: a / b | not run |" in lines
    # (5 products / 2.0) / (2 products / 0.8) = 1
    assert (
        "| float16 | 64 | 1024 | causal | native | 2.000 (1.900 to 2.100) | "
        "attention_backward_delta 0.200<br>attention_backward_dkv 1.800 | "
        "0.800 (0.700 to 0.900) | 1.00 |"
    ) in lines
    assert sum("backward" in line and "equal-rate" in line for line in lines) == 0
    assert "| native | `one` | 90 | 1024 | 0 |" in lines
    assert "| equal-rate | `two` | 91 | 1024 | 0 |" in lines
    assert not any("equal-rate | `one`" in line for line in lines)
