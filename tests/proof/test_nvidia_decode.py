"""What benchmarks/nvidia does with caches, without a GPU: small problems on the CPU engine."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from simulator import engine
from simulator.engine import ptx
from test_nvidia_speed import CpuKernels

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import (  # noqa: E402
    append_cases,
    build,
    cache_cases,
    caches,
    cases,
    controls,
    decode_peer,
    decode_report,
    decode_speed,
    decode_works,
    few_queries,
    prove_caches,
)
from benchmarks.nvidia.append_cases import AppendCase  # noqa: E402
from benchmarks.nvidia.cache_cases import CacheCase  # noqa: E402
from benchmarks.nvidia.decode_works import DecodeWork  # noqa: E402
from benchmarks.planner import ROOT as PLANNED  # noqa: E402
from benchmarks.planner import compile_planner  # noqa: E402

has_headers = pytest.mark.skipif(
    not (decode_peer.INCLUDE / "ATen/native/mps/kernels/DecodeAttention.h").exists(),
    reason="this torch has no Metal attention headers",
)


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> caches.CachePlanner:
    library = tmp_path_factory.mktemp("planner") / "lib.so"
    compile_planner(library, PLANNED, "-O0")
    return caches.CachePlanner(library)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.nvidia.attention.Guarded.device", "cpu")
    monkeypatch.setattr(cases.Case, "device", "cpu")
    monkeypatch.setattr(cache_cases.CacheCase, "device", "cpu")
    monkeypatch.setattr(append_cases.AppendCase, "device", "cpu")
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)


def kernels(planner: caches.CachePlanner, *calls: caches.Call) -> CpuKernels:
    found = caches.kernels_of(planner, calls)
    return CpuKernels({name: build.source_of(kernel) for name, kernel in found.items()})


def prover(planner: caches.CachePlanner, *calls: caches.Call) -> prove_caches.CacheProver:
    return prove_caches.CacheProver(kernels(planner, *calls), planner)


# ---- the problems -------------------------------------------------------------------------------


def shrunk(case: CacheCase) -> CacheCase:
    """The case in a room of 208 keys or a little less, which keeps what its kernels know."""
    size = min(case.page_size, 48)
    capacity = 208 // size * size if size else 208

    def scaled(n: int) -> int:
        return n if n > 1 << 20 else n * capacity // case.capacity

    changes = {name: tuple(map(scaled, getattr(case, name))) for name in ("lengths", "starts")}
    changes["lengths"] = tuple(
        max(n, case.added if case.counted else 0) for n in changes["lengths"]
    )
    if not case.counted:
        changes["added"] = capacity
    for name in ("window_left", "window_right"):
        if getattr(case, name) > 1:
            changes[name] = scaled(getattr(case, name)) + 1
    return case.but(capacity=capacity, page_size=size, parts=min(case.parts, 4), **changes)


DECODES = [case for group in cache_cases.GROUPS.values() for case in group()]
FORWARDS = list(few_queries.forwards())


@pytest.mark.parametrize("case", DECODES[::9], ids=str)
def test_decode(case: CacheCase, planner: caches.CachePlanner):
    small = shrunk(case)
    of = prover(planner, small.shaped())
    of.decode("rooms", small)
    (record,) = of.records
    assert record.failure == "" and record.repeats_bitwise
    assert record.kernels == sorted(of.kernels._sources)
    assert 0.0 <= record.errors["out"][0] < 0.1


@pytest.mark.parametrize("case", FORWARDS[::5], ids=str)
def test_few_queries(case: cases.Case, planner: caches.CachePlanner):
    changes = {"diagonal": 260 - case.q_len} if case.diagonal > 100 else {}
    if case.window_left > 0:
        changes["window_left"] = 90
    small = case.but(kv_len=260, batch=2, **changes)
    of = prover(planner, few_queries.shaped(small))
    of.forward(small)
    assert of.records[0].failure == "" and of.records[0].kernels


@pytest.mark.parametrize("case", list(append_cases.appends())[:-1:3], ids=str)
def test_append(case: AppendCase, planner: caches.CachePlanner):
    of = prover(planner, case.shaped())
    of.append(case)
    assert of.records[0].failure == "" and of.records[0].kernels


@pytest.mark.parametrize(
    "fault", list(controls.disturbed_parameters_of_caches()), ids=lambda f: f[0]
)
def test_every_planted_fault_is_noticed(fault: controls.CacheFault, planner: caches.CachePlanner):
    label, case, disturb = fault
    if isinstance(case, CacheCase):
        case = shrunk(case).but(dtype=torch.float32)
    of = prover(planner, case.shaped())
    of.fault(label, case, disturb)
    assert of.records[0].failure == "" and of.records[0].noticed
    of.fault("nothing", case, lambda params: None)
    assert "the fault went unnoticed" in of.records[1].failure


def test_nan_lies_wherever_nothing_may_be_read():
    case = CacheCase(
        torch.float32, lengths=(0, 20, 40), starts=(0, 17, 8), capacity=48, page_size=16, q_len=2,
        window_left=3, window_right=0,
    )  # fmt: skip
    call = case.call(case.rows())
    assert call.places.table is not None
    assert call.places.table[0].tolist() == [-5, -5, -5]
    assert call.places.table[1, 0] == 1 << 30 and call.places.table[1, 2] == -5
    used = int((~call.k.isnan()).all(-1).any(1).sum())
    assert used == sum(len(case.keys(b)) for b in range(3)) == 3 + 32
    assert call.q[0].isnan().all() and not call.q[1:].isnan().any()


def test_kernels_and_numbers_of_problems(planner: caches.CachePlanner):
    """Every kernel of the archive runs, and those under the sanitizers are among them."""
    compared = [case.shaped() for case in (*DECODES, *append_cases.appends())]
    compared += map(few_queries.shaped, FORWARDS)
    found = caches.kernels_of(planner, compared)
    assert set(found) == set(caches.kernels_of(planner, build.cache_calls()))
    families = {"attention_append", "attention_decode", "attention_decode_merge"}
    assert {kernel.family for kernel in found.values()} == families
    rows = {case.q_len * case.heads[0] // case.heads[1] for case in DECODES}
    assert {1, 16} < rows and max(rows) > 16
    assert {case.page_size for case in DECODES} == {0, *cache_cases.PAGE_SIZES, 256}
    for dtype in cases.DTYPES:
        widths = {case.widths for case in DECODES if case.dtype == dtype}
        assert widths > set(cache_cases.WIDTHS)
        groups = {c.heads[0] // c.heads[1] for c in DECODES if c.dtype == dtype}
        assert {1, 4, 8} < groups


def test_a_variant_of_each_kind_becomes_ptx(planner: caches.CachePlanner):
    calls = list(build.cache_calls())
    found = caches.kernels_of(planner, calls)
    longest = max((n for n in found if "float16" in n and "_d64_" in n), key=len)
    for name in (longest, "attention_decode_merge_float16", "attention_append_uint4"):
        text = ptx.compile(build.source_of(found[name]))
        assert f".entry {name}(" in text.replace(" (", "(")


PARTS = ("bf16", "tf32")


@pytest.mark.parametrize(
    ("dtype", "parts", "of_a_product"), [("bfloat16", "bf16", 1), ("float32", "tf32", 2)]
)
def test_float_products_on_tensor_cores(
    planner: caches.CachePlanner, dtype: str, parts: str, of_a_product: int
):
    """A mode for floats: half operands are there already."""
    work = DecodeWork(dtype, 64, 4096, 1, 1)
    found = caches.kernels_of(planner, [work.shaped()])
    kernel = next(k for k in found.values() if k.family == "attention_decode")
    text = ptx.compile(build.source_of(kernel), split_floats=True)
    products = {name: text.count(f".row.col.f32.{name}.{name}.f32") for name in PARTS}
    # Q K^T and P V of a block of 16 keys
    assert products == dict.fromkeys(PARTS, 0) | {parts: of_a_product * 2 * 2 * 64 // 8}
    assert text.count("shfl.sync") < ptx.compile(build.source_of(kernel)).count("shfl.sync") / 20


def test_two_fragments_of_rows_share_a_product(planner: caches.CachePlanner):
    work = DecodeWork("float16", 64, 4096, 1, 4, q_len=4)
    found = caches.kernels_of(planner, [work.shaped()])
    kernel = next(k for k in found.values() if k.family == "attention_decode")
    of_each, joined = (
        ptx.compile(build.source_of(kernel), join_rows=join_rows) for join_rows in (False, True)
    )
    # Q K^T and P V of a block of 16 keys
    assert of_each.count("mma.sync") == of_each.count("movmatrix") == 2 * 2 * 2 * 64 // 8
    assert joined.count("mma.sync") == joined.count("movmatrix") == 2 * 2 * 64 // 8
    lines = of_each.splitlines()
    assert len(lines) > len(joined.splitlines()) > len(lines) / 2


def product(sums: tuple[int, int], right: int, moves: str = "", left: int = 1) -> str:
    """PTX of a product of halves. Its other registers have the numbers behind those of the sums."""
    first, second = sums
    unused, transposed = f"%f{second + 1},%f{second + 2}", f"%r{second + 3}"
    return (
        "\t// begin inline asm\n"
        f"\tmovmatrix.sync.aligned.m8n8.trans.b16 {transposed}, %r{right};\n"
        f"\t// end inline asm\n{moves}\t// begin inline asm\n"
        "\tmma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        f"{{%f{first},%f{second},{unused}}}, {{%r{left},%r0}}, {{{transposed}}}, "
        f"{{%f{first},%f{second},{unused}}};\n\t// end inline asm\n"
    )


@pytest.mark.parametrize(
    ("upper", "between", "lower", "joined"),
    [
        (product((10, 11), 5), "", product((20, 21), 5, left=2), True),
        (product((10, 11), 5), "\tld.shared.u32 \t%r2, [%rd1+4];\n", product((20, 21), 5), True),
        (product((10, 11), 5), "", product((20, 21), 5, "\tmov.f32 \t%f20, %f9;\n"), True),
        (product((10, 11), 5), "", product((20, 21), 6), False),
        (product((10, 11), 5), "", product((10, 11), 5), False),
        (product((10, 11), 5), "", product((11, 12), 5), False),
        (product((10, 11), 5), "", product((20, 21), 5, "\tmov.f32 \t%f20, %f10;\n"), False),
        (product((10, 11), 5), "", product((20, 21), 5, "\tmov.b32 \t%r1, 0;\n"), False),
        (product((10, 11), 5), "\tld.shared.u32 \t%r1, [%rd1];\n", product((20, 21), 5), False),
        (product((10, 11), 5), "\tadd.rn.f32 \t%f9, %f10, %f10;\n", product((20, 21), 5), False),
        (product((10, 11), 5), "$L__BB0_1:\n", product((20, 21), 5), False),
    ],
    ids=[
        "neighbours", "a word is loaded", "sums begin at zero", "another right operand",
        "the same sums", "a sum in both", "a sum is moved", "a left operand is moved",
        "a left operand is loaded", "something is computed", "a jump may lead there",
    ],
)  # fmt: skip
def test_which_products_share_their_rows(upper: str, between: str, lower: str, joined: bool):
    text = f"first\n{upper}{between}{lower}last\n"
    found = ptx._join_rows(text)
    assert found.startswith("first\n") and found.endswith("last\n")
    if not joined:
        assert found == text
        return
    assert found.count("mma.sync") == found.count("movmatrix") == 1 and between in found
    left = "%r2" if "%r2," in lower else "%r1"
    both = "{%f10,%f11,%f20,%f21}"
    assert f".f16.f16.f32 {both}, {{%r1,{left}}}, {{%r14}}, {both};\n" in found


# ---- PyTorch's kernels --------------------------------------------------------------------------


@has_headers
@pytest.mark.parametrize("kv_len", [300, 1030], ids=["one pass", "two passes"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_peer_agrees_with_float64(dtype: torch.dtype, kv_len: int):
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> torch.Tensor:
        x = torch.randn(2, length, heads, 64, generator=generator)
        return x.to(dtype).transpose(1, 2)

    q, k, v = draw(4, 2), draw(2, kv_len), draw(2, kv_len)
    work = DecodeWork(str(dtype).removeprefix("torch."), 64, kv_len, 2, 2, 2, num_kv_heads=2)
    names = [step.name for step in decode_peer.steps(q, k, v)]
    assert len(names) == 1 + (kv_len > 1000)
    out = torch.full((2, 4, 2, 64), torch.nan, dtype=dtype)
    peers = CpuKernels(dict.fromkeys(names, decode_peer.SOURCE))
    for launch in decode_peer.prepare(peers, q, k, v, out, 0.125):
        launch.start()
    decode_speed.Exact(work, q, k, v).check({"out": out})


@has_headers
def test_peer_names_exist_in_the_header():
    names = {
        step.name
        for dim in decode_peer.HEAD_DIMS
        for dtype in cases.DTYPES
        for kv_len in (500, 5000)
        for step in decode_peer.steps(*[torch.empty(1, 1, kv_len, dim, dtype=dtype)[:, :, -n:]
                                        for n in (1, kv_len, kv_len)])
    }  # fmt: skip
    options = {"include_dirs": [decode_peer.INCLUDE], "only": names}
    assert names == set(engine.compile(decode_peer.SOURCE, **options).names)
    assert torch.__version__ in decode_peer.check_header()


def test_peer_refuses_what_pytorch_would_not_run():
    x = torch.empty(1, 1, 16, 64)
    with pytest.raises(ValueError, match="head_dim must be one of"):
        decode_peer.steps(*[x[..., :40]] * 3)
    with pytest.raises(ValueError, match="q_len must be at most 8; got 9"):
        decode_peer.steps(x[:, :, :9], x, x)
    with pytest.raises(ValueError, match="dense rows"):
        decode_peer.steps(*[torch.empty(1, 1, 64, 4).mT] * 3)
    assert not decode_peer.has_two_passes(1023, True) and decode_peer.has_two_passes(1024, False)


# ---- times --------------------------------------------------------------------------------------


def fake_clock(starts: dict) -> dict[str, list[float]]:
    for start in starts.values():
        start()
    milliseconds = {decode_speed.COPY: 1.0, decode_speed.PEER: 8.0, decode_speed.MERGE: 0.5}
    return {name: [milliseconds.get(name, 2.0)] * 3 for name in starts}


def bench_of(
    planner: caches.CachePlanner, *works: DecodeWork, clock: Callable = fake_clock
) -> decode_speed.Bench:
    found = caches.kernels_of(planner, [work.shaped() for work in works])
    sources = {name: build.source_of(kernel) for name, kernel in found.items()}
    for work in works:
        if work.has_peer:
            for step in decode_peer.steps(*work.operands("meta")):
                sources[step.name] = decode_peer.SOURCE
    of = dict.fromkeys(("native", "tensor-cores"), CpuKernels(sources))
    return decode_speed.Bench(of, planner, clock, "cpu", 4096, parts=(1, 2))


SMALL = DecodeWork("float16", 64, 320, 2, 2, num_kv_heads=2)


@pytest.fixture
def few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_works, "TOTAL", 400_000)


@has_headers
@pytest.mark.parametrize(
    "work",
    [SMALL, dataclasses.replace(SMALL, dtype="bfloat16", q_len=4),
     dataclasses.replace(SMALL, page_size=16)],
    ids=str,
)  # fmt: skip
def test_run(work: DecodeWork, planner: caches.CachePlanner, few_sets: None):
    assert work.kv_bytes == 2 * 2 * 2 * 320 * 64 * 2 and work.copies == 2
    bench = bench_of(planner, work)
    bench.run(work)
    (record,) = bench.records
    assert record.failure == "" and record.parts == bench.plan(work).params.parts
    ours = {decode_speed.OURS, "1 parts"}
    if work.dtype == "bfloat16":
        ours.add("ours, tensor-cores")
    assert ours <= set(record.times)
    # Two sets of operands in 2 ms, and 8192 bytes in one.
    assert record.of_copy[decode_speed.OURS].median == work.kv_bytes / 1.0 / 8192
    assert record.times[decode_speed.MERGE].median == 0.25
    assert record.null is not None and record.null.median == 1.0
    assert (decode_speed.PEER in record.times) == work.has_peer
    if work.has_peer:
        assert record.speedup[decode_speed.OURS].median == 4.0
    assert bench.attributes()["native"]


@has_headers
def test_nothing_is_timed_that_is_wrong(planner: caches.CachePlanner, few_sets: None):
    bench = bench_of(planner, SMALL)
    bench.planted_fault(SMALL)
    bench.caches["native"].disturb = controls.one_key_fewer
    bench.run(dataclasses.replace(SMALL, length=300))
    assert "AssertionError" in bench.records[0].failure and not bench.records[0].times


@has_headers
def test_a_peer_that_is_wrong_is_left_out(
    planner: caches.CachePlanner, few_sets: None, monkeypatch: pytest.MonkeyPatch
):
    bench = bench_of(planner, SMALL)
    prepare = decode_peer.prepare
    monkeypatch.setattr(decode_peer, "prepare", lambda *x: prepare(*x[:-1], 0.2))
    bench.run(SMALL)
    (record,) = bench.records
    assert record.failure == "" and decode_speed.PEER not in record.times
    assert "max error" in record.left_out[decode_speed.PEER] and not record.speedup
    lines = list(decode_report.summary({"records": [dataclasses.asdict(record)]}))
    assert lines[-1].startswith(f"Not timed: PyTorch's in {SMALL}: out: max error")


@has_headers
def test_results_that_change_while_timed_are_noticed(
    planner: caches.CachePlanner, few_sets: None, monkeypatch: pytest.MonkeyPatch
):
    def clock(starts: dict) -> dict[str, list[float]]:
        sides[-1][decode_speed.PEER].results[1]["out"].zero_()
        return fake_clock({name: lambda: None for name in starts})

    bench = bench_of(planner, SMALL, clock=clock)
    sides: list = []
    prepare = bench._sides
    monkeypatch.setattr(bench, "_sides", lambda *x: sides.append(prepare(*x)) or sides[-1])
    bench.run(SMALL)
    assert "the results changed" in bench.records[0].failure


def test_works_are_those_of_the_target():
    found = list(decode_works.works())
    assert len(set(found)) == len(found)
    grid = {(w.length, w.batch, w.group, w.head_dim, w.dtype) for w in found}
    assert len(grid) >= 3 * 2 * 3 * 2 * 2
    assert all(w.copies * w.kv_bytes >= 256 << 20 for w in found)
    assert {w.q_len * w.group for w in found} >= {1, 2, 4, 8, 16}


# ---- report -------------------------------------------------------------------------------------


def canned(group: int, share: float, best: float, speedup: float, **changes: object) -> dict:
    def spread(x: float) -> dict:
        return {"median": x, "p20": x - 0.01, "p80": x + 0.01, "rounds": 7}

    record = decode_speed.Record(
        f"work {group}", "float16", 64, 131072, 1, group, 1, 0, 1 << 28, 128, 256
    )
    shares = {"ours": spread(share), "512 parts": spread(best), "PyTorch's": spread(0.2)}
    times = {"ours": spread(2.0), "merge alone": spread(0.5), "PyTorch's": spread(2.0 * speedup)}
    return {
        **dataclasses.asdict(record), "times": times, "of_copy": shares, "null": spread(1.001),
        "speedup": {"ours": spread(speedup), "512 parts": spread(speedup * best / share)},
        "copied_per_second": 3e12, **changes,
    }  # fmt: skip


def result_of(*records: dict) -> dict:
    sources = {"commit": "abc", "edited": False, "digest": "def"}
    environment = {"gpu": "A GPU", "driver": "1", "torch": "2", "date": "today", "sources": sources}
    sizes = {"registers": 90, "shared_bytes": 1024, "local_bytes": 0}
    return {
        "environment": environment,
        "records": list(records),
        "kernels": {"native": {"one": sizes}},
    }


def test_report():
    result = result_of(
        canned(1, 0.6, 0.9, 1.5),
        canned(8, 0.5, 0.8, 4.0),
        canned(4, 0.5, 0.5, 0.9, failure="AssertionError: no\nmore"),
    )
    text = decode_report.page(result)
    assert "A GPU, driver 1, torch 2, today; commit abc, kernels def" in text
    assert "The copy: 3000 to 3000 GB/s." in text
    assert "plan's parts, 0 of 2 rows with 131072 keys reach 0.85" in text
    assert "best number of parts, 1 of 2 rows with 131072 keys reach 0.85" in text
    assert "groups of 8: 4.00 to 4.00 times as fast as PyTorch's, slower in 0 of 1 rows" in text
    assert "Failed: work 4: AssertionError: no." in text
    row = "| work 1 | 128, 256 | 0.60 (0.59-0.61) |  | 0.90 in 512 | 0.25 | 0.20 | 1.50 (1.49-1.51)"
    assert row in text
    assert "| float16, head dim 64 | 0.60 / 0.90; x1.5 / x2.3 |" in decode_report.short_section(
        result
    )
    assert json.loads(decode_report.json_lines(result)) == result


def test_runs_are_joined():
    first = result_of(canned(1, 0.6, 0.9, 1.5), canned(8, 0.5, 0.8, 4.0))
    later = result_of(canned(8, 0.7, 0.8, 4.0))
    later["environment"]["date"] = "tomorrow"
    later["kernels"] = {"native": {"two": first["kernels"]["native"]["one"]}}
    both = decode_report.join([first, later])
    assert both["records"] == [first["records"][0], later["records"][0]]
    assert set(both["kernels"]["native"]) == {"one", "two"} and "joined" not in first["environment"]
    assert "kernels def; work 8 in a run of its own, tomorrow. Made by" in decode_report.page(both)
    later["environment"]["gpu"] = "Another GPU"
    with pytest.raises(ValueError, match="different kernels or GPUs"):
        decode_report.join([first, later])


def test_docs_are_those_of_the_results():
    stored = decode_speed.RESULTS / "decode.json"
    result = json.loads(stored.read_text())
    assert (decode_speed.RESULTS / "decode.md").read_text() == decode_report.page(result)
    for path, text in decode_report.sections(result).items():
        assert decode_report.in_docs(path) == text
    assert not any(record["failure"] for record in result["records"])


def test_the_stored_proof_passed():
    result = json.loads((decode_speed.RESULTS / "caches.json").read_text())
    records = result["records"]
    assert not any(record["failure"] for record in records)
    said = (
        f"Of the {len(result['kernels'])} kernels for caches and few queries, on an H200, none of"
    )
    assert (
        f"{said} {len(records)} problems failed, with" in (ROOT / "docs" / "proof.md").read_text()
    )
    assert "H200" in result["environment"]["gpu"]
    assert {r["group"] for r in records} >= {
        *cache_cases.GROUPS, "few queries", "appended", "planted fault", "every variant"
    }  # fmt: skip
