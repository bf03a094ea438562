"""Writes the tables of docs/features.md: ``python -m benchmarks.feature_page``.

They are made of committed results alone, each figure beside the bound that was set for it before
it was measured. Nothing is counted or timed here, and what was not timed yet is said to be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .nvidia.decode_report import best_of, main_of
from .nvidia.features_report import LIMIT
from .nvidia.report import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "features.md"
BEGIN, END = "<!-- benchmarks.feature_page: {} -->", "<!-- end -->"

#: The bounds, set before the figures were known.
BIAS_CYCLES = 0.97  #: that a bias may add to a product of a forward at D 64
FUNCTION_CYCLES = 0.3  #: that a score_mod may add to a product above the fixed kernel
ASKED, READ = 2.0, 0.02  #: of the fastest memory for a core; bytes read besides the cache
OF_COPY, TIMES, GROUP, GROUP_TIMES = 0.85, 1.0, 8, 3.0  #: of decode on a GPU
NARROW = (16, 40)  #: head dims of which a block has few products, or many of padding

SCORES = {  #: gate's name -> (words, the GPU's name of it)
    "softcap": ("softcap", "softcap"),
    "alibi": ("ALiBi", "ALiBi"),
    "bias": ("additive bias, keys in pairs", "additive bias"),
    "bias, element by element": ("additive bias, element by element", ""),
    "bool mask": ("bool mask, blocks seen in part", ""),
    "sinks": ("sinks", "sinks"),
    "key ranges": ("key ranges, blocks seen whole", ""),
    "key ranges, edges": ("key ranges, blocks seen in part", ""),
}
HIDING = (
    "causal window of 512",
    "8 ragged documents",
    "half of the keys padding",
    "block-sparse bool mask",
)
PACKED = "packed, dS stored"
GRADIENT = "additive bias and its gradient"
_INSTRUCTIONS = (
    "threadgroup accesses",
    "device accesses",
    "conversions",
    "integer and address operations",
    "float operations",
    "exp2 and log2",
    "shuffles",
    "branches",
)

Table = list[list[str]]


@cache
def result(name: str) -> Any:
    """A committed result, or None."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def lines(rows: Table) -> list[str]:
    header, *others = rows
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *others)]


def met(good: bool) -> str:
    return "met" if good else "**missed**"


