"""The tables of a result of decode_speed.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .features_report import END, json_lines
from .paths import ROOT
from .report import provenance

__all__ = ["json_lines", "page", "progress", "write_docs"]

BEGIN = "<!-- benchmarks.nvidia.decode -->"
SHORT, LONG = ROOT / "docs" / "decoding.md", ROOT / "docs" / "performance-tables.md"
TARGET, GROUP_TARGET = 0.85, 3.0
"""Of the copy at the most keys; times PyTorch's with groups of 8."""
_PARTS_HALVED = 16
"""Of a key/value head: what the plan chooses for 4096 keys, beside which half as many are timed."""
_OURS, _TENSOR_CORES, _PEER, _MERGE = "ours", "ours, tensor-cores", "PyTorch's", "merge alone"


def main_of(record: dict) -> str:
    """The measurement that a table shows first: with the products on tensor cores."""
    return _TENSOR_CORES if _TENSOR_CORES in record["of_copy"] else _OURS


def best_of(record: dict) -> tuple[str, int]:
    """The fastest division of the keys, the plan's own among them, and its number of parts."""
    own = main_of(record)
    found = {own: record["parts"]}
    for name in record["of_copy"]:
        if name.endswith(" parts"):
            found[name] = int(name.removesuffix(" parts"))
    best = max(found, key=lambda name: record["of_copy"][name]["median"])
    return best, found[best]


def progress(record: dict) -> str:
    if record["failure"]:
        return f"{record['work']}: FAILED ({record['seconds']} s)"
    best, parts = best_of(record)
    share = record["of_copy"]
    text = f"{record['work']}: {share[main_of(record)]['median']:.3f} of the copy"
    text += f", {share[best]['median']:.3f} in {parts} parts"
    if _PEER in share:
        text += f", PyTorch's {share[_PEER]['median']:.3f}"
    return f"{text} ({record['seconds']} s)"


def join(results: Sequence[dict]) -> dict:
    """One result of several runs with the same kernels. Of a work that two have, the later counts.

    Raises:
        ValueError: the kernels or the GPUs differ.
    """
    first, *others = results
    environment = first["environment"] | {"joined": []}
    records = {record["work"]: record for record in first["records"]}
    kernels = {mode: dict(of) for mode, of in first["kernels"].items()}
    for other in others:
        own = other["environment"]
        if any(_same(own) != _same(x["environment"]) for x in results):
            raise ValueError("runs of different kernels or GPUs cannot be joined")
        works = [record["work"] for record in other["records"]]
        environment["joined"].append({"date": own["date"], "works": works})
        records |= {record["work"]: record for record in other["records"]}
        for mode, of in other["kernels"].items():
            kernels.setdefault(mode, {}).update(of)
    return {"environment": environment, "records": list(records.values()), "kernels": kernels}


def _same(environment: dict) -> tuple[str, ...]:
    sources = environment["sources"]
    return environment["gpu"], environment["driver"], sources["digest"]


def _made(environment: dict) -> str:
    """Where and from what, and which works ran at another time."""
    text = provenance(environment)
    for other in environment.get("joined", ()):
        text += f"; {', '.join(other['works'])} in a run of its own, {other['date']}"
    return text


def _spread(x: dict, digits: int = 2) -> str:
    median, p20, p80 = (f"{x[name]:.{digits}f}" for name in ("median", "p20", "p80"))
    return f"{median} ({p20}-{p80})"


def _row(record: dict) -> str:
    first = f"| {record['work']} | {record['parts']}, {record['threadgroups']} |"
    if record["failure"]:
        return f"{first} failed: {record['failure'].splitlines()[0][:80].replace('|', '/')} |"
    shares, speedup = record["of_copy"], record["speedup"]
    own = main_of(record)
    best, parts = best_of(record)
    merge = record["times"][_MERGE]["median"] / record["times"][_OURS]["median"]
    cells = [
        _spread(shares[own]),
        f"{shares[_OURS]['median']:.2f}" if own != _OURS else "",
        f"{shares[best]['median']:.2f} in {parts}",
        f"{merge:.2f}",
        f"{shares[_PEER]['median']:.2f}" if _PEER in shares else "",
        _spread(speedup[own]) if own in speedup else "",
        f"{speedup[best]['median']:.2f}" if best in speedup else "",
        _spread(record["null"], 3),
    ]
    return f"{first} {' | '.join(cells)} |"


