"""python -m orchard_ops plan: its figures are the formulas', and the longest length is the longest.

tests/attention/test_training_memory.py holds the formulas to the allocator's bytes.
"""

from __future__ import annotations

import functools
import json

import pytest

from orchard_ops import gpu
from orchard_ops.__main__ import main
from orchard_ops.commands import machine, plan_length
from orchard_ops.training_memory import AttentionLayer, TrainingStep

MODEL = ["--layers", "4", "--heads", "8/2", "--head-dim", "64", "--dtype", "float16"]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["plan", *MODEL, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def default_scratch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ORCHARD_BACKWARD_SCRATCH_MB", raising=False)


@pytest.mark.parametrize("arguments", ((), ("--batch", "3"), ("--full",), ("--checkpoint",)))
def test_the_longest_fits_and_a_longer_one_does_not(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    found = plan(capsys, "--ram", "8", "--reserved", "3", *arguments)
    batch = 3 if "--batch" in arguments else 1
    layer = AttentionLayer(8, 2, 64, "float16", batch, "--full" not in arguments)
    step = TrainingStep(layer, 4, "--checkpoint" in arguments)
    ours = functools.partial(step.ours, scratch_mb=260)  # of a machine of 8 GiB
    for name, peak in (("orchard_ops", ours), ("sdpa", step.stock)):
        longest = found["longest"][name]
        assert longest % 64 == 0 and longest > 0
        assert peak(longest) <= 5 << 30 < peak(longest + 64)
        for row in found["lengths"]:
            assert row[name] == peak(row["length"])
    assert found["longest"]["orchard_ops"] > 5 * found["longest"]["sdpa"]


def test_the_text_has_the_figures_of_the_data(capsys: pytest.CaptureFixture[str]):
    arguments = ("--ram", "8", "--lengths", "1024", "65536")
    found = plan(capsys, *arguments)
    assert main(["plan", *MODEL, *arguments]) == 0
    said = capsys.readouterr().out
    for row in found["lengths"]:
        (line,) = (x for x in said.splitlines() if x.split()[:1] == [str(row["length"])])
        assert plan_length.size(row["orchard_ops"]) in line
        assert plan_length.size(row["sdpa"]) in line
        assert line.endswith("*") == (row["sdpa"] > 8 << 30)
    longest = found["longest"]
    assert f"{longest['orchard_ops']} with orchard_ops, {longest['sdpa']} with F.scaled" in said


def test_the_rest_of_the_model_takes_its_part(capsys: pytest.CaptureFixture[str]):
    alone, beside = (plan(capsys, "--ram", "8", "--rest-per-token", n) for n in ("0", "5000"))
    for one, other in zip(alone["lengths"], beside["lengths"], strict=True):
        for name in ("orchard_ops", "sdpa"):
            assert other[name] - one[name] == 5000 * 4 * one["length"]
    assert beside["longest"]["orchard_ops"] < alone["longest"]["orchard_ops"]


def test_scratch_is_the_argument_the_variable_or_the_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    budgets = {n: plan(capsys, "--ram", str(n))["scratch_mb"] for n in (8, 16, 24, 36, 64, 192)}
    assert budgets == {8: 260, 16: 325, 24: 520, 36: 845, 64: 1560, 192: 4160}
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "7")
    assert plan(capsys, "--ram", "8")["scratch_mb"] == 7
    assert plan(capsys, "--ram", "8", "--scratch", "0")["scratch_mb"] == 0
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "much")
    assert main(["plan", *MODEL, "--ram", "8"]) == 2
    assert (
        "must be a whole number of MiB, from 0 to below 2^40; got 'much'" in capsys.readouterr().err
    )


def test_memory_is_the_machine_s_unless_it_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan_length.gpu, "here", lambda: gpu.Gpu(8, 0))
    found = plan(capsys)
    assert (found["memory_bytes"], found["memory_source"]) == (
        machine.memory_bytes(),
        "of this machine",
    )
    assert found["memory_bytes"] > 1 << 30
    monkeypatch.setattr(machine, "memory_bytes", lambda: 0)
    assert main(["plan", *MODEL]) == 2
    assert "give it with --ram" in capsys.readouterr().err
    monkeypatch.setattr(plan_length.gpu, "here", lambda: gpu.Gpu(8, 17 << 30))
    found = plan(capsys)
    assert found["memory_bytes"] == 17 << 30 and "Metal recommends" in found["memory_source"]
    assert found["scratch_mb"] == 520


def test_nothing_left_is_said(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *MODEL, "--ram", "8", "--reserved", "8"]) == 2
    assert "plan: --reserved leaves nothing: 8.0 GiB of 8.0 GiB" in capsys.readouterr().err


def test_a_memory_in_which_nothing_fits(capsys: pytest.CaptureFixture[str]):
    found = plan(capsys, "--ram", "0.0001")
    assert found["longest"] == {"orchard_ops": 0, "sdpa": 0}


@pytest.mark.parametrize(
    ("option", "value"),
    (
        ("--layers", "0"),
        ("--heads", "8/3"),
        ("--ram", "-1"),
        ("--ram", "nan"),
        ("--reserved", "inf"),
        ("--rest-per-token", "-1"),
        ("--dtype", "float64"),
    ),
)
def test_values_that_cannot_be(option: str, value: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *MODEL, f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: invalid" in capsys.readouterr().err


def test_heads_wider_than_any_kernel_have_no_plan(capsys: pytest.CaptureFixture[str]):
    wide = ["--layers", "12", "--heads", "12", "--head-dim", "512", "--ram", "16"]
    assert main(["plan", *wide]) == 2
    assert "no Metal kernel has a head_dim above 256; got 512" in capsys.readouterr().err
