"""What scores that are functions cost on an NVIDIA GPU, each beside fixed kernels of the same run.

``python -m benchmarks.nvidia.flex_speed`` needs torch with CUDA and what ``build --flex`` made. It
is features.py with other works: half fragments are multiplied as float ones, a work stands between
two runs of its yardstick, nothing is timed before its numbers agree with float64. It writes one
JSON file and a Markdown table; ``--docs`` puts the table of that file into docs/flex-attention.md
instead.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from . import flex_report, flex_texts, flex_works, reference, timing
from .attention import Attention
from .driver import Kernels
from .environment import describe
from .feature_works import Work
from .features import Bench, Clock, Problem, Record, Side
from .features_report import json_lines
from .flex import FlexAttention
from .flex_plans import FlexParams, FlexPlanner
from .flex_works import FlexWork
from .paths import (
    FLEX_PLANNER,
    FLEX_SOURCES,
    FLEX_SPEED_KERNELS,
    FLEX_SPEED_TEXTS,
    RESULTS,
)
from .plans import Planner, Scoring


class FlexProblem(Problem):
    """A work of functions, prepared for both directions; one query head is checked."""

    def __init__(self, work: FlexWork, attention: FlexAttention, device: str):
        self.work, self.device = work, device
        self._flex = attention
        self.call, self.functions, self.dout = work.call(device)
        self.q, self.k, self.v = self.call.q, self.call.k, self.call.v
        self._head = work.num_heads // 2

    def forward(self) -> Side:
        out = self._nan(self.q)
        row_stats = torch.full((*out.shape[:3], 2), torch.nan, device=self.device)
        launches = self._flex.prepare_forward(self.call, out, row_stats)
        return Side(launches, {"out": out, "row_stats": row_stats})

    def ds_elements(self) -> int:
        return self._flex.ds_elements(self.call, self.q, self.dout)

    def backward(self, forward: Side, ds: Tensor) -> Side:
        results = {name: self._nan(x) for name, x in zip(("dq", "dk", "dv"), self._operands())}
        delta = torch.full(self.q.shape[:3], torch.nan, device=self.device)
        ds.fill_(torch.nan)
        launches = self._flex.prepare_backward(
            self.call, self.dout, None, *forward.results.values(), delta, ds, *results.values()
        )
        return Side(launches, results)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def lse(self, row_stats: Tensor) -> Tensor:
        return self.call.lse(row_stats)

    @functools.cached_property
    def _mathematics(self) -> tuple[reference.MathResult, reference.MathResult]:
        head = slice(self._head, self._head + 1)
        operands = [x[:, head] for x in (*self._operands(), self.dout)]
        batch, _, *lengths = self.functions.sizes
        own = replace(self.functions, sizes=(batch, 1, *lengths), first_head=self._head)
        scoring = Scoring(self.call.scale, functions=own)
        ref = reference.attention(*operands, None, scoring, torch.float64)
        return ref, reference.attention(*operands, None, scoring, self.q.dtype)


class FlexBench(Bench):
    def __init__(self, kernels: Kernels, planner: FlexPlanner, clock: Clock, device: str = "cuda"):
        super().__init__(kernels, Planner(planner.library), clock, device)
        self._of_flex = planner
        self.flex = FlexAttention(kernels, planner)
        self.attention = Attention(kernels, self.planner)

    def _problem(self, work: Work) -> Problem:
        if isinstance(work, FlexWork):
            return FlexProblem(work, self.flex, self.device)
        return super()._problem(work)

    def _record(self, work: Work, yardstick: Work, backward: bool) -> Record:
        kernels = flex_works.kernels_of(work, self._of_flex, backward)
        return Record(
            "backward" if backward else "forward",
            work.feature,
            yardstick.feature,
            work.head_dim,
            yardstick.length,
            yardstick.batch,
            work.num_heads,
            flex_works.share(work, kernels, self.device),
            kernels=list(dict.fromkeys(kernel.name for kernel in kernels)),
        )

    def planted_fault(self, work: Work) -> None:
        """The check must notice a scale that is off by a tenth, or it is worth nothing."""

        def spoil(params: FlexParams) -> None:
            params.attention.scale *= 1.1
            params.attention.scale_log2 *= 1.1

        problem = self._problem(work)
        self.flex.disturb = spoil
        forward = problem.forward()
        self.flex.disturb = None
        try:
            problem.check(forward)
        except AssertionError as error:
            print(f"planted fault noticed: {error}", flush=True)
            return
        raise AssertionError("a planted fault went unnoticed: no figure of this run counts")


def _write(bench: FlexBench, output: Path) -> None:
    result = {
        "environment": describe(FLEX_SOURCES),
        "records": [asdict(record) for record in bench.records],
        "kernels": bench.attributes() if bench.usable else {},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "flex_speed.json").write_text(json_lines(result))
    (output / "flex_speed.md").write_text(flex_report.page(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--docs", action="store_true", help="only docs/flex-attention.md, from the file"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.docs:
        flex_report.write_docs(json.loads((options.output / "flex_speed.json").read_text()))
        return
    flex_works.TEXTS.update(flex_texts.read(FLEX_SPEED_TEXTS))
    clock = functools.partial(timing.between, seconds=options.seconds)
    bench = FlexBench(Kernels(FLEX_SPEED_KERNELS), FlexPlanner(FLEX_PLANNER), clock)
    chosen = list(flex_works.comparisons())
    bench.kernels.assemble(bench.kernels.names)
    bench.planted_fault(chosen[1].works[0])
    for comparison in chosen:
        bench.run(comparison)
        _write(bench, options.output)  # each time, so that a run that is cut off leaves results
        torch.cuda.empty_cache()
    print((options.output / "flex_speed.md").read_text())
    sys.exit(not bench.usable or any(record.failure for record in bench.records))


if __name__ == "__main__":
    main()