_HEAD = (
    "| | parts, threadgroups | of the copy | by shuffles | best number of parts | of it, merge "
    "| PyTorch's, of the copy | times PyTorch's | with the best | same again |",
    "|---|" + "---|" * 9,
)


def summary(result: dict) -> Iterator[str]:
    """Whether the targets are met, row by row."""
    good = [r for r in result["records"] if not r["failure"]]
    if not good:
        yield "Nothing was timed."
        return
    longest = max(r["length"] for r in good)
    long = [r for r in good if r["length"] == longest]
    choices: dict[str, Callable[[dict], str]] = {
        "the plan's parts": main_of,
        "the best number of parts": lambda r: best_of(r)[0],
    }
    for words, chosen in choices.items():
        shares = [r["of_copy"][chosen(r)]["median"] for r in long]
        reached = sum(share >= TARGET for share in shares)
        yield (
            f"With {words}, {reached} of {len(long)} rows with {longest} keys reach "
            f"{TARGET} of the copy ({min(shares):.2f} to {max(shares):.2f})."
        )
        times = {g: [r["speedup"][chosen(r)]["median"] for r in good if r["group"] == g
                     and r["speedup"]] for g in sorted({r["group"] for r in good})}  # fmt: skip
        for group, of_group in times.items():
            if of_group:
                slower = sum(x < 1.0 for x in of_group)
                yield (
                    f"With {words} and groups of {group}: {min(of_group):.2f} to "
                    f"{max(of_group):.2f} times as fast as PyTorch's, slower in {slower} of "
                    f"{len(of_group)} rows."
                )
    nulls = [r["null"]["median"] for r in good]
    yield (
        f"The same launches measured twice have {min(nulls):.3f} to {max(nulls):.3f} of each "
        "other's time (medians)."
    )
    for r in result["records"]:
        if r["failure"]:
            yield f"Failed: {r['work']}: {r['failure'].splitlines()[0][:300]}."
        for name, reason in r["left_out"].items():
            yield f"Not timed: {name} in {r['work']}: {reason.splitlines()[0][:300]}."


_READING = (
    "Bytes of all keys and values, each counted once, a second, by the bytes that a copy of 1 GiB "
    "on the device reads and writes in the same round: median of rounds (20th to 80th percentile). "
    "All launches of a call count, ours (attention_decode and its merge) and PyTorch's (both "
    "passes of sdpa_vector). Operands of at least 256 MiB take turns, so that no cache of the GPU "
    "has them. *Parts* is the number of threadgroups that share the keys of a key/value head of a "
    "sequence, as the plan chooses it for Apple GPUs; *best* is the fastest of that and of the "
    "others that were tried."
)
_TENSOR_CORES_SAY = (
    "bfloat16 and float32: Apple's matrix unit multiplies float operands at the rate of half ones. "
    "Here a float is split into two numbers that tensor cores multiply, with 16 bits together "
    "beside keys and values of bfloat16 and 22 beside those of float32; *by shuffles* is the exact "
    "product of floats, 24 shuffles and 16 fused multiply-adds each. In float16 two fragments of "
    "rows that follow each other share one instruction of the tensor cores."
)


def page(result: dict) -> str:
    """Markdown of what decode_speed.py writes as JSON."""
    copies = [r["copied_per_second"] / 1e9 for r in result["records"] if not r["failure"]]
    lines = [
        "# Decode beside a copy and beside PyTorch's Metal kernels, on an NVIDIA GPU",
        "",
        f"{_made(result['environment'])}. Made by `python -m benchmarks.nvidia.decode_speed`.",
        "",
        f"{_READING} {_TENSOR_CORES_SAY} What this says of Apple GPUs, and what not: README.md.",
        "",
        f"The copy: {min(copies):.0f} to {max(copies):.0f} GB/s." if copies else "",
        "",
        *(f"* {line}" for line in summary(result)),
        "",
        *_HEAD,
        *(_row(record) for record in result["records"]),
    ]
    for mode, kernels in result["kernels"].items():
        lines += ["", f"| kernel, {mode} | registers | shared bytes | spilled bytes |"]
        lines.append("|---|---|---|---|")
        for name, x in kernels.items():
            sizes = (x["registers"], x["shared_bytes"], x["local_bytes"])
            lines.append(f"| `{name}` | {' | '.join(map(str, sizes))} |")
    return "\n".join(lines) + "\n"


