"""The Markdown tables of a result of speed.py: ratios only, since milliseconds say nothing here."""

from __future__ import annotations

from collections.abc import Iterator

from .report import provenance

_MODES = ("native", "equal-rate")
#: Products of (rows x keys x head_dim): scores and out; scores again, dP, dQ, dK, dV.
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


def table(result: dict) -> str:
    """Markdown of what speed.py writes as JSON."""
    environment, records = result["environment"], result["records"]
    timed = [record for record in records if not record["same_as"]]
    failures = [record for record in timed if record["failure"]]
    lines = [
        "# Speed of the Metal kernels beside PyTorch's, on an NVIDIA GPU",
        "",
        f"{provenance(environment)}; PyTorch's kernel from {environment['sources']['peer']}. "
        "Made by `python -m benchmarks.nvidia.speed`.",
        "",
        "Each number is a median of ratios to PyTorch's `prefill_attention` on the same operands, "
        "measured in turns in the same run, with the 20th and 80th percentile. Below 1 is faster "
        "than PyTorch's. What these ratios say of Apple GPUs, and what not: README.md.",
        "",
        f"{len(timed)} comparisons, {len(failures)} failed.",
        "",
        "## Forward",
        "",
        "| dtype | head dim | length | mask | " + " | ".join(_MODES) + " |",
        "|---|---|---|---|" + "---|" * len(_MODES),
        *_forward_lines(records),
    ]
    if any(record["work"] == "backward" for record in records):
        lines += [
            "",
            "## Backward",
            "",
            "In units of PyTorch's *forward*, since PyTorch has no fused backward. The last column "
            "counts the five products of the mathematics (our forward: two) and gives their rate "
            "relative to our forward's in the same run.",
            "",
            "| dtype | head dim | length | mask | mode | backward | its kernels | our forward "
            "| product rate |",
            "|---|---|---|---|---|---|---|---|---|",
            *_backward_lines(records),
        ]
    lines += [
        "",
        "## Kernels",
        "",
        "| mode | kernel | registers | shared bytes | spilled bytes |",
        "|---|---|---|---|---|",
    ]
    for mode, kernels in result["kernels"].items():
        for name, x in kernels.items():
            if mode == _MODES[0] or x != result["kernels"][_MODES[0]].get(name):
                numbers = f"{x['registers']} | {x['shared_bytes']} | {x['local_bytes']}"
                lines.append(f"| {mode} | `{name}` | {numbers} |")
    return "\n".join(lines) + "\n"


def _where(record: dict) -> tuple[str, int, int, str]:
    mask = "causal" if record["causal"] else "dense"
    return record["dtype"], record["head_dim"], record["length"], mask


def _spread(x: dict) -> str:
    return f"{x['median']:.3f} ({x['p20']:.3f} to {x['p80']:.3f})"


def _cell(record: dict | None) -> str:
    if record is None:
        return "not run"
    if record["failure"]:
        return "failed: " + record["failure"].split("\n")[0][:120].replace("|", "/")
    return "same code" if record["same_as"] else _spread(record["relative"]["ours"])


def _forward_lines(records: list[dict]) -> Iterator[str]:
    forward = {(_where(r), r["mode"]): r for r in records if r["work"] == "forward"}
    for where in dict.fromkeys(where for where, _ in forward):
        cells = [_cell(forward.get((where, mode))) for mode in _MODES]
        yield f"| {' | '.join(map(str, where))} | {' | '.join(cells)} |"


def _backward_lines(records: list[dict]) -> Iterator[str]:
    for record in records:
        if record["work"] != "backward" or record["same_as"]:
            continue
        start = f"| {' | '.join(map(str, _where(record)))} | {record['mode']} | {_cell(record)} |"
        if record["failure"]:
            yield f"{start} | | |"
            continue
        relative = record["relative"]
        parts = {
            name.partition(f"_{record['dtype']}_")[0]: spread
            for name, spread in relative.items()
            if name.startswith("attention_backward")
        }
        kernels = "<br>".join(f"{name} {x['median']:.3f}" for name, x in parts.items())
        ours, forward = relative["ours"]["median"], relative["forward"]["median"]
        rate = (_BACKWARD_PRODUCTS / ours) / (_FORWARD_PRODUCTS / forward)
        yield f"{start} {kernels} | {_spread(relative['forward'])} | {rate:.2f} |"
