"""python -m orchard_ops selftest."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from orchard_ops import native
from orchard_ops.__main__ import main
from orchard_ops.commands import selftest
from orchard_ops.testing import DTYPES, Case


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "report.json"
    status = main(["selftest", "--quick", "--report", str(path), *arguments])
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_quick_run_passes(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, report = run(tmp_path, "--device", device)
    assert status == 0
    assert report["verdict"] == "all 9 variants agree with float64, forward and backward"
    assert "all 9 variants agree" in capsys.readouterr().out
    expected = {"flash_attn_fwd": 18, "flash_attn_bwd": 18}  # twice each
    assert report["metal_calls"] == (expected if device == "mps" else dict.fromkeys(expected, 0))
    assert report["environment"]["torch"] == torch.__version__


def test_every_variant_is_covered():
    head_dims = torch.ops.orchard.kernel_head_dims()
    storing = [d for d in head_dims if d >= 64]  # run without scratch as well
    both = len(head_dims) + len(storing)
    in_turns, divided = 3 * 2, 3 * 2 * len(head_dims)
    assert len(list(selftest.variants(quick=False))) == both * 3 * 2 * 2 + in_turns + divided
    assert {v.case.head_dim for v in selftest.variants(quick=False)} == set(head_dims)


def test_without_kernels_a_few_widths_are_run(monkeypatch: pytest.MonkeyPatch):
    """The reference has no code of its own for a width."""
    monkeypatch.setattr(native, "why_not", lambda: "the native library is missing")
    found = list(selftest.variants(quick=False))
    assert {v.case.head_dim for v in found} == {16, 64, 256}
    assert {(v.case.dtype, v.chunks, v.case.dropout_p > 0.0) for v in found} == set(
        itertools.product(DTYPES, (True, False), (True, False))
    )


def test_heads_and_keys_take_turns():
    """There is one pair of kernels for each of two heads, and for each of two parts of the keys."""
    import simulator

    cases = [v for v in selftest.variants(quick=True) if v.way.endswith("in turn")]
    for variant, parts in zip(cases, ((512, 512), (1728, 1672)), strict=True):
        with simulator.recording() as launches:
            assert selftest.check(variant, torch.device("mps"), "metal").passed
        groups = [x.threads[1] for x in launches if "dkv" in x.kernel]
        assert groups == [-(-keys // 32) for keys in parts * 2]


def test_keys_and_heads_are_divided():
    import simulator

    (variant,) = [v for v in selftest.variants(quick=True) if v.way == "divided"]
    with simulator.recording() as launches:
        assert selftest.check(variant, torch.device("mps"), "metal").passed
    kernels = " ".join(x.kernel for x in launches)
    assert "forward_merge" in kernels and "dkv_sums" in kernels


def test_wrong_results_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Kernels that see another diagonal than the float64 mathematics must not pass."""
    real = Case.math
    monkeypatch.setattr(
        Case, "math", lambda case, *a: real(case.but(diagonal=case.diagonal + 1), *a)
    )
    status, report = run(tmp_path, "--device", "mps")
    assert status == 1
    assert report["verdict"] == "9 of 9 variants are wrong"
    assert "out: max error" in report["outcomes"][0]["message"]


def test_failing_kernels_fail_instead_of_falling_back(tmp_path: Path):
    import simulator

    with simulator.faults(dispatch=1):
        status, report = run(tmp_path, "--device", "mps")
    assert status == 1 and report["verdict"] == "1 of 9 variants are wrong"
    assert "the dispatch failed" in report["outcomes"][0]["message"]