def _where(result: dict) -> str:
    return f"{_made(result['environment'])}; an NVIDIA GPU, no Mac"


def long_section(result: dict) -> str:
    """What stands between the marks in docs/performance-tables.md."""
    link = "[decode.md](../benchmarks/results/nvidia/decode.md)"
    note = f"Run on {_where(result)}; all of it is in {link}. {_READING} {_TENSOR_CORES_SAY}"
    rows = (_row(record) for record in result["records"])
    lines = [f"* {line}" for line in summary(result)]
    return "\n".join(["", note, "", *lines, "", *_HEAD, *rows, ""])


def short_section(result: dict) -> str:
    """What stands between the marks in docs/decoding.md: one query and the most keys."""
    grid = [r for r in result["records"] if not r["page_size"] and r["q_len"] == 1
            and r["dtype"] != "float32" and not r["failure"]]  # fmt: skip
    longest = max(r["length"] for r in grid)
    head_dims = (64, 128)
    rows = [r for r in grid if r["length"] == longest and r["head_dim"] in head_dims]
    columns = sorted({(r["batch"], r["group"]) for r in rows if r["group"] in (1, 4, 8)})
    titles = [f"batch {batch}, groups of {group}" for batch, group in columns]
    lines = [f"| {longest} keys | {' | '.join(titles)} |", "|---|" + "---|" * len(columns)]
    for dtype, dim in dict.fromkeys((r["dtype"], r["head_dim"]) for r in rows):
        cells = []
        for column in columns:
            found = [
                r for r in rows
                if (r["dtype"], r["head_dim"], r["batch"], r["group"]) == (dtype, dim, *column)
            ]  # fmt: skip
            cells.append(_short_cell(found[0]) if found else "")
        lines.append(f"| {dtype}, head dim {dim} | {' | '.join(cells)} |")
    note = (
        "Bytes of keys and values a second, by what a copy reads and writes in the same run, in as "
        "many parts as the plan chooses / in the best number that was tried; times as fast as "
        f"PyTorch's kernels on the same GPU, likewise. Run on {_where(result)}, where a float "
        "product is made of others; [all figures](performance-tables.md#decode-on-an-nvidia-gpu)."
    )
    return "\n".join(["", note, "", *lines, "", *_half_of_the_parts(grid)])


def _half_of_the_parts(records: list[dict]) -> list[str]:
    """The rate with half of the plan's parts by that with all of them, where both were timed."""
    half = f"{_PARTS_HALVED // 2} parts"
    halved = [r for r in records if r["parts"] == _PARTS_HALVED and half in r["times"]]
    said = []
    for batch in sorted({r["batch"] for r in halved}):
        rates = [
            r["times"][main_of(r)]["median"] / r["times"][half]["median"]
            for r in halved if r["batch"] == batch
        ]  # fmt: skip
        said.append(f"{min(rates):.2f} to {max(rates):.2f} at batch {batch}")
    if not said:
        return []
    length = min(r["length"] for r in halved)
    text = f"The rate of {half} by that of {_PARTS_HALVED}, at {length} keys: {', '.join(said)}."
    return [text, ""]


def _short_cell(record: dict) -> str:
    own, best = main_of(record), best_of(record)[0]
    shares, speedup = record["of_copy"], record["speedup"]
    text = f"{shares[own]['median']:.2f} / {shares[best]['median']:.2f}"
    if speedup:
        text += f"; x{speedup[own]['median']:.1f} / x{speedup[best]['median']:.1f}"
    return text


def sections(result: dict) -> dict[Path, str]:
    return {SHORT: short_section(result), LONG: long_section(result)}


def in_docs(path: Path) -> str:
    """What stands between the marks now."""
    return path.read_text().partition(BEGIN)[2].partition(END)[0]


def write_docs(result: dict) -> None:
    whole = re.escape(BEGIN) + ".*?" + re.escape(END)
    for path, text in sections(result).items():
        marked = f"{BEGIN}{text}{END}"
        path.write_text(re.sub(whole, lambda _, x=marked: x, path.read_text(), flags=re.S))