def span(values: Sequence[float], digits: int = 2) -> str:
    low, high = (f"{x:.{digits}f}" for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# ---- kinds of scores


def _counted() -> dict[tuple[str, int, str], dict[str, Any]]:
    return {
        (x["family"], x["head_dim"], x["score"]): x
        for x in result("apple_model/counts.json")["kernels"]
        if x["dtype"] == "float16"
    }


def _backward(cycles: Callable[[str, int], float | None], head_dim: int) -> float | None:
    """Of a product of the key's side and of dq, as many as each has: four and three."""
    family = "attention_backward_dkv" + ("_pairs" if head_dim > 96 else "")
    key_side, dq = cycles(family, head_dim), cycles("attention_backward_dq", head_dim)
    return None if key_side is None or dq is None else (4 * key_side + 3 * dq) / 7


def added(score: str) -> dict[str, float | None]:
    """What a kind of scores adds to a product: instructions and bytes of device memory of a forward
    at D 64, and cycles of model A."""
    counted = _counted()

    def cycles(family: str, head_dim: int) -> float | None:
        own = counted.get((family, head_dim, score))
        plain = counted[family, head_dim, ""]["a_cycles_per_product"]
        return None if own is None else own["a_cycles_per_product"] - plain

    forward = "attention_forward"
    own, plain = (counted[forward, 64, x]["totals"] for x in (score, ""))
    products = plain["products"]
    return {
        "instructions": sum(own[x] - plain[x] for x in _INSTRUCTIONS) / products,
        "bytes": (own["device bytes"] - plain["device bytes"]) / products,
        "forward 64": cycles(forward, 64),
        "forward 128": cycles(forward, 128),
        "backward 64": _backward(cycles, 64),
        "backward 128": _backward(cycles, 128),
        "share": cycles(forward, 64) / counted[forward, 64, ""]["a_cycles_per_product"],
    }


def gpu(feature: str, name: str = "nvidia/features.json") -> list[dict[str, Any]]:
    """The records of a feature that were timed."""
    content = result(name)
    records = content["records"] if content else []
    return [r for r in records if r["feature"] == feature and r["ratio"]]


def gpu_ratio(feature: str, work: str) -> str:
    ratios = [r["ratio"]["median"] for r in gpu(feature) if r["work"] == work]
    return span(ratios) if ratios else ""


def scores() -> Table:
    plain = _counted()["attention_forward", 64, ""]["a_cycles_per_product"]
    wide = _counted()["attention_forward", 128, ""]["a_cycles_per_product"]
    rows = [
        [
            "score",
            "instructions",
            "bytes",
            "cycles, forward, D 64",
            "D 128",
            "backward, D 64",
            "D 128",
            "of a forward, D 64",
            "GPU, forward",
            "GPU, backward",
        ],
        ["scale alone", "", "", f"{plain:.2f}", f"{wide:.2f}", "", "", "", "1", "1"],
    ]
    for score, (words, on_gpu) in SCORES.items():
        x = added(score)
        rows.append(
            [
                words,
                f"{x['instructions']:+.2f}",
                f"{x['bytes']:+.1f}",
                *(
                    "" if x[name] is None else f"{x[name]:+.2f}"
                    for name in ("forward 64", "forward 128", "backward 64", "backward 128")
                ),
                f"{x['share']:+.1%}",
                *(gpu_ratio(on_gpu, work) if on_gpu else "" for work in ("forward", "backward")),
            ]
        )
    return rows


# ---- what hides pairs


def by_ideal(feature: str, work: str = "", name: str = "nvidia/features.json") -> list[float]:
    return [
        r["ratio"]["median"] / r["share"]
        for r in gpu(feature, name)
        if r["share"] and work in ("", r["work"])
    ]


def hidden() -> Table:
    rows = [["what hides", "forward", "backward", f"at most {LIMIT}"]]
    for feature in (*HIDING, PACKED):
        cells = [span(by_ideal(feature, work)) for work in ("forward", "backward")]
        every = by_ideal(feature)
        within = sum(x <= LIMIT for x in every)
        verdict = met(within == len(every))
        rows.append([feature, *cells, f"{verdict}, {within} of {len(every)}"])
    return rows


# ---- the gradient of a bias


def gradient() -> Table:
    """Of 8 x 8 elements that a head adds to it, by how dS is had; and of the whole backward."""
    from .apple_model import features  # which needs the simulator

    kernels = result("apple_model/counts.json")["kernels"]
    again, stored = features.gradient_tiles(kernels)
    cycles, _, nbytes = stored.partition(" and ")
    times = [f"{r['ratio']['median']:.2f} (D {r['head_dim']})" for r in gpu(GRADIENT)]
    return [
        ["", "cycles, D 64", "D 128", "bytes read"],
        ["dS computed again", *again, ""],
        ["dS that was stored", cycles, cycles, nbytes.removesuffix(" bytes")],
        ["GPU: a backward with bias and gradient, by one without", *times, ""],
    ]


# ---- decode


def decode_model() -> Table:
    rows = [["", "rows", "cycles", "asks for", "by its products alone", "bytes besides"]]
    content = result("apple_model/decode.json")
    for case in content["cases"]:
        name = f"{case['dtype']} D {case['head_dim']}" + ", pages" * case["paged"]
        name += f", {case['score'].replace('alibi', 'ALiBi')}" if case["score"] else ""
        rows.append(
            [
                name,
                str(case["rows"]),
                f"{case['cycles']:.1f}",
                f"{case['rate']:.2f}",
                f"{case['by_products']:.2f}",
                f"{case['bytes_read'] / case['bytes_in_cache'] - 1:.1%}",
            ]
        )
    return rows


def _timed() -> list[dict[str, Any]]:
    return [r for r in result("nvidia/decode.json")["records"] if not r["failure"]]


def _longest() -> list[dict[str, Any]]:
    longest = max(r["length"] for r in _timed())
    return [r for r in _timed() if r["length"] == longest]


def _of_copy(record: dict[str, Any], best: bool = False) -> float:
    name = best_of(record)[0] if best else main_of(record)
    return record["of_copy"][name]["median"]


def _speedup(record: dict[str, Any]) -> float | None:
    spread = record["speedup"].get(main_of(record))
    return spread["median"] if spread else None


def decode_gpu() -> Table:
    """By dtype, head dim, batch, queries and pages, over the groups."""
    rows = [["keys, all groups", "of the copy", "with the best parts", "times PyTorch's"]]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in _longest():
        kind = f", {r['q_len']} queries" * (r["q_len"] > 1)
        kind += f", pages of {r['page_size']}" * bool(r["page_size"])
        groups.setdefault((r["dtype"], r["head_dim"], r["batch"], r["length"], kind), []).append(r)
    for (dtype, head_dim, batch, length, kind), records in groups.items():
        times = [x for r in records if (x := _speedup(r)) is not None]
        rows.append(
            [
                f"{dtype} D {head_dim}, batch {batch}, {length}{kind}",
                span([_of_copy(r) for r in records]),
                span([_of_copy(r, best=True) for r in records]),
                span(times) if times else "",
            ]
        )
    return rows


# ---- functions as scores


def flex() -> Table:
    content = result("apple_model/flex.json")["cycles"]
    first = [x for x in content if x["score"] == content[0]["score"]]
    rows = [["score_mod", "", *(x["kernel"] for x in first)]]
    for name in dict.fromkeys(x["score"] for x in content):
        of_score = [x for x in content if x["score"] == name]
        rows.append([name, "adds", *(f"{x['own'] - x['plain']:+.2f}" for x in of_score)])
        above = [f"{x['own'] - x['fixed']:+.2f}" for x in of_score]
        rows.append(["", "above the fixed kernel", *above])
    return rows


def flex_gpu() -> list[str]:
    content = result("nvidia/flex_speed.json")
    if content is None:
        return ["No result of `python -m benchmarks.nvidia.flex_speed` is committed yet."]
    rows = [["", "beside", "forward", "backward"]]
    for feature in dict.fromkeys(r["feature"] for r in content["records"]):
        own = gpu(feature, "nvidia/flex_speed.json")
        if not own or feature == own[0]["yardstick"]:
            continue
        cells = []
        for work in ("forward", "backward"):
            of_work = [r for r in own if r["work"] == work]
            ideal = [r["ratio"]["median"] / r["share"] for r in of_work if r["share"]]
            ratio = span([r["ratio"]["median"] for r in of_work]) if of_work else ""
            cells.append(f"x{span(ideal)} of the ideal" if ideal else ratio)
        rows.append([feature, own[0]["yardstick"], *cells])
    return lines(rows)


# ---- the bounds


def _share_within(values: Sequence[float], bound: float, at_most: bool) -> tuple[str, bool]:
    within = [x <= bound if at_most else x >= bound for x in values]
    return f"{span(values)}, {sum(within)} of {len(values)} within", all(within)


def bounds() -> Table:
    """Every bound, what was found, and whether it holds."""
    rows: Table = [["feature", "bound", "by", "found", ""]]

    def add(feature: str, bound: str, by: str, found: str, good: bool) -> None:
        rows.append([feature, bound, by, found, met(good)])

    bias = added("bias")["forward 64"]
    assert bias is not None
    add(
        "additive bias, forward, D 64",
        f"below {BIAS_CYCLES} cycles a product",
        "counts",
        f"{bias:.2f}",
        bias < BIAS_CYCLES,
    )
    ideals = [x for feature in HIDING for x in by_ideal(feature)]
    found, good = _share_within(ideals, LIMIT, True)
    hides = "windows, documents, padding, block-sparse masks"
    add(hides, f"{LIMIT} of the ideal at L 4096 and more", "GPU", found, good)
    found, good = _share_within(by_ideal(PACKED), LIMIT, True)
    add("8 ragged documents, packed beside padded", f"{LIMIT} of the ideal", "GPU", found, good)

    cases = result("apple_model/decode.json")["cases"]
    few = [x for x in cases if x["rows"] <= 8]
    asks = f"asks for {ASKED:.0f} times the memory's rate"
    for words, belongs in (
        ("32, 48, 64 to 256", lambda x: x["head_dim"] not in NARROW),
        (" and ".join(map(str, NARROW)), lambda x: x["head_dim"] in NARROW),
    ):
        found, good = _share_within([x["rate"] for x in few if belongs(x)], ASKED, False)
        add(f"decode, up to 8 rows, D {words}", asks, "model A", found, good)
    many = [x["rate"] for x in cases if x["rows"] > 8]
    found, good = _share_within(many, ASKED, False)
    add("decode, 9 to 16 rows, D 128", asks, "model A", found, good)
    besides = [x["bytes_read"] / x["bytes_in_cache"] - 1 for x in cases]
    found = f"{span([100 * x for x in besides], 1)} %"
    add("decode kernel", f"reads the cache and {READ:.0%}", "counts", found, max(besides) <= READ)
    longest = _longest()
    found, good = _share_within([_of_copy(r) for r in longest], OF_COPY, False)
    keys = f"decode, {longest[0]['length']} keys"
    add(keys, f"{OF_COPY} of a copy's rate", "GPU", found, good)
    every = [x for r in _timed() if (x := _speedup(r)) is not None]
    found, good = _share_within(every, TIMES, False)
    add("decode, all lengths", "never slower than PyTorch's kernels", "GPU", found, good)
    grouped = [x for r in longest if r["group"] == GROUP and (x := _speedup(r)) is not None]
    found, good = _share_within(grouped, GROUP_TIMES, False)
    times = f"{GROUP_TIMES:.0f} times PyTorch's"
    add(f"{keys}, {GROUP} heads a key/value head", times, "GPU", found, good)

    functions = result("apple_model/flex.json")["cycles"]
    nothing = [x["own"] - x["plain"] for x in functions if x["score"] == "noop"]
    add("score_mod that does nothing", "no cycle", "counts", span(nothing), max(nothing) <= 0)
    above = [x["own"] - x["fixed"] for x in functions if x["score"] != "noop"]
    add(
        "ALiBi and tanh as score_mod",
        f"{FUNCTION_CYCLES} cycles a product above the fixed kernels",
        "counts",
        f"{span(above)}",
        max(above) <= FUNCTION_CYCLES,
    )
    records = (result("nvidia/flex_speed.json") or {"records": []})["records"]
    sparse = [r["ratio"]["median"] / r["share"] for r in records if r["ratio"] and r["share"]]
    block_lists = ("FlexAttention's lists of blocks", f"{LIMIT} of the ideal", "GPU")
    if sparse:
        add(*block_lists, *_share_within(sparse, LIMIT, True))
    else:
        rows.append([*block_lists, "not timed yet", ""])
    return rows


def misses() -> list[str]:
    """The cells of the GPU's results that miss their bounds."""
    found = []
    names = "nvidia/features.json", "nvidia/flex_speed.json"
    above = [
        f"{r['feature']}, {r['work']}, D {r['head_dim']}: {r['ratio']['median'] / r['share']:.2f}"
        for name in names
        for r in (result(name) or {"records": []})["records"]
        if r["ratio"] and r["share"] and r["ratio"]["median"] / r["share"] > LIMIT
        if r["feature"] in (*HIDING, PACKED) or name == names[1]
    ]
    if above:
        found.append(f"above {LIMIT} of the ideal: {'; '.join(above)}")
    below = [f"{r['work']}: {_of_copy(r):.3f}" for r in _longest() if _of_copy(r) < OF_COPY]
    if below:
        found.append(f"below {OF_COPY} of the copy: {'; '.join(below)}")
    every = [(r, x) for r in _timed() if (x := _speedup(r)) is not None]
    slower = [f"{r['work']}: {x:.3f}" for r, x in every if x < TIMES]
    if slower:
        found.append(f"slower than PyTorch's: {'; '.join(slower)}")
    grouped = [(r, x) for r, x in every if r["group"] == GROUP and r in _longest()]
    fewer = [f"{r['work']}: {x:.2f}" for r, x in grouped if x < GROUP_TIMES]
    if fewer:
        found.append(f"below {GROUP_TIMES:.0f} times PyTorch's: {'; '.join(fewer)}")
    return [f"* {x}." for x in found] or ["* none."]


def sources() -> list[str]:
    """Where each result was made."""
    found = ["Counts and model A: this repository's simulator, on Linux; no Apple GPU."]
    for name, what in (
        ("features", "what features cost"),
        ("decode", "decode"),
        ("flex_speed", "functions as scores"),
    ):
        content = result(f"nvidia/{name}.json")
        if content:
            link = f"[{name}.md](../benchmarks/results/nvidia/{name}.md)"
            found.append(f"GPU, {what}: {provenance(content['environment'])} ({link}).")
    return [f"* {x}" for x in found]


SECTIONS: dict[str, Callable[[], Sequence[str]]] = {
    "bounds": lambda: lines(bounds()),
    "misses": misses,
    "scores": lambda: lines(scores()),
    "hidden": lambda: lines(hidden()),
    "gradient": lambda: lines(gradient()),
    "decode model": lambda: lines(decode_model()),
    "decode gpu": lambda: lines(decode_gpu()),
    "flex": lambda: lines(flex()),
    "flex gpu": flex_gpu,
    "sources": sources,
}


def written(text: str) -> str:
    """The page with every section anew."""
    for name, make in SECTIONS.items():
        begin = BEGIN.format(name)
        if text.count(begin) != 1:
            raise ValueError(f"docs/features.md has {text.count(begin)} marks {begin}, not one")
        section = "\n".join([begin, *make(), END])
        whole = re.escape(begin) + ".*?" + re.escape(END)
        text = re.sub(whole, lambda _, section=section: section, text, flags=re.S)
    return text


def missed() -> Iterator[str]:
    """The bounds that do not hold."""
    for feature, bound, *_, verdict in bounds()[1:]:
        if verdict == met(False):
            yield f"{feature}: {bound}"


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))
    print(PAGE)
    for x in missed():
        print(f"missed: {x}")


if __name__ == "__main__":
    main()
