"""python -m orchard_ops selftest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_kernels import HEAD_DIMS

from orchard_ops import selftest
from orchard_ops.__main__ import main


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "report.json"
    status = main(["selftest", "--quick", "--report", str(path), *arguments])
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_quick_run_passes(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, report = run(tmp_path, "--device", device)
    assert status == 0
    assert report["verdict"] == "all 6 variants agree with float64, forward and backward"
    assert "all 6 variants agree" in capsys.readouterr().out
    expected = {"flash_attn_fwd": 12, "flash_attn_bwd": 12}  # twice each
    assert report["metal_calls"] == (expected if device == "mps" else dict.fromkeys(expected, 0))
    assert report["environment"]["torch"] == torch.__version__


def test_every_variant_is_covered():
    assert selftest.HEAD_DIMS == HEAD_DIMS
    storing = [d for d in HEAD_DIMS if d >= 64]  # run without scratch as well
    both = len(HEAD_DIMS) + len(storing)
    assert len(list(selftest.variants(quick=False))) == both * 3 * 2 * 2


def test_wrong_results_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Kernels that see another diagonal than the float64 mathematics must not pass."""
    real = selftest.math_attention
    monkeypatch.setattr(
        selftest,
        "math_attention",
        lambda *a, **k: real(*a, **(k | {"diagonal": k["diagonal"] + 1})),
    )
    status, report = run(tmp_path, "--device", "mps")
    assert status == 1
    assert report["verdict"] == "6 of 6 variants are wrong"
    assert "out: max error" in report["outcomes"][0]["message"]


def test_failing_kernels_fail_instead_of_falling_back(tmp_path: Path):
    import simulator

    with simulator.faults(dispatch=1):
        status, report = run(tmp_path, "--device", "mps")
    assert status == 1 and report["verdict"] == "1 of 6 variants are wrong"
    assert "the dispatch failed" in report["outcomes"][0]["message"]
