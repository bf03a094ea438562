"""Runs every cell of the matrix of transformers and writes docs/transformers-matrix.md.

`make clients` runs it: families and situations are the tables of tests/clients. A cell that is
wrong, crashes, or runs on the reference without a reason that stands in the page makes it fail.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "clients")]

if sys.platform != "darwin":
    os.environ.setdefault("ORCHARD_NATIVE_LIBRARY", str(ROOT / "build/native/liborchard_ops.so"))
    import simulator

    simulator.enable()

import cells  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from families import FAMILIES  # noqa: E402
from situations import SITUATIONS  # noqa: E402

PAGE = ROOT / "docs" / "transformers-matrix.md"
SIGNS = {"metal": "M", "own": "o", "reference": "f", "refused": "r", "wrong": "X", "crash": "C"}
BAD = ("wrong", "crash")
OWN_ATTENTION = {
    "bloom": "adds ALiBi in its own attention code and does not ask the interface",
    "mpt": "adds ALiBi in its own attention code and does not ask the interface",
}
"""Families whose own attention runs, and why: the mask that they get is right all the same."""
REASONS: dict[str, str] = {}
"""Why calls of a family may run on the reference. There is none at present."""


INTRODUCTION = """\
`make clients` runs every cell with a tiny random model and writes this page; `make test` runs a
part of it and compares. Each cell compares outputs and gradients (or the tokens of generation) of
`attn_implementation="orchard"` with those of transformers' eager attention on the CPU. Bounds,
models and situations are in `tests/clients/`.

M: right, and every call of attention ran as Metal kernels. o: right, by the model's own attention
code (below). f: right, some calls on the reference. X: wrong. C: an error. Blank: the family has no
such situation, with eager attention either.""".splitlines()


def failures(found: Iterable[cells.Cell]) -> list[str]:
    """A line for each cell that may not stand in the page."""
    lines = []
    for cell in found:
        unsaid = (cell.outcome == "own" and cell.family not in OWN_ATTENTION) or (
            cell.outcome == "reference" and cell.family not in REASONS
        )
        if cell.outcome in BAD or cell.outcome == "refused" or unsaid:
            reasons = "; ".join(cell.reasons)
            lines.append(
                f"{cell.family} {cell.situation}: {cell.outcome} {cell.detail}{reasons}".strip()
            )
    return lines


def page(found: list[cells.Cell]) -> str:
    """The page, but for the line that says where it ran."""
    signs = {(cell.family, cell.situation): SIGNS[cell.outcome] for cell in found}
    counts = Counter(cell.outcome for cell in found)
    names = list(SITUATIONS)
    rows = [
        f"| {family} | " + " | ".join(signs.get((family, name), " ") for name in names) + " |"
        for family in FAMILIES
    ]
    own = [f"| {family} | {why} |" for family, why in OWN_ATTENTION.items()]
    return "\n".join(
        [
            "# transformers: which family works in which situation",
            "",
            *INTRODUCTION,
            "",
            f"{len(found)} cells of {len(FAMILIES)} families: "
            + ", ".join(f"{counts[x]} {x}" for x in SIGNS if counts[x])
            + ".",
            "",
            f"| family | {' | '.join(names)} |",
            "|---|" + "---|" * len(names),
            *rows,
            "",
            "## Situations",
            "",
            "| | |",
            "|---|---|",
            *(f"| {s.name} | {s.says} |" for s in SITUATIONS.values()),
            "",
            "## Families whose own attention runs",
            "",
            "| family | why |",
            "|---|---|",
            *own,
            "",
        ]
    )


def ran_on() -> str:
    """Where, and with what."""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    place = "an Apple GPU" if sys.platform == "darwin" else "the simulated mps device (Linux)"
    return f"It ran on {place} with {versions}. None of it has run on a Mac's GPU yet.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument(
        "--situations", nargs="*", default=list(SITUATIONS), choices=list(SITUATIONS)
    )
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    wanted = [
        (f, s) for f, s in cells.all_cells() if f in options.families and s in options.situations
    ]
    found = []
    for number, (family, situation) in enumerate(wanted, 1):
        start = time.perf_counter()
        cell = cells.run(family, situation)
        found.append(cell)
        took = time.perf_counter() - start
        print(
            f"{number}/{len(wanted)} {family} {situation}: {cell.outcome} ({took:.1f} s)",
            flush=True,
        )
    lines = failures(found)
    print("\n".join(lines) or "no cell is wrong, none crashed, and each ran where the page says")
    if len(found) == len(cells.all_cells()):
        text = page(found)
        PAGE.write_text(text + "\n" + ran_on())
        print(
            f"wrote {PAGE.relative_to(ROOT)}; transformers",
            importlib.metadata.version("transformers"),
        )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
