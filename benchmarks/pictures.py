"""Draws the pictures of README.md and docs/: ``python -m benchmarks.pictures``.

Each is made from one committed result file, and carries that file's SHA-256 in its metadata: a test
holds every picture to the data that it was drawn from. Nothing is measured here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

OURS, OURS_LOW, STOCK, GREY = "#1668a8", "#4fb3d9", "#d9731a", "#8a8a8a"
DTYPES = {"float16": "o", "bfloat16": "s", "float32": "^"}
MAC_GIB = 16
"""The memory of a small Mac, as a line to compare with."""


def memory(result: dict[str, Any]) -> Figure:
    """README: what attention in one layer takes in a training step, ours beside PyTorch's."""
    figure = Figure(figsize=(6.6, 3.7), layout="constrained")
    axes = figure.subplots()
    problem = result["records"][-1]["problem"]  # the larger one
    records = [r for r in result["records"] if r["problem"] == problem]
    lengths = [r["length"] for r in records]
    stock = [r["unfused"]["peak"] / 2**20 for r in records]
    low, usual = ([r["ours"][mode]["peak"] / 2**20 for r in records] for mode in (0, 1))
    axes.plot(lengths, stock, "s-", color=STOCK, label="PyTorch on mps (math path)")
    axes.plot(lengths, usual, "o-", color=OURS, label="orchard_ops")
    axes.plot(lengths, low, "d:", color=OURS_LOW, label="orchard_ops, low-memory mode")
    axes.axhline(MAC_GIB * 1024, color=GREY, linewidth=1, linestyle="--")
    axes.text(lengths[0], MAC_GIB * 1024 * 1.15, f"a Mac with {MAC_GIB} GiB", color=GREY, size=8)
    for values, color in ((stock, STOCK), (usual, OURS)):
        place = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(_bytes(values[-1]), (lengths[-1], values[-1]), color=color, size=9, **place)
    axes.set_yscale("log")
    ticks = [2.0**power for power in (4, 7, 10, 13, 16, 19)]
    axes.set_yticks(ticks, [_bytes(tick) for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    _lengths(axes, lengths)
    axes.set_xlim(right=lengths[-1] * 2)
    axes.set_xlabel("sequence length L")
    axes.set_ylabel("beyond q, k, v, dout")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title(
        f"Attention of one layer, training step, peak memory\n{problem}; "
        f"{result['environment']['measured']}, not a Mac",
        fontsize=9,
    )
    return figure


def predicted_speed(result: dict[str, Any]) -> Figure:
    """The ratios to PyTorch's kernels that the model predicts, with the middle 80 %."""
    figure = Figure(figsize=(8.8, 3.6), layout="constrained")
    forward, backward = figure.subplots(1, 2)
    for index, (dtype, marker) in enumerate(DTYPES.items()):
        rows = [
            k
            for k in result["kernels"]
            if k["family"] == "attention_forward" and k["dtype"] == dtype
        ]
        places = [place + (index - 1) * 0.2 for place in range(len(rows))]
        _with_range(forward, places, [k["ratio"] for k in rows], dtype, marker)
        forward.set_xticks(range(len(rows)), [str(k["head_dim"]) for k in rows])
    forward.set_xlabel("head_dim")
    forward.set_ylabel("time / time of PyTorch's prefill kernel")
    forward.set_title("forward, causal, L 4096: below 1 is faster", fontsize=9)
    cases = [(64, True), (128, True), (64, False), (128, False)]
    for index, (dtype, marker) in enumerate(DTYPES.items()):
        speedups = [_backward(result, dtype, *case)["speedup"] for case in cases]
        places = [place + (index - 1) * 0.2 for place in range(len(cases))]
        _with_range(backward, places, speedups, dtype, marker)
    names = [f"D {head_dim}\n{'causal' if causal else 'dense'}" for head_dim, causal in cases]
    backward.set_xticks(range(len(cases)), names)
    backward.set_ylabel("time of an unfused one / time")
    backward.set_title("backward, L 4096: above 1 is faster", fontsize=9)
    for axes in (forward, backward):
        axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
        axes.set_ylim(bottom=0)
    forward.legend(fontsize=8, loc="lower left")
    figure.suptitle(
        "Predicted for an M1 Max by a model, not measured (median, middle 80 %)", size=9
    )
    return figure


def features(result: dict[str, Any]) -> Figure:
    """What a feature adds to the model's issue cycles of a forward."""
    from .apple_model.features import costs

    header, rows = costs(result["kernels"])
    columns = [i for i, name in enumerate(header) if name in ("forward, D 64", "D 128")][:2]
    base, added = rows[0], list(reversed(rows[1:]))
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for offset, column, color in ((0.2, columns[0], OURS), (-0.2, columns[1], OURS_LOW)):
        shares = [100 * float(row[column]) / float(base[column]) for row in added]
        places = [place + offset for place in range(len(added))]
        label = f"head_dim {'64' if column == columns[0] else '128'}"
        axes.barh(places, shares, height=0.38, color=color, label=label)
    axes.set_yticks(range(len(added)), [row[0] for row in added], fontsize=8)
    axes.set_xlabel("% more issue cycles in the forward's loop")
    axes.set_title("What features cost (float16, counted by the model, not timed)", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def hidden_pairs(result: dict[str, Any]) -> Figure:
    """What hides pairs, by the ideal of the blocks that are seen, on a GPU."""
    from .feature_page import HIDING, PACKED
    from .nvidia.features_report import LIMIT

    features = [*HIDING, PACKED][::-1]
    records = [r for r in result["records"] if r["feature"] in features and r["ratio"]]
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for offset, work, color in ((0.13, "forward", OURS), (-0.13, "backward", STOCK)):
        chosen = [r for r in records if r["work"] == work]
        places = [features.index(r["feature"]) + offset for r in chosen]
        ratios = [r["ratio"]["median"] / r["share"] for r in chosen]
        axes.plot(ratios, places, "o", color=color, markersize=4, label=work)
    axes.axvline(1.0, color=GREY, linewidth=1)
    axes.axvline(LIMIT, color=GREY, linewidth=1, linestyle="--", label=f"the bound, {LIMIT}")
    axes.set_yticks(range(len(features)), features, fontsize=8)
    axes.set_xlabel("time / time of the blocks that are seen")
    axes.set_title(f"What hides pairs ({result['environment']['gpu']}, not a Mac)", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def decode_rate(result: dict[str, Any]) -> Figure:
    """Decode's bytes a second by a copy's, over the length of the cache, on a GPU."""
    from .nvidia.decode_report import TARGET, main_of

    records = [
        r
        for r in result["records"]
        if not r["failure"] and r["q_len"] == 1 and not r["page_size"] and r["batch"] == 1
    ]
    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    axes = figure.subplots()
    lengths = sorted({r["length"] for r in records})
    colors = {"float16": OURS, "bfloat16": OURS_LOW, "float32": STOCK}
    for dtype, marker in DTYPES.items():
        for head_dim, line in ((64, ":"), (128, "-")):
            points: dict[int, list[float]] = {}
            for r in records:
                if (r["dtype"], r["head_dim"]) == (dtype, head_dim):
                    points.setdefault(r["length"], []).append(r["of_copy"][main_of(r)]["median"])
            if points:
                at = sorted(points)
                lowest = [min(points[length]) for length in at]
                name = f"{dtype}, D {head_dim}"
                axes.plot(at, lowest, marker + line, color=colors[dtype], label=name, markersize=4)
    axes.axhline(TARGET, color=GREY, linewidth=1, linestyle="--", label=f"the bound, {TARGET}")
    _lengths(axes, lengths)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("keys in the cache, one sequence")
    axes.set_ylabel("bytes a second / those of a copy")
    axes.set_title(
        f"Decode, lowest over groups ({result['environment']['gpu']}, not a Mac)", fontsize=9
    )
    axes.legend(fontsize=7, ncols=2)
    return figure


def function_cost(result: dict[str, Any]) -> Figure:
    """What a function as a score adds to a product, beside the fixed kernel for the same."""
    rows = [x for x in result["cycles"] if x["score"] != "noop"][::-1]
    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for offset, which, color, label in (
        (0.2, "own", OURS, "score_mod"),
        (-0.2, "fixed", OURS_LOW, "fixed kernel"),
    ):
        added = [x[which] - x["plain"] for x in rows]
        places = [place + offset for place in range(len(rows))]
        axes.barh(places, added, height=0.38, color=color, label=label)
    names = [f"{x['score']}, {x['work']}, D {x['head_dim']}" for x in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xlabel("cycles that it adds to a product")
    axes.set_title("Functions as scores (float16, counted by the model, not timed)", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def _machine(result: dict[str, Any]) -> str:
    """The processor's name, which results of before have under another key."""
    environment = result["environment"]
    return environment.get("machine") or environment["cpu"]


def host_cost(result: dict[str, Any]) -> Figure:
    """What a call costs the host, in microseconds."""
    ways = ("forward", "backward", "forward + backward")
    calls = {
        "F.sdpa, cpu": GREY,
        "F.sdpa's fused op, empty kernels": STOCK,
        "orchard_ops.flash_attn": OURS,
    }
    figure = Figure(figsize=(6.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, color) in enumerate(calls.items()):
        medians = [result["microseconds"][f"{name}: {way}"]["whole"]["median"] for way in ways]
        places = [place + (index - 1) * 0.27 for place in range(len(ways))]
        axes.bar(places, medians, width=0.25, color=color, label=name)
    axes.set_xticks(range(len(ways)), ways)
    axes.set_ylabel("microseconds, median")
    axes.set_title(
        f"Host cost of a call ({_machine(result)}, simulated device, no kernel runs)",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    return figure


def reference_cost(result: dict[str, Any]) -> Figure:
    """The reference on a CPU beside SDPA's math path: time, and memory."""
    figure = Figure(figsize=(8.8, 3.4), layout="constrained")
    speed, space = figure.subplots(1, 2)
    for head_dim, color in ((64, OURS), (128, OURS_LOW)):
        for causal, line in ((False, "o-"), (True, "o:")):
            rows = sorted(
                (
                    r
                    for r in result["speed"]
                    if (r["dtype"], r["threads"], r["head_dim"], r["causal"])
                    == ("float32", 1, head_dim, causal)
                    and r["passes"] != "forward"
                    and r.get("mask") is None
                ),
                key=lambda r: r["length"],
            )
            label = f"D {head_dim}, {'causal' if causal else 'dense'}"
            lengths = [r["length"] for r in rows]
            speed.plot(lengths, [r["ratio"] for r in rows], line, color=color, label=label)
            _lengths(speed, lengths)
    speed.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
    speed.set_ylim(bottom=0)
    speed.set_ylabel("time / time of SDPA's math path")
    speed.set_title("forward and backward, float32, 1 thread", fontsize=9)
    speed.legend(fontsize=8)
    for attention, color in (("reference", OURS), ("math_path", STOCK)):
        rows = [
            r
            for r in result["memory"]
            if r["attention"] == attention and not r["causal"] and r["peak_extra_mib"] is not None
        ]
        label = "reference" if attention == "reference" else "SDPA's math path"
        lengths = [r["length"] for r in rows]
        peaks = [r["peak_extra_mib"] for r in rows]
        space.plot(lengths, peaks, "o-", color=color, label=label)
    space.set_yscale("log")
    _lengths(space, sorted({r["length"] for r in result["memory"]}))
    space.set_ylabel("MiB that the process took")
    space.set_title("the same, dense, D 64", fontsize=9)
    space.legend(fontsize=8)
    figure.suptitle(f"The reference kernels on a CPU ({_machine(result)})", size=9)
    return figure


def _lengths(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    names = [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths]
    axes.set_xticks(lengths, names)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)


def _with_range(
    axes: Axes, places: list[float], values: list[list[float]], label: str, marker: str
) -> None:
    """Medians with bars from the 10th to the 90th percentile; values are [median, p10, p90]."""
    medians = [v[0] for v in values]
    bars = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
    axes.errorbar(places, medians, bars, fmt=marker, markersize=4, elinewidth=1, label=label)


def _backward(
    result: dict[str, Any], dtype: str, head_dim: int, causal: bool, length: int = 4096
) -> dict[str, Any]:
    (row,) = (
        b
        for b in result["backward"]
        if (b["dtype"], b["head_dim"], b["causal"], b["length"], b["products"])
        == (dtype, head_dim, causal, length, 5)
    )
    return row


def _bytes(mebibytes: float) -> str:
    return f"{mebibytes / 1024:.0f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


PICTURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "memory-of-a-layer.png": ("memory.json", memory),
    "predicted-speed.png": ("apple_model/predictions.json", predicted_speed),
    "feature-cost.png": ("apple_model/counts.json", features),
    "hidden-pairs.png": ("nvidia/features.json", hidden_pairs),
    "decode-rate.png": ("nvidia/decode.json", decode_rate),
    "function-cost.png": ("apple_model/flex.json", function_cost),
    "host-cost.png": ("host_cost.json", host_cost),
    "reference-cost.png": ("reference_cost.json", reference_cost),
}
"""Picture -> the result file that it is drawn from, and how."""


def digest(source: str) -> str:
    """SHA-256 of a result file."""
    return hashlib.sha256((RESULTS / source).read_bytes()).hexdigest()


def main() -> None:
    for name, (source, draw) in PICTURES.items():
        figure = draw(json.loads((RESULTS / source).read_text()))
        figure.savefig(
            IMAGES / name, dpi=120, metadata={"Source": source, "SHA-256": digest(source)}
        )
        print(IMAGES / name)


if __name__ == "__main__":
    main()
