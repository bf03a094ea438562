"""bench --tiles and --scratch run our kernels in other ways, each measured beside the default."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from test_bench import TINY, run
from torch import Tensor

from orchard_ops.__main__ import main
from orchard_ops.commands.bench import (
    cases,
    command,
    contenders,
    report,
    results,
    timing,
    variants,
)
from orchard_ops.commands.place import find_place

simulated = pytest.mark.skipif(sys.platform == "darwin", reason="the simulated device's launches")
ONE = ("--device", "mps", "--lengths", "16")


@simulated
def test_tiles_take_turns_with_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import simulator

    monkeypatch.setenv("ORCHARD_TILES", "")  # for the op itself; put back afterwards
    with simulator.recording() as launches:
        status, found, rows = run(
            tmp_path, *ONE, "--head-dims", "64", "--tiles", "r1_k8_b?", "r1_k32_b2"
        )
    assert status == 0 and os.environ["ORCHARD_TILES"] == ""
    (case,) = found["cases"]
    assert case["mode"] == "forward"
    names = [f["contender"] for f in case["figures"]]
    assert names == ["orchard_ops", "sdpa", "tile r1_k8_b0", "tile r1_k8_b1", "tile r1_k8_b2"]
    assert [row["contender"] for row in rows] == names
    assert all(f["status"] == "measured" for f in case["figures"])
    assert len({len(f["samples_ms"]) for f in case["figures"]}) == 1

    stem = "attention_forward_float16_d64_"
    tiles = ["r1_k32_b2", "r1_k8_b0", "r1_k8_b1", "r1_k8_b2"]
    kernels = [f"{stem}{tile}_chunks" for tile in tiles]
    ran = [launch.kernel for launch in launches if launch.kernel.startswith(stem)]
    assert list(dict.fromkeys(ran)) == kernels
    # The last round: each contender's samples, in turn, and the same number of rounds before.
    ours = [f for f in case["figures"] if f["contender"] != "sdpa"]
    for figures, kernel in zip(ours, kernels):
        assert figures["path"] == f"Metal: {kernel}"
        assert ran.count(kernel) >= 3 + 2 + len(figures["samples_ms"])
    in_turn = [a for a, b in zip(ran, [*ran[1:], ""]) if a != b]
    assert in_turn[-4:] == kernels and in_turn.count(kernels[0]) > len(ours[0]["samples_ms"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "of the default's time (p20" in printed


@simulated
def test_a_wrong_tile_has_no_figure_and_the_others_do(tmp_path: Path):
    """The fourth dispatch is the first of that tile: the op has a gate, a path and a peak."""
    import simulator

    arguments = (*ONE, "--tiles", "r1_k8_b0", "r1_k8_b1")
    with simulator.faults(corrupt_dispatch=4):
        status, found, _ = run(tmp_path, *arguments)
    assert status == 1
    ours, sdpa, wrong, right = found["cases"][0]["figures"]
    assert wrong["contender"] == "tile r1_k8_b0" and wrong["status"] == "wrong result"
    assert "out: " in wrong["message"] and wrong["samples_ms"] == []
    assert all(f["status"] == "measured" and f["samples_ms"] for f in (ours, sdpa, right))


@simulated
def test_a_tile_that_fails_does_not_fall_back(tmp_path: Path, fresh_stats: None):
    import simulator

    with simulator.faults(dispatch=4):
        status, found, _ = run(tmp_path, *ONE, "--tiles", "r1_k8_b0")
    assert status == 1
    _, _, failed = found["cases"][0]["figures"]
    assert failed["status"] == "failed" and "the dispatch failed" in failed["message"]


@simulated
def test_every_other_tile_of_the_plan():
    place = find_place("mps")
    problem = cases.Problem("one", 2, 1, 64, "causal", dtype="float16", length=16)
    forward, training = (cases.Case(problem, mode) for mode in cases.MODES)
    further = variants.of_cases([forward, training], [], [0, 7, 0], place)
    names = [c.name for c in further[forward]]
    assert len(names) == len(set(names)) == 2 * 2 * 3 * 3 - 1  # all but the default
    assert "tile r1_k32_b2" not in names and "tile r1_k32_b2_float" in names
    assert [c.name for c in further[training]] == ["scratch 0 MiB", "scratch 7 MiB"]
    assert variants.of_cases([forward], None, None, place) == {forward: []}


@simulated
def test_scratch_budgets_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import simulator

    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "3")
    with simulator.recording() as launches:
        status, found, _ = run(
            tmp_path, *ONE, "--lengths", "40", "--head-dims", "64", "--scratch", "0", "256"
        )
    assert status == 0 and os.environ["ORCHARD_BACKWARD_SCRATCH_MB"] == "3"
    (case,) = found["cases"]
    assert case["mode"] == "training"
    ours, _, low, high = case["figures"]
    assert (low["contender"], high["contender"]) == ("scratch 0 MiB", "scratch 256 MiB")
    assert low["peak_bytes"] == 2 * (6 * 40 * 64) + 4 * (3 * 2 * 40)
    assert ours["peak_bytes"] == high["peak_bytes"] == low["peak_bytes"] + 4 * (2 * 40 * 40)
    assert "attention_backward_dq_float16" in low["path"]
    assert "dq_from_ds" not in low["path"] and "dq_from_ds" in high["path"]
    ran = [launch.kernel for launch in launches]
    for family, contenders_of in (("dq_float16", 1), ("dq_from_ds", 2)):
        count = sum(f"attention_backward_{family}" in kernel for kernel in ran)
        assert count >= contenders_of * (3 + 2 + len(low["samples_ms"]))


@pytest.mark.parametrize("arguments", (("--tiles",), ("--scratch", "0")), ids=("tiles", "scratch"))
def test_no_kernels_to_choose_from(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def said(device: str) -> str:
        command = ["bench", "--quick", "--device", device, "--output", str(tmp_path), *arguments]
        assert main(command) == 2
        return " ".join(capsys.readouterr().err.split())

    message = f"bench: {arguments[0]}: no Metal kernels to choose from here: "
    assert said("cpu") == f"{message}this runs on cpu"
    monkeypatch.setattr(variants.native, "why_not", lambda: "the native library is missing")
    assert said("mps") == f"{message}the native library is missing"
    assert not list(tmp_path.iterdir())


def test_tiles_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def said(*arguments: str) -> str:
        command = ["bench", "--output", str(tmp_path), *TINY, "--device", "mps", *arguments]
        assert main(command) == 2
        return " ".join(capsys.readouterr().err.split())

    unknown = said("--tiles", "r1_k8_b*", "r9*")
    assert "no tile is called r9*; there are r1_k8_b0, r1_k8_b1," in unknown
    assert "the Metal kernels cannot run it: head_dim" in said("--tiles", "--head-dims", "300")
    assert "--tiles is about forward" in said("--tiles", "--modes", "training")
    assert "--scratch is about training" in said("--scratch", "1", "--modes", "forward")


def test_out_of_memory_of_sdpa_while_timing_leaves_every_way_of_ours():
    """Where a tile fails too, our op alone is measured."""
    ran: list[str] = []

    def one(name: str, calls_until_error: int | None = None) -> contenders.Contender:
        def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
            ran.append(name)
            if calls_until_error is not None and ran.count(name) > calls_until_error:
                raise torch.OutOfMemoryError(f"no more for {name}")
            return contenders.ours(q, k, v, is_causal)

        return contenders.Contender(name, attention, is_ours=name != "sdpa")

    problem = cases.Problem("one", 1, 1, 16, "full", dtype="float32", length=9)
    schedule = timing.Schedule(seconds=1e-9, min_rounds=2, warm_up=1, sample_seconds=0.0)
    place = find_place("cpu")
    for limit, statuses in (
        (None, ["measured", "out of memory", "measured"]),
        (3 + 2, ["measured", "out of memory", "out of memory"]),
    ):
        ran.clear()
        measured = command.measure(
            cases.Case(problem, "forward"),
            [one("orchard_ops"), one("sdpa", 3), one("tile x", limit)],
            place,
            schedule,
        )
        assert [f.status for f in measured.figures] == statuses
        assert [bool(f.samples_ms) for f in measured.figures] == [s == "measured" for s in statuses]


def test_fastest_tile_in_words():
    def case(**times: list[float]) -> results.CaseResult:
        figures = [results.Figures("orchard_ops", "measured", samples_ms=[2.0, 4.0, 2.0])]
        for name, samples in times.items():
            figures.append(results.Figures(f"tile {name}", "measured", samples_ms=samples))
        return results.CaseResult("one", 64, "forward", figures)

    assert report.fastest_tile(case()) == report.fastest_tile(case(failed=[])) == ""
    assert report.fastest_tile(case(a=[1.0, 3.0, 2.0], b=[2.0, 1.0, 1.0])) == (
        "L 64, forward: the fastest is tile b, 0.50 of the default's time (p20 0.35, p80 0.80)"
    )
    assert report.fastest_tile(case(a=[3.0, 6.0, 3.0], b=[1.0, 8.0, 1.9])) == (
        "L 64, forward: none is clearly faster than the default; best tile b, 0.95 of the "
        "default's time (p20 0.68, p80 1.58)"
    )
