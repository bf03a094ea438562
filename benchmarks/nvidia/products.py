"""Times the backward with five and with seven products, over heads, lengths and budgets.

``python -m benchmarks.nvidia.products`` needs torch with CUDA and what ``build --products`` made.
The plan decides by what it may take for dS and by an estimate of the time: five products, in one
launch or divided over heads and keys, or seven. Its choice, five products under the same budgets
and seven take turns: whole backwards of ours alone, at equal rate. It writes one JSON file and a
Markdown table; the exit status is 1 if anything failed. With ``--docs`` it needs no GPU, and puts a
table into docs/performance-tables.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .paths import PRODUCTS_KERNELS, PRODUCTS_PLANNER, PRODUCTS_SOURCES, RESULTS, ROOT

sys.path.insert(0, str(ROOT / "src"))

from . import products_cases, products_report, timing
from .attention import Attention
from .driver import Kernels
from .environment import describe
from .peers import contenders, gate
from .peers.contenders import Contender, Operands
from .peers.problems import Problem
from .plans import Planner
from .products_cases import Case

#: Milliseconds of each work in each round.
Clock = Callable[[dict[str, timing.Work]], dict[str, list[float]]]
#: Milliseconds of one run.
Once = Callable[[timing.Work], float]

GATED = 8192
"""Up to this length results are compared with float64; beyond it with each other."""
FAR = 2.5
"""Times the fastest: what takes longer is timed once."""
_AGREE = 2.0**-9
"""Of the largest number: two roundings to float16 of sums in another order."""


@dataclass
class Outcome:
    """A budget on one problem. Where its plan is that of another one, it was not run."""

    launches: int
    products: int
    scratch_bytes: int
    heads_at_once: int
    keys_at_once: int
    dkv_parts: int
    same_as: str
    milliseconds: list[float] = field(default_factory=list)
    failure: str = ""


@dataclass
class Record:
    problem: str
    head_dim: int
    length: int
    num_heads: int
    num_kv_heads: int
    mask: str
    budgets: dict[str, Outcome]
    failure: str = ""
    seconds: float = 0.0


class Bench:
    def __init__(
        self, kernels: Kernels, planner: Planner, clock: Clock, once: Once, device: str = "cuda"
    ):
        self.planner, self.clock, self.once, self.device = planner, clock, once, device
        self.attention = Attention(kernels, planner)
        self.records: list[Record] = []
        self.usable = True

    def run(self, problem: Problem) -> None:
        """Records the outcome, whatever it is. After a fault of the GPU nothing more runs."""
        if not self.usable:
            return
        started = time.monotonic()
        case = products_cases.case(problem, self.planner)
        record = Record(
            str(problem), problem.head_dim, problem.length, problem.num_heads,
            problem.num_kv_heads, problem.mask, self._outcomes(case),
        )  # fmt: skip
        self.records.append(record)
        try:
            self._run(case, record)
            self._synchronize()
        except Exception as error:
            record.failure = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            print(f"FAILED {problem}\n{traceback.format_exc()}", flush=True)
            try:
                self._synchronize()
            except RuntimeError:
                self.usable = False
        record.seconds = round(time.monotonic() - started, 2)
        print(products_report.progress(asdict(record)), flush=True)

    def _outcomes(self, case: Case) -> dict[str, Outcome]:
        found = {}
        for budget, plan in case.plans.items():
            found[budget] = Outcome(
                len(plan.kernels), 5 if plan.ds_elements else 7, 
                4 * (plan.ds_elements + plan.dkv_part_elements),
                *products_cases.at_once(plan), plan.params.dkv_parts,
                case.same_as(budget),
            )  # fmt: skip
        return found

    def _run(self, case: Case, record: Record) -> None:
        x = Operands(case.problem, self.device)
        forward = contenders.ours_forward(self.attention, x, "equal-rate")
        forward.start()
        x.take(**forward.results)
        found: dict[str, Contender] = {}
        scorings = products_cases.scorings(case.problem)
        for budget in case.distinct:
            found[budget] = contenders.ours_backward(
                self.attention, x, "equal-rate", scorings[budget], budget
            )
            found[budget].start()
        self._check(case.problem, x, found)
        before = {b: [t.clone() for t in c.results.values()] for b, c in found.items()}
        samples = self._samples({budget: c.start for budget, c in found.items()})
        for budget, contender in found.items():
            if all(map(torch.equal, before[budget], contender.results.values())):
                record.budgets[budget].milliseconds = [round(t, 6) for t in samples[budget]]
            else:
                record.budgets[budget].failure = "the results changed while they were timed"

    def _samples(self, works: dict[str, timing.Work]) -> dict[str, list[float]]:
        """Of works that take turns; of those that are far from the fastest, one time is enough."""
        once = {budget: self.once(work) for budget, work in works.items()}
        near = {b: work for b, work in works.items() if once[b] < FAR * min(once.values())}
        return {budget: [time] for budget, time in once.items()} | self.clock(near)

    def _check(self, problem: Problem, x: Operands, found: dict[str, Contender]) -> None:
        """Raises AssertionError if a result is wrong."""
        if problem.length <= GATED:
            exact = gate.Gate(problem, x.tensors)
            for contender in found.values():
                exact.check(contender.results, strict=True)
            return
        first, *others = (contender.results for contender in found.values())
        for name, y in first.items():
            if not torch.isfinite(y).all():
                raise AssertionError(f"{name}: NaN or infinity")
            for other in others:
                _assert_agree(name, y, other[name])

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _assert_agree(name: str, a: Tensor, b: Tensor) -> None:
    error = (a.float() - b.float()).abs().max().item()
    largest = a.float().abs().max().item()
    if not error <= _AGREE * largest:
        raise AssertionError(f"{name}: five and seven products differ by {error} of {largest}")


def _write(bench: Bench, not_run: list[str], output: Path) -> str:
    """Writes both files and returns the Markdown."""
    result = {
        "environment": describe(PRODUCTS_SOURCES),
        "not_run": not_run,
        "records": [asdict(record) for record in bench.records],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "products.json").write_text(products_report.json_lines(result))
    text = products_report.page(result)
    (output / "products.md").write_text(text)
    return text


def earlier(output: Path, environment: dict) -> list[Record]:
    """What the run in `output` has recorded. Of other kernels or another kind of GPU: none."""
    path = output / "products.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    same = ("gpu", "driver", "sources")
    if any(result["environment"][name] != environment[name] for name in same):
        return []
    found = [
        Record(**record | {"budgets": {b: Outcome(**o) for b, o in record["budgets"].items()}})
        for record in result["records"]
    ]
    return [r for r in found if not r.failure and not any(o.failure for o in r.budgets.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="only docs/performance-tables.md")
    parser.add_argument("--seconds", type=float, default=0.3, help="of turns, for each problem")
    parser.add_argument("--budget", type=float, default=1e9, help="no problem begins after these")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.docs:
        products_report.write_docs(json.loads((options.output / "products.json").read_text()))
        return
    began = time.monotonic()
    kernels = Kernels(PRODUCTS_KERNELS)
    kernels.assemble(kernels.names)
    clock = functools.partial(timing.take_turns, seconds=options.seconds, limits=(2, 15), warm_up=1)
    once = functools.partial(timing.events, repeats=1)
    bench = Bench(kernels, Planner(PRODUCTS_PLANNER), clock, once)
    if options.resume:
        bench.records = earlier(options.output, describe(PRODUCTS_SOURCES))
    done = {record.problem for record in bench.records}
    left, text = [x for x in products_cases.problems() if str(x) not in done], ""
    while left and time.monotonic() - began <= options.budget:
        bench.run(left.pop(0))
        torch.cuda.empty_cache()
        # A run that is cut off leaves what it has.
        text = _write(bench, [str(problem) for problem in left], options.output)
    print(text)
    failed = any(r.failure or any(o.failure for o in r.budgets.values()) for r in bench.records)
    sys.exit(not bench.usable or failed)


if __name__ == "__main__":
    main()
