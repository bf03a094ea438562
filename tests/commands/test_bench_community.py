"""bench by model and shape, where it does not help, and reports that people send in."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from orchard_ops.__main__ import build_parser, main
from orchard_ops.commands.bench import cases, community, contenders, models, report, results
from orchard_ops.commands.bench import command as bench_command

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "community"
SCHEMA = json.loads((FOLDER / "schema.json").read_text())
REPORTS = sorted(file for file in FOLDER.glob("*") if file.name not in ("schema.json", "README.md"))
TINY = ("--lengths", "16", "24", "--heads", "2/1", "--head-dims", "16", "--seconds", "0.01")
QUICK = ("bench", "--quick", *TINY)


def wrongs(values: object) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(values)]


# ---- the folder


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.name)
def test_a_report_of_the_folder(file: Path):
    """It has the form and comes from a run that ended on a real machine; a median lies between its
    p20 and p80."""
    found = json.loads(file.read_text())
    assert not wrongs(found)
    assert file.suffix == ".json" and found["complete"]
    assert found["machine"]["kind"] != "simulated"
    for case in found["cases"]:
        triples = [one["ms"] for one in case["contenders"] if "ms" in one]
        for median, p20, p80 in (*triples, case.get("sdpa_over_ours", (1, 1, 1))):
            assert p20 <= median <= p80


def test_the_folder_has_a_report():
    assert REPORTS  # or the test above looks at nothing


# ---- what bench --save writes


def test_saved_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "report.json"
    words = (*QUICK, "--device", "cpu", "--output", str(tmp_path / "out"), "--save", str(file))
    assert main([*words, "--cases", "llama-3.2-1b", "gemma-2-2b"]) == 0
    found = json.loads(file.read_text())
    assert not wrongs(found) and found["complete"]
    assert [(c["name"], c["length"], c["mode"]) for c in found["cases"]] == [
        (name, length, mode)
        for name in ("llama-3.2-1b", "gemma-2-2b")
        for length in (16, 24)
        for mode in ("forward", "training")
    ]
    (kept,) = (tmp_path / "out").glob("*.json")
    for row, case in zip(found["cases"], results.read_json(kept).cases, strict=True):
        assert (row["heads"], row["kv_heads"], row["head_dim"]) == (2, 1, 16)
        ratio = case.ratio("sdpa", "orchard_ops")
        assert row["sdpa_over_ours"][0] == pytest.approx(ratio, rel=1e-3)
        for one, figures in zip(row["contenders"], case.figures, strict=True):
            assert one["ms"] == pytest.approx([figures.time_ms(p) for p in (50, 20, 80)], rel=1e-3)
            assert one["peak_bytes"] == figures.peak_bytes
        assert [one["path"] for one in row["contenders"]] == ["reference", "fused"] or (
            row["contenders"][1]["path"] == "unfused"
        )
    printed = " ".join(capsys.readouterr().out.split())
    assert "no Metal kernel runs there" in printed and str(file.name) in printed
    assert "gemma-2-2b is measured without its softcap of 50" in printed
    assert "Where it does not help: " in printed


@pytest.mark.skipif(sys.platform == "darwin", reason="the simulated device")
def test_saved_on_the_simulated_device(tmp_path: Path):
    file = tmp_path / "report.json"
    words = (*QUICK, "--device", "mps", "--output", str(tmp_path), "--save", str(file))
    assert main([*words, "--lengths", "16", "--cases", "whisper-small"]) == 0
    found = json.loads(file.read_text())
    assert not wrongs(found)
    assert found["machine"]["kind"] == "simulated"
    assert {row["contenders"][0]["path"] for row in found["cases"]} == {"Metal"}


def test_a_stopped_run_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """After every case, so that whatever ends the run loses one case at most."""
    measure = bench_command.measure
    file = tmp_path / "report.json"

    def stopped(case, *rest):
        if case.problem.length == 24:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(bench_command, "measure", stopped)
    words = (*QUICK, "--device", "cpu", "--output", str(tmp_path / "out"), "--save", str(file))
    assert main([*words]) == 130
    found = json.loads(file.read_text())
    assert not wrongs(found) and not found["complete"]
    assert [(c["length"], c["mode"]) for c in found["cases"]] == [(16, "forward"), (16, "training")]
    assert f"and in {file}" in " ".join(capsys.readouterr().err.split())


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    words = (*QUICK, "--device", "cpu", "--output", str(tmp_path / "out"))
    assert main([*words, "--save", str(tmp_path / "file" / "report.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))  # nothing was measured


def of_a_mac() -> dict:
    """The report of two cases on a machine as macOS describes it, one of them a failure."""
    machine: dict = {
        "machine": "Apple M2 Pro",
        "model": "Mac14,9",
        "architecture": "arm64",
        "system": "macOS 15.5",
        "cpus": 12,
        "cpu_threads": 8,
        "load_average": 1.5,
        "torch": "2.13.0",
        "python": "3.13.0rc1",
        "orchard_ops": "0.1.0.dev0",
        "native_library": "/Users/somebody/liborchard_ops.dylib is missing",
        "memory_gib": 32,
        "device": "mps",
        "kind": "apple_gpu",
        "description": "Apple GPU of somebody",
        "gpu_cores": 19,
    }
    failed = results.Figures("sdpa", results.FAILED, message="/Users/somebody/model.py is missing")
    fine = results.Figures("orchard_ops", results.MEASURED, "Metal: a", "", 1024, [1.0, 2.0])
    also = results.Figures("sdpa", results.MEASURED, "unfused: b", "", 4096, [2.0, 4.0])
    problem = models.MODELS["llama-3.2-1b"]
    run = results.Results(machine, "2026-11-27", "torch.accelerator.max_memory_allocated")
    of = [cases.Case(problem, mode) for mode in cases.MODES]
    for case, theirs in zip(of, (also, failed)):
        run.cases.append(
            results.CaseResult(problem.series, problem.length, case.mode, [fine, theirs])
        )
    return json.loads(community.to_json(run, of, True))


def test_nothing_personal():
    found = of_a_mac()
    assert not wrongs(found)
    assert "somebody" not in json.dumps(found)
    assert found["machine"]["model"] == "Mac14,9" and found["machine"]["gpu_cores"] == 19
    ours, failed = found["cases"][1]["contenders"]
    assert failed == {"name": "sdpa", "status": "failed"} and ours["ms"][0] == 1.5
    assert found["cases"][0]["sdpa_over_ours"] == [2.0, 2.0, 2.0]
    assert "sdpa_over_ours" not in found["cases"][1]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(user="somebody"),
        lambda r: r["machine"].update(host="somebody.local"),
        lambda r: r["machine"].update(model="Somebody's Mac"),
        lambda r: r["machine"].pop("chip"),
        lambda r: r["machine"].update(system="Linux 6.1.0-somebody"),
        lambda r: r["machine"].update(kind="mps"),
        lambda r: r["cases"].clear(),
        lambda r: r["cases"][0].update(length=0),
        lambda r: r["cases"][0].update(name="/Users/somebody/model"),
        lambda r: r["cases"][0]["contenders"][0].pop("ms"),
        lambda r: r["cases"][0]["contenders"][0].update(ms=[1.0]),
        lambda r: r["cases"][0]["contenders"][0].update(path="Metal: /Users/somebody"),
        lambda r: r["cases"][1]["contenders"][1].update(ms=[1.0, 1.0, 1.0]),
        lambda r: r["cases"][1]["contenders"][1].update(message="no"),
        lambda r: r.update(format="orchard_ops bench 2"),
    ],
)
def test_the_schema_refuses(change):
    right = of_a_mac()
    wrong = copy.deepcopy(right)
    change(wrong)
    assert wrong != right and wrongs(wrong)


# ---- presets and rows


def test_models_have_their_own_lengths():
    args = build_parser().parse_args(["bench", "--cases", "vit-b16", "gpt", "llama-3.2-1b"])
    chosen = [str(case) for case in cases.chosen(args, "apple_gpu") if case.mode == "forward"]
    assert chosen[0] == "vit-b16: B1 H12 D64 full float16 L197 forward"
    assert chosen[-1] == "llama-3.2-1b: B1 H32/8 D64 causal float16 L4096 forward"
    assert len(chosen) == 1 + 5 + 1
    assert set(models.LEAVES_OUT) <= set(models.MODELS) <= set(cases.PRESETS)
    for name, model in models.MODELS.items():
        assert name == model.name and model.num_heads % model.num_kv_heads == 0


@pytest.mark.parametrize(
    ("sdpa", "words"),
    [
        ([2.0, 2.0, 2.0, 2.0, 2.0], ""),
        ([1.1, 1.1, 1.1, 1.1, 1.1], ""),
        ([1.0, 1.0, 1.0, 1.0, 1.0], "as fast as SDPA (1.00)"),
        ([0.5, 0.5, 0.5, 0.5, 0.5], "SDPA is faster: 0.50 of our time"),
        ([0.9, 0.9, 2.0, 2.0, 2.0], "SDPA takes 2.00 of our time, but 0.90 in a fifth"),
    ],
)
def test_where_it_does_not_help(sdpa: list[float], words: str):
    ours = results.Figures(contenders.OURS, results.MEASURED, samples_ms=[1.0] * 5)
    theirs = results.Figures(contenders.SDPA, results.MEASURED, samples_ms=sdpa)
    found = report.does_not_help(results.CaseResult("s", 64, "forward", [ours, theirs]))
    assert found.startswith(words) and bool(found) == bool(words)
