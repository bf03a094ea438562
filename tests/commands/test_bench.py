"""python -m orchard_ops bench: the gate comes first, the figures are the samples', plots repeat."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orchard_ops.__main__ import build_parser, main
from orchard_ops.commands import bench, machine
from orchard_ops.commands.bench import (
    cases,
    contenders,
    gate,
    memory,
    plot,
    results,
    timing,
)
from orchard_ops.testing import math_attention

COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "bench"
TINY = ("--lengths", "16", "48", "--heads", "2/1", "--head-dims", "16", "--seconds", "0.01")


def run(folder: Path, *arguments: str) -> tuple[int, dict, list[dict]]:
    status = main(["bench", "--quick", "--output", str(folder), *TINY, *arguments])
    (json_file,), (csv_file,) = folder.glob("*.json"), folder.glob("*.csv")
    with csv_file.open(newline="") as file:
        return status, json.loads(json_file.read_text()), list(csv.DictReader(file))


def test_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, report, rows = run(tmp_path, "--device", "cpu", "--against", "sdpa", "sdpa-math")
    assert status == 0
    assert report["machine"]["machine"] == machine.chip() != ""
    assert report["machine"]["torch"] == torch.__version__
    assert [(c["length"], c["mode"]) for c in report["cases"]] == [
        (16, "forward"),
        (16, "training"),
        (48, "forward"),
        (48, "training"),
    ]
    assert len(rows) == 4 * 3
    by_row = iter(rows)
    for case in report["cases"]:
        assert case["series"] == "gpt: B1 H2/1 D16 causal float32"
        assert [f["contender"] for f in case["figures"]] == ["orchard_ops", "sdpa", "sdpa-math"]
        assert len({len(f["samples_ms"]) for f in case["figures"]}) == 1  # they took turns
        for figures in case["figures"]:
            assert figures["status"] == "measured" and len(figures["samples_ms"]) >= 3
            row = next(by_row)
            ordered = sorted(figures["samples_ms"])
            assert ordered[0] <= float(row["p20_ms"]) <= float(row["median_ms"])
            assert float(row["median_ms"]) <= float(row["p80_ms"]) <= ordered[-1]
            assert float(row["median_ms"]) == pytest.approx(
                torch.tensor(ordered, dtype=torch.float64).quantile(0.5).item(), rel=1e-4
            )
            assert int(row["peak_bytes"]) == figures["peak_bytes"] > 0
            assert row["contender"] == figures["contender"]
            assert (row["machine"], row["length"]) == (machine.chip(), str(case["length"]))
        ours, sdpa, math = case["figures"]
        assert ours["path"].startswith("reference: the tensors are on cpu")
        assert sdpa["path"].startswith("fused: PyTorch's flash attention for the CPU")
        assert math["path"].startswith("unfused")
    printed = " ".join(capsys.readouterr().out.split())
    assert "no Metal kernel runs there" in printed and "4/4: gpt" in printed


@pytest.mark.skipif(sys.platform == "darwin", reason="the path of the simulated device")
def test_simulated_device(tmp_path: Path, fresh_stats: None):
    status, report, _ = run(tmp_path, "--device", "mps", "--lengths", "40")
    assert status == 0
    assert report["machine"]["kind"] == "simulated"
    assert report["memory_method"] == "torch.accelerator.max_memory_allocated"
    assert [f.name for f in tmp_path.glob("*simulated.svg")]
    forward, training = (case["figures"] for case in report["cases"])
    assert forward[0]["path"].startswith("Metal: attention_forward_float16_d16")
    assert "backward" in training[0]["path"] and "backward" not in forward[0]["path"]
    assert "_scaled_dot_product_attention_math_for_mps" in forward[1]["path"]
    assert training[1]["path"].startswith("unfused")
    # out, dq and dk, dv in half precision; two statistics of each row, and delta
    assert forward[0]["peak_bytes"] == 2 * (2 * 40 * 16) + 4 * (2 * 2 * 40)
    assert training[0]["peak_bytes"] == 2 * (6 * 40 * 16) + 4 * (3 * 2 * 40)


@pytest.mark.skipif(sys.platform == "darwin", reason="the simulated device's faults")
def test_a_corrupted_kernel_has_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import simulator

    with simulator.faults(corrupt_dispatch=1):
        status, report, rows = run(tmp_path, "--device", "mps", "--lengths", "16")
    assert status == 1
    wrong, right = report["cases"]
    (figures,) = wrong["figures"]  # the others are not measured either
    assert figures["status"] == "wrong result" and "out: " in figures["message"]
    assert figures["samples_ms"] == [] and figures["peak_bytes"] is None
    assert rows[0]["status"] == "wrong result" and rows[0]["median_ms"] == ""
    assert all(f["status"] == "measured" for f in right["figures"])
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "FAILED orchard_ops: wrong result (gpt: B1 H2/1 D16 causal float16 L16 forward)" in printed
    )


def test_every_contender_is_plotted_in_its_own_way(tmp_path: Path):
    names = ["orchard_ops", "sdpa", *(f"tile {i}" for i in range(36))]
    styles = [style for _, *style in plot._styles(names)]
    assert [color for color, _ in styles[:4]] == list(plot._COLORS)
    assert len(styles) == len(names) == len({str(style) for style in styles})
    figures = [results.Figures(name, "measured", "", "", 1024, [1.0]) for name in names]
    found = results.Results(
        {"machine": "m", "kind": "cpu", "cpu_threads": 1, "system": "s", "torch": "t"},
        "",
        "",
        [results.CaseResult("one", 64, "forward", figures)],
    )
    svg = plot.save(found, tmp_path / "many")[1].read_text()
    assert all(f"<!-- {name} -->" in svg for name in names)


@pytest.mark.parametrize("index", range(4))
def test_gate_sees_each_result(index: int):
    """A hundredth of one value in out, dq, dk or dv."""
    case = cases.Case(
        cases.Problem("one", 2, 1, 16, "causal", dtype="float32", length=40), "training"
    )
    contender = contenders.CONTENDERS[contenders.OURS]
    found = list(contender.call(cases.operands(case.problem), case))
    gate.check(tuple(found), case)
    found[index] = found[index].clone()
    found[index].view(-1)[17] += 0.01
    with pytest.raises(AssertionError, match=("out", "dq", "dk", "dv")[index]):
        gate.check(tuple(found), case)


@pytest.mark.parametrize("mask", cases.MASKS)
def test_gate_by_blocks_is_the_mathematics(mask: str, monkeypatch: pytest.MonkeyPatch):
    problem = cases.Problem("one", 4, 2, 16, mask, batch=2, dtype="float16", length=45)
    monkeypatch.setattr(gate, "_BLOCK_ELEMENTS", 2 * 45 * 7)  # blocks of seven rows
    for compute, dtype in ((torch.float64, torch.float64), (torch.float32, torch.float16)):
        blocks = gate._math_by_blocks(problem, compute, dtype)
        whole = math_attention(
            *cases.operands(problem), dtype=dtype, window_right=0 if problem.is_causal else -1
        )
        tolerance = (
            {"rtol": 1e-12, "atol": 1e-12}
            if dtype == torch.float64
            else {"rtol": 1e-3, "atol": 1e-3}
        )
        for name in ("out", "dq", "dk", "dv", "lse"):
            x, y = getattr(blocks, name), getattr(whole, name)
            torch.testing.assert_close(x.to(y.dtype), y, **tolerance)
        for name in gate._SIZES:  # the tolerance is never wider
            assert 0 < getattr(blocks, name) <= getattr(whole, name) * (1 + 1e-6)


def _with_sdpa(monkeypatch: pytest.MonkeyPatch, attention) -> None:
    contender = contenders.Contender(contenders.SDPA, attention)
    monkeypatch.setitem(contenders.CONTENDERS, contenders.SDPA, contender)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no more"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 bytes ...)"),
        RuntimeError("Invalid buffer size: 16.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
            "allocate memory: you tried to allocate 1 bytes."
        ),
    ],
)
def test_out_of_memory_of_sdpa_is_a_result(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        if q.shape[2] > 16:
            raise error
        return contenders._sdpa(q, k, v, is_causal)

    _with_sdpa(monkeypatch, attention)
    status, report, rows = run(tmp_path, "--device", "cpu", "--modes", "training")
    assert status == 0
    (_, short), (ours, long) = (case["figures"] for case in report["cases"])
    assert short["status"] == ours["status"] == "measured" and ours["samples_ms"]
    assert long["status"] == "out of memory" and long["samples_ms"] == []
    assert long["message"] == str(error).split("\n")[0]
    assert rows[3]["status"] == "out of memory"
    (svg,) = tmp_path.glob("*.svg")
    assert svg.stat().st_size > 1000


def test_out_of_memory_while_timing_leaves_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = 0

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise torch.OutOfMemoryError("no more")
        return contenders._sdpa(q, k, v, is_causal)

    _with_sdpa(monkeypatch, attention)
    arguments = ("--device", "cpu", "--lengths", "16", "--modes", "forward")
    status, report, _ = run(tmp_path, *arguments)
    assert status == 0
    ours, sdpa = report["cases"][0]["figures"]
    assert ours["status"] == "measured" and ours["samples_ms"]
    assert sdpa["status"] == "out of memory"
    assert sdpa["samples_ms"] == [] and sdpa["peak_bytes"] is None


def test_any_other_error_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def attention(*_: object) -> Tensor:
        raise RuntimeError("nonsense")

    _with_sdpa(monkeypatch, attention)
    status, report, _ = run(tmp_path, "--device", "cpu", "--lengths", "16", "--modes", "forward")
    assert status == 1
    assert report["cases"][0]["figures"][1]["status"] == "failed"


def test_plots_again_from_json(tmp_path: Path):
    run(tmp_path, "--device", "cpu", "--lengths", "16")
    (json_file,) = tmp_path.glob("*.json")
    again = tmp_path / "again"
    assert main(["bench", "--plot", str(json_file), "--output", str(again)]) == 0
    for ending in results.PLOT_FORMATS:
        (first,), (second,) = tmp_path.glob(f"*.{ending}"), again.glob(f"*.{ending}")
        assert first.name == second.name and first.stat().st_size > 1000
    text = (again / f"{json_file.stem}.svg").read_text()
    assert "<svg" in text
    # Nothing but the file decides: reading and writing it changes nothing.
    assert results.to_json(results.read_json(json_file)) == json_file.read_text()


@pytest.mark.parametrize("file", sorted(COMMITTED.glob("*.json")), ids=lambda file: file.stem)
def test_committed_results(file: Path):
    """A committed run was measured throughout, its table is that of the JSON, and there is a
    picture."""
    committed = results.read_json(file)
    assert committed.all_right() and committed.cases
    assert file.stem == machine.slug(committed.machine)
    assert results.to_csv(committed) == file.with_suffix(".csv").read_text()
    assert file.with_suffix(".png").exists()


@pytest.mark.parametrize("mode", cases.MODES)
def test_committed_memory_is_this_reference(mode: str):
    """Bytes do not depend on the machine's load. If they differ here, `bench` has to run again."""
    committed = results.read_json(COMMITTED / "intel-r-xeon-r-processor-cpu.json")
    if committed.machine["torch"] != torch.__version__:
        pytest.skip(f"the operators of torch {committed.machine['torch']} were measured")
    problem = replace(cases.PRESETS["gpt"], dtype="float32", length=512)
    (found,) = (
        c
        for c in committed.cases
        if (c.series, c.length, c.mode) == (problem.series, problem.length, mode)
    )
    case = cases.Case(problem, mode)
    for name in (contenders.OURS, contenders.SDPA_MATH):
        call = partial(contenders.CONTENDERS[name].call, cases.operands(problem), case)
        assert memory.peak_bytes(call, torch.device("cpu")) == found.of(name).peak_bytes, name


