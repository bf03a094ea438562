"""python -m benchmarks.apple_model.flex: what functions as scores add to a product, by model A.

Cycles of a scheduler for an 8x8x8 product in float16, above the kernel with plain scores, of the
functions in `MODS` and of the fixed kernels for the same scores. Counted anew at each run; with
``--write`` into results/apple_model/flex.json.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import counts, gate
from .counts import Counts, Variant
from .issue_model import issue

RECORD = gate.RESULTS / "flex.json"
MADE_BY = "python -m benchmarks.apple_model.flex --write"
CAPTURES, FIRST_CAPTURE = 8, 23  # shaders/flex_params.h
KERNELS: tuple[tuple[str, str, int], ...] = (
    ("forward, D 64", counts.FORWARD, 64),
    ("D 128", counts.FORWARD, 128),
    ("dk/dv, D 64", counts.DKV, 64),
    ("by pairs, D 128", counts.DKV_PAIRS, 128),
    ("dq, D 64", counts.DQ, 64),
    ("D 128", counts.DQ, 128),
)
WORK = {
    counts.FORWARD: "forward",
    counts.DKV: "dk/dv",
    counts.DKV_PAIRS: "dk/dv",
    counts.DQ: "dq",
}


@dataclass(frozen=True)
class Mod:
    """A score_mod as Metal, the table that it captures, and the fixed kernels' name of it."""

    text: str
    table: torch.Tensor | None
    fixed: str


_TEXT = """
struct ScoreMod {{
  static constant constexpr const bool kUnitSlope = {unit_slope};
  FlexCaptures captures;
  METAL_FUNC float score(float s, int b, int h, int q, int kv, thread float& derivative) const {{
    {lines}
  }}
}};
"""
MODS = {
    "noop": Mod("", None, ""),
    "ALiBi": Mod(
        _TEXT.format(
            unit_slope="true",
            lines="derivative = 1.0f;\n"
            "    return s - captures.at<float>(0, h) * abs(float(q - kv));",
        ),
        torch.ones(1),
        "alibi",
    ),
    "tanh": Mod(
        _TEXT.format(
            unit_slope="false",
            lines="const float t = flex_tanh(s * 0.05f);\n"
            "    derivative = 1.0f - t * t;\n    return 20.0f * t;",
        ),
        None,
        "softcap",
    ),
}


def _params(attention: bytes, table: torch.Tensor | None) -> bytes:
    """FlexParams: the first capture is a table of one dimension, and there are no block_states."""
    shape = (0,) * 8 if table is None else (table.numel(), 1, 1, 1, 1, 0, 0, 0)
    captures = struct.pack("8i", *shape) + bytes(32 * (CAPTURES - 1))
    return attention + captures + struct.pack("3q6i", 0, 0, 0, 0, 0, 0, 0, 0, 1)


def variant(family: str, dtype: str, head_dim: int, mod: Mod, q_len: int, kv_len: int) -> Variant:
    """The kernel that the plan takes for such scores (native/flex_plan.cpp), which is the plain one
    where there is no function."""
    plain = counts.variant(family, dtype, head_dim, q_len, kv_len)
    if not mod.text:
        return plain
    name = f"{plain.name}_flex"
    instantiation = plain.instantiation.replace(plain.name, name)
    instantiation = instantiation.replace("PlainScore", "FlexScore<ScoreMod, NoMaskMod, NoMask>")
    return replace(
        plain,
        family=f"{plain.family}_flex",
        name=name,
        instantiation=f"{mod.text}\n\n{instantiation}",
        params=_params(plain.params, mod.table),
    )


def count(family: str, dtype: str, head_dim: int, mod: Mod) -> Counts:
    """As `counts.count`, of a kernel with this score_mod."""
    if not mod.text:
        return counts.count(family, dtype, head_dim)
    table = torch.zeros(1) if mod.table is None else mod.table
    results = []
    tile = counts.variant(family, dtype, head_dim)
    for blocks in (counts.SHORT, counts.LONG):
        along_queries = tile.family in counts.STORING
        lengths = (tile.bq * blocks, tile.bk) if along_queries else (tile.bq, tile.bk * blocks)
        v = variant(family, dtype, head_dim, mod, *lengths)
        launched = counts._launch(
            v, dtype, head_dim, *lengths, "", 1, 0, more={FIRST_CAPTURE: table}
        )
        results.append(launched)
    return counts._counts(*results, tile.simdgroups, (counts.SHORT, counts.LONG))


def cycles(family: str, head_dim: int, name: str) -> tuple[float, float]:
    """Of a product in float16: with one of MODS, and of the fixed kernel for the same scores."""
    mod = MODS[name]
    own = issue(family, count(family, "float16", head_dim, mod)).per_product
    fixed = issue(family, counts.count(family, "float16", head_dim, mod.fixed)).per_product
    return own, fixed


def record() -> list[dict[str, Any]]:
    """Of each of MODS in each kernel: cycles of a product with plain scores, with the function, and
    of the fixed kernel for the same scores."""
    return [
        dict(zip(("own", "fixed"), cycles(family, head_dim, name)))
        | dict(
            score=name,
            kernel=title,
            work=WORK[family],
            head_dim=head_dim,
            plain=issue(family, counts.count(family, "float16", head_dim)).per_product,
        )
        for name in MODS
        for title, family, head_dim in KERNELS
    ]


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What functions and fixed kernels add to a product."""
    lines = [["score", *(title for title, _, _ in KERNELS)], ["---"] * (len(KERNELS) + 1)]
    for name in dict.fromkeys(row["score"] for row in rows):
        of_score = [row for row in rows if row["score"] == name]
        for words, which in ((name, "own"), (f"{name}, fixed", "fixed")):
            lines.append([words, *(f"{row[which] - row['plain']:+.2f}" for row in of_score)])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.name}, too")
    rows = record()
    if parser.parse_args().write:
        RECORD.write_text(json.dumps({"made_by": MADE_BY, "cycles": rows}, indent=1) + "\n")
    for line in table(rows):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
