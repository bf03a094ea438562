"""Holds the plan's estimate of a backward's time to what products.py has timed.

``python -m benchmarks.nvidia.choice`` needs no GPU: it reads products.json, asks the plan of this
tree for the time of each division that was timed, and prints where the estimate prefers the slower
way and how far it is off. The constants of native/plan/backward_cost.cpp were fitted with it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import planner
from .paths import RESULTS
from .peers.problems import Problem
from .plans import MULTIPROCESSORS
from .products_report import LOSS, times


@dataclass(frozen=True)
class Comparison:
    """Five products, divided as they were under a budget, beside seven."""

    problem: str
    budget: str
    measured: float  # the time of five by that of seven
    estimated: float

    @property
    def loss(self) -> float:
        """What the way that the estimate prefers took, by the faster one."""
        taken = self.measured if self.estimated < 1 else 1.0
        return taken / min(self.measured, 1.0)


def _problem(record: dict) -> Problem:
    mask = record["mask"]
    window = int(mask.removeprefix("window ")) if mask.startswith("window") else 0
    return Problem(
        record["problem"].split()[0], record["head_dim"], record["length"], mask != "dense",
        num_heads=record["num_heads"], num_kv_heads=record["num_kv_heads"], window=window,
    )  # fmt: skip


def comparisons(records: list[dict], library: Path) -> Iterator[Comparison]:
    plans = planner.Planner(library)
    for record in records:
        measured, outcomes = times(record), record["budgets"]
        seven = next((b for b in measured if outcomes[b]["products"] == 7), None)
        problem = _problem(record)
        names = ("q", "k", "v", "dout")
        layouts = {
            name: (tuple(x.shape), x.stride(), 0)
            for name, x in zip(names, problem.operands("meta").values(), strict=True)
        }
        number = planner.DTYPES.index(problem.dtype)
        scoring = problem.scoring()
        windows = {name: getattr(scoring, name) for name in ("window_left", "window_right")}

        def estimate(outcome: dict) -> float:
            at_once = (outcome["heads_at_once"], outcome["keys_at_once"])
            return plans.time_of_backward(
                layouts, number, outcome["products"] == 5, at_once, outcome["dkv_parts"],  # noqa: B023
                gpu_cores=MULTIPROCESSORS, **windows,  # noqa: B023
            )  # fmt: skip

        for budget, outcome in outcomes.items():
            if seven is None or outcome["products"] == 7 or outcome["same_as"] != budget:
                continue
            yield Comparison(
                record["problem"], budget, measured[budget] / measured[seven],
                estimate(outcome) / estimate(outcomes[seven]),
            )  # fmt: skip


def lost(found: list[Comparison]) -> list[Comparison]:
    """Those in which the estimate prefers what takes more than LOSS times the other, the worst
    first."""
    return sorted((x for x in found if x.loss > LOSS), key=lambda x: -x.loss)


def spread(found: list[Comparison]) -> float:
    """By what factor the estimated ratios are off the measured ones, as a rule."""
    return math.exp(statistics.pstdev(math.log(x.estimated / x.measured) for x in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, default=RESULTS / "products.json")
    options = parser.parse_args()
    records = json.loads(options.record.read_text())["records"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libplanner.so")
        planner.compile_planner(library)
        found = list(comparisons(records, library))
    for x in lost(found):
        print(f"{x.problem}, {x.budget}: {x.loss:.3f} (five by seven: measured {x.measured:.3f}, "
              f"estimated {x.estimated:.3f})")  # fmt: skip
    print(f"{len(lost(found))} of {len(found)} choices lose more than {(LOSS - 1) * 100:.0f} %; "
          f"the ratios are off by a factor of {spread(found):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