def test_plot_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, text in (("a.json", "{}"), ("b.json", "no JSON"), ("c.json", '{"format": 9}')):
        (tmp_path / name).write_text(text)
        assert main(["bench", "--plot", str(tmp_path / name)]) == 2
        assert "is not a result of" in " ".join(capsys.readouterr().err.split())
    assert main(["bench", "--plot", str(tmp_path / "missing.json")]) == 2


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delitem(sys.modules, "orchard_ops.commands.bench.plot")
    monkeypatch.delattr(bench, "plot")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, report, _ = run(tmp_path, "--device", "cpu", "--lengths", "16")
    assert status == 0 and report["cases"]
    assert not list(tmp_path.glob("*.svg"))
    assert "they need matplotlib" in " ".join(capsys.readouterr().out.split())
    (json_file,) = tmp_path.glob("*.json")
    assert main(["bench", "--plot", str(json_file)]) == 2


def test_turns_are_taken():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    schedule = timing.Schedule(seconds=1e-9, min_rounds=4, warm_up=1, sample_seconds=0.0)
    samples = timing.interleaved(calls, torch.device("cpu"), schedule)
    assert "".join(order) == "aabb" + "ab" * 4  # warm-up and the count of calls come first
    assert [len(s) for s in samples.values()] == [4, 4]


