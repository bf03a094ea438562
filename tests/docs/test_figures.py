"""The figures and pictures of docs/performance.md and README.md are those of the committed data."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pages import ROOT
from PIL import Image

from benchmarks import pictures, reference_cost

pytestmark = pytest.mark.simulated  # the instruments that some are drawn with need Linux

DATA: dict[str, Any] = {
    name: json.loads((pictures.RESULTS / source).read_text())
    for name, (source, _) in pictures.PICTURES.items()
}
TEXT = " ".join((ROOT / "docs" / "performance.md").read_text().split())


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_of_the_present_data(name: str):
    """`python -m benchmarks.pictures` writes what it drew into the file."""
    source, _ = pictures.PICTURES[name]
    with Image.open(pictures.IMAGES / name) as picture:
        assert picture.text["Source"] == source
        assert picture.text["SHA-256"] == pictures.digest(source), (
            "run python -m benchmarks.pictures"
        )


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_draws_something(name: str):
    """Every panel has finite marks and says what its axis is."""
    _, draw = pictures.PICTURES[name]
    for axes in draw(DATA[name]).axes:
        heights = [bar.get_width() + bar.get_height() for bar in axes.patches]
        points = [float(y) for line in axes.lines for y in line.get_ydata()]
        assert len(heights) + len(points) >= 5
        assert all(map(math.isfinite, heights + points))
        assert axes.get_xlabel() or axes.get_ylabel()


def test_the_memory_picture_has_every_record():
    (axes,) = pictures.memory(DATA["memory-of-a-layer.png"]).axes
    records = DATA["memory-of-a-layer.png"]["records"]
    drawn = {round(float(y) * 2**20) for line in axes.lines for y in line.get_ydata()}
    for record in records:
        if record["problem"] == records[-1]["problem"]:
            peaks = [mode["peak"] for mode in record["ours"]] + [record["unfused"]["peak"]]
            assert drawn.issuperset(peaks)


def test_memory_in_words():
    (record,) = (
        r
        for r in DATA["memory-of-a-layer.png"]["records"]
        if r["length"] == 8192 and r["problem"] == "B1 H32/8 D128 causal bfloat16"
    )
    low, usual = (mode["peak"] / 2**20 for mode in record["ours"])
    assert record["ours"][1]["scratch_budget_mb"] == 260
    assert f"ours takes {usual:.0f} MiB beyond q, k, v and dout, {low:.0f} MiB in low" in TEXT
    assert f"and PyTorch's {record['unfused']['peak'] / 2**30:.1f} GiB" in TEXT


def test_predictions_in_words():
    result = DATA["predicted-speed.png"]
    ratios = [
        k["ratio"][0]
        for k in result["kernels"]
        if (k["family"], k["dtype"]) == ("attention_forward", "float16")
    ]
    assert f"in {min(ratios):.2f} to {max(ratios):.2f} of the time" in TEXT
    at = [pictures._backward(result, "float16", d, True)["speedup"][0] for d in (64, 128)]
    error = next(x for x in result["leave_one_out"] if x["point"] == "prefill 32x16")
    assert "{median:.2f} [{low:.2f}..{high:.2f}] times as slow".format(**error) in TEXT
    assert f"{at[0]:.2f} times as fast as an unfused one at D 64 and {at[1]:.2f} times" in TEXT


def test_features_in_words():
    from benchmarks.apple_model import features

    _, rows = features.costs(DATA["feature-cost.png"]["kernels"])
    base = float(rows[0][1])
    share = {row[0]: f"{100 * float(row[1]) / base:.0f} %" for row in rows[1:]}
    assert max(rows[1:], key=lambda row: float(row[1]))[0] == "softcap"
    assert f"Softcap is the dearest, {share['softcap']} of a forward at D 64" in TEXT
    assert f"takes {share['bias, read in pairs']}, ALiBi {share['ALiBi']}" in TEXT


def test_host_cost_in_words():
    of = DATA["host-cost.png"]["microseconds"]

    def median(name: str) -> str:
        return f"{of[name]['whole']['median']:.0f}"

    forward, both = (
        median(f"orchard_ops.flash_attn: {w}") for w in ("forward", "forward + backward")
    )
    assert f"a forward costs {forward} microseconds" in TEXT
    assert f"forward and backward {both}, of which" in TEXT
    assert f"takes {median('F.sdpa, cpu: forward + backward')}." in TEXT


def test_the_table_of_masked_steps():
    """docs/performance-tables.md has the script's table, and the sentence above it is true."""
    result = DATA["reference-cost.png"]
    page = (ROOT / "docs" / "performance-tables.md").read_text()
    assert reference_cost.masked_table(result) in page
    words = " ".join(page.split())
    steps = [r for r in result["speed"] if r["mask"] and r["passes"] == "forward + backward"]
    assert {(r["heads"], r["length"]) for r in steps} >= {(8, 256), (8, 512), (8, 1024), (16, 1024)}
    assert max(r["ratio"] for r in steps) <= result["limit"]
    most = max(found[device] for found in result["operators"] for device in ("cpu", "meta"))
    assert f"none of {len(steps)} steps takes more" in words and f"at most {most} op" in words


def test_reference_cost_in_words():
    ratios = [
        r["ratio"]
        for r in DATA["reference-cost.png"]["speed"]
        if (r["dtype"], r["passes"], r["mask"]) == ("float32", "forward + backward", None)
    ]
    assert f"at {min(ratios):.2f} to {max(ratios):.2f} times" in TEXT