def test_peak_memory_on_the_cpu():
    def call() -> Tensor:
        torch.empty(1 << 20, dtype=torch.uint8)  # freed before the next
        x = torch.empty(1 << 19, dtype=torch.uint8)
        return torch.cat((x, x))

    assert memory.peak_bytes(call, torch.device("cpu")) == (1 << 19) + (1 << 20)


@pytest.mark.skipif(sys.platform == "darwin", reason="counts the simulated device's bytes")
def test_peak_memory_where_the_allocator_remembers_none(monkeypatch: pytest.MonkeyPatch):
    """The simulated driver's memory is its peak, as if all that was freed were cached."""
    import simulator

    def call() -> Tensor:
        x = torch.empty(1 << 20, dtype=torch.uint8, device="mps")
        return x[:16] + 1

    device = torch.device("mps")
    assert memory.peak_bytes(call, device) == (1 << 20) + 16
    monkeypatch.setattr(memory, "_has_peak", lambda: False)
    simulator.reset_peak()
    assert memory.peak_bytes(call, device) == (1 << 20) + 16
    assert "driver_allocated_memory" in memory.method(device)


def test_cases_of_a_command_line():
    def chosen(*arguments: str, kind: str = "apple_gpu") -> list[cases.Case]:
        return cases.chosen(build_parser().parse_args(["bench", *arguments]), kind)

    assert len(chosen()) == (3 * 5 + 3) * 2  # the short ones have lengths of their own
    assert {c.problem.dtype for c in chosen()} == {"float16"}
    assert {c.problem.dtype for c in chosen(kind="cpu")} == {"float32"}
    quick = chosen("--quick")
    assert [str(c) for c in quick] == [
        f"gpt: B1 H12 D64 causal float16 L{length} {mode}"
        for length in (512, 1024)
        for mode in ("forward", "training")
    ]
    words = (
        "--cases vit llama --heads 8/2 --head-dims 80 --masks causal --dtypes bfloat16 "
        "--lengths 100 --modes forward --batch 3"
    )
    case = chosen(*words.split())[0]
    assert str(case) == "vit: B3 H8/2 D80 causal bfloat16 L100 forward"
    assert {c.mode for c in chosen("--tiles")} == {"forward"}
    assert {c.mode for c in chosen("--scratch", "0")} == {"training"}
    assert {c.mode for c in chosen("--tiles", "--scratch", "0")} == {"forward", "training"}
    assert {c.mode for c in chosen("--tiles", "a", "--modes", *cases.MODES)} == set(cases.MODES)
    for wrong in ("7/2", "0", "x", "4/0"):
        with pytest.raises(SystemExit):
            chosen("--heads", wrong)


def test_machine_names():
    apple = {
        "machine": "Apple M2 Pro",
        "device": "mps",
        "kind": "apple_gpu",
        "gpu_cores": 19,
        "system": "macOS 15.5",
        "torch": "2.13.0",
        "cpu_threads": 8,
        "load_average": 1.5,
    }
    assert machine.slug(apple) == "apple-m2-pro-mps"
    assert machine.where(apple) == "Apple M2 Pro (GPU of 19 cores), macOS 15.5, torch 2.13.0"
    assert "SIMULATED" in machine.where(apple | {"kind": "simulated"})
    on_cpu = machine.where(apple | {"kind": "cpu"})
    assert "(CPU, 8 threads; no Metal kernel runs there)" in on_cpu
